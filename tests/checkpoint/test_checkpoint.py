"""Checkpoints: exact reading of good ones, with few reads, and typed errors for damaged or hostile ones."""

import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from tritontower.checkpoint import checkpoint as checkpoint_module
from tritontower.checkpoint import dequantize
from tritontower.checkpoint import files as weight_files
from tritontower.checkpoint.checkpoint import Checkpoint
from tritontower.checkpoint.files import Layout
from tritontower.errors import (
    CheckpointAmbiguousError,
    CheckpointCorruptError,
    CheckpointIncompleteError,
    CheckpointNotFoundError,
    NonFiniteWeightsError,
    ShapeMismatchError,
    TowerError,
    UnexpectedTensorError,
    UnsafeFormatError,
    UnsafePathError,
    UnsupportedDtypeError,
    UsageError,
)

PREFIXES = {"visual.": ""}
INDEX = "model.safetensors.index.json"
NATIVE_INDEX = "consolidated.safetensors.index.json"
SHAPES = {"norm.weight": (4,), "proj.weight": (3, 4)}


def vision_tensors(prefix: str = "visual.") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {prefix + name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def single(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


def sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def raw_file(header: object, data: bytes = b"") -> bytes:
    """Makes a safetensors file with any header: an object to write as JSON, or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


class CountingOpen:
    """Replaces ``safe_open`` and records which files are opened and which tensors are read."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.backends: list[str] = []
        self.read: list[str] = []
        self.handles: list[weakref.ref[CountingHandle]] = []

    def __call__(self, path: str, **options: Any) -> "CountingHandle":
        self.files.append(Path(path).name)
        self.backends.append(options["backend"])
        handle = CountingHandle(ORIGINAL_OPEN(path, **options), self.read)
        self.handles.append(weakref.ref(handle))
        return handle

    def list_open(self) -> list[str]:
        """Files whose handles still exist."""
        return [file for file, handle in zip(self.files, self.handles, strict=True) if handle() is not None]


class CountingHandle:
    def __init__(self, handle: Any, read: list[str]) -> None:
        self._handle, self._read = handle, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        self._read.append(name)
        return self._handle.get_tensor(name)


ORIGINAL_OPEN = weight_files.safe_open


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> CountingOpen:
    counting = CountingOpen()
    monkeypatch.setattr(weight_files, "safe_open", counting)
    return counting


# -- good checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["visual.", "model.visual.", "module.model.visual."])
def test_single_file_reads_only_vision_tensors(tmp_path: Path, opened: CountingOpen, prefix: str) -> None:
    tensors = vision_tensors(prefix)
    single(tmp_path, {**tensors, "model.layers.0.weight": torch.ones(8)})
    with Checkpoint.open(tmp_path, prefixes=PREFIXES) as checkpoint:
        checkpoint.expect(SHAPES)
        loaded = dict(checkpoint.iterate(torch.float32))
    assert {prefix + name: tensor.tolist() for name, tensor in loaded.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    assert sorted(opened.read) == sorted(tensors)
    assert opened.backends == ["pread"]


def test_only_shards_with_vision_tensors_are_opened(tmp_path: Path, opened: CountingOpen) -> None:
    one, two = vision_tensors().items()
    folder = sharded(
        tmp_path,
        {
            "a.safetensors": {"lm.0": torch.ones(2), one[0]: one[1]},
            "b.safetensors": {two[0]: two[1]},
            "c.safetensors": {"lm.1": torch.ones(2)},
        },
    )
    (folder / "c.safetensors").unlink()  # it is never opened
    with Checkpoint.open(folder, prefixes=PREFIXES) as checkpoint:
        checkpoint.expect(SHAPES)
        assert set(dict(checkpoint.iterate(torch.float32))) == set(SHAPES)
    assert opened.files == ["a.safetensors", "b.safetensors"]
    assert opened.read == [one[0], two[0]]


def test_opening_and_checking_reads_no_tensor(tmp_path: Path, opened: CountingOpen) -> None:
    single(tmp_path, vision_tensors())
    Checkpoint.open(tmp_path, prefixes=PREFIXES).expect(SHAPES)
    assert opened.read == []


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_converts_as_torch_does(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in vision_tensors().items()}
    with Checkpoint.open(single(tmp_path, tensors), prefixes=PREFIXES) as checkpoint:
        for name, tensor in checkpoint.iterate(wanted):
            assert tensor.dtype == wanted
            assert torch.equal(tensor, tensors[f"visual.{name}"].to(wanted))


def test_dtype_is_the_one_of_most_bytes(tmp_path: Path) -> None:
    single(tmp_path, {"visual.small": torch.ones(4), "visual.large": torch.ones(64, dtype=torch.bfloat16)})
    assert Checkpoint.open(tmp_path, prefixes=PREFIXES).dtype == torch.bfloat16


TREE = {"vision_tower.": "tower.", "vision_tower.vision_model.": "tower.", "multi_modal_projector.": "projector."}
NAMES = {
    # stored name: (prefixes, result)
    "visual.norm.weight": (PREFIXES, "norm.weight"),
    "model.visual.norm.weight": (PREFIXES, "norm.weight"),
    "module.visual.norm.weight": (PREFIXES, "norm.weight"),
    "base_model.model.model.visual.norm.weight": (PREFIXES, "norm.weight"),
    "_orig_mod.module.visual.norm.weight": (PREFIXES, "norm.weight"),
    "model.model.vision_tower.norm.weight": (TREE, "tower.norm.weight"),
    "model.vision_tower.vision_model.norm.weight": (TREE, "tower.norm.weight"),
    "vision_tower.vision_model_norm.weight": (TREE, "tower.vision_model_norm.weight"),
    "multi_modal_projector.norm.weight": (TREE, "projector.norm.weight"),
    "model.image_newline": ({**TREE, "image_newline": "image_newline"}, "image_newline"),
    "model.vision_model.a": ({"model.vision_model.": "tower."}, "tower.a"),
    "module.model.vision_model.a": ({"model.vision_model.": "tower."}, "tower.a"),
    "model.vision_model.b": ({"model.vision_model.": "long.", "vision_model.": "short."}, "long.b"),
    "model.vision_model.c": ({"": "", "vision_model.": "tower."}, "tower.c"),
    "model.module.d": ({"": "rest."}, "rest.d"),
    "model.visual.model.e": (PREFIXES, "model.e"),
    "model": ({"": ""}, "model"),
    "model.": ({"": ""}, "model."),
    "models.visual.a": (PREFIXES, None),
    "my_model.visual.a": (PREFIXES, None),
    "visually.a": (PREFIXES, None),
    "lm_head.weight": (PREFIXES, None),
    "text.visual.a": (PREFIXES, None),
    "language_model.model.visual.a": (PREFIXES, None),
    "language_model.model.layers.0.a": ({**PREFIXES, "": ""}, None),
    "model.language_model.layers.0.a": ({**PREFIXES, "": ""}, None),
    "model.language_model.visual.a": ({**PREFIXES, "": ""}, None),
    "language_model_a": ({"": ""}, "language_model_a"),
}


@pytest.mark.parametrize(
    ("name", "prefixes", "expected"), [(name, *case) for name, case in NAMES.items()], ids=list(NAMES)
)
def test_wrappers_are_removed_and_the_longest_prefix_replaced(
    name: str, prefixes: dict[str, str], expected: str | None
) -> None:
    assert weight_files.strip_prefix(name, prefixes) == expected


def test_prefixes_keep_two_parts_apart(tmp_path: Path) -> None:
    names = ("vision_tower.vision_model.norm.weight", "vision_tower.cls", "multi_modal_projector.norm.weight")
    single(tmp_path, {name: torch.ones(1) for name in names})
    tensors = Checkpoint.open(tmp_path, prefixes=TREE).tensors
    assert list(tensors) == ["projector.norm.weight", "tower.cls", "tower.norm.weight"]
    assert len(tensors) == 3
    assert tensors["tower.norm.weight"].name == "vision_tower.vision_model.norm.weight"


def test_reports_progress_in_bytes(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    with Checkpoint.open(single(tmp_path, vision_tensors()), prefixes=PREFIXES) as checkpoint:
        list(checkpoint.iterate(torch.float32, progress=lambda done, total: steps.append((done, total))))
    assert [total for _, total in steps] == [64, 64]
    assert steps[-1] == (64, 64)
    assert steps[0][0] in (16, 48)


def test_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    tensors = {f"visual.{index}": torch.ones(2**20, dtype=torch.bfloat16) for index in range(40)}
    folder = single(tmp_path, tensors)
    script = f"""
        import resource, torch
        from pathlib import Path
        from tritontower.checkpoint.checkpoint import Checkpoint
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with Checkpoint.open(Path({str(folder)!r}), prefixes={{"visual.": ""}}) as checkpoint:
            for number, (name, tensor) in enumerate(checkpoint.iterate(torch.float32)):
                del tensor
                if number == 3:
                    before = peak()
            print(peak() - before)
    """
    grown = int(run_python(script).stdout)
    assert grown < 20 * 2**20, "40 tensors of 4 MiB were kept"


def test_odd_shapes_and_scalars_are_read(tmp_path: Path) -> None:
    tensors = {"visual.odd": torch.randn(3, 7, 5), "visual.scalar": torch.tensor(2.5), "visual.none": torch.ones(0, 4)}
    with Checkpoint.open(single(tmp_path, tensors), prefixes=PREFIXES) as checkpoint:
        checkpoint.expect({"odd": (3, 7, 5), "scalar": (), "none": (0, 4)})
        loaded = dict(checkpoint.iterate(torch.float32))
    assert all(torch.equal(loaded[name.removeprefix("visual.")], tensor) for name, tensor in tensors.items())


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment, check=False
    )


def test_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    # 640 = 0x0280: the first two bytes of the file are those of a pickle of protocol 2.
    text = json.dumps({"visual.x": entry([1], 0, 4)}).encode().ljust(640)
    (tmp_path / "model.safetensors").write_bytes(raw_file(text, b"\0" * 4))
    assert Checkpoint.open(tmp_path, prefixes=PREFIXES).tensors["x"].shape == (1,)


# -- damaged files -----------------------------------------------------------------------------------------------------

ONE = {"visual.a": entry([1], 0, 4)}
CORRUPT = {
    "empty": (b"", "0 bytes"),
    "four bytes": (b"\1\0\0\0", "4 bytes"),
    "header length 2**63": ((2**63).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "header of 101 MB": ((101_000_000).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "header longer than file": ((1000).to_bytes(8, "little") + b"{}", "incomplete"),
    "header not UTF-8": (raw_file(b'{"\xff": 1}'), "download it again"),
    "header not JSON": (raw_file(b'{"a": '), "download it again"),
    "header a list": (raw_file([1]), "not a safetensors file"),
    "header empty": (raw_file(b""), "download it again"),
    "overlap": (raw_file({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"\0" * 6), "download it again"),
    "hole": (raw_file({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12), "download it again"),
    "trailing bytes": (raw_file(ONE, b"\0" * 5), "download it again"),
    "negative shape": (raw_file({"visual.a": entry([-1], 0, 4)}, b"\0" * 4), "download it again"),
    "size overflow": (raw_file({"visual.a": entry([2**40, 2**40], 0, 4)}, b"\0" * 4), "download it again"),
    "shape disagrees with bytes": (raw_file({"visual.a": entry([2], 0, 4)}, b"\0" * 4), "download it again"),
    "unknown dtype": (raw_file({"visual.a": entry([1], 0, 4, "X7")}, b"\0" * 4), "download it again"),
    "metadata not text": (raw_file({"__metadata__": {"a": 1}, **ONE}, b"\0" * 4), "download it again"),
    "truncated data": (raw_file(ONE, b"\0" * 3), "incomplete"),
    "git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "web page": (b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>", "web page"),
    "pickle": (pickle.dumps({"visual.a": [1.0] * 9}, protocol=4), "pickle under another name"),
    "zip of torch.save": (b"PK\x03\x04" + b"\0" * 60, "pickle under another name"),
}


@pytest.mark.parametrize(("content", "hint"), CORRUPT.values(), ids=CORRUPT)
def test_damaged_file_is_named_with_the_reason(tmp_path: Path, content: bytes, hint: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=re.escape(str(path))) as caught:
        Checkpoint.open(tmp_path, prefixes=PREFIXES)
    assert hint in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    content = save(vision_tensors())
    for length in range(len(content)):
        (tmp_path / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(CheckpointCorruptError):
            Checkpoint.open(tmp_path, prefixes=PREFIXES)


def test_file_system_errors_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(19, "No such device")

    single(tmp_path, vision_tensors())
    monkeypatch.setattr(weight_files, "safe_open", refuse)
    with pytest.raises(CheckpointCorruptError, match="No such device"):
        Checkpoint.open(tmp_path, prefixes=PREFIXES)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(data=st.data())
def test_mutated_file_raises_only_tower_errors(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(save(vision_tensors()))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    (tmp_path / "model.safetensors").write_bytes(content)
    try:
        with Checkpoint.open(tmp_path, prefixes=PREFIXES) as checkpoint:
            checkpoint.expect(SHAPES)
            loaded = dict(checkpoint.iterate(torch.float32))
    except TowerError as error:
        message = str(error)
    else:
        message = ""
        assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == SHAPES
    assert message.isprintable() or not message


def test_file_that_shrinks_while_read_is_an_error(tmp_path: Path) -> None:
    single(tmp_path, {f"visual.{index}": torch.ones(2**18) for index in range(4)})
    script = f"""
        import os, torch
        from pathlib import Path
        from tritontower.checkpoint.checkpoint import Checkpoint
        from tritontower.errors import CheckpointCorruptError
        folder = Path({str(tmp_path)!r})
        with Checkpoint.open(folder, prefixes={{"visual.": ""}}) as checkpoint:
            try:
                for number, _ in enumerate(checkpoint.iterate(torch.float32)):
                    os.truncate(folder / "model.safetensors", 2**19)
            except CheckpointCorruptError as error:
                print("rejected after", number + 1, "changed while it was read" in str(error))
    """
    result = run_python(script)
    assert result.returncode == 0, f"the process died: {result.stderr}"
    assert result.stdout.split() == ["rejected", "after", "1", "True"]


# -- folders and indices ----------------------------------------------------------------------------------------------

UNSAFE_NAMES = [
    "../secret.safetensors",
    "/etc/secret.safetensors",
    "sub/a.safetensors",
    "..\\a.safetensors",
    "C:a.safetensors",
    "a\0.safetensors",
    "a.bin",
    "..",
    "",
    7,
    None,
    ["a.safetensors"],
]


@pytest.mark.parametrize("name", UNSAFE_NAMES, ids=repr)
@pytest.mark.parametrize("tensor", ["visual.norm.weight", "lm.weight"])
def test_unsafe_shard_name_is_rejected_before_opening_files(
    tmp_path: Path, opened: CountingOpen, name: object, tensor: str
) -> None:
    save_file(vision_tensors(), tmp_path / "a.safetensors")
    weight_map = {"visual.proj.weight": "a.safetensors", tensor: name}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UnsafePathError, match=r"shards in model\.safetensors\.index\.json must be file names"):
        Checkpoint.open(tmp_path, prefixes=PREFIXES)
    assert opened.files == []


def _link_out(folder: Path) -> None:
    (folder / "model.safetensors").symlink_to(single(folder.parent / "outside", vision_tensors()) / "model.safetensors")


def _index_link_out(folder: Path) -> None:
    save_file(vision_tensors(), folder / "a.safetensors")
    (folder / INDEX).symlink_to(sharded(folder.parent / "outside", {"a.safetensors": vision_tensors()}) / INDEX)


def _link_into_another_repository(folder: Path) -> None:
    blobs = folder.parents[2] / "models--c--d" / "blobs"
    blobs.mkdir(parents=True)
    save_file(vision_tensors(), blobs / "abc")
    (folder / "model.safetensors").symlink_to(blobs / "abc")


def _link_into_the_cache(folder: Path) -> None:
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    save_file(vision_tensors(), blobs / "abc")
    (folder / "model.safetensors").symlink_to(Path("../../blobs/abc"))


def _link_inside(folder: Path) -> None:
    save_file(vision_tensors(), folder / "weights.data")
    (folder / "model.safetensors").symlink_to("weights.data")


@pytest.mark.parametrize(
    ("build", "is_safe"),
    [
        (_link_out, False),
        (_index_link_out, False),
        (_link_into_another_repository, False),
        (_link_into_the_cache, True),
        (_link_inside, True),
    ],
)
def test_links_must_stay_in_the_folder_or_the_hub_cache(
    tmp_path: Path, build: Callable[[Path], None], is_safe: bool
) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder.parent / "outside").mkdir()
    build(folder)
    if not is_safe:
        with pytest.raises(UnsafePathError, match="leaves the folder"):
            Checkpoint.open(folder, prefixes=PREFIXES)
    assert set(Checkpoint.open(folder, prefixes=PREFIXES, allow_symlinks=not is_safe).tensors) == set(SHAPES)


def _missing_shard(folder: Path) -> None:
    sharded(folder, {"a.safetensors": vision_tensors()})
    (folder / "a.safetensors").unlink()


def _index_names_wrong_shard(folder: Path) -> None:
    one, two = vision_tensors().items()
    sharded(folder, {"a.safetensors": {one[0]: one[1]}, "b.safetensors": {two[0]: two[1]}})
    (folder / INDEX).write_text(json.dumps({"weight_map": {one[0]: "b.safetensors", two[0]: "b.safetensors"}}))


def _tensor_in_two_shards(folder: Path) -> None:
    tensors = vision_tensors()
    sharded(folder, {"a.safetensors": tensors, "b.safetensors": dict(list(tensors.items())[:1])})
    first, second = tensors
    (folder / INDEX).write_text(json.dumps({"weight_map": {first: "b.safetensors", second: "a.safetensors"}}))


def _two_generations(folder: Path) -> None:
    single(folder, {**vision_tensors("visual."), **vision_tensors("model.visual.")})


def _numbered(*names: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for name in names:
            save_file(NATIVE, folder / f"{name}.safetensors")

    return build


def _index(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_text(text)


NATIVE_PREFIXES = {"vision_encoder.": "tower."}
NATIVE = {f"vision_encoder.{name}": tensor for name, tensor in vision_tensors("").items()}
NATIVE_NAMES = {f"tower.{name}" for name in SHAPES}
INCOMPLETE, AMBIGUOUS, NOT_FOUND = CheckpointIncompleteError, CheckpointAmbiguousError, CheckpointNotFoundError

FOLDERS: dict[str, tuple[Callable[[Path], object], type[TowerError], str]] = {
    "no folder": (lambda folder: folder.rmdir(), NOT_FOUND, "not a folder"),
    "no weights": (lambda folder: None, NOT_FOUND, "neither model.safetensors nor"),
    "other layout": (_numbered("consolidated"), NOT_FOUND, "consolidated.safetensors, which is another layout"),
    "directory": (
        lambda folder: (folder / "model.safetensors").mkdir(),
        CheckpointCorruptError,
        "not an ordinary file",
    ),
    "only pickles": (
        lambda folder: torch.save(vision_tensors(), folder / "pytorch_model.bin"),
        UnsafeFormatError,
        "save_pretrained",
    ),
    "index not JSON": (_index("{"), CheckpointCorruptError, "not JSON"),
    "index a list": (_index("[]"), CheckpointCorruptError, "a list"),
    "index without weight_map": (_index('{"metadata": {}}'), INCOMPLETE, "must have a weight_map"),
    "missing shard": (_missing_shard, INCOMPLETE, "a.safetensors"),
    "index names wrong shard": (_index_names_wrong_shard, INCOMPLETE, "lacks 1 tensors"),
    "tensor in two shards": (_tensor_in_two_shards, AMBIGUOUS, "the same tensor"),
    "two generations of names": (_two_generations, AMBIGUOUS, "the same tensor"),
    "language model only": (
        lambda folder: single(folder, {"model.layers.0.weight": torch.ones(2)}),
        INCOMPLETE,
        "no vision tensor",
    ),
}
NATIVE_FOLDERS: dict[str, tuple[Callable[[Path], object], type[TowerError], str]] = {
    "last missing": (_numbered("consolidated-00001-of-00002"), INCOMPLETE, "1 of 2 numbered files"),
    "first missing": (_numbered("consolidated.01"), INCOMPLETE, "1 of 2 numbered files"),
    "after the last": (
        _numbered("consolidated-00001-of-00002", "consolidated-00003-of-00002"),
        INCOMPLETE,
        "2 of 2 numbered files",
    ),
    "two sets": (_numbered("consolidated-00001-of-00001", "consolidated-00001-of-00002"), AMBIGUOUS, "of 2 sets"),
    "two spellings": (_numbered("consolidated.00", "consolidated-00001-of-00001"), AMBIGUOUS, "of 2 sets"),
    "layout of transformers": (
        _numbered("model"),
        NOT_FOUND,
        "neither consolidated.safetensors nor consolidated.safet",
    ),
    "no digits": (_numbered("consolidated.a0"), NOT_FOUND, "another layout"),
    "native pickles": (
        lambda folder: torch.save(NATIVE, folder / "consolidated.00.pth"),
        UnsafeFormatError,
        "consolidated.00.pth",
    ),
    "path in native index": (
        lambda folder: (folder / NATIVE_INDEX).write_text('{"weight_map": {"vision_encoder.a": "../a.safetensors"}}'),
        UnsafePathError,
        "shards in consolidated.safetensors.index.json must be",
    ),
    "native index names wrong shard": (
        lambda folder: (
            save_file(NATIVE, folder / "a.safetensors"),
            (folder / NATIVE_INDEX).write_text('{"weight_map": {"vision_encoder.a": "a.safetensors"}}'),
        ),
        INCOMPLETE,
        "that consolidated.safetensors.index.json lists",
    ),
}


@pytest.mark.parametrize(
    ("layout", "build", "error", "text"),
    [("hf", *case) for case in FOLDERS.values()] + [("mistral", *case) for case in NATIVE_FOLDERS.values()],
    ids=[*FOLDERS, *NATIVE_FOLDERS],
)
def test_invalid_folder_raises_a_typed_error(
    tmp_path: Path, layout: Layout, build: Callable[[Path], object], error: type[TowerError], text: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    build(folder)
    with pytest.raises(error, match=re.escape(text)):
        Checkpoint.open(folder, prefixes=PREFIXES if layout == "hf" else NATIVE_PREFIXES, layout=layout)


# -- Mistral's own layout ---------------------------------------------------------------------------------------------


def test_folder_may_have_both_layouts(tmp_path: Path, opened: CountingOpen) -> None:
    save_file(NATIVE, tmp_path / "consolidated.safetensors")
    sharded(tmp_path, {"model-00001-of-00001.safetensors": vision_tensors()})
    assert set(Checkpoint.open(tmp_path, prefixes=PREFIXES).tensors) == set(SHAPES)
    assert set(Checkpoint.open(tmp_path, prefixes=NATIVE_PREFIXES, layout="mistral").tensors) == NATIVE_NAMES
    assert opened.files == ["model-00001-of-00001.safetensors", "consolidated.safetensors"]


def test_native_index_selects_shards_with_vision_tensors(tmp_path: Path, opened: CountingOpen) -> None:
    save_file(NATIVE, tmp_path / "consolidated-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(NATIVE, "consolidated-00002-of-00002.safetensors")
    weight_map["layers.0.wq.weight"] = "consolidated-00001-of-00002.safetensors"
    (tmp_path / NATIVE_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert set(Checkpoint.open(tmp_path, prefixes=NATIVE_PREFIXES, layout="mistral").tensors) == NATIVE_NAMES
    assert opened.files == ["consolidated-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    "files",
    [
        ["consolidated-00001-of-00003", "consolidated-00002-of-00003", "consolidated-00003-of-00003"],
        ["consolidated.00", "consolidated.01", "consolidated.02"],
    ],
    ids=["of", "ranks"],
)
def test_numbered_files_read_only_vision_tensors(tmp_path: Path, opened: CountingOpen, files: list[str]) -> None:
    one, two = NATIVE.items()
    contents = [
        {one[0]: one[1], "layers.0.wq.weight": torch.ones(2)},
        {"output.weight": torch.ones(2)},
        {two[0]: two[1]},
    ]
    for file, tensors in zip(files, contents, strict=True):
        save_file(tensors, tmp_path / f"{file}.safetensors")
    with Checkpoint.open(tmp_path, prefixes=NATIVE_PREFIXES, layout="mistral") as checkpoint:
        assert opened.list_open() == [f"{files[0]}.safetensors", f"{files[2]}.safetensors"]
        loaded = dict(checkpoint.iterate(torch.float32))
    assert opened.list_open() == []
    assert all(torch.equal(loaded[f"tower.{name}"], NATIVE[f"vision_encoder.{name}"]) for name in SHAPES)
    assert opened.files == [f"{file}.safetensors" for file in files]
    assert opened.read == [one[0], two[0]]


# -- comparison with the configuration ---------------------------------------------------------------------------------


def test_missing_tensors_are_counted_and_ten_listed(tmp_path: Path) -> None:
    single(tmp_path, vision_tensors())
    specs = {**SHAPES, **{f"blocks.{index}.weight": (4,) for index in range(30)}}
    with pytest.raises(CheckpointIncompleteError) as caught:
        Checkpoint.open(tmp_path, prefixes=PREFIXES).expect(specs)
    assert "lacks 30 of the tower's 32 tensors" in str(caught.value)
    assert "(and 20 more)" in str(caught.value)
    assert len(caught.value.names) == 30
    assert str(caught.value).count("blocks.") == 10


def test_shape_is_compared_with_the_header(tmp_path: Path, opened: CountingOpen) -> None:
    single(tmp_path, vision_tensors())
    with pytest.raises(ShapeMismatchError) as caught:
        Checkpoint.open(tmp_path, prefixes=PREFIXES).expect({**SHAPES, "proj.weight": (2**40, 2**20)})
    error = caught.value
    assert (error.name, error.expected, error.found) == ("visual.proj.weight", (2**40, 2**20), (3, 4))
    assert opened.read == []


def test_unused_vision_tensors_must_be_ignored(tmp_path: Path) -> None:
    extra = {"visual.rotary.inv_freq": torch.ones(2), "visual.position_ids": torch.arange(3)}
    single(tmp_path, {**vision_tensors(), **extra})
    checkpoint = Checkpoint.open(tmp_path, prefixes=PREFIXES)
    with pytest.raises(UnexpectedTensorError, match=r"1 vision tensors .*visual\.rotary\.inv_freq"):
        checkpoint.expect(SHAPES, ignored=["*position_ids"])
    checkpoint.expect(SHAPES, ignored=["*position_ids", "rotary.*"])
    assert set(dict(checkpoint.iterate(torch.float32))) == set(SHAPES), "ignored tensors must not be loaded"


def test_unneeded_tensors_are_neither_checked_nor_read(tmp_path: Path, opened: CountingOpen) -> None:
    unneeded = {
        "visual.blocks.9.fc.weight": torch.zeros(5, dtype=torch.int64),
        "visual.blocks.9.fc.bias": torch.full((7, 7), float("nan")),
        "visual.head.weight": torch.zeros(8, 1, dtype=torch.uint8),
        "visual.head.weight.absmax": torch.zeros(3),
        "visual.head.weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8),
        "visual.probe.qweight": torch.zeros(2, 2, dtype=torch.int32),
        "visual.probe.scales": torch.zeros(2, dtype=torch.float16),
        "visual.scaled.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn),
        "visual.scaled.weight_scale": torch.zeros(7, 7, 7),
        "visual.scaled.input_scale": torch.zeros(1),
    }
    single(tmp_path, {**vision_tensors(), **unneeded})
    names = ["blocks.9.fc.weight", "blocks.9.fc.bias", "head.weight", "probe.weight", "scaled.weight", "not.there"]
    with Checkpoint.open(tmp_path, prefixes=PREFIXES) as checkpoint:
        checkpoint.expect(SHAPES, unneeded=names)
        assert opened.read == []
        assert set(dict(checkpoint.iterate(torch.float32))) == set(SHAPES)
        assert sorted(opened.read) == [f"visual.{name}" for name in sorted(SHAPES)]
        checkpoint.expect(SHAPES, ignored=["blocks.9.*", "head.*", "probe.*", "scaled.weight"])
        for left_out in names[:-1]:
            with pytest.raises((UnsupportedDtypeError, UnexpectedTensorError), match=left_out.rpartition(".")[0]):
                checkpoint.expect(SHAPES, unneeded=set(names) - {left_out})


def test_specs_take_precedence_over_unneeded(tmp_path: Path) -> None:
    single(tmp_path, vision_tensors())
    with Checkpoint.open(tmp_path, prefixes=PREFIXES) as checkpoint:
        with pytest.raises(ShapeMismatchError):
            checkpoint.expect({**SHAPES, "norm.weight": (5,)}, unneeded=["norm.weight"])
        with pytest.raises(UnexpectedTensorError, match=r"visual\.proj\.weight"):
            checkpoint.expect({"norm.weight": (4,)}, unneeded=["proj"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_quantized_tensor_is_named_with_the_method(tmp_path: Path, dtype: torch.dtype) -> None:
    single(tmp_path, {**vision_tensors(), "visual.norm.weight": torch.zeros(4).to(dtype)})
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    checkpoint = Checkpoint.open(tmp_path, prefixes=PREFIXES)
    message = r"visual\.norm\.weight.*stored as [A-Z0-9_]+ \(config\.json: quant_method 'bitsandbytes'\)"
    with pytest.raises(UnsupportedDtypeError, match=message):
        checkpoint.expect(SHAPES)
    with pytest.raises(UnsupportedDtypeError, match=message):
        list(checkpoint.iterate(torch.float32))


def test_tower_without_a_loadable_dtype_has_no_dtype(tmp_path: Path) -> None:
    single(tmp_path, {"visual.a": torch.zeros(4, dtype=torch.int8)})
    with pytest.raises(UnsupportedDtypeError, match="stored as I8; only"):
        _ = Checkpoint.open(tmp_path, prefixes=PREFIXES).dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_non_finite_weights_are_rejected_by_name(tmp_path: Path, value: float, stored: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in vision_tensors().items()}
    tensors["visual.proj.weight"][1, 2] = value
    with Checkpoint.open(single(tmp_path, tensors), prefixes=PREFIXES) as checkpoint:
        with pytest.raises(NonFiniteWeightsError, match="has NaN or infinity") as caught:
            list(checkpoint.iterate(torch.float32))
        assert caught.value.name == "visual.proj.weight"
        assert len(list(checkpoint.iterate(torch.float32, check_finite=False))) == 2


@pytest.mark.parametrize(("stored", "wanted"), [(torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)])
def test_overflow_of_the_wanted_dtype_is_rejected(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    largest = torch.finfo(stored).max
    single(tmp_path, {"visual.a": torch.tensor([1.0, -largest], dtype=stored)})
    with (
        Checkpoint.open(tmp_path, prefixes=PREFIXES) as checkpoint,
        pytest.raises(NonFiniteWeightsError, match=f"the maximum of {wanted} is"),
    ):
        list(checkpoint.iterate(wanted))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_finite_weights_whose_sum_overflows_are_accepted(tmp_path: Path, dtype: torch.dtype) -> None:
    huge = torch.full((8,), torch.finfo(dtype if dtype != torch.float64 else torch.float32).max, dtype=dtype)
    wanted = torch.float32 if dtype == torch.float64 else dtype
    with Checkpoint.open(single(tmp_path, {"visual.a": huge}), prefixes=PREFIXES) as checkpoint:
        assert torch.equal(dict(checkpoint.iterate(wanted))["a"], huge.to(wanted))


def test_unknown_name_and_closed_checkpoint(tmp_path: Path) -> None:
    with Checkpoint.open(single(tmp_path, vision_tensors()), prefixes=PREFIXES) as checkpoint:
        with pytest.raises(CheckpointIncompleteError, match="lacks nothing_like_it"):
            list(checkpoint.iterate(torch.float32, names=["nothing_like_it"]))
        assert [name for name, _ in checkpoint.iterate(torch.float32, names=["norm.weight"])] == ["norm.weight"]
    with pytest.raises(UsageError, match="the checkpoint must be open"):
        list(checkpoint.iterate(torch.float32))


def test_never_unpickles() -> None:
    for module in (checkpoint_module, dequantize, weight_files):
        source = Path(module.__file__).read_text()
        assert "torch.load" not in source
        assert "import pickle" not in source

"""What a damaged, incomplete or hostile checkpoint gets, and that a good one is read exactly and sparingly."""

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
    """A safetensors file with any header: an object to write as JSON, or its very bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


class CountingOpen:
    """Stands in for ``safe_open`` and notes which files are opened and which tensors are read."""

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

    @property
    def held(self) -> list[bool]:
        """Of every file that was opened, whether it still is."""
        return [handle() is not None for handle in self.handles]


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
def test_reads_the_vision_tensors_of_a_single_file_and_only_those(
    tmp_path: Path, opened: CountingOpen, prefix: str
) -> None:
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


def test_opens_only_the_shards_that_hold_vision_tensors(tmp_path: Path, opened: CountingOpen) -> None:
    one, two = vision_tensors().items()
    folder = sharded(
        tmp_path,
        {
            "a.safetensors": {"lm.0": torch.ones(2), one[0]: one[1]},
            "b.safetensors": {two[0]: two[1]},
            "c.safetensors": {"lm.1": torch.ones(2)},
        },
    )
    (folder / "c.safetensors").unlink()  # not even its absence matters
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
    # stored name: (prefixes, what becomes of it)
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
def test_wrappers_are_dropped_and_the_longest_root_is_replaced(
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
    assert grown < 20 * 2**20, "40 tensors of 4 MiB were kept, though the caller kept none"


def test_reads_odd_shapes_and_scalars_as_they_are(tmp_path: Path) -> None:
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


# -- files that are not what they should be ---------------------------------------------------------------------------

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
def test_corrupt_file_is_named_with_the_reason(tmp_path: Path, content: bytes, hint: str) -> None:
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


def test_directory_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointCorruptError, match="not an ordinary file"):
        Checkpoint.open(tmp_path, prefixes=PREFIXES)


def test_file_system_that_refuses_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_mutated_file_raises_nothing_but_tower_errors(tmp_path: Path, data: st.DataObject) -> None:
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


def test_file_that_shrinks_while_it_is_read_does_not_kill_the_process(tmp_path: Path) -> None:
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
                print("refused after", number + 1, "changed while it was read" in str(error))
    """
    result = run_python(script)
    assert result.returncode == 0, f"the process died: {result.stderr}"
    assert result.stdout.split() == ["refused", "after", "1", "True"]


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
def test_unsafe_shard_name_is_refused_before_any_file_is_opened(
    tmp_path: Path, opened: CountingOpen, name: object, tensor: str
) -> None:
    save_file(vision_tensors(), tmp_path / "a.safetensors")
    weight_map = {"visual.proj.weight": "a.safetensors", tensor: name}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UnsafePathError, match="names the shard"):
        Checkpoint.open(tmp_path, prefixes=PREFIXES)
    assert opened.files == []


def test_link_that_leaves_the_folder_is_refused_unless_allowed(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    single(elsewhere, vision_tensors())
    (folder / "model.safetensors").symlink_to(elsewhere / "model.safetensors")
    with pytest.raises(UnsafePathError, match="leaves the folder"):
        Checkpoint.open(folder, prefixes=PREFIXES)
    assert set(Checkpoint.open(folder, prefixes=PREFIXES, allow_symlinks=True).tensors) == set(SHAPES)


def test_index_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    sharded(elsewhere, {"a.safetensors": vision_tensors()})
    save_file(vision_tensors(), folder / "a.safetensors")
    (folder / INDEX).symlink_to(elsewhere / INDEX)
    with pytest.raises(UnsafePathError, match="leaves the folder"):
        Checkpoint.open(folder, prefixes=PREFIXES)


def test_links_inside_the_folder_and_into_the_hub_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(vision_tensors(), blobs / "abc")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/abc"))
    assert set(Checkpoint.open(snapshot, prefixes=PREFIXES).tensors) == set(SHAPES)

    folder = tmp_path / "plain"
    folder.mkdir()
    save_file(vision_tensors(), folder / "weights.data")
    (folder / "model.safetensors").symlink_to("weights.data")
    assert set(Checkpoint.open(folder, prefixes=PREFIXES).tensors) == set(SHAPES)


def test_other_hub_repository_is_outside(tmp_path: Path) -> None:
    snapshot, other = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--c--d" / "blobs"
    snapshot.mkdir(parents=True)
    other.mkdir(parents=True)
    save_file(vision_tensors(), other / "abc")
    (snapshot / "model.safetensors").symlink_to(other / "abc")
    with pytest.raises(UnsafePathError):
        Checkpoint.open(snapshot, prefixes=PREFIXES)


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


FOLDERS: dict[str, tuple[Callable[[Path], object], type[TowerError], str]] = {
    "no weights": (lambda folder: None, CheckpointNotFoundError, "neither model.safetensors nor"),
    "other layout": (
        lambda folder: save_file(vision_tensors(), folder / "consolidated.safetensors"),
        CheckpointNotFoundError,
        "consolidated.safetensors",
    ),
    "only pickles": (
        lambda folder: torch.save(vision_tensors(), folder / "pytorch_model.bin"),
        UnsafeFormatError,
        "save_pretrained",
    ),
    "index not JSON": (lambda folder: (folder / INDEX).write_text("{"), CheckpointCorruptError, "not JSON"),
    "index a list": (lambda folder: (folder / INDEX).write_text("[]"), CheckpointCorruptError, "a list"),
    "index without weight_map": (
        lambda folder: (folder / INDEX).write_text('{"metadata": {}}'),
        CheckpointIncompleteError,
        "no weight_map",
    ),
    "missing shard": (_missing_shard, CheckpointIncompleteError, "a.safetensors"),
    "index names wrong shard": (_index_names_wrong_shard, CheckpointIncompleteError, "lacks 1 tensors"),
    "tensor in two shards": (_tensor_in_two_shards, CheckpointAmbiguousError, "the same tensor"),
    "two generations of names": (_two_generations, CheckpointAmbiguousError, "the same tensor"),
    "language model only": (
        lambda folder: single(folder, {"model.layers.0.weight": torch.ones(2)}),
        CheckpointIncompleteError,
        "no vision tensor",
    ),
}


@pytest.mark.parametrize(("build", "error", "text"), FOLDERS.values(), ids=FOLDERS)
def test_faulty_folder(tmp_path: Path, build: Callable[[Path], object], error: type[TowerError], text: str) -> None:
    build(tmp_path)
    with pytest.raises(error, match=re.escape(text)):
        Checkpoint.open(tmp_path, prefixes=PREFIXES)


# -- Mistral's own layout ---------------------------------------------------------------------------------------------

NATIVE_PREFIXES = {"vision_encoder.": "tower."}
NATIVE = {f"vision_encoder.{name}": tensor for name, tensor in vision_tensors("").items()}
NATIVE_NAMES = {f"tower.{name}" for name in SHAPES}


def test_folder_with_both_layouts_works_for_each(tmp_path: Path, opened: CountingOpen) -> None:
    save_file(NATIVE, tmp_path / "consolidated.safetensors")
    sharded(tmp_path, {"model-00001-of-00001.safetensors": vision_tensors()})
    assert set(Checkpoint.open(tmp_path, prefixes=PREFIXES).tensors) == set(SHAPES)
    assert set(Checkpoint.open(tmp_path, prefixes=NATIVE_PREFIXES, layout="mistral").tensors) == NATIVE_NAMES
    assert opened.files == ["model-00001-of-00001.safetensors", "consolidated.safetensors"]


def test_native_index_opens_only_the_shards_that_hold_vision_tensors(tmp_path: Path, opened: CountingOpen) -> None:
    save_file(NATIVE, tmp_path / "consolidated-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(NATIVE, "consolidated-00002-of-00002.safetensors")
    weight_map["layers.0.wq.weight"] = "consolidated-00001-of-00002.safetensors"
    (tmp_path / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert set(Checkpoint.open(tmp_path, prefixes=NATIVE_PREFIXES, layout="mistral").tensors) == NATIVE_NAMES
    assert opened.files == ["consolidated-00002-of-00002.safetensors"]


def test_native_index_is_named_in_messages(tmp_path: Path) -> None:
    index = tmp_path / "consolidated.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"vision_encoder.a": "../secret.safetensors"}}))
    with pytest.raises(UnsafePathError, match=r"consolidated\.safetensors\.index\.json names the shard"):
        Checkpoint.open(tmp_path, prefixes=NATIVE_PREFIXES, layout="mistral")
    save_file(NATIVE, tmp_path / "a.safetensors")
    index.write_text(json.dumps({"weight_map": {"vision_encoder.a": "a.safetensors"}}))
    with pytest.raises(CheckpointIncompleteError, match=r"that consolidated\.safetensors\.index\.json places there"):
        Checkpoint.open(tmp_path, prefixes=NATIVE_PREFIXES, layout="mistral")


@pytest.mark.parametrize(
    "files",
    [
        ["consolidated-00001-of-00003", "consolidated-00002-of-00003", "consolidated-00003-of-00003"],
        ["consolidated.00", "consolidated.01", "consolidated.02"],
    ],
    ids=["of", "ranks"],
)
def test_numbered_files_without_an_index_are_all_asked_but_only_vision_tensors_are_read(
    tmp_path: Path, opened: CountingOpen, files: list[str]
) -> None:
    one, two = NATIVE.items()
    contents = [
        {one[0]: one[1], "layers.0.wq.weight": torch.ones(2)},
        {"output.weight": torch.ones(2)},
        {two[0]: two[1]},
    ]
    for file, tensors in zip(files, contents, strict=True):
        save_file(tensors, tmp_path / f"{file}.safetensors")
    with Checkpoint.open(tmp_path, prefixes=NATIVE_PREFIXES, layout="mistral") as checkpoint:
        assert opened.held == [True, False, True], "a file without vision tensors is closed at once"
        loaded = dict(checkpoint.iterate(torch.float32))
    assert opened.held == [False] * 3
    assert all(torch.equal(loaded[f"tower.{name}"], NATIVE[f"vision_encoder.{name}"]) for name in SHAPES)
    assert opened.files == [f"{file}.safetensors" for file in files]
    assert opened.read == [one[0], two[0]]


NUMBERED_FAULTS: dict[str, tuple[list[str], type[TowerError], str]] = {
    "last left out": (["consolidated-00001-of-00002"], CheckpointIncompleteError, "1 of 2 numbered files"),
    "first left out": (["consolidated.01"], CheckpointIncompleteError, "1 of 2 numbered files"),
    "beyond the last": (
        ["consolidated-00001-of-00002", "consolidated-00003-of-00002"],
        CheckpointIncompleteError,
        "2 of 2 numbered files",
    ),
    "two sets": (["consolidated-00001-of-00001", "consolidated-00001-of-00002"], CheckpointAmbiguousError, "of 2 sets"),
    "two spellings": (["consolidated.00", "consolidated-00001-of-00001"], CheckpointAmbiguousError, "of 2 sets"),
    "other layout": (["model"], CheckpointNotFoundError, "neither consolidated.safetensors nor consolidated.safet"),
    "no digits": (["consolidated.a0"], CheckpointNotFoundError, "another layout"),
}


@pytest.mark.parametrize(("files", "error", "text"), NUMBERED_FAULTS.values(), ids=NUMBERED_FAULTS)
def test_faulty_native_folder(
    tmp_path: Path, opened: CountingOpen, files: list[str], error: type[TowerError], text: str
) -> None:
    for file in files:
        save_file(NATIVE, tmp_path / f"{file}.safetensors")
    with pytest.raises(error, match=re.escape(text)):
        Checkpoint.open(tmp_path, prefixes=NATIVE_PREFIXES, layout="mistral")
    assert opened.files == []


def test_native_pickles_are_refused(tmp_path: Path) -> None:
    torch.save(NATIVE, tmp_path / "consolidated.00.pth")
    with pytest.raises(UnsafeFormatError, match=r"consolidated\.00\.pth"):
        Checkpoint.open(tmp_path, prefixes=NATIVE_PREFIXES, layout="mistral")


def test_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="not a folder") as caught:
        Checkpoint.open(tmp_path / "nothing", prefixes=PREFIXES)
    assert isinstance(caught.value, OSError)


# -- tensors against the configuration --------------------------------------------------------------------------------


def test_missing_tensors_are_counted_and_ten_are_listed(tmp_path: Path) -> None:
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


def test_unused_vision_tensors_are_refused_unless_ignored(tmp_path: Path) -> None:
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


def test_needed_tensors_are_needed_even_if_they_are_unneeded_too(tmp_path: Path) -> None:
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


def test_dtype_of_a_wholly_quantized_tower_is_refused(tmp_path: Path) -> None:
    single(tmp_path, {"visual.a": torch.zeros(4, dtype=torch.int8)})
    with pytest.raises(UnsupportedDtypeError, match="stored as I8; only"):
        _ = Checkpoint.open(tmp_path, prefixes=PREFIXES).dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_non_finite_weights_are_refused_by_name(tmp_path: Path, value: float, stored: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in vision_tensors().items()}
    tensors["visual.proj.weight"][1, 2] = value
    with Checkpoint.open(single(tmp_path, tensors), prefixes=PREFIXES) as checkpoint:
        with pytest.raises(NonFiniteWeightsError, match="holds NaN or infinity") as caught:
            list(checkpoint.iterate(torch.float32))
        assert caught.value.name == "visual.proj.weight"
        assert len(list(checkpoint.iterate(torch.float32, check_finite=False))) == 2


@pytest.mark.parametrize(("stored", "wanted"), [(torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)])
def test_overflow_of_the_wanted_type_is_refused(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    largest = torch.finfo(stored).max
    single(tmp_path, {"visual.a": torch.tensor([1.0, -largest], dtype=stored)})
    with (
        Checkpoint.open(tmp_path, prefixes=PREFIXES) as checkpoint,
        pytest.raises(NonFiniteWeightsError, match=f"{wanted} ends at"),
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
    with pytest.raises(UsageError, match="closed"):
        list(checkpoint.iterate(torch.float32))


def test_never_unpickles() -> None:
    for module in (checkpoint_module, dequantize, weight_files):
        source = Path(module.__file__).read_text()
        assert "torch.load" not in source
        assert "import pickle" not in source

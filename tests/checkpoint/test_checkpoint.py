"""Checkpoints: exact reading of good ones, with few reads, and typed errors for damaged or hostile ones."""

import json
import math
import pickle
import re
import textwrap
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save, save_file
from support.checkpoints import Opened
from support.processes import run_python

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
NON_FINITE = ("nan", "inf", "-inf")
INDEX, NATIVE_INDEX = "model.safetensors.index.json", "consolidated.safetensors.index.json"
SHAPES = {"norm.weight": (4,), "proj.weight": (3, 4)}
NORM, PROJ = "visual.norm.weight", "visual.proj.weight"


def vision_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"visual.{name}": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def single(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    """Writes a checkpoint of one file, and opens it."""
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder, prefixes=PREFIXES)


def index(weight_map: object) -> bytes:
    return json.dumps({"weight_map": weight_map}).encode()


def raw_file(header: object, data: bytes = b"") -> bytes:
    """Makes a safetensors file with any header: an object to write as JSON, or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


Files = dict[str, list[str]]
A, B, C, MODEL = "a.safetensors", "b.safetensors", "c.safetensors", "model.safetensors"
NATIVE, RANK_0, RANK_1 = "consolidated.safetensors", "consolidated.00.safetensors", "consolidated.01.safetensors"
ONE_OF_1, A_OF_2 = "consolidated-00001-of-00001.safetensors", "consolidated-00001-of-00002.safetensors"
THREE_OF_2 = "consolidated-00003-of-00002.safetensors"
OF_3 = [f"consolidated-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
READ: dict[str, tuple[Layout, Files, str | None, list[str]]] = {
    # layout, files with their tensors, index, opened files
    "single": ("hf", {MODEL: [NORM, "lm.0", PROJ]}, None, [MODEL]),
    "shards": ("hf", {A: ["lm.0", NORM], B: [PROJ], C: ["lm.1"]}, INDEX, [A, B]),
    "other layout as well": ("hf", {NATIVE: [NORM, PROJ], A: [NORM, PROJ]}, INDEX, [A]),
    "native single": ("mistral", {MODEL: ["lm.0"], NATIVE: [NORM, PROJ]}, None, [NATIVE]),
    "native shards": ("mistral", {OF_3[0]: ["lm.0"], OF_3[1]: [NORM, PROJ]}, NATIVE_INDEX, [OF_3[1]]),
    "numbered": ("mistral", {OF_3[0]: [NORM, "lm.0"], OF_3[1]: ["lm.1"], OF_3[2]: [PROJ]}, None, OF_3),
    "ranks": ("mistral", {RANK_0: [NORM, "lm.0"], RANK_1: [PROJ]}, None, [RANK_0, RANK_1]),
}


@pytest.mark.parametrize(("layout", "files", "index_name", "expected"), READ.values(), ids=READ)
def test_only_vision_tensors_are_read(
    tmp_path: Path, opened: Opened, layout: Layout, files: Files, index_name: str | None, expected: list[str]
) -> None:
    tensors = {**vision_tensors(), "lm.0": torch.ones(2), "lm.1": torch.ones(2)}
    for file in expected:  # the others are never opened
        save_file({name: tensors[name] for name in files[file]}, tmp_path / file)
    if index_name is not None:
        weight_map = {name: file for file, names in files.items() for name in names}
        (tmp_path / index_name).write_bytes(index(weight_map))
    with Checkpoint.open(tmp_path, prefixes=PREFIXES, layout=layout) as checkpoint:
        checkpoint.expect(SHAPES)
        assert opened.read == []
        assert sorted(opened.handles) == [file for file in expected if {NORM, PROJ} & set(files[file])]
        loaded = dict(checkpoint.iterate(torch.float32))
    assert not opened.handles
    assert all(torch.equal(loaded[name], tensors[f"visual.{name}"]) for name in SHAPES)
    assert [path.name for path in opened.files] == expected
    assert sorted(opened.read) == [NORM, PROJ]


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_converts_any_shape_as_torch_does(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    shapes = {"odd": (3, 7, 5), "scalar": (), "none": (0, 4)}
    tensors = {f"visual.{name}": torch.randn(shape).to(stored) for name, shape in shapes.items()}
    with single(tmp_path, tensors) as checkpoint:
        checkpoint.expect(shapes)
        loaded = dict(checkpoint.iterate(wanted))
    assert {tensor.dtype for tensor in loaded.values()} == {wanted}
    assert all(torch.equal(loaded[name], tensors[f"visual.{name}"].to(wanted)) for name in shapes)


TREE = {"vision_tower.": "tower.", "vision_tower.vision_model.": "tower.", "multi_modal_projector.": "projector."}
NAMES: dict[str, tuple[dict[str, str], str | None]] = {
    # stored name: (prefixes, result)
    "visual.norm.weight": (PREFIXES, "norm.weight"),
    "module.visual.norm.weight": (PREFIXES, "norm.weight"),
    "_orig_mod.module.visual.norm.weight": (PREFIXES, "norm.weight"),
    "model.vision_tower.vision_model.norm.weight": (TREE, "tower.norm.weight"),
    "vision_tower.vision_model_norm.weight": (TREE, "tower.vision_model_norm.weight"),
    "multi_modal_projector.norm.weight": (TREE, "projector.norm.weight"),
    "model.image_newline": ({**TREE, "image_newline": "image_newline"}, "image_newline"),
    "module.model.vision_model.a": ({"model.vision_model.": "tower."}, "tower.a"),
    "model.vision_model.b": ({"model.vision_model.": "long.", "vision_model.": "short."}, "long.b"),
    "model.vision_model.c": ({"": "", "vision_model.": "tower."}, "tower.c"),
    "model.module.d": ({"": "rest."}, "rest.d"),
    "model.visual.model.e": (PREFIXES, "model.e"),
    "models.visual.a": (PREFIXES, None),
    "text.visual.a": (PREFIXES, None),
    "language_model.model.visual.a": (PREFIXES, None),
    "language_model.model.layers.0.a": ({**PREFIXES, "": ""}, None),
    "model.language_model.visual.a": ({**PREFIXES, "": ""}, None),
    "language_model_a": ({"": ""}, "language_model_a"),
}


@pytest.mark.parametrize("name", NAMES)
def test_wrappers_are_removed_and_the_longest_prefix_replaced(name: str) -> None:
    prefixes, expected = NAMES[name]
    assert weight_files.strip_prefix(name, prefixes) == expected


def test_tensors_are_streamed_from_a_file_that_may_shrink(tmp_path: Path) -> None:
    single(tmp_path, {f"visual.{index}": torch.ones(2**20, dtype=torch.bfloat16) for index in range(40)})
    script = f"""
        import os, resource, torch
        from pathlib import Path
        from tritontower.checkpoint.checkpoint import Checkpoint
        from tritontower.errors import CheckpointCorruptError
        folder = Path({str(tmp_path)!r})
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        with Checkpoint.open(folder, prefixes={{"visual.": ""}}) as checkpoint:
            for number, (name, tensor) in enumerate(checkpoint.iterate(torch.float32)):
                del tensor
                if number == 3:
                    before = peak()
            print(peak() - before)
            try:
                for number, _ in enumerate(checkpoint.iterate(torch.float32)):
                    os.truncate(folder / "model.safetensors", 2**21)
            except CheckpointCorruptError as error:
                print(number + 1, "changed while it was read" in str(error))
    """
    result = run_python("-c", textwrap.dedent(script), environment={"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, f"the process died: {result.stderr}"
    grown, *rejected = result.stdout.split()
    assert int(grown) < 20, "40 tensors of 4 MiB were kept"
    assert rejected == ["1", "True"]


def test_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    # 640 = 0x0280: the first two bytes of the file are those of a pickle of protocol 2.
    text = json.dumps({"visual.x": entry([1], 0, 4)}).encode().ljust(640)
    (tmp_path / "model.safetensors").write_bytes(raw_file(text, b"\0" * 4))
    Checkpoint.open(tmp_path, prefixes=PREFIXES).expect({"x": (1,)})


ONE = {"visual.a": entry([1], 0, 4)}
CORRUPT = {
    "empty": (b"", "0 bytes"),
    "header length 2**63": ((2**63).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "header longer than file": ((1000).to_bytes(8, "little") + b"{}", "incomplete"),
    "header not JSON": (raw_file(b'{"a": '), "download it again"),
    "overlap": (raw_file({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"\0" * 6), "download it again"),
    "hole": (raw_file({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12), "download it again"),
    "shape disagrees with bytes": (raw_file({"visual.a": entry([2], 0, 4)}, b"\0" * 4), "download it again"),
    "unknown dtype": (raw_file({"visual.a": entry([1], 0, 4, "X7")}, b"\0" * 4), "download it again"),
    "truncated data": (raw_file(ONE, b"\0" * 3), "incomplete"),
    "git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "web page": (b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>", "web page"),
    "pickle": (pickle.dumps({"visual.a": [1.0] * 9}, protocol=4), "pickle under another name"),
    "zip of torch.save": (b"PK\x03\x04" + b"\0" * 60, "pickle under another name"),
}


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    content = save(vision_tensors())
    for length in range(len(content)):
        (tmp_path / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(CheckpointCorruptError):
            Checkpoint.open(tmp_path, prefixes=PREFIXES)


UNSAFE_NAMES = ["../x.safetensors", "\\x.safetensors", "C:x.safetensors", "\0.safetensors", "x.bin", 7]


@pytest.mark.parametrize("name", UNSAFE_NAMES, ids=repr)
@pytest.mark.parametrize("tensor", [NORM, "lm.weight"])
def test_unsafe_shard_name_is_rejected_before_opening_files(
    tmp_path: Path, opened: Opened, name: object, tensor: str
) -> None:
    save_file(vision_tensors(), tmp_path / "a.safetensors")
    (tmp_path / INDEX).write_bytes(index({PROJ: "a.safetensors", tensor: name}))
    with pytest.raises(UnsafePathError, match=r"shards in model\.safetensors\.index\.json must be file names"):
        Checkpoint.open(tmp_path, prefixes=PREFIXES)
    assert opened.files == []


@pytest.mark.parametrize(
    ("link", "target", "is_safe"),
    [
        ("model.safetensors", "../outside/weights", False),
        ("model.safetensors", "../../../models--c--d/blobs/abc", False),
        (INDEX, "../outside/index", False),
        ("model.safetensors", "../../blobs/abc", True),
        ("model.safetensors", "weights.data", True),
    ],
)
def test_links_must_stay_in_the_folder_or_the_hub_cache(tmp_path: Path, link: str, target: str, is_safe: bool) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    save_file(vision_tensors(), folder / "a.safetensors")
    (folder / target).parent.mkdir(parents=True, exist_ok=True)
    content = index(dict.fromkeys((NORM, PROJ), "a.safetensors")) if link == INDEX else save(vision_tensors())
    (folder / target).write_bytes(content)
    (folder / link).symlink_to(target)
    if is_safe:
        Checkpoint.open(folder, prefixes=PREFIXES).expect(SHAPES)
        return
    with pytest.raises(UnsafePathError, match="leaves the folder"):
        Checkpoint.open(folder, prefixes=PREFIXES)


BOTH = save(vision_tensors())
ONLY_NORM, TWICE = save({NORM: torch.ones(4)}), save({NORM: torch.ones(4), f"model.{NORM}": torch.ones(4)})
INCOMPLETE, AMBIGUOUS, NOT_FOUND = CheckpointIncompleteError, CheckpointAmbiguousError, CheckpointNotFoundError
FOLDERS: dict[str, tuple[Layout, dict[str, bytes], type[TowerError], str]] = {
    "no weights": ("hf", {}, NOT_FOUND, "neither model.safetensors nor"),
    "other layout": ("hf", {"consolidated.safetensors": BOTH}, NOT_FOUND, "consolidated.safetensors, which is another"),
    "only pickles": ("hf", {"pytorch_model.bin": b""}, UnsafeFormatError, "save_pretrained"),
    "index not JSON": ("hf", {INDEX: b"{"}, CheckpointCorruptError, "not JSON"),
    "index a list": ("hf", {INDEX: b"[]"}, CheckpointCorruptError, "a list"),
    "index without weight_map": ("hf", {INDEX: b"{}"}, INCOMPLETE, "must have a weight_map"),
    "missing shard": ("hf", {INDEX: index({NORM: "a.safetensors"})}, INCOMPLETE, "a.safetensors"),
    "index names wrong shard": ("hf", {A: ONLY_NORM, INDEX: index({NORM: A, PROJ: A})}, INCOMPLETE, "lacks 1 tensors"),
    "tensor in two shards": ("hf", {A: BOTH, B: ONLY_NORM, INDEX: index({PROJ: A, NORM: B})}, AMBIGUOUS, "the same t"),
    "two generations of names": ("hf", {MODEL: TWICE}, AMBIGUOUS, "the same tensor"),
    "language model only": ("hf", {"model.safetensors": save({"lm.0": torch.ones(4)})}, INCOMPLETE, "no vision tensor"),
    "last missing": ("mistral", {A_OF_2: BOTH}, INCOMPLETE, "1 of 2 numbered files"),
    "first missing": ("mistral", {"consolidated.01.safetensors": BOTH}, INCOMPLETE, "1 of 2 numbered files"),
    "after the last": ("mistral", {A_OF_2: BOTH, THREE_OF_2: BOTH}, INCOMPLETE, "2 of 2 numbered files"),
    "two sets": ("mistral", {ONE_OF_1: BOTH, A_OF_2: BOTH}, AMBIGUOUS, "of 2 sets"),
    "two spellings": ("mistral", {"consolidated.00.safetensors": BOTH, ONE_OF_1: BOTH}, AMBIGUOUS, "of 2 sets"),
    "layout of transformers": ("mistral", {"model.safetensors": BOTH}, NOT_FOUND, "has neither consolidated.safetens"),
    "no digits": ("mistral", {"consolidated.a0.safetensors": BOTH}, NOT_FOUND, "another layout"),
    "native pickles": ("mistral", {"consolidated.00.pth": b""}, UnsafeFormatError, "consolidated.00.pth"),
    "path in native index": (
        "mistral",
        {NATIVE_INDEX: index({NORM: "../a"})},
        UnsafePathError,
        "shards in consolidated",
    ),
    **{name: ("hf", {MODEL: content}, CheckpointCorruptError, hint) for name, (content, hint) in CORRUPT.items()},
}


@pytest.mark.parametrize(("layout", "files", "error", "text"), FOLDERS.values(), ids=FOLDERS)
def test_invalid_folder_raises_a_typed_error(
    tmp_path: Path, layout: Layout, files: dict[str, bytes], error: type[TowerError], text: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=re.escape(text)) as caught:
        Checkpoint.open(tmp_path, prefixes=PREFIXES, layout=layout)
    if error is CheckpointCorruptError:
        assert str(tmp_path / next(iter(files))) in str(caught.value)
        assert isinstance(caught.value, ValueError)


def test_file_system_errors_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointNotFoundError, match="not a folder"):
        Checkpoint.open(tmp_path / "nothing", prefixes=PREFIXES)
    (tmp_path / MODEL).mkdir()
    with pytest.raises(CheckpointCorruptError, match="not an ordinary file"):
        Checkpoint.open(tmp_path, prefixes=PREFIXES)
    (tmp_path / MODEL).rmdir()
    (tmp_path / MODEL).write_bytes(BOTH)
    monkeypatch.setattr(weight_files, "safe_open", Mock(side_effect=OSError(19, "No such device")))
    with pytest.raises(CheckpointCorruptError, match="No such device"):
        Checkpoint.open(tmp_path, prefixes=PREFIXES)


def test_missing_tensors_and_shapes_are_found_in_the_header(tmp_path: Path, opened: Opened) -> None:
    checkpoint = single(tmp_path, vision_tensors())
    with pytest.raises(CheckpointIncompleteError) as caught:
        checkpoint.expect({**SHAPES, **{f"blocks.{index}.weight": (4,) for index in range(30)}})
    assert "lacks 30 of the tower's 32 tensors" in str(caught.value)
    assert "(and 20 more)" in str(caught.value)
    assert (len(caught.value.names), str(caught.value).count("blocks.")) == (30, 10)
    with pytest.raises(ShapeMismatchError) as mismatch:
        checkpoint.expect({**SHAPES, "proj.weight": (2**40, 2**20)})
    error = mismatch.value
    assert (error.name, error.expected, error.found) == ("visual.proj.weight", (2**40, 2**20), (3, 4))
    assert opened.read == []


def test_unused_vision_tensors_must_be_ignored(tmp_path: Path) -> None:
    extra = {"visual.rotary.inv_freq": torch.ones(2), "visual.position_ids": torch.arange(3)}
    checkpoint = single(tmp_path, {**vision_tensors(), **extra})
    with pytest.raises(UnexpectedTensorError, match=r"1 vision tensors .*visual\.rotary\.inv_freq"):
        checkpoint.expect(SHAPES, ignored=["*position_ids"])
    checkpoint.expect(SHAPES, ignored=["*position_ids", "rotary.*"])
    assert set(dict(checkpoint.iterate(torch.float32))) == set(SHAPES), "ignored tensors must not be loaded"


def test_unneeded_tensors_are_neither_checked_nor_read(tmp_path: Path, opened: Opened) -> None:
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
        with pytest.raises(ShapeMismatchError):
            checkpoint.expect({**SHAPES, "norm.weight": (5,)}, unneeded=[*names, "norm.weight"])
        for left_out in names[:-1]:
            with pytest.raises((UnsupportedDtypeError, UnexpectedTensorError), match=left_out.rpartition(".")[0]):
                checkpoint.expect(SHAPES, unneeded=set(names) - {left_out})


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
    with pytest.raises(UnsupportedDtypeError, match=r"stored as \w+ \("):
        _ = single(tmp_path, {"visual.a": torch.zeros(4).to(dtype)}).dtype


@pytest.mark.parametrize(
    ("stored", "wanted", "value"),
    [
        *((dtype, torch.float32, float(text)) for dtype in (torch.float32, torch.bfloat16) for text in NON_FINITE),
        (torch.bfloat16, torch.float16, -torch.finfo(torch.bfloat16).max),
        (torch.float32, torch.bfloat16, -torch.finfo(torch.float32).max),
    ],
)
def test_non_finite_results_are_rejected_by_name(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype, value: float
) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in vision_tensors().items()}
    tensors["visual.proj.weight"][1, 2] = value
    message = f"the maximum of {wanted} is" if math.isfinite(value) else "has NaN or infinity"
    with single(tmp_path, tensors) as checkpoint:
        with pytest.raises(NonFiniteWeightsError, match=message) as caught:
            list(checkpoint.iterate(wanted))
        assert caught.value.name == "visual.proj.weight"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_finite_weights_whose_sum_overflows_are_accepted(tmp_path: Path, dtype: torch.dtype) -> None:
    huge = torch.full((8,), torch.finfo(dtype if dtype != torch.float64 else torch.float32).max, dtype=dtype)
    wanted = torch.float32 if dtype == torch.float64 else dtype
    with single(tmp_path, {"visual.a": huge}) as checkpoint:
        assert torch.equal(dict(checkpoint.iterate(wanted))["a"], huge.to(wanted))


def test_unknown_name_and_closed_checkpoint(tmp_path: Path) -> None:
    with single(tmp_path, vision_tensors()) as checkpoint:
        with pytest.raises(CheckpointIncompleteError, match="lacks nothing_like_it"):
            list(checkpoint.iterate(torch.float32, names=["nothing_like_it"]))
        assert [name for name, _ in checkpoint.iterate(torch.float32, names=["norm.weight"])] == ["norm.weight"]
    with pytest.raises(UsageError, match="the checkpoint must be open"):
        list(checkpoint.iterate(torch.float32))

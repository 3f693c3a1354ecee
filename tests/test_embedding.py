"""Embeddings: their tensors, and their files, including untrusted ones."""

import json
import math
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tritontower.embedding import ImageEmbedding, load_embeddings, save_embeddings
from tritontower.errors import BackendUnavailableError, EmbeddingFileError, UsageError


def embedding(
    tokens: int = 6, width: int = 8, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> ImageEmbedding:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, width, generator=generator).to(dtype)
    plain = {
        "grid_thw": (1, 4, 6),
        "original_size": (100, 50),
        "processed_size": (84, 56),
        "content_hash": f"{seed:064x}",
    }
    return ImageEmbedding(embeddings=rows, **{**plain, **changes})


def rich(seed: int = 0) -> ImageEmbedding:
    """An embedding in which nothing is left out."""
    plain = embedding(seed=seed, dtype=torch.bfloat16)
    rows = plain.embeddings
    return embedding(
        seed=seed,
        dtype=torch.bfloat16,
        grid_thw=(2, 2, 6),
        deepstack=(rows + 1, rows * 2),
        pooled=torch.randn(2, 5),
        token_ids=tuple(range(10**9, 10**9 + 6)),
        text_alias="<image ü\n>",
        bidirectional_spans=((0, 4), (4, 6)),
        tile_tokens=(4, 2),
        seconds_per_grid=1 / 3,
        timestamps=(0.1, 0.7),
        is_video=True,
    )


def assert_same(first: ImageEmbedding, second: ImageEmbedding) -> None:
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert tensor.dtype == second.tensors[name].dtype, name
        assert torch.equal(tensor, second.tensors[name]), name
    metadata = [
        {k: v for k, v in vars(one).items() if k not in ("embeddings", "deepstack", "pooled")}
        for one in (first, second)
    ]
    assert metadata[0] == metadata[1]


def test_tensors_have_names_and_sizes() -> None:
    plain = embedding()
    assert plain.tile_tokens == (6,)
    assert list(plain.tensors) == ["embeddings"]
    assert plain.nbytes == 6 * 8 * 4
    assert list(rich().tensors) == ["embeddings", "deepstack.0", "deepstack.1", "pooled"]
    assert rich().nbytes == 3 * 6 * 8 * 2 + 2 * 5 * 4


def test_ids_and_alias_make_a_new_embedding() -> None:
    plain = embedding()
    named = plain.with_token_ids(range(6)).with_alias("<a>")
    assert (named.token_ids, named.text_alias) == ((0, 1, 2, 3, 4, 5), "<a>")
    assert (plain.token_ids, plain.text_alias) == ((), None)
    assert named.embeddings is plain.embeddings
    assert named.with_alias(None).text_alias is None


@pytest.mark.parametrize("ids", [range(5), [0, 1, 2, 3, 4, -1], [0.0] * 6, [True] * 6, [2**63] * 6])
def test_invalid_ids_are_rejected(ids: Any) -> None:
    with pytest.raises(UsageError, match="one integer"):
        embedding().with_token_ids(ids)


@pytest.mark.parametrize("alias", ["", 3, b"a"])
def test_invalid_aliases_are_rejected(alias: Any) -> None:
    with pytest.raises(UsageError, match="text_alias"):
        embedding().with_alias(alias)


def test_moving_takes_all_tensors_and_copies_on_request() -> None:
    whole = rich()
    assert_same(whole.to("cpu"), whole)
    assert whole.to("cpu").embeddings is whole.embeddings
    copy = whole.to("cpu", copy=True)
    assert_same(copy, whole)
    assert all(copy.tensors[name].data_ptr() != tensor.data_ptr() for name, tensor in whole.tensors.items())
    moved = whole.to("meta")
    assert {tensor.device.type for tensor in moved.tensors.values()} == {"meta"}
    assert moved.timestamps == whole.timestamps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_embedding_comes_back_from_its_file(tmp_path: Path, dtype: torch.dtype) -> None:
    for number, one in enumerate((embedding(dtype=dtype), rich(), embedding(tokens=0, tile_tokens=(0,)))):
        path = tmp_path / f"{number}.safetensors"
        one.save(path)
        assert_same(ImageEmbedding.load(path), one)
        assert_same(ImageEmbedding.load(str(path)), one)


def test_several_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    rows = torch.randn(12, 8)
    halves = [embedding(seed=seed).with_tensors({"embeddings": part}) for seed, part in enumerate(rows.split(6))]
    several = [rich(), *halves, halves[0], embedding(tokens=3, width=20)]
    save_embeddings(path, several)
    again = load_embeddings(path)
    assert len(again) == 5
    for first, second in zip(again, several, strict=True):
        assert_same(first, second)
    save_embeddings(path, [])
    assert load_embeddings(path) == []
    with pytest.raises(EmbeddingFileError, match="must hold one embedding, got 0"):
        ImageEmbedding.load(path)
    assert list(tmp_path.iterdir()) == [path]
    # A device that is none, or not here, is found even where there is nothing to put on it.
    for device, error in (("meta", BackendUnavailableError), ("attic", UsageError)):
        with pytest.raises(error, match=device):
            load_embeddings(path, device=device)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_embedding_survives_a_file(tmp_path: Path, data: st.DataObject) -> None:
    tiles = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    tokens, seconds = sum(tiles), st.floats(0, 1e6)
    frames = data.draw(st.integers(1, 3))
    video = frames > 1 or data.draw(st.booleans())
    one = embedding(
        tokens,
        data.draw(st.integers(1, 5)),
        seed=data.draw(st.integers(0, 99)),
        grid_thw=(frames, data.draw(st.integers(1, 9)), 4),
        tile_tokens=tuple(tiles),
        token_ids=data.draw(st.sampled_from([(), tuple(range(2**40, 2**40 + tokens))])),
        text_alias=data.draw(st.none() | st.text(st.characters(exclude_categories=["Cs"]))),
        seconds_per_grid=data.draw(st.none() | seconds) if video else None,
        timestamps=data.draw(st.sampled_from([0, frames if video else 0]).map(lambda count: (0.5,) * count)),
        is_video=video,
    )
    one.save(tmp_path / "one.safetensors")
    assert_same(ImageEmbedding.load(tmp_path / "one.safetensors"), one)


# -- untrusted files -----------------------------------------------------------------------------------------------


def changed(path: Path, target: Path, **changes: Any) -> Path:
    """A copy of a file of one embedding with other metadata."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a handle, no mapping)
    (first,) = json.loads(metadata["embeddings"])
    metadata["embeddings"] = json.dumps([{**first, **changes}])
    save_file(tensors, target, metadata=metadata)
    return target


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rich().save(tmp_path / "rich.safetensors")
    return tmp_path / "rich.safetensors"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grid_thw", [1, 2]),
        ("grid_thw", [0, 2, 2]),
        ("grid_thw", [1.5, 2, 2]),
        ("grid_thw", "abc"),
        ("grid_thw", None),
        ("original_size", [10, -1]),
        ("original_size", [True, True]),
        ("processed_size", [2**70, 1]),
        ("content_hash", 5),
        ("token_ids", [1, 2]),
        ("token_ids", [-1] * 6),
        ("text_alias", ["a"]),
        ("bidirectional_spans", [[0, 7]]),
        ("bidirectional_spans", [[3, 3]]),
        ("bidirectional_spans", [[0]]),
        ("bidirectional_spans", ["ab"]),
        ("bidirectional_spans", 4),
        ("tile_tokens", [5]),
        ("tile_tokens", [7, -1]),
        ("seconds_per_grid", -1.0),
        ("seconds_per_grid", math.nan),
        ("seconds_per_grid", 10**400),
        ("seconds_per_grid", "1"),
        ("timestamps", [1.0]),
        ("timestamps", [1.0, math.inf]),
        ("deepstack_levels", 1),
        ("deepstack_levels", 10**9),
        ("deepstack_levels", -1),
        ("deepstack_levels", "2"),
        ("pooled", False),
        ("pooled", 1),
        ("is_video", False),
        ("is_video", None),
        ("is_video", 1),
    ],
)
def test_invalid_metadata_is_rejected_by_name(saved: Path, tmp_path: Path, name: str, value: Any) -> None:
    assert_same(ImageEmbedding.load(changed(saved, tmp_path / "same.safetensors")), ImageEmbedding.load(saved))
    with pytest.raises(EmbeddingFileError) as caught:
        ImageEmbedding.load(changed(saved, tmp_path / "changed.safetensors", **{name: value}))
    assert "changed.safetensors" in str(caught.value)
    assert name in str(caught.value) or "tensors" in str(caught.value)


def test_a_promise_of_many_tensors_is_rejected_early(saved: Path, tmp_path: Path) -> None:
    with safe_open(saved, "pt") as file:
        metadata = dict(file.metadata())
    (first,) = json.loads(metadata["embeddings"])
    metadata["embeddings"] = json.dumps([{**first, "deepstack_levels": 4}] * 5000)
    save_file({f"t{number}": torch.zeros(1) for number in range(9)}, tmp_path / "many.safetensors", metadata=metadata)
    with pytest.raises(EmbeddingFileError, match="does not say which"):
        load_embeddings(tmp_path / "many.safetensors")


@pytest.mark.parametrize(
    "tensors",
    [
        {"0.embeddings": torch.zeros(6)},
        {"0.embeddings": torch.zeros(6, 8, dtype=torch.int8)},
        {"0.deepstack.0": torch.zeros(5, 8, dtype=torch.bfloat16)},
        {"0.deepstack.1": torch.zeros(6, 8)},
        {"0.pooled": torch.zeros(2, 5, 1)},
        {"extra": torch.zeros(1)},
        {"0.pooled": None},
    ],
)
def test_tensors_that_do_not_fit_are_rejected(saved: Path, tmp_path: Path, tensors: dict[str, Any]) -> None:
    with safe_open(saved, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    mixed = {name: tensor for name, tensor in {**stored, **tensors}.items() if tensor is not None}
    save_file(mixed, tmp_path / "mixed.safetensors", metadata=metadata)
    with pytest.raises(EmbeddingFileError, match=r"mixed\.safetensors"):
        ImageEmbedding.load(tmp_path / "mixed.safetensors")


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"format": "tritontower.embeddings", "version": "2", "embeddings": "[]"},
        {"format": "tritontower.embeddings", "version": "1"},
        {"format": "tritontower.embeddings", "version": "1", "embeddings": "{"},
        {"format": "tritontower.embeddings", "version": "1", "embeddings": "[" * 100_000},
        {"format": "tritontower.embeddings", "version": "1", "embeddings": "{}"},
        {"format": "tritontower.embeddings", "version": "1", "embeddings": "[3]"},
        {"format": "tritontower.embeddings", "version": "1", "embeddings": "[{}]"},
        {"format": "tritontower.embeddings", "version": "1", "embeddings": "[]"},
    ],
)
def test_files_of_other_formats_are_rejected(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"0.embeddings": torch.zeros(2, 2)}, path, metadata=metadata)
    with pytest.raises(EmbeddingFileError, match="other"):
        load_embeddings(path)


def test_damaged_files_are_rejected(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    path = tmp_path / "damaged.safetensors"
    for data in (
        b"",
        b"1234",
        whole[:20],
        whole[:-1],
        whole + b"x",
        b"\xff" * 64,
        pickle.dumps({"a": 1}) * 5,
        b"<html>" * 9,
    ):
        path.write_bytes(data)
        with pytest.raises(EmbeddingFileError, match="damaged"):
            load_embeddings(path)
    with pytest.raises(EmbeddingFileError, match="no such file"):
        load_embeddings(tmp_path / "nowhere.safetensors")
    with pytest.raises(EmbeddingFileError, match="not an ordinary file"):
        load_embeddings(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_raise_only_file_errors(saved: Path, data: st.DataObject) -> None:
    damaged = bytearray(saved.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = saved.with_name("mutated.safetensors")
    path.write_bytes(bytes(damaged))
    try:
        found = load_embeddings(path)
    except EmbeddingFileError:
        return
    assert all(sum(one.tile_tokens) == one.num_tokens for one in found)


def test_a_file_is_written_whole_or_not_at_all(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def interrupted(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(EmbeddingFileError, match="No space left"):
            embedding().save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]
    with pytest.raises(EmbeddingFileError, match="not an ordinary file"):
        embedding().save(tmp_path)
    with pytest.raises(EmbeddingFileError, match="cannot be written"):
        embedding().save(tmp_path / "no" / "such" / "folder.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_a_file_keeps_its_permissions(tmp_path: Path) -> None:
    plain, kept = tmp_path / "plain", tmp_path / "embeddings.safetensors"
    plain.write_bytes(b"")
    embedding().save(kept)
    assert stat.S_IMODE(kept.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    for mode in (0o664, 0o640, 0o604):
        kept.chmod(mode)
        embedding(seed=mode).save(kept)
        assert stat.S_IMODE(kept.stat().st_mode) == mode
        assert_same(ImageEmbedding.load(kept), embedding(seed=mode))


def test_repr_shows_shape_without_values() -> None:
    assert repr(embedding()) == "<ImageEmbedding [6, 8] torch.float32 on cpu, grid (1, 4, 6)>"
    assert "2 deepstack levels, pooled, alias '<image ü\\n>'" in repr(rich())

"""Embeddings: their tensors, and their files, including untrusted ones."""

import json
import math
import os
import pickle
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tritontower.embedding import ImageEmbedding, load_embeddings, save_embeddings
from tritontower.errors import BackendUnavailableError, EmbeddingFileError, UsageError


def embedding(tokens=6, width=8, *, dtype=torch.float32, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, width, generator=generator).to(dtype)
    plain = ImageEmbedding(rows, (1, 4, 6), (100, 50), (84, 56), f"{seed:064x}")
    return replace(plain, **changes)


def rich(seed=0):
    """An embedding in which nothing is left out."""
    plain = embedding(seed=seed, dtype=torch.bfloat16)
    rows = plain.embeddings
    return embedding(
        seed=seed,
        dtype=torch.bfloat16,
        grid_thw=(2, 2, 6),
        deepstack=(rows + 1, rows * 2),
        pooled=torch.arange(10.0).view(2, 5),
        token_ids=tuple(range(10**9, 10**9 + 6)),
        text_alias="<image ü\n>",
        bidirectional_spans=((0, 4), (4, 6)),
        tile_tokens=(4, 2),
        seconds_per_grid=1 / 3,
        timestamps=(0.1, 0.7),
        is_video=True,
    )


def assert_same(first, second):
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert tensor.dtype == second.tensors[name].dtype, name
        assert torch.equal(tensor, second.tensors[name]), name
    for name in vars(first).keys() - {"embeddings", "deepstack", "pooled"}:
        assert getattr(first, name) == getattr(second, name), name


def test_tensors_have_names_and_sizes():
    plain = embedding()
    assert plain.tile_tokens == (6,)
    assert list(plain.tensors) == ["embeddings"]
    assert plain.nbytes == 6 * 8 * 4
    assert list(rich().tensors) == ["embeddings", "deepstack.0", "deepstack.1", "pooled"]
    assert rich().nbytes == 3 * 6 * 8 * 2 + 2 * 5 * 4


def test_ids_and_alias_make_a_new_embedding():
    plain = embedding()
    named = plain.with_token_ids(range(6)).with_alias("<a>")
    assert (named.token_ids, named.text_alias) == ((0, 1, 2, 3, 4, 5), "<a>")
    assert (plain.token_ids, plain.text_alias) == ((), None)
    assert named.embeddings is plain.embeddings
    assert named.with_alias(None).text_alias is None


def test_invalid_ids_and_aliases_are_rejected():
    for ids in (range(5), [0, 1, 2, 3, 4, -1], [0.0] * 6, [True] * 6, [2**63] * 6):
        with pytest.raises(UsageError, match="one integer"):
            embedding().with_token_ids(ids)
    for alias in ("", 3, b"a"):
        with pytest.raises(UsageError, match="text_alias"):
            embedding().with_alias(alias)


def test_moving_takes_all_tensors_and_copies_on_request():
    whole = rich()
    assert_same(whole.to("cpu"), whole)
    assert whole.to("cpu").embeddings is whole.embeddings
    copy = whole.to("cpu", copy=True)
    assert_same(copy, whole)
    assert all(copy.tensors[name].data_ptr() != tensor.data_ptr() for name, tensor in whole.tensors.items())
    moved = whole.to("meta")
    assert {tensor.device.type for tensor in moved.tensors.values()} == {"meta"}
    assert moved.timestamps == whole.timestamps


def test_several_come_back_in_order(tmp_path):
    path = tmp_path / "all.safetensors"
    rows = torch.randn(12, 8)
    halves = [embedding(seed=seed).with_tensors({"embeddings": part}) for seed, part in enumerate(rows.split(6))]
    several = [rich(), *halves, halves[0], embedding(tokens=3, width=20, dtype=torch.float16, tile_tokens=(3,))]
    save_embeddings(path, several)
    again = load_embeddings(path)
    assert len(again) == 5
    for first, second in zip(again, several, strict=True):
        assert_same(first, second)
    save_embeddings(path, [])
    assert load_embeddings(path) == []
    with pytest.raises(EmbeddingFileError, match="must hold one embedding, got 0"):
        ImageEmbedding.load(str(path))
    assert list(tmp_path.iterdir()) == [path]
    # A device that is none, or not here, is found even where there is nothing to put on it.
    for device, error in (("meta", BackendUnavailableError), ("attic", UsageError)):
        with pytest.raises(error, match=device):
            load_embeddings(path, device=device)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_embedding_survives_a_file(tmp_path, data):
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


@pytest.fixture
def saved(tmp_path):
    rich().save(tmp_path / "rich.safetensors")
    return tmp_path / "rich.safetensors"


def change_file(path, metadata=None, tensors=None, **fields):
    """Replaces metadata of a file, tensors (``None`` removes one) and ``fields`` of its one embedding."""
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a handle, no mapping)
        described = dict(file.metadata())
    (first,) = json.loads(described["embeddings"])
    described = {**described, "embeddings": json.dumps([{**first, **fields}]), **(metadata or {})}
    stored = {name: tensor for name, tensor in {**stored, **(tensors or {})}.items() if tensor is not None}
    save_file(stored, path, metadata=described)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("grid_thw", [[1, 2], [0, 2, 2], [1.5, 2, 2], "abc", None]),
        ("original_size", [[10, -1], [True, True]]),
        ("processed_size", [[2**70, 1]]),
        ("content_hash", [5]),
        ("token_ids", [[1, 2], [-1] * 6]),
        ("text_alias", [["a"]]),
        ("bidirectional_spans", [[[0, 7]], [[3, 3]], [[0]], ["ab"], 4]),
        ("tile_tokens", [[5], [7, -1]]),
        ("seconds_per_grid", [-1.0, math.nan, 10**400, "1"]),
        ("timestamps", [[1.0], [1.0, math.inf]]),
        ("deepstack_levels", [1, 10**9, -1, "2"]),
        ("pooled", [False, 1]),
        ("is_video", [False, None, 1]),
    ],
)
def test_invalid_metadata_is_rejected_by_name(saved, name, values):
    change_file(saved)
    assert_same(ImageEmbedding.load(saved), rich())
    for value in values:
        change_file(saved, **{name: value})
        with pytest.raises(EmbeddingFileError, match=rf"rich\.safetensors.*({name}|tensors)"):
            ImageEmbedding.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0.embeddings": torch.zeros(6)}, "tensors"),
        ({"0.embeddings": torch.zeros(6, 8, dtype=torch.int8)}, "tensors"),
        ({"0.deepstack.0": torch.zeros(5, 8, dtype=torch.bfloat16)}, "tensors"),
        ({"0.deepstack.1": torch.zeros(6, 8)}, "tensors"),
        ({"0.pooled": torch.zeros(2, 5, 1)}, "tensors"),
        ({"extra": torch.zeros(1)}, "only in"),
        ({"0.pooled": None}, "only in"),
        ({"format": "pt"}, "must be of format"),
        ({"version": "2"}, "must be of format"),
        *(({"embeddings": text}, "not JSON") for text in ("", "{", "[" * 100_000)),
        *(({"embeddings": text}, "not a list") for text in ("{}", "[3]")),
        ({"embeddings": "[{}]"}, "does not say which"),
        ({"embeddings": json.dumps([{"deepstack_levels": 4, "pooled": False}] * 5000)}, "does not say which"),
        ({"embeddings": "[]"}, "lists 0 tensors"),
    ],
)
def test_other_tensors_and_formats_are_rejected(saved, changes, message):
    is_metadata = all(isinstance(value, str) for value in changes.values())
    change_file(saved, **{"metadata" if is_metadata else "tensors": changes})
    with pytest.raises(EmbeddingFileError, match=rf"rich\.safetensors.*({message})"):
        load_embeddings(saved)


def test_damaged_files_are_rejected(saved, tmp_path):
    whole = saved.read_bytes()
    path = tmp_path / "damaged.safetensors"
    for data in (b"", b"1234", whole[:20], whole[:-1], whole + b"x", b"\xff" * 64, pickle.dumps("a" * 99)):
        path.write_bytes(data)
        with pytest.raises(EmbeddingFileError, match="damaged"):
            load_embeddings(path)
    with pytest.raises(EmbeddingFileError, match="no such file"):
        load_embeddings(tmp_path / "nowhere.safetensors")
    with pytest.raises(EmbeddingFileError, match="not an ordinary file"):
        load_embeddings(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_raise_only_file_errors(saved, data):
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


def test_a_file_is_written_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    before = saved.read_bytes()

    def interrupted(self, target):
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
def test_a_file_keeps_its_permissions(tmp_path):
    plain, kept = tmp_path / "plain", tmp_path / "embeddings.safetensors"
    plain.write_bytes(b"")
    embedding().save(kept)
    assert stat.S_IMODE(kept.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    for mode in (0o664, 0o640, 0o604):
        kept.chmod(mode)
        embedding(seed=mode).save(kept)
        assert stat.S_IMODE(kept.stat().st_mode) == mode
        assert_same(ImageEmbedding.load(kept), embedding(seed=mode))


def test_repr_shows_shape_without_values():
    assert repr(embedding()) == "<ImageEmbedding [6, 8] torch.float32 on cpu, grid (1, 4, 6)>"
    assert "2 deepstack levels, pooled, alias '<image ü\\n>'" in repr(rich())

"""Requests to the hub, and the error for every way a model cannot be found.  No network: the hub is a folder."""

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from tritontower.checkpoint.checkpoint import Checkpoint
from tritontower.checkpoint.files import Layout
from tritontower.checkpoint.hub import fetch_shards, locate
from tritontower.errors import (
    CheckpointIncompleteError,
    CheckpointNotFoundError,
    TowerError,
    UnsafeFormatError,
    UnsafePathError,
    UsageError,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "org/name"
PREFIXES = {"visual.": ""}
EXPECTED = "model must be a local folder, or a hub id such as 'org/name', got"
NOT_THERE = f"{EXPECTED} .*does not exist"


class FakeHub:
    """A repository that copies its files into a cache with the hub's layout, and records requests."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.files: dict[str, bytes] = {"config.json": b"{}"}
        self.requests: list[tuple[str, str | None]] = []
        self.options: list[dict[str, Any]] = []
        self.failures: dict[str, Exception] = {}  # by file name; "*": every file; "": the list of files
        self.listings: list[tuple[str | None, str | None]] = []

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.requests]

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None, **options: Any) -> str:
        self.requests.append((filename, revision))
        self.options.append(options)
        failure = self.failures.get("*", self.failures.get(filename))
        if failure is not None:
            raise failure
        if repo_id != MODEL or filename not in self.files:
            raise errors.LocalEntryNotFoundError(f"no {filename}")
        repository = self.cache / "models--org--name"
        blob, link = repository / "blobs" / filename, repository / "snapshots" / COMMIT / filename
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(self.files[filename])
        if not link.exists():
            link.symlink_to(Path("../../blobs") / filename)
        return str(link)

    def list_repo_files(self, repo_id: str, *, revision: str | None, token: str | None) -> list[str]:
        self.listings.append((revision, token))
        if "" in self.failures:
            raise self.failures[""]
        return list(self.files)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", fake.list_repo_files)
    return fake


def weights(folder: Path, *names: str) -> bytes:
    path = folder / "weights"
    save_file({name: torch.ones(2) for name in names}, path)
    return path.read_bytes()


def test_local_folder_takes_precedence_and_needs_no_hub(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / MODEL
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for model, expected in ((folder, folder), (str(folder), folder), (MODEL, Path(MODEL)), (f"~/{MODEL}", folder)):
        assert locate(model) == expected
        fetch_shards(expected, PREFIXES)
    assert hub.requests == []


def index(**weight_map: str) -> bytes:
    return json.dumps({"weight_map": weight_map}).encode()


HF_INDEX, NATIVE_INDEX = "model.safetensors.index.json", "consolidated.safetensors.index.json"
FIRST, SECOND = "consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors"
A, B, C, SINGLE, NATIVE = (f"{name}.safetensors" for name in ("a", "b", "c", "model", "consolidated"))
BOTH = ("visual.one", "visual.two")
SHARDS = index(**{"visual.one": A, "lm.1": B, "visual.two": C})
NATIVE_SHARDS = index(**{"visual.one": SECOND, "visual.two": SECOND, "output": FIRST})
Contents = dict[str, tuple[str, ...] | bytes]
FETCHED: dict[str, tuple[Layout, Contents, list[str]]] = {
    # layout, files (names of tensors, or bytes), fetched weight files
    "single": ("hf", {SINGLE: BOTH}, [SINGLE]),
    "shards": ("hf", {A: ("visual.one", "lm.0"), B: ("lm.1",), C: ("visual.two",), HF_INDEX: SHARDS}, [A, C]),
    "native single": ("mistral", {NATIVE: BOTH, SINGLE: ("visual.x",)}, [NATIVE]),
    "native shards": ("mistral", {SECOND: BOTH, NATIVE_INDEX: NATIVE_SHARDS}, [SECOND]),
    "native numbered": ("mistral", {FIRST: ("output", "visual.two"), SECOND: ("visual.one",)}, [FIRST, SECOND]),
}


@pytest.mark.parametrize(("layout", "files", "fetched"), FETCHED.values(), ids=FETCHED)
def test_only_files_with_vision_tensors_are_fetched(
    tmp_path: Path, hub: FakeHub, layout: Layout, files: Contents, fetched: list[str]
) -> None:
    for name, content in files.items():
        hub.files[name] = content if isinstance(content, bytes) else weights(tmp_path, *content)
    hub.files["tokenizer.json"] = b"{}"
    folder = locate(MODEL, revision="v1.0")
    assert folder.name == COMMIT
    processors = ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"]
    assert hub.names == ["config.json", "params.json", *processors, HF_INDEX]
    fetch_shards(folder, PREFIXES, layout=layout, token="secret")
    assert [name for name in hub.names[6:] if name in files and name != NATIVE_INDEX] == fetched
    assert hub.requests[0] == ("config.json", "v1.0")
    assert {revision for _, revision in hub.requests[1:]} == {COMMIT}, "all files come from one commit"
    assert hub.listings == ([(COMMIT, "secret")] if fetched == [FIRST, SECOND] else [])
    tensors = Checkpoint.open(folder, prefixes=PREFIXES, layout=layout).weights
    assert set(tensors) == {"one", "two"}


@pytest.fixture
def native(hub: FakeHub) -> FakeHub:
    """A repository with only Mistral's own layout."""
    hub.files = {"params.json": b"{}", "tekken.json": b"{}", "README.md": b""}
    return hub


def test_repository_without_config_is_located_by_its_params(native: FakeHub) -> None:
    folder = locate(MODEL, revision="main")
    assert (folder / "params.json").is_file()
    assert native.requests[:2] == [("config.json", "main"), ("params.json", "main")]
    assert {revision for _, revision in native.requests[2:]} == {COMMIT}
    assert "tekken.json" not in native.names


@pytest.mark.parametrize("how", ["local_files_only", "offline mode"])
def test_native_numbered_files_are_found_in_the_cache(tmp_path: Path, native: FakeHub, how: str) -> None:
    native.files |= {FIRST: weights(tmp_path, "output"), SECOND: weights(tmp_path, "visual.one")}
    folder = locate(MODEL)
    fetch_shards(folder, PREFIXES, layout="mistral")
    native.failures[""] = errors.OfflineModeIsEnabled("details")
    native.listings.clear()
    fetch_shards(folder, PREFIXES, layout="mistral", local_files_only=how == "local_files_only")
    assert len(native.listings) == (how == "offline mode")
    (folder / SECOND).unlink()
    with pytest.raises(CheckpointIncompleteError, match="1 of 2 numbered files"):
        fetch_shards(folder, PREFIXES, layout="mistral", local_files_only=True)


@pytest.mark.parametrize(
    ("layout", "files", "error", "text"),
    [
        ("hf", [], CheckpointNotFoundError, "org/name has neither model.safetensors nor model.safetensors.index"),
        ("hf", ["pytorch_model.bin"], UnsafeFormatError, "only as pickles (pytorch_model.bin)"),
        ("hf", ["x.pth", "consolidated.safetensors"], CheckpointNotFoundError, "has neither"),
        ("mistral", [], CheckpointNotFoundError, "org/name has neither consolidated.safetensors nor consolidated."),
        ("mistral", ["consolidated.00.pth"], UnsafeFormatError, "consolidated.00.pth"),
        ("mistral", ["consolidated.00.pth", "model.safetensors"], CheckpointNotFoundError, "has neither"),
    ],
)
def test_repository_without_usable_weights(
    hub: FakeHub, layout: Layout, files: list[str], error: type[TowerError], text: str
) -> None:
    hub.files |= dict.fromkeys(files, b"")
    folder = locate(MODEL)
    with pytest.raises(error, match=re.escape(text)):
        fetch_shards(folder, PREFIXES, layout=layout)
    assert not set(files) & set(hub.names)
    hub.failures[""] = ConnectionError("details")
    with pytest.raises(CheckpointNotFoundError, match=r"the list of files cannot be fetched \(ConnectionError\)"):
        fetch_shards(folder, PREFIXES, layout=layout)


def test_options_reach_every_request(tmp_path: Path, hub: FakeHub) -> None:
    hub.files["model.safetensors"] = weights(tmp_path, "visual.one")
    folder = locate(MODEL, token="secret", cache_dir=hub.cache, local_files_only=True)
    fetch_shards(folder, PREFIXES, token="secret", local_files_only=True)
    assert all(
        options == {"token": "secret", "cache_dir": hub.cache, "local_files_only": True} for options in hub.options
    )


def test_unsafe_shard_name_is_never_requested(hub: FakeHub) -> None:
    hub.files |= {HF_INDEX: index(**{"visual.one": A, "visual.two": "../../evil.safetensors"}), A: b""}
    folder = locate(MODEL)
    hub.requests.clear()
    with pytest.raises(UnsafePathError):
        fetch_shards(folder, PREFIXES)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        ("https://huggingface.co/org/name", UsageError, EXPECTED),
        ("no-such-folder", CheckpointNotFoundError, NOT_THERE),
        ("./org/name", CheckpointNotFoundError, NOT_THERE),
        ("./file", UsageError, r"got the file .*; pass its folder"),
        ("a/b/c", CheckpointNotFoundError, NOT_THERE),
        ("", UsageError, EXPECTED),
        ("~no-such-user-here/model", CheckpointNotFoundError, "cannot be looked up"),
        ("x" * 5000, CheckpointNotFoundError, "cannot be looked up"),
        (Path("org/name"), CheckpointNotFoundError, NOT_THERE),
    ],
)
def test_invalid_model_names_are_not_requested(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str | Path, error: type[TowerError], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(error, match=text):
        locate(model)
    assert hub.requests == []


def without_response(kind: type[Exception]) -> Exception:
    return kind.__new__(kind)  # their constructors need a response


FAILURES = {
    "offline": (errors.LocalEntryNotFoundError("https://long\ndetails"), "not in the local cache"),
    "offline mode": (errors.OfflineModeIsEnabled("details"), "HF_HUB_OFFLINE unset"),
    "connection": (ConnectionError("details"), r"cannot be fetched \(ConnectionError\)"),
    "neither an OSError nor the hub's": (EOFError("0x7f00"), r"cannot be fetched \(EOFError\)"),
    "gated": (without_response(errors.GatedRepoError), "the repository is gated"),
    "no repository": (without_response(errors.RepositoryNotFoundError), "no such repository, or a private one"),
    "no revision": (without_response(errors.RevisionNotFoundError), "no such revision"),
    "no file": (without_response(errors.RemoteEntryNotFoundError), r"or params\.json is not in the repository"),
}


@pytest.mark.parametrize(("failure", "text"), FAILURES.values(), ids=FAILURES)
def test_failure_is_explained_in_one_line(hub: FakeHub, failure: Exception, text: str) -> None:
    hub.failures["*"] = failure
    with pytest.raises(CheckpointNotFoundError, match=text) as caught:
        locate(MODEL, revision="v2", token="secret")
    message = str(caught.value)
    assert message.startswith("org/name at revision 'v2': config.json ")
    assert message.isprintable(), "one line"
    assert "secret" not in message
    assert isinstance(caught.value, OSError)


def test_failure_on_an_optional_file_is_an_error(hub: FakeHub) -> None:
    hub.failures["processor_config.json"] = ConnectionError()
    with pytest.raises(CheckpointNotFoundError, match=r"processor_config\.json cannot be fetched"):
        locate(MODEL)


def test_real_hub_offline_is_explained_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="not in the local cache") as caught:
        locate(MODEL, cache_dir=tmp_path, local_files_only=True)
    assert str(caught.value).isprintable()

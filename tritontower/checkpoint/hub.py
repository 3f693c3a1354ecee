"""Locates a model's folder: a local one, or the needed files of a repository on the Hugging Face hub.

The hub provides the configuration files and only the weight shards with vision tensors: 1.3 of the 16 gigabytes of a 7B
model, if its shards are split that way.  All files come from one commit: the one that the revision named when
``config.json`` was fetched (or ``params.json``, in repositories with only Mistral's own files).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tritontower.errors import CheckpointNotFoundError, UsageError, shorten

from .files import INDEX_NAMES, SINGLE_NAMES, Layout, Prefixes, list_numbered_files, list_shards, reject_pickles

CONFIG_NAME: Final = "config.json"
MISTRAL_CONFIG_NAME: Final = "params.json"
_OPTIONAL_NAMES: Final = (
    MISTRAL_CONFIG_NAME,
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    INDEX_NAMES["hf"],
)
_PICKLE_NAMES: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_EXPECTED: Final = "must be a local folder, or a hub id such as 'org/name'"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def locate(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Returns the folder with the checkpoint's configuration; :func:`fetch_shards` then fetches its weights.

    Args:
        model: a local folder, or a hub id such as ``"Qwen/Qwen2-VL-2B-Instruct"``.  An existing folder takes precedence.
        revision, token, cache_dir, local_files_only: as in ``huggingface_hub``; no effect for a local folder.

    Raises:
        UsageError: a URL, or a file instead of its folder.
        CheckpointNotFoundError: there is no such folder or repository, or it cannot be reached.
    """
    text = str(model)
    if not isinstance(model, (str, Path)) or not text or "://" in text:
        raise UsageError(f"model {_EXPECTED}, got {shorten(model)}")
    try:
        folder = Path(model).expanduser()
        if folder.is_dir():
            return folder
        is_file = folder.is_file()
    except (OSError, RuntimeError) as error:  # too long a name, a folder without permission, an unknown ~user
        raise CheckpointNotFoundError(f"model {shorten(text)} cannot be looked up ({type(error).__name__})") from error
    if is_file:
        raise UsageError(f"model {_EXPECTED}, got the file {shorten(text)}; pass its folder")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(text):
        raise CheckpointNotFoundError(f"model {_EXPECTED}, got {shorten(text)}, which does not exist")
    hub = _Hub(text, revision, token, cache_dir, local_files_only)
    folder = hub.fetch_first(CONFIG_NAME, MISTRAL_CONFIG_NAME).parent
    hub = _Hub(text, _commit(folder) or revision, token, cache_dir, local_files_only)
    for name in _OPTIONAL_NAMES:
        hub.fetch_optional(name)
    return folder


def fetch_shards(
    folder: Path, prefixes: Prefixes, *, layout: Layout = "hf", token: str | None = None, local_files_only: bool = False
) -> None:
    """Fetches the weight files with vision tensors, if ``folder`` is in the hub's cache; otherwise does nothing.

    Without an index, all of Mistral's numbered files are fetched.

    Args:
        folder: the result of :func:`locate`.
        prefixes, layout: as for :meth:`tritontower.checkpoint.checkpoint.Checkpoint.open`.
        token, local_files_only: as in ``huggingface_hub``.

    Raises:
        CheckpointNotFoundError: a file cannot be fetched.
        UnsafeFormatError: the repository has only pickles.
        UnsafePathError, CheckpointIncompleteError, CheckpointCorruptError: the index cannot be used.
        CheckpointAmbiguousError: numbered files of several sets.
    """
    commit = _commit(folder)
    if commit is None:
        return
    kind, *parts = folder.parents[1].name.split("--")
    if kind != "models" or not parts:
        return
    hub = _Hub("/".join(parts), commit, token, folder.parents[2], local_files_only)
    if (folder / INDEX_NAMES[layout]).is_file() or (layout != "hf" and hub.fetch_optional(INDEX_NAMES[layout])):
        for shard in list_shards(folder, prefixes, layout):
            hub.fetch(shard)
    elif hub.fetch_optional(SINGLE_NAMES[layout]) is None:
        _fetch_unlisted(hub, folder, layout)


def _fetch_unlisted(hub: "_Hub", folder: Path, layout: Layout) -> None:
    if layout == "mistral":
        names = hub.list_files() or [entry.name for entry in folder.iterdir()]
        numbered = list_numbered_files(hub.repository, names)
        for name in numbered:
            hub.fetch(name)
        if numbered:
            return
        pickles = [] if any(name.endswith(".safetensors") for name in names) else names
    else:
        pickles = [name for name in _PICKLE_NAMES if hub.has(name)]
    reject_pickles(hub.repository, pickles)
    raise CheckpointNotFoundError(f"{hub.repository} has neither {SINGLE_NAMES[layout]} nor {INDEX_NAMES[layout]}")


def _commit(folder: Path) -> str | None:
    """The commit of ``folder``, if it is a snapshot in the hub's cache."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


@dataclass(frozen=True)
class _Hub:
    """One repository at one revision."""

    repository: str
    revision: str | None
    token: str | None
    cache_dir: str | Path | None
    local_files_only: bool

    def fetch(self, name: str) -> Path:
        """Returns the local path of the file ``name``, after downloading it if needed."""
        from huggingface_hub import errors, hf_hub_download

        try:
            return Path(
                hf_hub_download(
                    self.repository,
                    name,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                )
            )
        except errors.HFValidationError as error:
            raise UsageError(f"{shorten(self.repository)} must be a hub id such as 'org/name'") from error
        except Exception as error:  # also the transport's own exceptions, which differ between the hub's releases
            raise CheckpointNotFoundError(f"{self._at()}: {name} {_reason(error)}") from error

    def fetch_optional(self, name: str) -> Path | None:
        """Like :meth:`fetch`, but ``None`` if the repository (or, offline, the cache) has no such file."""
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return self.fetch(name)
        except CheckpointNotFoundError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                return None
            raise

    def fetch_first(self, name: str, otherwise: str) -> Path:
        """Like :meth:`fetch`, but of the file ``otherwise`` if there is no ``name``."""
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return self.fetch(name)
        except CheckpointNotFoundError as error:
            if not isinstance(error.__cause__, EntryNotFoundError):
                raise
            path = self.fetch_optional(otherwise)
            if path is None:
                reason = _reason(error.__cause__)
                raise CheckpointNotFoundError(f"{self._at()}: {name} (or {otherwise}) {reason}") from error.__cause__
            return path

    def list_files(self) -> list[str]:
        """Lists the repository's files; none offline.

        Raises:
            CheckpointNotFoundError: the hub cannot be reached.
        """
        from huggingface_hub import errors, list_repo_files

        if self.local_files_only:
            return []
        try:
            return list_repo_files(self.repository, revision=self.revision, token=self.token)
        except errors.OfflineModeIsEnabled:
            return []
        except Exception as error:  # as in fetch
            raise CheckpointNotFoundError(f"{self._at()}: the list of files {_reason(error)}") from error

    def has(self, name: str) -> bool:
        """Tells if the repository has the file ``name``; ``False`` if the hub cannot be reached."""
        from huggingface_hub import file_exists

        if self.local_files_only:
            return False
        try:
            return file_exists(self.repository, name, revision=self.revision, token=self.token)
        except Exception:  # as in fetch
            return False

    def _at(self) -> str:
        return f"{self.repository} at revision {shorten(self.revision)}" if self.revision else self.repository


def _reason(error: Exception) -> str:
    """Explains in one line why a file could not be fetched; the hub's own messages are several, with URLs."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "cannot be fetched: the repository is gated; request access on its page and pass token=..."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "cannot be fetched: no such repository, or a private one; check the id, or pass token=..."
    if isinstance(error, errors.RevisionNotFoundError):
        return "cannot be fetched: no such revision"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return (
            "is not in the local cache and the hub cannot be reached; go online (HF_HUB_OFFLINE unset, "
            "local_files_only=False), or pass a local folder"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return "is not in the repository"
    return f"cannot be fetched ({type(error).__name__})"

"""Model → local folder: a folder that is there already, or the needed files of a repository on the Hugging Face hub.

From the hub come the configuration files and, of the weights, only the shards that hold vision tensors: 1.3 of the 16
gigabytes of a 7B model, where its shards are cut that way.  Everything is fetched at the one commit that the revision
stood for when ``config.json`` (or ``params.json``, in repositories that have only Mistral's own files) was fetched.
"""

import re
from pathlib import Path
from typing import Final

from tritontower.errors import CheckpointNotFoundError, UsageError, shorten

from .files import INDEX_NAMES, SINGLE_NAMES, Layout, Prefixes, numbered_files, refuse_pickles, shards_with_prefix

__all__ = ["CONFIG_NAME", "fetch_shards", "locate"]

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
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def locate(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder with the checkpoint's configuration; its weights may still have to come, by :func:`fetch_shards`.

    That is ``config.json``, or ``params.json`` in a repository that has only Mistral's own files.

    Args:
        model: a local folder, or a hub id such as ``"Qwen/Qwen2-VL-2B-Instruct"``.  A folder that exists wins over a
            hub id that is spelled the same.
        revision, token, cache_dir, local_files_only: as in ``huggingface_hub``; of no effect for a local folder.

    Raises:
        UsageError: a URL, or a file instead of its folder.
        CheckpointNotFoundError: there is no such folder or repository, or it cannot be reached.
    """
    if not isinstance(model, (str, Path)):
        raise UsageError(f"model is {shorten(model)}; pass a local folder, or a hub id such as 'org/name'")
    text = str(model)
    if not text:
        raise UsageError("model is empty; pass a local folder, or a hub id such as 'org/name'")
    if "://" in text:
        raise UsageError(f"model {shorten(text)} is a URL; pass a local folder, or a hub id such as 'org/name'")
    try:
        folder = Path(model).expanduser()
        if folder.is_dir():
            return folder
        is_file = folder.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder without permission, an unknown ~user
        raise CheckpointNotFoundError(f"model {shorten(text)} cannot be looked up ({type(error).__name__})") from error
    if is_file:
        raise UsageError(f"model {shorten(text)} is a file; pass the folder that it is in")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(text):
        raise CheckpointNotFoundError(
            f"model {shorten(text)} is neither a local folder nor a hub id such as 'org/name'"
        )
    hub = _Hub(text, revision, token, cache_dir, local_files_only)
    folder = hub.fetch_first(CONFIG_NAME, MISTRAL_CONFIG_NAME).parent
    hub = _Hub(text, _commit(folder) or revision, token, cache_dir, local_files_only)
    for name in _OPTIONAL_NAMES:
        hub.fetch_if_there(name)
    return folder


def fetch_shards(
    folder: Path, prefixes: Prefixes, *, layout: Layout = "hf", token: str | None = None, local_files_only: bool = False
) -> None:
    """Fetches the weight files of ``folder`` that hold vision tensors, if it lies in the hub's cache; else does nothing.

    Mistral's numbered files without an index are all fetched, since nothing says which of them hold the tower.

    Args:
        folder: what :func:`locate` returned.
        prefixes: as for :meth:`tritontower.checkpoint.checkpoint.Checkpoint.open`.
        layout: whose names the weight files have, as there.
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
    if (folder / INDEX_NAMES[layout]).is_file() or (layout != "hf" and hub.fetch_if_there(INDEX_NAMES[layout])):
        for shard in shards_with_prefix(folder, prefixes, layout):
            hub.fetch(shard)
    elif hub.fetch_if_there(SINGLE_NAMES[layout]) is None:
        _fetch_unlisted(hub, folder, layout)


def _fetch_unlisted(hub: "_Hub", folder: Path, layout: Layout) -> None:
    """Fetches what has neither an index nor the name of a single file, or says what the repository has instead."""
    if layout == "mistral":
        names = hub.list_files() or [entry.name for entry in folder.iterdir()]
        numbered = numbered_files(hub.repository, names)
        for name in numbered:
            hub.fetch(name)
        if numbered:
            return
        pickles = [] if any(name.endswith(".safetensors") for name in names) else names
    else:
        pickles = [name for name in _PICKLE_NAMES if hub.has(name)]
    refuse_pickles(hub.repository, pickles)
    raise CheckpointNotFoundError(f"{hub.repository} holds neither {SINGLE_NAMES[layout]} nor {INDEX_NAMES[layout]}")


def _commit(folder: Path) -> str | None:
    """The commit that ``folder`` is the snapshot of, where it is one of the hub's cache."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


class _Hub:
    """One repository at one revision."""

    def __init__(
        self,
        repository: str,
        revision: str | None,
        token: str | None,
        cache_dir: str | Path | None,
        local_files_only: bool,
    ) -> None:
        self.repository = repository
        self.revision = revision
        self._token = token
        self._cache_dir = cache_dir
        self._local_files_only = local_files_only

    def fetch(self, name: str) -> Path:
        """The local path of the file ``name``, downloaded if it is not there yet."""
        from huggingface_hub import errors, hf_hub_download

        try:
            return Path(
                hf_hub_download(
                    self.repository,
                    name,
                    revision=self.revision,
                    token=self._token,
                    cache_dir=self._cache_dir,
                    local_files_only=self._local_files_only,
                )
            )
        except errors.HFValidationError as error:
            raise UsageError(f"{shorten(self.repository)} is not a valid hub id; it is spelled 'org/name'") from error
        except Exception as error:  # the transport's own exceptions too, which differ between the hub's releases
            raise CheckpointNotFoundError(f"{self._at()}: {name} {_reason(error)}") from error

    def fetch_if_there(self, name: str) -> Path | None:
        """As :meth:`fetch`, but ``None`` where the repository (or, offline, the cache) has no such file."""
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return self.fetch(name)
        except CheckpointNotFoundError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                return None
            raise

    def fetch_first(self, name: str, otherwise: str) -> Path:
        """As :meth:`fetch`, but of the file ``otherwise`` where there is no ``name``."""
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return self.fetch(name)
        except CheckpointNotFoundError as error:
            if not isinstance(error.__cause__, EntryNotFoundError):
                raise
            path = self.fetch_if_there(otherwise)
            if path is None:
                reason = _reason(error.__cause__)
                raise CheckpointNotFoundError(f"{self._at()}: {name} (or {otherwise}) {reason}") from error.__cause__
            return path

    def list_files(self) -> list[str]:
        """The repository's files; none where the hub is not to be reached.

        Raises:
            CheckpointNotFoundError: it is to be reached, and cannot be.
        """
        from huggingface_hub import errors, list_repo_files

        if self._local_files_only:
            return []
        try:
            return list_repo_files(self.repository, revision=self.revision, token=self._token)
        except errors.OfflineModeIsEnabled:
            return []
        except Exception as error:  # as in fetch
            raise CheckpointNotFoundError(f"{self._at()}: the list of files {_reason(error)}") from error

    def has(self, name: str) -> bool:
        """Whether the repository has the file ``name``; ``False`` where that cannot be found out."""
        from huggingface_hub import file_exists

        if self._local_files_only:
            return False
        try:
            return file_exists(self.repository, name, revision=self.revision, token=self._token)
        except Exception:  # as in fetch
            return False

    def _at(self) -> str:
        return f"{self.repository} at revision {shorten(self.revision)}" if self.revision else self.repository


def _reason(error: Exception) -> str:
    """Why a file could not be fetched and what to do, in one line; the hub's own texts are several, with URLs."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "cannot be fetched: the repository is gated; ask for access on its page and pass token=..."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "cannot be fetched: no such repository, or a private one; check the id, or pass token=..."
    if isinstance(error, errors.RevisionNotFoundError):
        return "cannot be fetched: no such revision"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return (
            "is not in the local cache and the hub is not reached; go online (HF_HUB_OFFLINE unset, "
            "local_files_only=False), or pass a local folder"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return "is not in the repository"
    return f"cannot be fetched ({type(error).__name__})"

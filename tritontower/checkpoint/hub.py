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

    An existing folder takes precedence over a hub id; the other arguments, as in ``huggingface_hub``, do not affect it.
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
    folder = hub.fetch(CONFIG_NAME, MISTRAL_CONFIG_NAME).parent
    hub = _Hub(text, _commit(folder) or revision, token, cache_dir, local_files_only)
    for name in _OPTIONAL_NAMES:
        hub.fetch_optional(name)
    return folder


def fetch_shards(
    folder: Path, prefixes: Prefixes, *, layout: Layout = "hf", token: str | None = None, local_files_only: bool = False
) -> None:
    """Fetches the weight files with vision tensors, if ``folder`` is in the hub's cache; otherwise does nothing.

    Without an index, all of Mistral's numbered files are fetched.
    """
    commit = _commit(folder)
    if commit is None:
        return
    kind, *parts = folder.parents[1].name.split("--")
    if kind != "models" or not parts:
        return
    hub = _Hub("/".join(parts), commit, token, folder.parents[2], local_files_only)
    index, single = INDEX_NAMES[layout], SINGLE_NAMES[layout]
    if (folder / index).is_file() or (layout != "hf" and hub.fetch_optional(index)):
        for shard in list_shards(folder, prefixes, layout):
            hub.fetch(shard)
        return
    if hub.fetch_optional(single):
        return
    names = hub.list_files() or [entry.name for entry in folder.iterdir()]
    numbered = list_numbered_files(hub.repository, names) if layout == "mistral" else []
    for name in numbered:
        hub.fetch(name)
    if not numbered:
        if not any(name.endswith(".safetensors") for name in names):
            reject_pickles(hub.repository, names)
        raise CheckpointNotFoundError(f"{hub.repository} has neither {single} nor {index}")


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

    def fetch(self, *names: str) -> Path:
        """Returns the local path of the first of ``names`` that exists, after downloading it if needed."""
        from huggingface_hub import errors, hf_hub_download

        absent: Exception | None = None
        for name in names:
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
            except errors.EntryNotFoundError as error:
                absent = absent or error
            except Exception as error:  # also the transport's own exceptions, which differ between the hub's releases
                raise self._error(name, error) from error
        raise self._error(" or ".join(names), absent) from absent

    def fetch_optional(self, name: str) -> Path | None:
        """Like :meth:`fetch`, but ``None`` if the repository (or, offline, the cache) has no such file."""
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return self.fetch(name)
        except CheckpointNotFoundError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                return None
            raise

    def list_files(self) -> list[str]:
        """Lists the repository's files; none offline."""
        from huggingface_hub import errors, list_repo_files

        if self.local_files_only:
            return []
        try:
            return list_repo_files(self.repository, revision=self.revision, token=self.token)
        except errors.OfflineModeIsEnabled:
            return []
        except Exception as error:  # as in fetch
            raise self._error("the list of files", error) from error

    def _error(self, name: str, error: Exception | None) -> CheckpointNotFoundError:
        revision = f" at revision {shorten(self.revision)}" if self.revision else ""
        return CheckpointNotFoundError(f"{self.repository}{revision}: {name} {_explain(error)}")


def _explain(error: Exception | None) -> str:
    # In one line; the hub's own messages are several, with URLs.
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

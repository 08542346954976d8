"""Files of dataset repositories on the Hugging Face Hub: list and checked download of a commit.

huggingface_hub transfers the bytes and resumes. Its exceptions are converted to errors that say what a user can do.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dgbench.download.addresses import without_secrets
from dgbench.download.transfer import FullDiskError, full_disk
from dgbench.errors import DataError


@dataclass(frozen=True, slots=True)
class Listed:
    """A commit of a repository and those of its files that are wanted."""

    repo: str
    revision: str
    licence: str | None
    files: dict[str, int]  # path -> bytes
    sha256: dict[str, str]  # of the large ones


def listing(repo: str, revision: str, patterns: Sequence[str]) -> Listed:
    """Ask the Hub for the commit of a revision and for its files that match.

    Raises: DataError saying what the Hub answered and what to do.
    """
    from fnmatch import fnmatch

    from huggingface_hub import HfApi

    with _explained(repo, revision):
        info = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
    chosen = [f for f in info.siblings or () if any(fnmatch(f.rfilename, pattern) for pattern in patterns)]
    for name in (f.rfilename for f in chosen):
        if not _is_text(name):
            raise DataError(f"{repo} lists a file {name!r}, a name that is no text in UTF-8", "its owner has to rename it")
        if name.startswith(("/", "~")) or "\\" in name or ".." in name.split("/"):
            raise DataError(f"{repo} lists a file {name!r}, which lies outside of it", "do not fetch this repository")
    licence = getattr(info.card_data, "license", None) if info.card_data else None
    return Listed(
        repo,
        str(info.sha),
        licence if isinstance(licence, str) else None,
        {f.rfilename: f.size or 0 for f in chosen},
        {f.rfilename: f.lfs.sha256 for f in chosen if f.lfs is not None},
    )


def fetch(wanted: Listed, folder: Path, again: str) -> None:
    """Download a commit's files into a folder, resuming earlier tries, and check each size and stated sha256.

    Raises: DataError saying what the Hub answered, or which file is damaged (it is removed); FullDiskError.
    """
    from huggingface_hub import snapshot_download

    _check_room(wanted, folder, again)
    names = [_literal(name) for name in wanted.files]
    with _explained(wanted.repo, wanted.revision), full_disk(folder, None, again):
        snapshot_download(wanted.repo, repo_type="dataset", revision=wanted.revision, local_dir=folder, allow_patterns=names)
    for name, size in wanted.files.items():
        path = folder / name
        have = path.stat().st_size if path.is_file() else None
        problem = None
        if have != size:
            problem = f"has {have or 0:,} bytes, the Hub states {size:,}"
        elif name in wanted.sha256 and (digest := _sha256(path)) != wanted.sha256[name]:
            problem = f"is damaged: its sha256 is {digest}, the Hub states {wanted.sha256[name]}"
        if problem:
            path.unlink(missing_ok=True)
            raise DataError(f"{wanted.repo}/{name} {problem}", f"it is removed; {again}")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _literal(name: str) -> str:
    # a file's own name as a pattern
    return re.sub(r"([*?[])", r"[\1]", name)


def _check_room(wanted: Listed, folder: Path, again: str) -> None:
    missing = sum(size for name, size in wanted.files.items() if not (folder / name).is_file())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise FullDiskError(
            f"no room for {wanted.repo}: {missing:,} bytes are missing, {folder.parent} has {free:,} free",
            f"make room there, or point --root or DGBENCH_DATA at a larger disk; then {again}",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _explained(repo: str, revision: str) -> Iterator[None]:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from mfuser.towers.hub import DownloadError, check_token, transport_error

    endpoint = without_secrets(constants.ENDPOINT)
    page, again = f"{endpoint}/datasets/{repo}", "run the same command again"
    try:
        check_token()
        yield
    except DownloadError as unsendable:
        raise DataError(unsendable.message, unsendable.hint) from None
    except (OSError, RuntimeError, HFValidationError, transport_error()) as problem:
        error: BaseException = problem
        while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__
        reason = without_secrets((str(error).strip().splitlines() or [type(error).__name__])[0])
        if isinstance(error, HFValidationError):
            raise DataError(f"`{repo}` is no name of a repository: {reason}", "--hub OWNER/NAME, as on the Hub's page") from None
        if isinstance(error, GatedRepoError):
            raise DataError(
                f"{repo} is gated: its owner asks you to accept the licence first",
                f"accept it at {page}, log in with: hf auth login, and {again}",
            ) from None
        if isinstance(error, RevisionNotFoundError):
            raise DataError(
                f"{repo} has no revision `{revision}`",
                f"{page}/commits/main lists them; --revision takes a branch, a tag or a commit",
            ) from None
        if isinstance(error, RepositoryNotFoundError):
            raise DataError(
                f"the Hub knows no dataset {repo}, or it is private",
                f"check the name at {page}; for a private one log in with: hf auth login",
            ) from None
        if isinstance(error, HfHubHTTPError):
            raise DataError(
                f"{endpoint} does not give out {repo}: it answers {error.response.status_code}",
                f"see https://status.huggingface.co, and {again}",
            ) from None
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise  # the file system's error names its file
        raise DataError(
            f"no connection to {endpoint} for {repo}: {reason}",
            f"check the network and HTTPS_PROXY, then {again}: it goes on where it stopped",
        ) from None


def fetch_one(wanted: Listed, name: str, folder: Path, again: str) -> Path:
    """Download one file of a commit into a folder."""
    fetch(Listed(wanted.repo, wanted.revision, None, {name: wanted.files[name]}, wanted.sha256), folder, again)
    return folder / name

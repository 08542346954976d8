"""Published weights on the Hugging Face Hub: list, local state, and download.

This is the only file of this package that uses the network, and only in `download`. huggingface_hub transfers files to its
cache, and resumes interrupted transfers (those that the user stops start again). Each file is then compared with
the size and the hash that the Hub states; a file that differs is removed, so that the next try starts again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mfuser.towers.files import HubFile, PackagedFile
from mfuser.towers.table import TOWERS
from mfuser.towers.weights import WeightsNotFound, files, how_to_get

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

Check = Literal["size and sha256", "size and git-sha1", "size", "names and shapes"]
BY_TENSORS: Check = "names and shapes"  # of what the Hub states nothing

# status codes after which huggingface_hub retries, a limited number of times
_TRANSIENT = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class Model:
    """One tower: where its weights come from and whether they are here. From-scratch towers have no repository."""

    name: str
    role: Literal["vfm", "vlm", "both", "cnn"]
    repo: str | None
    file: str | None
    gigabytes: float | None
    licence: str | None
    path: str | None  # of the weights on this disk
    missing: tuple[str, ...]  # files that are not here: the weights', the tokenizer's


@dataclass(frozen=True, slots=True)
class Fetched:
    """One file after `download`."""

    name: str  # the tower's, as it was asked for
    state: Literal["downloaded", "copied", "here", "nothing to fetch"]
    repo: str | None = None
    file: str | None = None
    path: str | None = None
    bytes: int | None = None
    checked: Check | None = None  # against what the Hub states


class DownloadError(WeightsNotFound):
    """A file cannot be fetched from the Hub, or is not what the Hub says it is."""


def models() -> list[Model]:
    """Return every tower, by its name in recipes and in `dgbench download`."""
    found: list[Model] = []
    for name, row in TOWERS.items():
        if (file := row.weights) is None:  # trained from scratch
            found.append(Model(name, row.role, None, None, None, None, None, ()))
            continue
        if isinstance(file, PackagedFile):
            found.append(Model(name, row.role, None, file.file, file.gigabytes, file.licence, str(file.where), ()))
            continue
        missing = tuple(part.file for part in row.files if part.where is None)
        path = str(where) if (where := file.where) else None
        found.append(Model(name, row.role, file.repo, file.file, file.gigabytes, file.licence, path, missing))
    return found


def check_token() -> None:
    """Check that the login, if there is one, can be sent.

    Raises: DownloadError, which does not contain the login.
    """
    from huggingface_hub import get_token

    token = get_token()
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise DownloadError(
            "the token of the Hub holds characters that no token has",
            "unset HF_TOKEN, or set it again as https://huggingface.co/settings/tokens shows it, without quotes "
            "and blanks; or log in with: hf auth login",
        )


def without_secrets(text: str) -> str:
    """Return a text whose URLs (HF_ENDPOINT's, a proxy's) are without name, password and query string."""
    bare = re.sub(r"(?<=://)[^/?#\s]*@", "", text)
    return re.sub(r"(://[^\s?#'\"`]*)\?[^\s#'\"`]*", r"\1?...", bare)


def offline() -> str | None:
    """Return the variable that forbids downloads, as `DGBENCH_OFFLINE=1`, or None."""
    from huggingface_hub import constants

    if os.environ.get("DGBENCH_OFFLINE") == "1":
        return "DGBENCH_OFFLINE=1"
    return "HF_HUB_OFFLINE=1" if constants.HF_HUB_OFFLINE else None


def download(towers: Sequence[str], tell: Callable[[str], None] | None = None) -> list[Fetched]:
    """Fetch the towers' files into the Hub cache; what is there already is left alone.

    Args:
        towers: rows of TOWERS, or `timm:<model>`.    tell: is given one line before each transfer.

    Raises: DownloadError if a file cannot be fetched or differs from what the Hub states; files fetched before it stay.
    """
    wanted = [(tower, file) for tower in dict.fromkeys(towers) for file in files(tower)]
    missing = [(tower, file) for tower, file in wanted if file.where is None]
    if missing and (switch := offline()):
        listed = ", ".join(str(file) for _, file in missing)
        raise DownloadError(
            f"{switch} forbids downloads; not on this machine: {listed}", how_to_get(dict.fromkeys(tower for tower, _ in missing))
        )
    fetched = []
    for tower in dict.fromkeys(towers):
        for file in files(tower):
            if path := file.where:
                row = Fetched(tower, "here", file.repo, file.file, str(path), path.stat().st_size)
            else:
                row = _fetch(tower, file, tell or (lambda _: None))
            fetched.append(row)
        for file in files(tower):
            if file.where is None:  # `main` has moved on from the commit that a file was copied to
                _fetch(tower, file, tell or (lambda _: None))
        if not files(tower):
            fetched.append(Fetched(tower, "nothing to fetch"))
    return fetched


def _fetch(tower: str, file: HubFile, tell: Callable[[str], None]) -> Fetched:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    url = hf_hub_url(file.repo, file.file)
    check_token()
    tell(f"{tower}: {file}, licence {file.licence}")
    try:
        stated = None
        try:
            # asked once and not retried: without a network, that fails at once
            stated = get_hf_file_metadata(url)
            _check_space(file, stated)
        except HfHubHTTPError as error:
            if error.response.status_code not in _TRANSIENT:
                raise
        path = Path(hf_hub_download(file.repo, file.file))
        stated = stated or get_hf_file_metadata(url)
    # hf_xet, huggingface_hub's other transfer method, raises RuntimeError
    except (OSError, RuntimeError, transport_error()) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file system's error names its file
        raise _explained(tower, file, error) from error
    return Fetched(tower, "downloaded", file.repo, file.file, str(path), path.stat().st_size, _check(tower, file, path, stated))


def transport_error() -> type[Exception]:
    """Return the error class of the HTTP library that huggingface_hub uses, which depends on its version."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError" and issubclass(kind, Exception))


def _check_space(file: HubFile, stated: HfFileMetadata) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    place = next(folder for folder in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if stated.size is not None and stated.size > free:
        raise DownloadError(
            f"no room for {file.repo}/{file.file}: it has {stated.size:,} bytes, {HF_HUB_CACHE} {free:,} free",
            "free some space there, or point HF_HUB_CACHE at a larger disk",
        )


def stated(file: HubFile) -> HfFileMetadata | None:
    """Return what the Hub states of a file; None where that is forbidden, and where it does not answer."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if offline():
        return None
    check_token()
    try:
        return get_hf_file_metadata(hf_hub_url(file.repo, file.file))
    except (OSError, RuntimeError, transport_error()):
        return None


def compared(path: Path, stated: HfFileMetadata) -> tuple[Check, str | None]:
    """Return how a file was compared with what the Hub states, and how it differs; None if it does not."""
    size, etag = path.stat().st_size, stated.etag or ""
    # the Hub's etag is the sha256 of a large file, and git's object id of a small one
    checked: Check
    if re.fullmatch(r"[0-9a-f]{64}", etag):
        checked, digest = "size and sha256", hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", etag):
        checked, digest = "size and git-sha1", hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    else:
        checked, digest = "size", hashlib.sha256()
    if stated.size is not None and size != stated.size:
        return checked, f"it has {size:,} bytes, the Hub states {stated.size:,}"
    if checked == "size":
        return checked, None
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    return checked, None if found == etag else f"its {checked.split()[-1]} is {found}, the Hub states {etag}"


def _check(tower: str, file: HubFile, path: Path, stated: HfFileMetadata) -> Check:
    """Hold a file against what the Hub states; one that differs is removed."""
    checked, problem = compared(path, stated)
    if problem is not None:
        _remove(path)
        raise DownloadError(
            f"{file.repo}/{file.file} is damaged: {problem}",
            f"it is removed; run again: dgbench download {tower}. If it happens twice, a proxy or a mirror changes files",
        )
    return checked


def _remove(path: Path) -> None:
    # names in the cache are links to blobs: a blob that is left would count as complete
    while path.is_symlink():
        target = path.parent / os.readlink(path)
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def _explained(tower: str, file: HubFile, error: Exception) -> DownloadError:
    """Return the error in words that a user can act on."""
    from huggingface_hub import constants
    from huggingface_hub.errors import FileMetadataError, GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    # huggingface_hub's own summary of the errors
    while isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    name, endpoint = f"{file.repo}/{file.file}", without_secrets(constants.ENDPOINT)
    reason = without_secrets((str(error).strip().splitlines() or [type(error).__name__])[0])
    again = f"run again: dgbench download {tower}"
    if isinstance(error, GatedRepoError):
        return DownloadError(
            f"{name} is gated: its owner asks you to accept the licence first",
            f"accept it at {endpoint}/{file.repo}, log in with: hf auth login, and {again}",
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        says, hint = _ANSWERS.get(status, ("it answers otherwise", f"see https://status.huggingface.co, and {again}"))
        return DownloadError(f"{endpoint} does not give out {name}: {says} ({status})", hint.format(again=again))
    if isinstance(error, FileMetadataError):
        return DownloadError(f"{endpoint} does not answer as a Hub does: {reason}", "check HF_ENDPOINT, and any proxy between")
    if "Consistency check failed" in reason:
        return DownloadError(f"{name} did not arrive whole: {reason.partition(': ')[2]}", f"it is removed; {again}")
    if isinstance(error, transport_error()):
        hint = f"check the network and HTTPS_PROXY; or, {how_to_get([tower])}"
        return DownloadError(f"no connection to {endpoint} for {name}: {reason}", hint)
    return DownloadError(f"{name} cannot be fetched: {reason}", again)


# status -> what it means, what to do
_ANSWERS = {
    401: (
        "it does not know you, or the repository is private or gone",
        "log in with: hf auth login, or unset HF_TOKEN if it is old; then {again}",
    ),
    403: ("your login may not read it", "see what your token may do at https://huggingface.co/settings/tokens; then {again}"),
    404: (
        "it has no such file",
        "with HF_ENDPOINT set, the mirror may lack it; else see whether a newer dgbench knows its place",
    ),
    429: ("too many requests", "log in with: hf auth login, or wait; then {again}"),
}

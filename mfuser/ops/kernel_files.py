"""Folder of compiled kernels, and checks whether a library may be loaded: it runs with all of its user's permissions."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
from pathlib import Path

_BUILD = re.compile(r"\.build-(?P<host>.*)-(?P<pid>\d+)-[^-]*")


class PlaceError(RuntimeError):
    """There is no folder for compiled kernels; `hint` says how to name one."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message}: {hint}")
        self.message = message
        self.hint = hint


def kernels_dir() -> Path:
    """Return the folder of the libraries: MFUSER_KERNELS, else the user's cache folder; never below the current folder.

    Raises: PlaceError if the variable holds no absolute path, or the user has no home folder.
    """
    if path := os.environ.get("MFUSER_KERNELS"):
        if not Path(path).is_absolute():
            raise PlaceError(
                f"MFUSER_KERNELS is `{path}`, which is no absolute path", f"set it to {os.path.abspath(path)}, or unset it"
            )
        return Path(path)
    # the XDG specification: anything but an absolute path is ignored
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        cache = _home() / ".cache"
    return cache / "mfuser" / "kernels"


def _home() -> Path:
    try:
        home = Path.home()
    except RuntimeError:
        home = Path()
    if not home.is_absolute():
        raise PlaceError("there is no home folder to keep kernels in", "set HOME, or MFUSER_KERNELS to a folder that is yours")
    return home


def distrusted(library: Path) -> str | None:
    """Return why a library of `kernels_dir` must not be loaded, None if it may be.

    It, or a folder from there on, can then be written by others than this user and root.

    Raises: OSError if it is not there.
    """
    if os.name != "posix":
        return None
    top = kernels_dir()
    folders = [folder for folder in library.parents if folder == top or top in folder.parents]
    if not os.environ.get("MFUSER_KERNELS"):
        folders.append(top.parent)
    real = library.resolve()
    for place in dict.fromkeys((library, *folders, real, real.parent)):
        state = place.stat()
        if state.st_uid not in (0, os.getuid()):
            return f"{place} belongs to user {state.st_uid}, neither to you nor to root"
        if state.st_mode & 0o022:
            return f"others may write to {place}: look who did, then `chmod go-w {shlex.quote(str(place))}`"
    return None


def make_folder(folder: Path) -> None:
    """Make a folder and those above it so that only their owner may write, whatever the umask."""
    for place in (*reversed(folder.parents), folder):
        if not place.is_dir():
            place.mkdir(mode=0o755, exist_ok=True)


def build_prefix() -> str:
    """Return the prefix of the folder in which this process compiles."""
    return f".build-{platform.node()}-{os.getpid()}-"


def clear_builds(folder: Path) -> None:
    """Remove files that builds of killed processes left in `folder`."""
    for place in folder.glob(".build-*"):
        found = _BUILD.fullmatch(place.name)
        if found is None or found["host"] != platform.node() or os.name != "posix":
            continue
        try:
            os.kill(int(found["pid"]), 0)
        except ProcessLookupError:
            shutil.rmtree(place, ignore_errors=True)
        except OSError:
            continue

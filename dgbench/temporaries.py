"""Names of temporary files and folders that are renamed when complete, and removal of those of killed processes."""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

# older versions wrote no host, and no `.tmp` after files
_NAME = re.compile(r"\.(?P<of>.+)\.(?:(?P<host>[^./]*)-)?(?P<pid>\d+)(?:\.tmp)?")
_OLD = 7 * 86400.0  # seconds after which another machine's files count as abandoned


def beside(path: Path) -> Path:
    """Return a hidden name in the folder of `path` that only this process uses and that contains its id."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.tmp")


def clear(folder: Path, *, of: str | None = None, shared: bool = False) -> None:
    """Remove temporary files and folders (see `beside`) in `folder` whose process no longer runs.

    Args:
        of: only those of the file or folder of this name.
        shared: the folder may hold other hidden things: only files are removed, and only those whose name ends in `.tmp`.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        found = _NAME.fullmatch(name)
        if found is None or of not in (None, found["of"]) or not _left(folder / name, found["host"], int(found["pid"])):
            continue
        is_folder = (folder / name).is_dir() and not (folder / name).is_symlink()
        if shared and (is_folder or not name.endswith(".tmp")):
            continue
        with suppress(OSError):
            if is_folder:
                shutil.rmtree(folder / name)
            else:
                (folder / name).unlink()


def _host() -> str:
    return platform.node().replace(".", "_")


def _left(path: Path, host: str | None, pid: int) -> bool:
    if os.name == "posix" and host in (None, _host()):
        return not runs(pid)
    try:
        return time.time() - path.lstat().st_mtime > _OLD
    except OSError:
        return False


def runs(pid: int) -> bool:
    """Return whether a process with this id runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    # a worker whose parent was killed stays a zombie if no process waits for it, as in containers without an init
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return True

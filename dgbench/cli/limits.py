"""What the system ran out of when a data loader's workers failed, told by the text of PyTorch's error."""

from __future__ import annotations

import errno
import re


def ran_out(error: BaseException) -> tuple[str, str] | None:
    """Return message and hint if `error` came of a full /dev/shm, too many open files or a killed worker."""
    from dgbench.ends import NO_FILES, NO_SHARED_MEMORY

    # the exit code is in the first of two errors that PyTorch raises of one worker
    text = f"{error}\n{error.__cause__ or ''}"

    def told(pattern: str) -> bool:
        return re.search(pattern, text) is not None

    if isinstance(error, OSError) and error.errno not in (errno.EMFILE, errno.ENFILE):
        return None
    if not isinstance(error, OSError | RuntimeError):
        return None
    if isinstance(error, OSError) or told(rf"Too many open files|items of ancdata|exit code {NO_FILES}\b"):
        return (
            "too many open files",
            "raise the limit (ulimit -n 65536), or load images without worker processes: --set train.workers=0",
        )
    if told(rf"shared memory|killed by signal: Bus error|exit code {NO_SHARED_MEMORY}\b|torch_.*No space left"):
        return (
            "no space left in /dev/shm, through which worker processes hand over images",
            "start docker with --shm-size=2g (it gives 64 MB by itself), or do without workers: --set train.workers=0",
        )
    if told("DataLoader worker .*(killed by signal: Killed|exited unexpectedly)"):
        return (
            "a worker process that loads images was ended from outside, as systems do when memory runs out",
            "load with fewer of them: --set train.workers=0, 1, ...",
        )
    return None

"""Errors of the machine (disk, memory, open files, shared memory): one line for each, and what to do about it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

_LESS = "use smaller batches: --set train.batch_size=2 eval.batch_size=1 train.workers=0, or smaller images"
_SHARED = "give it more (docker: --shm-size=8g), or load in the training process: --set train.workers=0"


def refusal(error: BaseException) -> tuple[str, str | None] | None:
    """Return message and hint if `error` is such an error of the machine, or was caused by a full disk; else None."""
    # a worker's exit code is in the first of the two errors that PyTorch raises for it
    text = "\n".join(_said(error)) if isinstance(error, RuntimeError) else str(error)
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return f"`{_name(error.object)}` has bytes that are no UTF-8", "rename the file or folder: its name cannot be stored"
    if isinstance(error, RuntimeError | OSError) and _SHARED_MEMORY.search(text):
        return "the shared memory through which workers hand over images is full (/dev/shm)", _SHARED
    if _too_many_files(error, text):
        return f"too many open files{_limit()}", "raise the limit (ulimit -n 4096), or open fewer: --set train.workers=0"
    if (asked := _out_of_memory(error, text)) is not None:
        return f"out of memory{asked}", _LESS
    if isinstance(error, RuntimeError) and _KILLED.search(text):
        return "a worker that loads images was killed, most often because memory was used up", f"{_LESS}; see also ulimit -n"
    no_more = isinstance(error, BlockingIOError) and error.filename is None and error.errno == errno.EAGAIN
    if no_more or (isinstance(error, RuntimeError) and "can't start new thread" in text):
        return (
            "the system allows no further process or thread",
            "end others, raise the limit (ulimit -u), or: --set train.workers=0",
        )
    return full_disk(error) or (_of_files(error) if isinstance(error, OSError) else None)


def _said(error: BaseException | None) -> Iterator[str]:
    """Yield the texts of an error and of its causes."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


# 81 and 82 are exit codes of workers (dgbench/ends.py)
_SHARED_MEMORY = re.compile(
    r"shared memory.*no space|bus error|no space.*(shared memory|/dev/shm)|"
    r"(unable to (write to file|allocate shared memory|resize file) .*(</?torch_|no space))|"
    r"exit code 81\b",
    re.IGNORECASE | re.DOTALL,
)
_FILES = re.compile(r"too many open files|items of ancdata|exit code 82\b", re.IGNORECASE)
_KILLED = re.compile(r"DataLoader worker .*(killed by signal|exited unexpectedly)", re.DOTALL)


def _too_many_files(error: BaseException, text: str) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return isinstance(error, RuntimeError | OSError) and _FILES.search(text) is not None


def _limit() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return ""
    return f", {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} are allowed"


def _out_of_memory(error: BaseException, text: str) -> str | None:
    """Return what the message says about the lack of memory; None if the error is something else."""
    if type(error).__name__ == "OutOfMemoryError":
        return f" on the GPU: {(text.splitlines() or [''])[0]}"
    torchs = isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in text or "bad allocation" in text or "bad_alloc" in text
    )
    systems = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if not (isinstance(error, MemoryError) or torchs or systems):
        return None
    if found := re.search(r"tried to allocate (\d+) bytes", text):
        return f": {int(found[1]) / 2**30:,.1f} GiB were asked for at once"
    if found := re.search(r"Unable to allocate ([\d.]+ \w+)", text):
        return f": {found[1]} were asked for at once"
    return ""


def full_disk(error: BaseException | None) -> tuple[str, str | None] | None:
    """Return message and hint if a full disk is the error or its cause: libraries wrap the system's error in one of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _of_files(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _of_files(error: OSError) -> tuple[str, str | None] | None:
    if error.errno == errno.EPIPE:
        return None
    path = _name(error.filename)
    reason = (error.strerror or "cannot be used").lower()
    if path in ("standard output", "standard error"):
        return f"{path} cannot be written: {reason}", None
    some = path or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk while writing {some}", "free some space there, or choose another --out"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"no permission: {some}", "choose a place that is yours, or change its permissions"
    if error.errno == errno.EROFS:
        return f"the file system is read-only: {some}", "choose a place that can be written"
    return (f"{reason}: {path}", None) if path else None


def _name(filename: object) -> str:
    if isinstance(filename, str | bytes | os.PathLike):
        from dgbench.render.outside import visible

        return visible(os.fsdecode(filename))
    return "" if filename is None else f"descriptor {filename}"

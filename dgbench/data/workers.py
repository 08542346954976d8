"""Start of a data loader's worker processes, and their end if the system has no more shared memory or open files."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from multiprocessing.queues import Queue
from typing import Any

import cv2

from dgbench import ends


def worker_init(_: int) -> None:
    """Set up a loader's worker: OpenCV uses one core in it, and it ends with its parent."""
    cv2.setNumThreads(0)
    ends.follow()
    # otherwise a batch that cannot be sent is dropped, and the parent waits for it for ever
    Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]


def _end(error: BaseException, _: Any) -> None:
    text = str(error)
    if (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)) or "Too many open files" in text:
        os._exit(ends.NO_FILES)
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in text or "shared memory" in text:
        os._exit(ends.NO_SHARED_MEMORY)
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)

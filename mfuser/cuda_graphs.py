"""Capture of calls as CUDA graphs: what inference, training and timings share."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Found = TypeVar("Found")


class CaptureError(RuntimeError):
    """What no CUDA graph can hold; the message has the error that came first."""


def rehearsed(call: Callable[[], Found], stream: torch.cuda.Stream) -> Found:
    """Return call(), run on the stream of a capture: libraries make their handles and workspaces for it; wait for the device."""
    now = torch.cuda.current_stream(stream.device)
    stream.wait_stream(now)
    with torch.cuda.stream(stream):
        found = call()
    now.wait_stream(stream)
    torch.cuda.synchronize(stream.device)
    return found


def captured(call: Callable[[], Found], stream: torch.cuda.Stream, pool: Any = None) -> tuple[Found, torch.cuda.CUDAGraph]:
    """Return what a call returns, to be written by replays, and its graph, which is to be kept as long as that is read.

    Args:
        pool: memory of graphs that are replayed in the order of their capture, or one at a time; None: its own.

    Raises: CaptureError; the current stream and the generator are then as they were.
    """
    gc.collect()  # large models hang in cycles, and what was a graph's is not to be freed while another is captured
    now, graph = torch.cuda.current_stream(stream.device), torch.cuda.CUDAGraph()
    try:
        # threads that pin images for a loader may go on meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            found = call()
    except RuntimeError as error:
        _recover(now)
        raise CaptureError(first_cause(error)) from error
    return found, graph


def _recover(stream: torch.cuda.Stream) -> None:
    """Go back to a stream behind a capture that failed: `torch.cuda.graph` leaves its own where ending the capture fails, too."""
    torch.cuda.set_stream(stream)
    with contextlib.suppress(RuntimeError, AttributeError):
        # the generator stays in the capture, and every later draw would be refused
        generator = torch.cuda.default_generators[stream.device_index]
        generator.graphsafe_set_state(generator.clone_state())


def first_cause(error: BaseException) -> str:
    """Return the type and the first line of the error that came first: ending a capture raises another one about it."""
    seen = {id(error)}
    while (before := error.__cause__ or error.__context__) is not None and id(before) not in seen:
        seen.add(id(before))
        error = before
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"

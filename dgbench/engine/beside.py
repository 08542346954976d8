"""Work that goes on beside a model: pictures are drawn and written by threads while the next image is segmented."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

from dgbench.resources import usable_cores

T = TypeVar("T")
_WORKERS = 4


class Beside(Generic[T]):
    """Calls in threads, whose results are in the order of the calls; at most twice as many as threads wait.

    Compressing and writing leave Python's lock to others. An error of a call is raised by a later `put`, or by `results`.
    """

    def __init__(self, done: Callable[[], None]) -> None:
        """`done` is called in the caller's thread for each call that has ended."""
        self._workers = min(_WORKERS, usable_cores())
        self._pool = ThreadPoolExecutor(self._workers)
        self._waiting: deque[Future[T]] = deque()
        self._found: list[T] = []
        self._done = done

    def __enter__(self) -> Beside[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # what has begun is written whole, what has not is left out after an error
        self._pool.shutdown(wait=True, cancel_futures=error is not None)

    def put(self, call: Callable[[], T]) -> None:
        """Have a call made; waits where many are not done yet: their images take memory."""
        self._waiting.append(self._pool.submit(call))
        while len(self._waiting) > 2 * self._workers:
            self._take()

    def results(self) -> list[T]:
        """Return what all calls returned."""
        while self._waiting:
            self._take()
        return self._found

    def _take(self) -> None:
        self._found.append(self._waiting.popleft().result())
        self._done()

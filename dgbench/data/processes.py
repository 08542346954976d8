"""Work spread over processes that end with this one, as rendering is."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from dgbench import ends
from dgbench.errors import DataError

Given = TypeVar("Given")
Result = TypeVar("Result")


def spread(work: Callable[[Given], Result], given: Iterable[Given], workers: int, what: str, hint: str) -> Generator[Result]:
    """Yield the results of `work` as they come, in any order; closing the generator ends the processes.

    `what` ("rendered ...") and `hint` word the error below.

    Raises: DataError if the system ends a process; whatever `work` raises.
    """
    # spawn: the parent may hold threads (torch, BLAS) that a fork would copy in a broken state
    context = get_context("spawn")
    line, held = context.Pipe(duplex=False)
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=ends.follow, initargs=(line,)) as pool:
            try:
                with ends.unheard_interrupts():
                    finished = as_completed([pool.submit(work, one) for one in given])  # forgets results that it has passed on
                for done in finished:
                    yield done.result()
            except BaseException:
                held.close()  # ends them at once
                pool.shutdown(cancel_futures=True)
                raise
    except BrokenProcessPool:
        raise DataError(f"a process that {what} was ended from outside, as systems do when memory runs out", hint) from None
    finally:
        held.close()
        line.close()

"""Several processes of one command, as forks of the test's process, so that nothing is imported twice.

    ended = processes.together(lambda: command("train", ...), 2)

Each fork has the variables that a launcher sets, and its own standard streams in a file. The method `plain` (`plain_method`) is
without BatchNorm, which CPUs cannot share.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mfuser import methods

RECIPE = """
method: {name: plain}
data: {source: streets-game, targets: [streets-city], size: [64, 128], crop: [64, 64], train_images: 8, val_images: 5,
  rare_class_sampling: 0.1}
train: {steps: 6, batch_size: 4, workers: 0, log_every: 1, checkpoint_every: 3}
optim: {lr: 1.0e-2}
eval: {protocol: unified, batch_size: 2}
"""


Then = Callable[[list[int]], bool]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: its status, negative for a signal, and what it said."""

    status: int
    out: str
    err: str


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Know the method `plain` within the block."""
    # what the processes import is there already
    import accelerate
    import matplotlib.pyplot
    import timm.layers

    import dgbench.engine.evaluate
    import dgbench.engine.parallel
    import dgbench.engine.train
    import dgbench.report.curves

    assert accelerate
    assert timm
    assert matplotlib
    assert dgbench
    methods.__path__.append(str(Path(__file__).parent / "plain_method"))
    methods.module("plain")
    try:
        yield
    finally:
        methods.__path__.pop()


def command(*words: str) -> None:
    """Run the program; it ends the process."""
    from dgbench import cli

    sys.argv = ["dgbench", *words]
    cli.main()


def together(action: Callable[[], object], count: int, folder: Path, *, then: Then | None = None, **env: str) -> list[Ended]:
    """Run `action` in so many processes to their end, and return how each ended.

    Args:
        then: what to do with the processes' ids, once, as soon as it returns True.    env: further variables.

    Raises: AssertionError if one is still running after a minute.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(count):
        own = {**launched, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        children.append(_fork(action, folder / f"{rank}", {**own, **env}))
    return wait(children, folder, then)


def wait(children: list[int], folder: Path, then: Then | None = None, seconds: float = 180) -> list[Ended]:
    """Wait for the end of processes, and return how each ended.

    Raises: AssertionError if one is still running after so many seconds.
    """
    end = time.monotonic() + seconds
    codes: dict[int, int] = {}
    while left := [child for child in children if child not in codes]:
        for child in left:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if then is not None and then(children):
            then = None
        if time.monotonic() > end:
            for child in left:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise AssertionError(f"{len(left)} of {len(children)} processes are still running after {seconds} s")
        time.sleep(0.01)
    told = [[(folder / f"{rank}.{kind}").read_text() for kind in ("out", "err")] for rank in range(len(children))]
    return [Ended(codes[child], *words) for child, words in zip(children, told, strict=True)]


def _fork(action: Callable[[], object], streams: Path, env: dict[str, str]) -> int:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    status = 70
    try:
        for number, kind in ((1, "out"), (2, "err")):
            file = os.open(f"{streams}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ.update(env)
        sys.modules["torch"].set_num_threads(1)
        action()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise AssertionError

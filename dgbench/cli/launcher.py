"""`--gpus N`: the same command in N processes of this machine, as torchrun starts them, under one handling of signals and ends.

torchrun itself ends the others as soon as one has ended, also while the first still writes its checkpoint, and reports every end
with a traceback. Here, processes have time to end by themselves; what they say themselves is not said again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

import typer

from dgbench.errors import DgbenchError

if TYPE_CHECKING:
    from dgbench.engine.team import Team

_GO_ON = "go on with the same eval, or with train --resume"
_LIFELINE = "DGBENCH_LIFELINE"  # descriptor of a pipe that is closed when the launcher ends
_NOTICE, _PATIENCE = 8.0, 12.0  # seconds that processes have to notice another one's end, and then a signal
_FORWARDED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def joined(gpus: int | None, device: str | None) -> Team:
    """Return the processes that carry out this command, this one among them; `--gpus N` starts them, and exits with their end.

    Raises: DgbenchError for what is no launch (`launch.launched`), processes that do not come, fewer GPUs than asked for.
    """
    from dgbench import launch

    place = launch.check(gpus)
    if place.world == 1 and (gpus or 1) > 1:
        raise typer.Exit(_run(gpus or 1))
    if place.world == 1:
        from dgbench.engine.team import ALONE

        return ALONE
    _end_with_launcher()
    # read when torch is imported: c10d logs each end of a connection with a stack of its own; what happened is said here
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from dgbench.engine.device import pick_device
    from dgbench.engine.team import join

    on = pick_device(device)
    if on.type == "cpu" and device is None and launch.ASKED in os.environ:
        raise DgbenchError(
            f"--gpus {place.world}, but no CUDA device is usable here", "`dgbench doctor` says why; or use --device cpu"
        )
    team = join(place, on)
    from dgbench import render

    team.tell = render.failure
    return team


def _run(count: int) -> int:
    """Run this program `count` times, and return the exit status of all together."""
    from dgbench import launch
    from dgbench.resources import usable_cores

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        launch.ASKED: str(count),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // count)),
    }
    read, write = os.pipe()
    processes: list[subprocess.Popen[bytes]] = []
    sent: list[int] = []
    with _forwarding(processes, sent):
        try:
            for rank in range(count):
                env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), _LIFELINE: str(read)}
                # a group of its own: what a terminal sends reaches it once, through this process
                processes.append(subprocess.Popen(sys.orig_argv, env=env, pass_fds=[read], process_group=0))
            os.close(read)
            ended_here = _wait(processes)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            os.close(write)
    return _status([process.returncode for process in processes], ended_here, sent)


def _wait(processes: list[subprocess.Popen[bytes]]) -> set[int]:
    """Wait for all; end those that do not follow the first one that ended. Return the ranks that had to be ended."""
    first: float | None = None
    ended: set[int] = set()
    while running := [rank for rank, process in enumerate(processes) if process.poll() is None]:
        now = time.monotonic()
        if first is None and len(running) < len(processes):
            first = now
        if first is not None and now - first > _NOTICE:
            # the first process may still be at its results, the others are done
            if all(process.returncode in (None, 0) for process in processes) and running == [0]:
                first = now
            for rank in running if first != now else ():
                how = signal.SIGTERM if rank not in ended else signal.SIGKILL
                if how == signal.SIGTERM or now - first > _NOTICE + _PATIENCE:
                    processes[rank].send_signal(how)
                    ended.add(rank)
        time.sleep(0.05)
    return ended


def _status(codes: list[int], ended_here: set[int], sent: list[int]) -> int:
    from dgbench import launch, render

    if sent and not any(code == 1 for code in codes):
        return 128 + sent[0]
    killed = {rank: -code for rank, code in enumerate(codes) if code < 0 and rank not in ended_here}
    if killed:
        rank, number = next(iter(killed.items()))
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        why = ", most often because memory was used up" if name == "SIGKILL" else ""
        render.failure(f"process {rank} of {len(codes)} was killed ({name}){why}", _GO_ON)
        return 1
    told = [code for code in codes if code not in (0, launch.LOST) and code > 0]
    if not told and any(codes):
        render.failure("the processes have lost each other", _GO_ON)
        return 1
    return max(told, default=0)


@contextlib.contextmanager
def _forwarding(processes: list[subprocess.Popen[bytes]], sent: list[int]) -> Iterator[None]:
    """Pass on the signals that end a command, and wait for what the processes make of them."""

    def forward(number: int, _: FrameType | None) -> None:
        sent.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.getsignal(number) for number in _FORWARDED}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, forward)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _end_with_launcher() -> None:
    """End this process if the one that started it is killed: by SIGTERM, after which a training can go on."""
    from dgbench import launch

    text = os.environ.get(_LIFELINE, "")
    if not text.isdecimal() or launch.ASKED not in os.environ:
        return

    def follow() -> None:
        with contextlib.suppress(OSError):
            os.read(int(text), 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_NOTICE + _PATIENCE)
        os._exit(launch.LOST)

    threading.Thread(target=follow, daemon=True).start()

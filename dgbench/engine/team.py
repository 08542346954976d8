"""The processes that train or score together: how they find each other, exchange numbers, and end together.

Numbers go through a gloo group beside the one for gradients, so that no GPU waits for them; words through the store by which
the processes found each other. Whoever fails first claims the right to say so; the others end silently.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dgbench.engine.pulse import Pulse
from dgbench.errors import DgbenchError
from dgbench.launch import Launched

if TYPE_CHECKING:
    import torch

_GO_ON = "go on with the same eval, or with train --resume"
FAILED = "failed"  # key of the store: the rank of the first process that failed
_POLL = 0.05  # seconds between two looks at the store
_GOODBYE = 20.0  # seconds that the first process waits for the others' end
_PATIENCE = 10.0  # seconds without the others, after which one says so


class PeerLost(DgbenchError):
    """Another process of the same command ended; it or its launcher says why, if anybody can."""


class NotReached(DgbenchError):
    """The first process cannot be reached, so that only this one can say so."""


class Team:
    """This process and the others. One that is alone exchanges nothing."""

    def __init__(self, place: Launched, store: Any = None, group: Any = None, backend: str = "") -> None:
        self.rank, self.world, self.local_rank = place.rank, place.world, place.local_rank
        self.nodes = max(1, place.world // max(1, place.local_world))
        self.backend, self._group = backend, group
        self._connection: Any
        self.store: Any
        self._connection, self.store = store or (None, None)
        self.tell: Callable[[str, str | None], None] = _tell
        self._met, self._left = 0, False
        self._pulse = Pulse(self.own_store(), self.rank, self.world) if self.world > 1 else None

    def __str__(self) -> str:
        """Say how many processes there are, and how they exchange gradients."""
        where = "one machine" if self.nodes == 1 else f"{self.nodes} machines"
        return f"{self.world} processes on {where} ({self.backend})"

    @property
    def main(self) -> bool:
        """Whether this process writes files, draws progress and shows results."""
        return self.rank == 0

    def total(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sums over all processes of an array of integers.

        Raises: PeerLost if another process has ended.
        """
        if self.world == 1:
            return numbers
        return self._reduced(numbers, "SUM")

    def most(self, number: int) -> int:
        """Return the largest of all processes' numbers. Raises: PeerLost."""
        return number if self.world == 1 else int(self._reduced(np.array([number], np.int64), "MAX")[0])

    def mean(self, numbers: list[float]) -> list[float]:
        """Return the means over all processes; NaN where one of them has it. Raises: PeerLost."""
        if self.world == 1:
            return numbers
        return [float(value) for value in self._reduced(np.array(numbers, np.float64), "SUM") / self.world]

    def each(self, number: int) -> list[int]:
        """Return every process's number, by rank. Raises: PeerLost."""
        own = np.zeros(self.world, np.int64)
        own[self.rank] = number
        return [int(value) for value in self.total(own)]

    def meet(self) -> None:
        """Wait until every process is here, however long another takes. Raises: PeerLost."""
        if self.world > 1:
            self._met += 1
            self.store.add(f"met/{self._met}", 1)
            self._until(lambda: self.store.add(f"met/{self._met}", 0) >= self.world)

    def from_main(self, key: str, text: str | None = None) -> str:
        """Return the text that the first process gives; the others wait for it. Raises: PeerLost."""
        if self.world == 1 or self.main:
            assert text is not None
            if self.world > 1:
                self.store.set(f"said/{key}", text)
            return text
        self._until(lambda: self.store.check([f"said/{key}"]))
        said: bytes = self.store.get(f"said/{key}")
        return said.decode()

    def claim(self) -> bool:
        """Return whether this process is the first to fail, and so the one that says what happened."""
        if self.world == 1:
            return True
        try:
            return bool(self.store.compare_set(FAILED, "", str(self.rank)) == str(self.rank).encode())
        except Exception:  # whoever holds the store has ended, and with it all
            return self.main

    def failed(self) -> bool:
        """Return whether a process has failed."""
        try:
            return bool(self.store.check([FAILED]))
        except Exception:
            return True

    def told(self) -> bool:
        """Return whether a process has failed that says what happened; not where that cannot be asked."""
        with suppress(Exception):
            return self.world > 1 and bool(self.store.check([FAILED]))
        return False

    def holder(self) -> str:
        """Return who holds the store, in words."""
        return "the launcher of the first machine" if _launchers_store() else "process 0"

    def speaks_without_store(self) -> bool:
        """Return whether this process is the one that speaks if the store does not answer: one beside whoever holds it."""
        if not _launchers_store():
            return self.rank == 1
        return self.rank == (self.world // self.nodes if self.nodes > 1 else 0)

    def lost(self, error: BaseException) -> PeerLost | None:
        """Return what to raise in place of an error that only says that another process is gone; None for any other error."""
        if self.world == 1 or isinstance(error, DgbenchError):
            return None
        words = str(error).lower()
        kinds = ("DistBackendError", "DistNetworkError", "DistStoreError", "DistError")
        if type(error).__name__ in kinds or (isinstance(error, RuntimeError) and any(sign in words for sign in _SIGNS)):
            return PeerLost("another process of this command has ended", _GO_ON)
        return None

    def own_store(self) -> Any:
        """Return the store by a connection of its own, for another thread."""
        from torch.distributed.distributed_c10d import PrefixStore

        return PrefixStore(_prefix(), self._connection.clone())

    def leave(self) -> None:
        """End the exchange, after all have finished: the first process, which may hold the store, goes last."""
        if self.world == 1 or self._left:
            return
        self._left = True
        if self._pulse is not None:
            self._pulse.end()
        import torch.distributed as dist

        from mfuser.processes import exchange_by_hosts

        end = time.monotonic() + _GOODBYE
        with suppress(Exception):
            self.store.add("left", 1)
            while self.main and self.store.add("left", 0) < self.world and not self.failed() and time.monotonic() < end:
                time.sleep(_POLL)
        if dist.is_initialized():
            exchange_by_hosts(None)
            dist.destroy_process_group()

    def _reduced(self, numbers: NDArray[Any], how: str) -> NDArray[Any]:
        import torch
        import torch.distributed as dist

        tensor = torch.from_numpy(np.ascontiguousarray(numbers).copy())
        try:
            dist.all_reduce(tensor, op=getattr(dist.ReduceOp, how), group=self._group)
        except RuntimeError as error:
            raise self.lost(error) or error from None
        return tensor.numpy()

    def _until(self, ready: Callable[[], bool]) -> None:
        while True:
            try:
                if ready():
                    return
            except RuntimeError as error:
                raise self.lost(error) or error from None
            if self.failed():
                raise PeerLost("another process of this command has failed", None)
            if self._pulse is not None and (gone := self._pulse.gone()):
                raise PeerLost(f"no sign of life from process {gone[0]} of this command", _GO_ON)
            time.sleep(_POLL)


# of gloo and NCCL, whose errors are plain RuntimeErrors where a socket is closed
_SIGNS = ("gloo", "connection closed", "connection reset", "broken pipe", "nccl", "peer", "socket")


def _tell(message: str, hint: str | None) -> None:
    print(f"error: {message}" + (f"\n\nhint: {hint}" if hint else ""), file=sys.stderr, flush=True)


ALONE = Team(Launched())
_team = ALONE


def team() -> Team:
    """Return the processes that have joined, or this one alone."""
    return _team


def join(place: Launched, device: torch.device) -> Team:
    """Find the other processes, and return them with this one. A second call returns the same.

    Raises: DgbenchError if they do not come, for `cuda:N`, or if the machine has fewer GPUs than processes.
    """
    global _team
    if place.world == 1 or _team.world > 1:
        return _team
    if device.index is not None:
        raise DgbenchError(
            f"`{device}` was named, but a launcher has started this process for a GPU of its own",
            "use --device cuda; CUDA_VISIBLE_DEVICES says which GPUs the launcher has",
        )
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    from mfuser.processes import exchange_by_hosts

    shared = False
    if device.type == "cuda":
        there = torch.cuda.device_count()
        shared = there < place.local_world
        if shared and os.environ.get("DGBENCH_SHARE_GPU") != "1":
            raise DgbenchError(
                f"{place.local_world} processes were started on this machine, which has {there} GPU{'s' * (there != 1)}",
                "start one for each GPU; see CUDA_VISIBLE_DEVICES; with DGBENCH_SHARE_GPU=1 processes share GPUs, for tests",
            )
        torch.cuda.set_device(place.local_rank % there)
        if shared:
            os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # accelerate would give each its own
    connection, store = _found(place)
    # accelerate reads these, which srun does not set
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(place.local_world))
    # NCCL takes one process a GPU
    backend = "gloo" if device.type == "cpu" or shared else "nccl"
    limit = timedelta(seconds=4 * hang_seconds())
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=place.rank, world_size=place.world, timeout=limit)
    group = dist.new_group(backend="gloo", timeout=limit)
    exchange_by_hosts(group)
    _team = Team(place, (connection, store), group, backend)
    atexit.register(_team.leave)
    return _team


def hang_seconds() -> float:
    """Return after how many seconds without a step a training counts as hanging: DGBENCH_HANG_MINUTES, 30 by default."""
    text = os.environ.get("DGBENCH_HANG_MINUTES") or "30"
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e5:
        raise DgbenchError(f"DGBENCH_HANG_MINUTES is `{text[:40]}`, expected minutes above 0", "unset it for 30")
    return 60 * minutes


def _found(place: Launched) -> tuple[Any, Any]:
    """Return a connection to the store that all processes have joined, and the part of it that is theirs.

    Raises: DgbenchError naming the address if they do not come in time.
    """
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed import DistError
    from torch.distributed.distributed_c10d import PrefixStore

    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise DgbenchError(f"MASTER_PORT is `{port[:40]}`, expected a port", "unset it, and use torchrun or --gpus N")
    hosts = place.rank == 0 and not _launchers_store()
    seconds = _join_seconds()
    end, patient = time.monotonic() + seconds, time.monotonic() + _PATIENCE
    one, store, come = None, None, 0
    while time.monotonic() < end:
        try:
            if store is None:
                one = TCPStore(host, int(port), None, hosts, timedelta(seconds=min(5.0, seconds)), wait_for_workers=False)
                store = PrefixStore(_prefix(), one)
                store.set_timeout(timedelta(minutes=5))
                store.add("come", 1)
            if (come := store.add("come", 0)) >= place.world:
                return one, store
        except (DistError, RuntimeError) as error:
            if hosts and "in use" in str(error).lower():
                raise DgbenchError(
                    f"port {port} of {host} is in use", "choose another MASTER_PORT, or leave it to torchrun or --gpus N"
                ) from None
        if time.monotonic() > patient and place.rank == 0:
            patient = end
            print(f"waiting at {host}:{port}: {come} of {place.world} processes are here", file=sys.stderr, flush=True)
        time.sleep(_POLL)
    raise (DgbenchError if come else NotReached)(
        f"{come or 'none'} of {place.world} processes came to {host}:{port} within {seconds:g} s",
        "unset RANK and WORLD_SIZE if they are left over from another program; else see whether the others reach this address",
    )


def _launchers_store() -> bool:
    """Return whether the store is that of torchrun, in a process of its own on the first machine."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _prefix() -> str:
    # after a restart by torchrun, what the last try left is another one's
    return f"dgbench/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _join_seconds() -> float:
    text = os.environ.get("DGBENCH_JOIN_SECONDS") or "300"
    try:
        return max(0.1, float(text))
    except ValueError:
        raise DgbenchError(f"DGBENCH_JOIN_SECONDS is `{text[:40]}`, expected seconds", "unset it for 300") from None

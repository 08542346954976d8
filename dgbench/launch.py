"""The processes that a launcher started this one among, from the environment variables that launchers set. Needs no torch.

torchrun, `accelerate launch` and `--gpus` set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
Variables that are left over from another program, and launchers that started fewer or other processes than they were asked for,
are refused here, before anything waits for processes that never come.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from dgbench.errors import DgbenchError, StoppedError, Terminated

ASKED = "DGBENCH_PROCESSES"  # how many `--gpus` started on this machine
LOST = 75  # exit status of a process that ends without a word, because another has ended
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_UNSET = "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
_START = "or start with --gpus N, torchrun or accelerate launch"


@dataclass(frozen=True, slots=True)
class Launched:
    """Index of this process and number of processes, over all machines and on this one."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def launched() -> Launched:
    """Return this process's place among those that were started.

    Raises: DgbenchError for variables that cannot be a launcher's, and for a launcher that started less than it was asked for.
    """
    given = {name: _number(name) for name in _NAMES if os.environ.get(name)}
    world = given.get("WORLD_SIZE", 1)
    if world <= 1:
        if given.get("RANK", 0) > 0 or given.get("LOCAL_RANK", 0) > 0:
            name = "RANK" if given.get("RANK", 0) else "LOCAL_RANK"
            size = given.get("WORLD_SIZE", "not set")
            raise DgbenchError(
                f"{name} is {given[name]}, but WORLD_SIZE is {size}: left over from another program?",
                f"{_UNSET}; {_START}",
            )
        _refuse_lone_process()
        return Launched()
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise DgbenchError(
            f"WORLD_SIZE is {world}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: left over from "
            "another program?",
            f"{_UNSET}; {_START}",
        )
    rank = given["RANK"]
    local_rank = given.get("LOCAL_RANK", _number("SLURM_LOCALID") if os.environ.get("SLURM_LOCALID") else None)
    if local_rank is None:
        raise DgbenchError(
            f"RANK is {rank} of {world}, but LOCAL_RANK is not set", f"set it to the process's index on its machine; {_START}"
        )
    local_world = given.get("LOCAL_WORLD_SIZE", max(local_rank + 1, world // _nodes()))
    if rank >= world or local_rank >= local_world or local_world > world:
        raise DgbenchError(
            f"RANK {rank} of WORLD_SIZE {world} does not fit to LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE {local_world}",
            f"{_UNSET}; {_START}",
        )
    return Launched(rank, world, local_rank, local_world)


def several() -> bool:
    """Return whether this process is one of several, without judging the variables."""
    return (os.environ.get("WORLD_SIZE") or "1").strip() not in ("0", "1")


def first() -> bool:
    """Return whether this process is the only one, or the first of several."""
    return not several() or (os.environ.get("RANK") or "0").strip() == "0"


def check(asked: int | None) -> Launched:
    """Return this process's place among as many processes as were asked for.

    Raises: DgbenchError if a launcher started another number; as `launched`.
    """
    found = launched()
    if asked is not None and found.world > 1 and ASKED not in os.environ and asked != found.world:
        raise DgbenchError(
            f"--gpus {asked}, but the launcher started {found.world} processes",
            f"leave --gpus out, or start dgbench by itself with --gpus {asked}",
        )
    return found


def _refuse_lone_process() -> None:
    """Refuse what only looks like a training of several processes.

    Raises: DgbenchError.
    """
    tasks = _number("SLURM_STEP_NUM_TASKS") if os.environ.get("SLURM_STEP_NUM_TASKS") else 1
    if tasks > 1:
        raise DgbenchError(
            f"srun started {tasks} tasks, but each of them is a process by itself: WORLD_SIZE is not set",
            "let srun start one torchrun on each node, see docs/cluster.md; or run one task: srun --ntasks 1",
        )
    # accelerate sets these two for several processes, and starts one if there is no MPI
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") and os.environ.get("MASTER_ADDR"):
        raise DgbenchError(
            "accelerate launch was asked for several processes on the CPU, but started one",
            "use --gpus N --device cpu, or torchrun --nproc-per-node N; for one process: unset MASTER_ADDR",
        )


def _number(name: str) -> int:
    text = os.environ[name].strip()
    if not text.isdecimal() or len(text) > 7:
        raise DgbenchError(f"the environment variable {name} is `{text[:40]}`, expected a number from 0", f"{_UNSET}; {_START}")
    return int(text)


def _nodes() -> int:
    return max(1, _number("SLURM_NNODES")) if os.environ.get("SLURM_NNODES") else 1


def silent(error: BaseException) -> int | None:
    """Return the status with which this process ends without a word; None if it is the one that says what happened.

    Of several processes, whoever fails first tells its error; the first tells what was stopped on purpose, unless one has failed.
    """
    if not several():
        return None
    module = sys.modules.get("dgbench.engine.team")
    team = module.team() if module is not None else None
    if isinstance(error, KeyboardInterrupt | Terminated | StoppedError):
        code = 128 + error.signum if isinstance(error, Terminated) else getattr(error, "code", 130)
        # torchrun stops the others when one has failed, which has said why
        return None if first() and (team is None or not team.told()) else code
    if module is None or team is None or team.world == 1:  # they have not met yet: all fail alike
        return None if first() or (module is not None and isinstance(error, module.NotReached)) else 1
    if isinstance(error, module.PeerLost) and ASKED in os.environ:  # `--gpus` sees how it ended
        return LOST
    return None if team.claim() else LOST

"""The device to run on, its name, and how much memory was used there.

Torch is imported inside the functions, so that the command line can refuse a name without waiting for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgbench.errors import DgbenchError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from dgbench.engine.team import Team

_NAME = re.compile(r"cpu|cuda(?::(0|[1-9]\d{0,3}))?")
# devices that torch knows but dgbench was not tested on; any other word is no device
_OTHERS = ("mps", "xpu", "meta", "hip", "xla", "npu", "hpu", "mtia", "vulkan", "privateuseone")
_HINT = "use `cpu`, `cuda` or `cuda:1`"


def check_device(name: str) -> str:
    """Return the name if it is `cpu`, `cuda` or `cuda:N`. Whether this machine has it is checked by `pick_device`.

    Raises: DgbenchError for any other name.
    """
    if _NAME.fullmatch(name):
        return name
    if name.partition(":")[0] in _OTHERS:
        raise DgbenchError(f"device `{name}` is not supported: models run on a CPU or on a CUDA GPU", _HINT)
    raise DgbenchError(f"unknown device `{name}`", _HINT)


def pick_device(name: str | None) -> torch.device:
    """Return the named device, or by default the GPU if there is one, else the CPU. A named device is used or refused.

    `cuda:N` becomes the process's current device, too: kernels are launched and host memory is pinned there.

    Raises: DgbenchError for an unknown name or a device that this machine lacks.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(check_device(name))
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise DgbenchError("no CUDA device is usable here", "`dgbench doctor` says why; or use --device cpu")
    if device.index is not None:
        if device.index >= (count := torch.cuda.device_count()):
            there = "one CUDA device, `cuda:0`" if count == 1 else f"{count} CUDA devices, `cuda:0` to `cuda:{count - 1}`"
            raise DgbenchError(f"no device `{name}`: this machine has {there}", "use one of them, or --device cpu")
        torch.cuda.set_device(device)
    return device


def accelerator_on(
    device: torch.device,
    precision: str,
    trackers: Sequence[str] = (),
    folder: Path | None = None,
    team: Team | None = None,
) -> Accelerator:
    """Accelerate's handle of exactly this device; one of several processes takes the GPU that its launcher meant.

    Args:
        trackers: experiment trackers that it may start, by accelerate's names.    folder: where they keep their files.
        team: the processes that train together, which have met.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import patch_environment

    tracked: dict[str, Any] = {"log_with": list(trackers) or None, "project_dir": folder}
    if team is not None and team.world > 1:
        from dgbench.engine.parallel import settings

        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(cpu=device.type == "cpu", mixed_precision=precision, kwargs_handlers=settings(), **tracked)
    # its state is one a process, and would keep the device of an earlier training
    AcceleratorState._reset_state(reset_partial_state=True)
    # what a launcher of one process sets would let accelerate look for others
    with patch_environment(ACCELERATE_TORCH_DEVICE=str(device), LOCAL_RANK="-1", WORLD_SIZE="1"):
        return Accelerator(cpu=device.type == "cpu", mixed_precision=precision, **tracked)


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or `cpu`, for records."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_gib(device: torch.device) -> float:
    """Return the peak GiB of this process: GPU memory as allocated by torch, or resident memory on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    import sys

    # Linux counts KiB, macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def memory_refused(error: BaseException) -> str | None:
    """Return what the machine's memory (not a GPU's) was too small for; None if the error is something else."""
    # torch's class for a GPU; OpenCV's error contains this word in its text
    if type(error).__name__ == "OutOfMemoryError":
        return None
    words = ("DefaultCPUAllocator", "OutOfMemoryError", "Cannot allocate memory")
    if not isinstance(error, MemoryError) and not any(word in str(error) for word in words):
        return None
    asked = re.search(r"tried to allocate (\d+) bytes", str(error))
    return "the memory does not suffice" + (f": {int(asked[1]) / 2**30:,.1f} GiB more were asked for" if asked else "")

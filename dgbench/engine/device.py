"""Which device to run on."""

from __future__ import annotations

import torch

from dgbench.errors import DgbenchError


def pick_device(name: str | None) -> torch.device:
    """The named device, or the GPU when there is one and the CPU otherwise. A named device is used or refused.

    Raises: DgbenchError for an unknown name or a device that this machine lacks.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DgbenchError(f"unknown device `{name}`", "use `cpu`, `cuda` or `cuda:1`") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DgbenchError("no CUDA device is usable here", "`dgbench doctor` says why; or use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise DgbenchError(f"device `{name}` is not supported", "use `cpu` or `cuda`")
    return device

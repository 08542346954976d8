"""Checks of every operator's tensors before a backend is called, and results for empty inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_types(op: str, names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Refuse tensors that no backend accepts: integers would be truncated, and two devices would crash.

    Args:
        names: the tensors', as the operator's user knows them.    tensors: the first is there, others may be absent.

    Raises: TypeError for anything but a tensor of DTYPES, ValueError for one on another device than the first.
    """
    device = None
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            allowed = ", ".join(str(dtype) for dtype in DTYPES)
            raise TypeError(f"{op}: {name} must be real and floating point, got {given}; allowed are {allowed}")
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device} and {names[0]} on {device}; bring all to one device")


def check_shapes(op: str, names: Sequence[str], tensors: Sequence[Tensor | None], expected: Sequence[tuple[int, ...]]) -> None:
    """Raise ValueError naming the first tensor that has another shape than is expected."""
    for name, tensor, shape in zip(names, tensors, expected, strict=True):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}, expected {shape}")


def constant(result: Tensor, *inputs: Tensor | None) -> Tensor:
    """Return `result`, which does not depend on the inputs, with a graph in which each of them has a zero gradient."""
    for tensor in inputs:
        if tensor is not None and tensor.requires_grad:
            # the sum over none of its elements, so that infinite values have no effect
            result = result + tensor[None][:0].sum().to(result.dtype)
    return result

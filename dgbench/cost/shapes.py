"""Tracing of a model on shapes alone: TorchScript's graph of a forward pass on the meta device, without computation.

fvcore counts in such a graph. While TorchScript traces, sizes read in Python are tensors, which torch's own shape
functions for the meta device do not take; so each of them runs in a second thread, which is not being traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


@contextmanager
def on_shapes() -> Iterator[None]:
    """Let `torch.jit` trace models whose parameters and inputs are on the meta device, within the context."""
    with torch.no_grad(), ThreadPoolExecutor(1) as thread, _Elsewhere(thread), _Convolutions():
        yield


class _Elsewhere(TorchDispatchMode):
    def __init__(self, thread: ThreadPoolExecutor) -> None:
        super().__init__()
        self.thread = thread

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.thread.submit(_run, func, args, kwargs or {}).result()


@torch.no_grad()
def _run(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if func is torch.ops.aten._convolution.default:
        func, args = torch.ops.aten.convolution.default, args[:9]
    out = func(*args, **kwargs)
    given = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}

    def fresh(value: Any) -> Any:
        # this thread's autograd has already marked the result as a view; the tracing thread's must do that itself
        if not isinstance(value, Tensor) or not value.is_meta or id(value) in given:
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

    return tree_map(fresh, out)


class _Convolutions(TorchFunctionMode):
    """A mode that calls convolutions by the one name that TorchScript records; other names are lost under a mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _CONVOLUTIONS.get(func, func)(*args, **kwargs or {})


def _convolution(dims: int) -> Callable[..., Tensor]:
    def call(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if padding == "same":
            gaps = [dilation] * dims if isinstance(dilation, int) else list(dilation)
            more = [gap * (side - 1) for gap, side in zip(gaps, weight.shape[2:], strict=True)]
            input = pad(input, [part for n in reversed(more) for part in (n // 2, n - n // 2)])
        if isinstance(padding, str):
            padding = 0
        return _recorded(dims, input, weight, bias, stride, padding, dilation, False, 0, groups)

    return call


def _transposed(dims: int) -> Callable[..., Tensor]:
    def call(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        return _recorded(dims, input, weight, bias, stride, padding, dilation, True, output_padding, groups)

    return call


def _recorded(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor:
    steps, pads, gaps, more = ([v] * dims if isinstance(v, int) else list(v) for v in (stride, padding, dilation, output_padding))
    out: Tensor = torch._convolution(input, weight, bias, steps, pads, gaps, transposed, more, groups, False, False, False, False)
    return out


_CONVOLUTIONS: dict[Any, Callable[..., Tensor]] = {
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    torch.conv_transpose1d: _transposed(1),
    torch.conv_transpose2d: _transposed(2),
    torch.conv_transpose3d: _transposed(3),
}

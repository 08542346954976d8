"""The selective scan by the compiled kernels of mamba-ssm, called directly: an operator's body is below autograd.

Written against mamba-ssm 2.3.2.post1 (csrc/selective_scan/selective_scan.cpp at e9594ce), whose extension has

    fwd(u, delta, A, B, C, D, z, bias, softplus)
        -> y before the gate, x, and y if there is z
    bwd(u, delta, A, B, C, D, z, bias, dy, x, y before the gate, dz to fill, softplus, whether to return y, too)
        -> du, ddelta, dA, dB, dC, dD, dbias, and dz if there is z

with u, delta, z, y (B, D, L) and B, C (B, 1, N, L) of one dtype and contiguous along L, and A, D, bias in fp32. x is
(B, D, chunks, 2 N) in fp32: for every 2048 steps, and the rest, pairs of the decay since the start and the state at the
end. It adds gradients by atomics, so that their last bits change from run to run.

Its backward computes the decayed state as the next state minus the step's input. If a state decays within a step (delta |A|
above about 15), the difference is rounding noise, and so are these elements of A's gradient: 1e-7 of the others, but of any
sign. Our kernels multiply the state by its decay.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mfuser.ops.dispatch import BackendError, mismatch

_HINT = "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation -e '.[mamba]'"
if find_spec("selective_scan_cuda") is None:
    raise ImportError(f"No module named 'selective_scan_cuda': {_HINT}")
try:
    _kernels = import_module("selective_scan_cuda")
except ImportError as error:
    # for example a build for another version of torch
    raise ImportError(f"{error}: {_HINT}") from error

_MOST_STATES = 256
_CHUNK = 2048


def refuse(*tensors: Tensor | None) -> str | None:
    """Say why the kernels cannot take the op's tensors; without tensors, why they cannot run at all."""
    if problem := mismatch(tensors, "cuda"):
        return problem
    A, initial = (tensors[2], tensors[8]) if len(tensors) == 9 else (None, None)
    if A is not None and A.shape[1] > _MOST_STATES:
        return f"takes at most {_MOST_STATES} states, not {A.shape[1]}"
    return None if initial is None else "takes no initial state"


def saved_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """Return the shape of what `forward` stores for `backward`: x, (B, D, chunks, 2 N)."""
    return (u.shape[0], u.shape[2], -(-u.shape[1] // _CHUNK), 2 * A.shape[1])


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    softplus: bool,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, L, D) in u's dtype, the final state (B, D, N) and x (empty unless `keep`); takes no initial state."""
    ungated, x, *gated = _kernels.fwd(*_arguments(u, delta, A, B, C, D, z, bias), softplus)
    y = u.new_empty(u.shape).copy_((gated[0] if gated else ungated).mT)
    state = x[:, :, -1, 1::2].clone(memory_format=torch.contiguous_format)
    return y, state, x if keep else x.new_empty(0)


def backward(
    dy: Tensor,
    dstate: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    softplus: bool,
    saved: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of (u, delta, A, B, C, D, z, bias, initial); None for absent inputs.

    Raises: BackendError if the final state has a gradient.
    """
    if dstate is not None:
        raise BackendError("mamba_ssm: the final state has no gradient; use backend `triton` or `torch`")
    arguments = _arguments(u, delta, A, B, C, D, z, bias)
    # the operator only keeps x, so that with a gate the forward runs again
    ungated = None if z is None else _kernels.fwd(*arguments, softplus)[0]
    dy = dy.mT.to(arguments[0].dtype).contiguous()
    du, ddelta, dA, dB, dC, dD, dbias, *rest = _kernels.bwd(*arguments, dy, saved, ungated, None, softplus, False)
    dz = rest[0].mT if rest else None
    return du.mT, ddelta.mT, dA, dB[:, 0].mT, dC[:, 0].mT, None if D is None else dD, dz, None if bias is None else dbias, None


def _arguments(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None
) -> tuple[Any, ...]:
    """Return the first arguments of both functions, in their layout and types."""
    dtype = u.dtype
    for tensor in (delta, B, C, z):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    u, delta, B, C = (tensor.mT.to(dtype).contiguous() for tensor in (u, delta, B, C))
    z = None if z is None else z.mT.to(dtype).contiguous()
    D, bias = (None if tensor is None else tensor.float().contiguous() for tensor in (D, bias))
    return u, delta, A.float().contiguous(), B[:, None], C[:, None], D, z, bias

"""The selective scan in plain tensor operations, block by block, for a CPU or any other device.

A block of time steps is expanded to (T, B, N, D), scanned, reduced to y and dropped; only the state at the start of
each block is kept for the backward, which expands the blocks again from last to first. The CPU scans a block that fits
its cache with one fused multiply-add per step. Other devices, where launching a step costs more than computing it,
take large blocks and scan about sqrt(T) segments of them side by side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_CPU_BLOCK = 2**17  # elements of (T, B, N, D), 512 KB in fp32
_DEVICE_BLOCK = 2**26


def saved_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """Return the shape of what `forward` stores for `backward`: the state before each block, (blocks, B, N, D)."""
    return (-(-u.shape[1] // _block(u, A)), u.shape[0], A.shape[1], A.shape[0])


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
    """Return y (B, L, D) in u's dtype, the final state (B, D, N) and the states before each block (empty unless `keep`)."""
    block, saved = _block(u, A), u.new_empty(saved_shape(u, A) if keep else (0,), dtype=_precise(u))
    x, step, A, B, C = _expand(u, delta, A, B, C, bias, softplus)
    inflow, y = step * x, torch.empty_like(x)
    decay, states = (_Steps(x, A, block) for _ in range(2))
    h = x.new_zeros(u.shape[0], *A.shape)  # (B, N, D)
    if initial is not None:
        h.copy_(initial.mT)
    for i, part in enumerate(_parts(len(x), block)):
        if keep:
            saved[i] = h
        a, s = decay.first(part), states.first(part)  # (T, B, N, D)
        torch.mul(step[part, :, None], A, out=a).exp_()
        torch.mul(inflow[part, :, None], B[part], out=s)
        _scan(decay, states, len(a), h)
        h.copy_(s[-1])
        torch.sum(s.mul_(C[part]), 2, out=y[part])
    if D is not None:
        y.addcmul_(x, D.to(x.dtype))
    if z is not None:
        y.mul_(F.silu(z.transpose(0, 1).to(x.dtype)))
    out = u.new_empty(u.shape)
    out.copy_(y.transpose(0, 1))
    return out, h.mT.contiguous(), saved


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
    """Return the gradients of (u, delta, A, B, C, D, z, bias, initial); equations as in `reference.backward`."""
    # autocast, if it is still on where the backward is called, would round the products below
    with torch.autocast(u.device.type, enabled=False):
        return _backward(dy, dstate, u, delta, A, B, C, D, z, bias, initial, softplus, saved)


def _backward(
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
    block = _block(u, A)
    x, step, A, B, C = _expand(u, delta, A, B, C, bias, softplus)
    dy = dy.transpose(0, 1).to(x.dtype).contiguous()  # (L, B, D)
    y = dgated = gate = share = None
    if z is not None:
        gate = z.transpose(0, 1).to(x.dtype)
        share, dgated, y = torch.sigmoid(gate), dy, torch.empty_like(x)
        dy = dy * gate * share
    inflow = step * x
    dinflow, ddecay = torch.empty_like(x), torch.empty_like(x)
    dA = torch.zeros_like(A)
    dB, dC = x.new_empty(B.shape[:3]), x.new_empty(B.shape[:3])  # (L, B, N)
    decay, states, back = (_Steps(x, A, block) for _ in range(3))
    later = torch.zeros_like(saved[0])  # exp(delta[t+1] A) g[t+1]
    if dstate is not None:
        later.copy_(dstate.mT)
    for i, part in reversed(list(enumerate(_parts(len(x), block)))):
        a, s, g = (buffer.first(part) for buffer in (decay, states, back))  # (T, B, N, D)
        torch.mul(step[part, :, None], A, out=a).exp_()
        torch.mul(inflow[part, :, None], B[part], out=s)
        _scan(decay, states, len(a), saved[i])
        if y is not None:
            torch.sum(s * C[part], 2, out=y[part])
        dC[part] = torch.matmul(s.flatten(0, 1), dy[part].flatten(0, 1)[..., None]).view(dC[part].shape)
        torch.mul(C[part], dy[part, :, None], out=g)
        g[-1] += later
        _scan_back(decay, back, len(a))
        torch.mul(a[0], g[0], out=later)
        dB[part] = torch.matmul(g.flatten(0, 1), inflow[part].flatten(0, 1)[..., None]).view(dB[part].shape)
        # g[t] exp(delta[t] A) h[t-1]; h[t] minus the input at t would be the same except for rounding, which is all that
        # is left of it where a state decays within a step
        a[0].mul_(saved[i])
        a[1:].mul_(s[:-1])
        carried = a.mul_(g)
        torch.sum(g.mul_(B[part]), 2, out=dinflow[part])
        dA += torch.einsum("tbnd,tbd->nd", carried, step[part])
        torch.sum(carried.mul_(A), 2, out=ddecay[part])
    du, ddelta = dinflow * step, ddecay.addcmul_(dinflow, x)
    dD = dz = None
    if D is not None:
        du.addcmul_(dy, D.to(x.dtype))
        dD = (dy * x).sum((0, 1))
    if dgated is not None and y is not None and gate is not None and share is not None:
        y = y if D is None else y.addcmul_(x, D.to(x.dtype))
        dz = (dgated * y * share * (1 + gate * (1 - share))).transpose(0, 1)
    if softplus:
        # softplus'(z) = sigmoid(z) = 1 - exp(-softplus(z))
        ddelta.mul_(torch.expm1(-step).neg_())
    dbias = None if bias is None else ddelta.sum((0, 1))
    dinitial = None if initial is None else later.mT
    du, ddelta, dB, dC = (grad.transpose(0, 1) for grad in (du, ddelta, dB, dC))
    return du, ddelta, dA.mT, dB, dC, dD, dz, dbias, dinitial


class _Steps:
    """A block's buffer (T, B, N, D), used again by every block, and its steps, sliced once."""

    def __init__(self, x: Tensor, A: Tensor, block: int) -> None:
        self.whole = x.new_empty(min(block, len(x)), x.shape[1], *A.shape)
        self.steps = self.whole.unbind(0) if x.device.type == "cpu" else ()

    def first(self, part: slice) -> Tensor:
        """Return the part of the buffer that a block of this length uses."""
        return self.whole[: part.stop - part.start]

    def take(self, value: Tensor) -> _Steps:
        """Copy `value` into the first steps."""
        self.whole[: len(value)].copy_(value)
        return self


def _precise(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _block(u: Tensor, A: Tensor) -> int:
    """Return the time steps per block."""
    budget = _CPU_BLOCK if u.device.type == "cpu" else _DEVICE_BLOCK
    return max(16, budget // max(1, u.shape[0] * A.shape[0] * A.shape[1]))


def _parts(length: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]


def _expand(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, bias: Tensor | None, softplus: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return tensors with time first and channels last: u, delta (L, B, D), A (N, D), B, C (L, B, N, 1); delta made positive."""
    precise = _precise(u)
    x, step, B, C = (tensor.transpose(0, 1).to(precise).contiguous() for tensor in (u, delta, B, C))
    if bias is not None:
        step = step + bias.to(precise)
    if softplus:
        step = F.softplus(step)
    return x, step, A.mT.to(precise).contiguous(), B[..., None], C[..., None]


def _scan(decay: _Steps, states: _Steps, length: int, h: Tensor) -> None:
    """Compute states[t] += decay[t] states[t-1] over the first `length` steps, with `h` before the first."""
    if not states.steps:
        states.take(_scan_segments(decay.whole[:length], states.whole[:length], h))
        return
    for a, s in zip(decay.steps[:length], states.steps[:length], strict=True):
        h = s.addcmul_(a, h)


def _scan_back(decay: _Steps, g: _Steps, length: int) -> None:
    """Compute g[t] += decay[t+1] g[t+1] over the first `length` steps, from last to first."""
    if not g.steps:
        # the same recurrence backwards; the last step has no input
        a, values = decay.whole[:length], g.whole[:length]
        shifted = torch.cat([a[1:], torch.zeros_like(a[:1])]).flip(0)
        g.take(_scan_segments(shifted, values.flip(0), torch.zeros_like(values[0])).flip(0))
        return
    for t in range(length - 2, -1, -1):
        g.steps[t].addcmul_(decay.steps[t + 1], g.steps[t + 1])


def _scan_segments(decay: Tensor, source: Tensor, h: Tensor) -> Tensor:
    """Compute the same recurrence in about 2 sqrt(T) steps: segments in parallel from zero, then their last states in order."""
    length, rest = source.shape[0], source.shape[1:]
    width = max(1, math.isqrt(length))
    pad = -length % width
    if pad:
        decay = torch.cat([decay, decay.new_ones(pad, *rest)])
        source = torch.cat([source, source.new_zeros(pad, *rest)])
    reach = decay.reshape(-1, width, *rest).clone()  # factor of a segment's first state at each step
    states = source.reshape(-1, width, *rest).clone()
    for t in range(1, width):
        states[:, t].addcmul_(reach[:, t], states[:, t - 1])
        reach[:, t].mul_(reach[:, t - 1])
    before = torch.empty_like(states[:, 0])
    for i in range(len(states)):
        before[i] = h
        h = torch.addcmul(states[i, -1], reach[i, -1], h)
    return states.addcmul_(reach, before[:, None]).flatten(0, 1)[:length]

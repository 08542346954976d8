"""What `kernels.py` compares: this package's backends, other people's kernels and plain loops, each in its own layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from dgbench.cost.cases import Case
from dgbench.cost.kernels import candidates
from mfuser.fusion import MVFuser
from mfuser.ops import dispatch

FOREIGN = ("mamba_ssm",)  # third-party backends, for which our guarantees do not hold
Result = tuple[Tensor, ...]  # what comes out, then the gradient of every leaf


@dataclass(frozen=True)
class Bound:
    """A contender with the inputs of one case in its own layout; `ours` brings its result back to the case's."""

    forward: Callable[[], object]
    both: Callable[[], Result]
    ours: Callable[[Result], Result] = lambda result: result


@dataclass(frozen=True)
class Contender:
    """An implementation: `bind` prepares it for a case, or raises with the reason why it cannot run."""

    name: str
    bind: Callable[[Case], Bound]
    own: bool = True
    graph: bool = True  # whether its calls can be captured
    peer: bool = False  # not a backend of this package


def own(op: str, device: torch.device) -> list[Contender]:
    """Return the backends of an operator, including those that "auto" does not take."""

    def bind(row: dispatch.Backend, case: Case) -> Bound:
        if (reason := dispatch.unusable(row, *case.probe)) is not None:
            raise ImportError(reason)
        return Bound(partial(case.forward, row.name), partial(case.both, row.name))

    return [
        # the torch backends copy small tables from the host, which no graph can hold
        Contender(row.name, partial(bind, row), own=row.name not in FOREIGN, graph=row.name != "torch")
        for row in candidates(op, device)
    ]


def mamba_raw(case: Case) -> Bound:
    """Bind mamba-ssm's compiled scan, without autograd."""
    scan = _imported("selective_scan_cuda")
    (u, delta, B, C), (A, D, bias) = _channels_first(case), (case.leaves[i].detach() for i in (2, 5, 6))
    B, C, dout = B[:, None], C[:, None], case.dout.mT.contiguous()  # one group

    def forward() -> list[Tensor]:
        found: list[Tensor] = scan.fwd(u, delta, A, B, C, D, None, bias, True)
        return found

    def both() -> Result:
        y, states, *_ = forward()
        return y, *scan.bwd(u, delta, A, B, C, D, None, bias, dout, states, None, None, True, False)

    def ours(result: Result) -> Result:
        y, du, ddelta, dA, dB, dC, dD, dbias, *_ = result
        return y.mT, du.mT, ddelta.mT, dA, dB.squeeze(1).mT, dC.squeeze(1).mT, dD, dbias

    return Bound(forward, both, ours)


def mamba_autograd(case: Case) -> Bound:
    """Bind the same as its users call it."""
    _imported("selective_scan_cuda")
    scan = _imported("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    u, delta, B, C = (tensor.requires_grad_() for tensor in _channels_first(case))
    A, D, bias = (case.leaves[i] for i in (2, 5, 6))
    dout = case.dout.mT.contiguous()

    def call() -> Tensor:
        y: Tensor = scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)
        return y

    def both() -> Result:
        y = call()
        return y, *torch.autograd.grad(y, (u, delta, A, B, C, D, bias), dout)

    def ours(result: Result) -> Result:
        y, du, ddelta, dA, dB, dC, dD, dbias = result
        return y.mT, du.mT, ddelta.mT, dA, dB.mT, dC.mT, dD, dbias

    return Bound(torch.no_grad()(call), both, ours)


def _channels_first(case: Case) -> tuple[Tensor, ...]:
    return tuple(case.leaves[i].detach().mT.contiguous() for i in (0, 1, 3, 4))


def deformable_detr(case: Case) -> Bound:
    """Bind Deformable-DETR's operator, without autograd; widening bf16 values and narrowing results is timed."""
    attend = _imported("MultiScaleDeformableAttention")
    value, locations, weights = (leaf.detach() for leaf in case.leaves)
    sides: tuple[int, ...] = case.remake.keywords["sides"]  # type: ignore[attr-defined]
    shapes = torch.tensor([(side, side) for side in sides], device=value.device)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    wide = locations.dtype
    step = 64  # images at a time; the paper's setting

    def forward() -> Tensor:
        out: Tensor = attend.ms_deform_attn_forward(value.to(wide), shapes, starts, locations, weights, step)
        return out.to(value.dtype)

    def both() -> Result:
        widened, dout = value.to(wide), case.dout.to(wide)
        out = attend.ms_deform_attn_forward(widened, shapes, starts, locations, weights, step)
        dvalue, *rest = attend.ms_deform_attn_backward(widened, shapes, starts, locations, weights, dout, step)
        return out.to(value.dtype), dvalue.to(value.dtype), *rest

    return Bound(forward, both)


def composition(scan: Callable[..., Tensor] | None, norm: Callable[..., Tensor] | None, case: Case) -> Bound:
    """Bind MVFuser's block in plain modules around another scan, channels before tokens from the convolutions to the scan.

    Args:
        scan: mamba-ssm's interface; None imports it.    norm: (y, z, weight) gated; None takes its Triton norm.
    """
    if scan is None:
        _imported("selective_scan_cuda")
        scan = _imported("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    if norm is None:
        fused = _imported("mamba_ssm.ops.triton.layernorm_gated").rmsnorm_fn
        norm = lambda y, z, weight: fused(y, weight, None, z=z, eps=1e-5)  # noqa: E731
    joint, *parameters = case.leaves
    width = joint.shape[2]
    p = dict(zip(dict(MVFuser(width).named_parameters()), parameters, strict=True))
    state, rank = p["A_log"].shape[1], p["dt_proj.weight"].shape[1]
    low = joint.dtype in (torch.bfloat16, torch.float16)

    def block() -> Tensor:
        x, z = F.linear(joint, p["in_proj.weight"]).mT.chunk(2, 1)  # (B, C/2, L) each
        x = F.silu(F.conv1d(x, p["conv1d_x.weight"], padding=1, groups=x.shape[1]))
        z = F.silu(F.conv1d(z, p["conv1d_z.weight"], padding=1, groups=z.shape[1]))
        steps, B, C = F.linear(x.mT, p["x_proj.weight"]).split([rank, state, state], -1)
        delta = F.linear(steps, p["dt_proj.weight"], p["dt_proj.bias"]).mT
        A, bias = -p["A_log"].float().exp(), p["dt_proj.bias"].float()
        y = scan(x, delta, A, B.mT.contiguous(), C.mT.contiguous(), p["D"].float(), delta_bias=bias, delta_softplus=True)
        gated = norm(y.mT.contiguous(), z.mT.contiguous(), p["norm.weight"])
        return F.linear(gated.to(joint.dtype), p["out_proj.weight"]) * p["scale"]

    def call() -> Tensor:
        with torch.autocast(joint.device.type, joint.dtype, enabled=low):
            return block()

    def both() -> Result:
        out = call()
        return out, *torch.autograd.grad(out, case.leaves, case.dout.to(out.dtype))

    return Bound(torch.no_grad()(call), both)


def plain_norm(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Return x / rms(x) * weight * silu(z), in fp32."""
    wide = y.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight * F.silu(z.float())


def plain_loop(pick: Callable[[Tensor], Sequence[Tensor] | Callable[[int], Tensor]], case: Case) -> Bound:
    """Bind the scan as a loop over time under autograd, like Mamba's own reference.

    All decays and inputs, (B, D, L, N), are computed before the loop.

    Args:
        pick: how a time step is taken from them.
    """
    u, delta, A, B, C, D, bias = case.leaves

    def call() -> Tensor:
        x, step = u.mT, F.softplus(delta + bias).mT  # (B, D, L)
        decay = torch.exp(step[..., None] * A[:, None])
        inflow = (step * x)[..., None] * B[:, None]
        decays, inflows, readouts = pick(decay), pick(inflow), pick(C[:, None])
        h, ys = x.new_zeros(len(x), *A.shape), []
        for t in range(x.shape[2]):
            h = _at(decays, t) * h + _at(inflows, t)
            ys.append((h * _at(readouts, t)).sum(-1))
        return torch.stack(ys, 1) + u * D

    def both() -> Result:
        out = call()
        return out, *torch.autograd.grad(out, case.leaves, case.dout)

    return Bound(torch.no_grad()(call), both)


def _at(steps: Sequence[Tensor] | Callable[[int], Tensor], t: int) -> Tensor:
    return steps(t) if callable(steps) else steps[t]


def indexed(tensor: Tensor) -> Callable[[int], Tensor]:
    """Return steps by indexing: the backward of each is a tensor of zeros as large as the whole."""
    return lambda t: tensor[:, :, t]


def unbound(tensor: Tensor) -> Sequence[Tensor]:
    """Return all steps at once: one backward for all."""
    return tensor.unbind(2)


def _imported(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"no peer: {error}") from error


SCAN_PEERS = [
    Contender("mamba-ssm, raw", mamba_raw, own=False, peer=True),
    Contender("mamba-ssm, autograd", mamba_autograd, own=False, peer=True),
]
DEFORM_PEERS = [Contender("Deformable-DETR", deformable_detr, own=False, peer=True)]
BLOCK_PEERS = [
    Contender("authors' composition over mamba-ssm", partial(composition, None, plain_norm), own=False, peer=True),
    Contender("the same, mamba-ssm's norm", partial(composition, None, None), own=False, peer=True),
]

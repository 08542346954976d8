"""Calls of the operators on random inputs, which `dgbench kernels bench` and `benchmarks/kernels.py` time and check."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mfuser.fusion import MVFuser
from mfuser.ops import ms_deform_attn, selective_scan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class Case:
    """One call of an operator on inputs of its own.

    Attributes:
        call: runs it with the backend of that name.    leaves: inputs with gradients.
        dout: the gradient of the result.    probe: arguments for dispatch.
        bytes: what forward and backward must read and write at least, each tensor once.
        exps: exponentials that every implementation of the forward needs.
        products: multiply-adds of the forward's matrix products.    remake: the same call on other leaves and dout.
    """

    op: str
    shape: str
    call: Callable[[str], Tensor]
    leaves: tuple[Tensor, ...]
    dout: Tensor
    probe: tuple[Tensor | None, ...]
    bytes: tuple[int, int]
    remake: Callable[[tuple[Tensor, ...], Tensor], Case]
    exps: int = 0
    products: int = 0

    def forward(self, backend: str) -> Tensor:
        """Return the operator's result."""
        with torch.no_grad():
            return self.call(backend)

    def both(self, backend: str) -> tuple[Tensor, ...]:
        """Return the result and the gradient of every leaf."""
        out = self.call(backend)
        return out, *torch.autograd.grad(out, self.leaves, self.dout)

    def precise(self) -> Case:
        """Return the same case in fp64, to compare with."""
        return self.remake(tuple(leaf.detach().double().requires_grad_() for leaf in self.leaves), self.dout.double())


def scan_case(
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch: int,
    length: int,
    dim: int,
    state: int,
    shift: float = -2.0,
    gated: bool = False,
    seed: int = 0,
) -> Case:
    """Return the selective scan as MVFuser calls it: a bias and softplus for the steps, D, A in fp32.

    Args:
        shift: of the raw steps, whose bias is drawn around -1 already; -40 makes steps tiny, 30 large.
        gated: also a gate and a first state, and the last state is part of the result.
    """
    draw = _Draw(dtype, device, seed)
    wide = _wide(dtype)
    leaves = [
        draw(batch, length, dim),
        draw(batch, length, dim) + shift,
        -draw(dim, state, dtype=wide).exp(),
        draw(batch, length, state),
        draw(batch, length, state),
        draw(dim, dtype=wide),
        draw(dim, dtype=wide) - 1,
    ]
    dout = draw(batch, length, dim)
    if gated:
        leaves += [draw(batch, length, dim), draw(batch, dim, state, dtype=wide)]
        dout = torch.cat([dout.flatten().to(wide), draw(batch * dim * state, dtype=wide)])
    return _scan(tuple(leaf.requires_grad_() for leaf in leaves), dout)


def _scan(leaves: tuple[Tensor, ...], dout: Tensor) -> Case:
    u, delta, A, B, C, D, bias, *more = leaves
    z, initial = more or (None, None)

    def call(backend: str) -> Tensor:
        y, last = selective_scan(
            u,
            delta,
            A,
            B,
            C,
            D,
            z=z,
            delta_bias=bias,
            delta_softplus=True,
            initial_state=initial,
            return_final_state=True,
            backend=backend,
        )
        return y if initial is None else torch.cat([y.flatten().to(last.dtype), last.flatten()])

    batch, length, dim = u.shape
    tokens, mixers = u.numel() * u.element_size(), B.numel() * B.element_size()
    return Case(
        "selective_scan",
        f"B {batch}, L {length}, D {dim}, N {A.shape[1]}",
        call,
        leaves,
        dout,
        (u, delta, A, B, C, D, z, bias, initial),
        (3 * tokens + 2 * mixers, 5 * tokens + 4 * mixers),
        _scan,
        exps=u.numel() * A.shape[1],
    )


def deform_case(
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch: int,
    sides: Sequence[int],
    heads: int,
    dim: int,
    points: int,
    spread: str = "near",
    seed: int = 0,
) -> Case:
    """Make deformable self-attention over square maps: every cell of every map is a query; locations and weights in fp32.

    Args:
        spread: "near", 1..P cells from the query's own place in a direction per head, as such layers start
            (Zhu et al. 2021, appendix A.4), give or take a cell; "anywhere", uniformly; or "outside" as well.
    """
    draw = _Draw(dtype, device, seed)
    wide = _wide(dtype)
    cells, scales = sum(side * side for side in sides), len(sides)
    places = (batch, cells, heads, scales, points, 2)
    if spread == "anywhere":
        locations = draw.uniform(*places, dtype=wide)
    elif spread == "outside":
        locations = 2 * draw.uniform(*places, dtype=wide) - 0.5
    else:
        centres = [(torch.arange(side, device=device, dtype=wide) + 0.5) / side for side in sides]
        own = torch.cat([torch.stack(torch.meshgrid(c, c, indexing="xy"), -1).flatten(0, 1) for c in centres])  # (Q, 2)
        angle = torch.arange(heads, device=device, dtype=wide) * (2 * torch.pi / heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, points + 1, device=device, dtype=wide)
        offsets = direction[:, None, None] * distance[:, None] + draw(*places, dtype=wide) / 2
        extent = torch.tensor(sides, device=device, dtype=wide)[:, None, None]
        locations = own[:, None, None, None] + offsets / extent
    weights = draw(batch, cells, heads, scales * points, dtype=wide).softmax(-1).unflatten(-1, (scales, points))
    leaves = (draw(batch, cells, heads, dim), locations, weights)
    return _deform(
        tuple(leaf.requires_grad_() for leaf in leaves), draw(batch, cells, heads * dim), sides=tuple(sides), spread=spread
    )


def _deform(leaves: tuple[Tensor, ...], dout: Tensor, *, sides: tuple[int, ...], spread: str) -> Case:
    value, locations, weights = leaves
    shapes = [(side, side) for side in sides]

    def call(backend: str) -> Tensor:
        return ms_deform_attn(value, shapes, locations, weights, backend=backend)

    batch, cells, heads, dim = value.shape
    points = weights.shape[-1]
    maps, rest = (sum(t.numel() * t.element_size() for t in group) for group in ((value,), (locations, weights)))
    return Case(
        "ms_deform_attn",
        f"B {batch}, Q {cells}, {heads} x {dim}, {len(sides)} scales, {points} points {spread}",
        call,
        leaves,
        dout,
        leaves,
        (2 * maps + rest, 3 * maps + 2 * rest),
        partial(_deform, sides=sides, spread=spread),
    )


def block_case(
    dtype: torch.dtype, device: torch.device, *, batch: int, length: int, width: int, state: int = 16, seed: int = 0
) -> Case:
    """Return a whole MVFuser in training: fp32 weights, autocast for bf16 and fp16, no dropout."""
    draw = _Draw(dtype, device, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = MVFuser(width, state=state, dropout=0.0).to(device, _wide(dtype))
    # as after training: the initial 0.001 would hide errors
    nn.init.ones_(module.scale)
    joint = draw(batch, length, width).requires_grad_()
    return _block((joint, *module.parameters()), draw(batch, length, width), module=module)


def _block(leaves: tuple[Tensor, ...], dout: Tensor, *, module: MVFuser) -> Case:
    joint, *values = leaves
    own = list(module.parameters())
    if any(value is not parameter for value, parameter in zip(values, own, strict=True)):
        module = copy.deepcopy(module).to(values[0].dtype)
        own = list(module.parameters())
        with torch.no_grad():
            for parameter, value in zip(own, values, strict=True):
                parameter.copy_(value)
    low = joint.dtype in (torch.bfloat16, torch.float16)

    def call(backend: str) -> Tensor:
        module.backend = backend
        with torch.autocast(joint.device.type, joint.dtype, enabled=low):
            return module.mix(joint)

    batch, length, width = joint.shape
    half, rank, state = width // 2, module.rank, module.state
    tokens = joint.numel() * joint.element_size()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in own)
    return Case(
        "mvfuser",
        f"B {batch}, L {length}, C {width}, N {state}",
        call,
        (joint, *own),
        dout,
        (module.in_proj.weight, module.A_log),
        (2 * tokens + weights, 3 * tokens + 2 * weights),
        partial(_block, module=module),
        exps=batch * length * half * state,
        products=batch * length * (2 * width * half + half * (rank + 2 * state) + rank * half + half * width),
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Draw:
    """Seeded normal numbers of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def uniform(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device).to(dtype)

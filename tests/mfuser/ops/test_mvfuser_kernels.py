"""MVFuser's kernels one by one against their equations, at the ends of their tensors, and as large batches are tuned."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mfuser.ops import compiled

from . import mvfuser_kernels
from .emulation import fenced
from .mvfuser_block import autocast, errors, kernels, make, run, tokens

__all__ = ["kernels"]  # a fixture


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("half", "batch", "length"), [(24, 2, 9), (7, 3, 5), (264, 1, 67)])
def test_kernels_touch_no_memory_beyond_their_tensors(emulated, half, batch, length, dtype):
    for before in (False, True):

        def draw(*shape: int, kind: torch.dtype = dtype, before: bool = before) -> Tensor:
            return fenced(torch.randn(shape).to(kind), before=before)

        wx, wz = (draw(half, 1, 3, kind=torch.float32) for _ in range(2))
        weight, scale = draw(half, kind=torch.float32), draw(1, kind=torch.float32)[0]
        xz, y, z, d, more = draw(batch, length, 2 * half), *(draw(batch, length, half) for _ in range(4))
        with compiled.use(emulated):
            results = [
                *mvfuser_kernels.conv_forward(xz, wx, wz, True),
                *(conv := mvfuser_kernels.conv_backward(xz, wx, wz, d, more, z, True)),
                mvfuser_kernels.norm_forward(y, z, weight, scale, 1e-5),
                *(norm := mvfuser_kernels.norm_backward(d.view(-1, half), y, z, weight, scale, 1e-5)),
            ]
            A, dA = draw(half, 3, kind=torch.float32), draw(half, 3, kind=torch.float32)
            results += mvfuser_kernels.finish(fenced(conv[1]), fenced(norm[3]), dA, A, draw(half, kind=torch.float32), 2.0)
            out = fenced(torch.full((batch * length, 11), 7.0, dtype=dtype))
            mvfuser_kernels.join(
                draw(batch, length, 5, kind=torch.float32), draw(batch, length, 5, kind=torch.float32), out[:, 1:]
            )
            assert (out[:, 0] == 7).all()
            assert (out[:, 1:] != 7).all()
            results += mvfuser_kernels.prepare(y, [wx, weight], A, weight, 2.0, torch.bfloat16)[1]
        assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("shape", [(24, 4, 2, 9), (160, 16, 1, 67)], ids=str)
def test_the_block_touches_no_memory_beyond_its_buffers(emulated, monkeypatch, shape, before):
    width, state, batch, length = shape
    backend, empty = import_module("mfuser.ops.mvfuser.cuda_backend"), torch.empty
    monkeypatch.setattr(backend, "_ALIGNED", 16)
    monkeypatch.setattr(backend, "_plan", backend._plan.__wrapped__)
    buffers = []

    def guarded(*size, **options) -> Tensor:
        made = empty(*size, **options)
        if made.dtype != torch.uint8:
            return made
        buffers.append(fenced(made, before=before))
        return buffers[-1]

    fuser, joint = make(width, state), tokens(batch, length, width)
    with compiled.use(emulated):
        monkeypatch.setattr("mfuser.fusion.plan", lambda *_: ("cuda", "cuda"))
        expected = run(fuser, autocast(fuser.mix), joint)
        monkeypatch.setattr(torch, "empty", guarded)
        actual = run(fuser, autocast(fuser.mix), joint)
        with torch.no_grad():
            alone = fuser.mix(joint)
    assert len(buffers) == 4
    assert torch.isfinite(alone).all()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def one_by_one(name: str) -> ModuleType:
    """The kernels of a backend as functions."""
    return mvfuser_kernels if name == "cuda" else import_module(f"mfuser.ops.mvfuser.{name}_backend")


@pytest.mark.parametrize("half", [7, 24, 130])
@pytest.mark.parametrize("gate", [False, True])
def test_kernels_of_any_width_equal_their_equations(kernels, half, gate):
    backend, device, eps = one_by_one(kernels[0]), kernels[1], 1e-5
    xz, wx, wz = tokens(2, 9, 2 * half, device=device), *(tokens(half, 1, 3, device=device) + i for i in range(2))
    y, d, weight, scale = *tokens(2, 2, 9, half, device=device), tokens(half, device=device), tokens(1, device=device)[0]
    leaves = [t.double().requires_grad_() for t in (xz, wx, wz, y, weight, scale)]
    wide, conv_x, conv_z, scanned, factor, times = leaves
    before = wide.mT.split(half, 1)
    x, z = (F.conv1d(part, w, padding=1, groups=half).mT for part, w in zip(before, (conv_x, conv_z), strict=True))
    x, z = F.silu(x), F.silu(z) if gate else z
    g = times * scanned * (scanned.square().mean(-1, keepdim=True) + eps).rsqrt() * factor * F.silu(z)
    grads = torch.autograd.grad([g, x], leaves, [d.double(), d.double()])

    mine_x, mine_z = backend.conv_forward(xz, wx, wz, gate)
    mine_g = backend.norm_forward(y, mine_z, weight, scale, eps)
    # what comes in lacks the scale
    dy, dz, again, norm = backend.norm_backward(d.view(-1, half), y, mine_z, weight, scale, eps)
    dxz, conv = backend.conv_backward(xz, wx, wz, torch.zeros_like(d), d, dz, gate)
    A = tokens(half, 3, device=device)
    dwx, dwz, dweight, dscale, dA_log, dbias = backend.finish(conv, norm, 2 * A, A, weight, 3.0)
    expected = (x, z, g, g, grads[3], grads[0], grads[1], grads[2], grads[4], grads[5], 2 * A * A, 3 * weight)
    actual = (mine_x, mine_z, mine_g, again, dy, dxz, dwx, dwz, dweight, dscale, dA_log, dbias)
    for mine, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.double(), right.detach().double().view(mine.shape), rtol=1e-4, atol=1e-4)


def test_rows_of_xz_may_be_part_of_longer_ones(kernels):
    backend = one_by_one(kernels[0])
    wide = tokens(2, 9, 64, device=kernels[1])
    wx, wz = (tokens(24, 1, 3, device=kernels[1]) for _ in range(2))
    d = [tokens(2, 9, 24, device=kernels[1]) for _ in range(3)]
    for xz in (wide[..., :48], wide[..., 5:53], wide.transpose(0, 1).contiguous().transpose(0, 1)[..., 8:56]):
        for name, rest in (("conv_forward", (True,)), ("conv_backward", (*d, True))):
            function = getattr(backend, name)
            for actual, expected in zip(function(xz, wx, wz, *rest), function(xz.contiguous(), wx, wz, *rest), strict=True):
                assert torch.equal(actual, expected)


def test_many_tokens_and_blocks(kernels, monkeypatch):
    """What large batches choose: longer walks, and several tokens for each of the norm's programs."""
    backend = import_module(f"mfuser.ops.mvfuser.{kernels[0]}_backend")
    monkeypatch.setattr(backend, "_NORM_BLOCKS", 3)
    if kernels[0] == "cuda":
        monkeypatch.setattr(backend, "_MANY", 0)
        monkeypatch.setattr(backend, "_plan", backend._plan.__wrapped__)
    fuser, joint = make(24, 4, device=kernels[1]), tokens(2, 70, 24, device=kernels[1])
    expected = run(fuser, fuser.composed, joint)
    assert max(errors(run(fuser, fuser.mix, joint), expected).values()) < 1e-5

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mfuser.ops import available, ms_deform_attn

from .tolerances import TOL

BACKENDS = [name for name in available("ms_deform_attn") if name != "reference"]
# batch, queries, heads, dim, points, maps
SHAPES = [
    (1, 1, 1, 1, 1, [(1, 1)]),
    (2, 5, 2, 3, 3, [(3, 4), (6, 7)]),
    (1, 130, 4, 16, 4, [(4, 5), (8, 10), (16, 20)]),
    (3, 17, 3, 33, 2, [(1, 9), (5, 1)]),
]


def inputs(batch, queries, heads, dim, points, maps, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    cells = sum(h * w for h, w in maps)
    value = torch.randn(batch, cells, heads, dim, generator=generator, dtype=torch.float64)
    # well beyond the edges, too
    places = torch.rand(batch, queries, heads, len(maps), points, 2, generator=generator, dtype=torch.float64) * 2 - 0.5
    weights = torch.randn(batch, queries, heads, len(maps), points, generator=generator, dtype=torch.float64)
    return tuple(t.to(dtype).requires_grad_() for t in (value, places, weights))  # type: ignore[return-value]


def by_grid_sample(value: Tensor, maps: list[tuple[int, int]], places: Tensor, weights: Tensor) -> Tensor:
    """The same by torch's own bilinear sampling."""
    total = torch.zeros(())
    parts = value.split([h * w for h, w in maps], 1)
    for scale, ((height, width), part) in enumerate(zip(maps, parts, strict=True)):
        image = part.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (height, width))  # (B M, D, H, W)
        grid = 2 * places[:, :, :, scale].transpose(1, 2).flatten(0, 1) - 1  # (B M, Q, P, 2)
        sampled = F.grid_sample(image, grid, align_corners=False)  # (B M, D, Q, P)
        weight = weights[:, :, :, scale].transpose(1, 2).flatten(0, 1)[:, None]
        total = total + (sampled * weight).sum(-1)
    batch, heads = value.shape[0], value.shape[2]
    return total.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


def run(function, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    out = function(*arguments)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out.double() * probe).sum(), arguments)]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s[:5])))
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_value_and_every_gradient_equal_grid_sampling(backend, shape, dtype):
    given = inputs(*shape, dtype=getattr(torch, dtype))
    wide = tuple(t.detach().double().requires_grad_() for t in given)
    maps = shape[5]
    actual = run(lambda v, p, w: ms_deform_attn(v, maps, p, w, backend=backend), given)
    expected = run(lambda v, p, w: by_grid_sample(v, maps, p, w), wide)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        rtol, atol = TOL[dtype][min(i, 1)]
        torch.testing.assert_close(a.double(), e, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_gradients_by_finite_differences(backend):
    maps = [(3, 4), (6, 7)]
    given = inputs(2, 3, 2, 2, 2, maps)
    assert torch.autograd.gradcheck(lambda v, p, w: ms_deform_attn(v, maps, p, w, backend=backend), given)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_the_operator_is_well_formed(backend):
    value, places, weights = inputs(2, 3, 2, 2, 2, [(3, 4), (6, 7)])
    arguments = (value, [3, 4, 6, 7], places, weights, backend)
    torch.library.opcheck(torch.ops.mfuser.ms_deform_attn.default, arguments)
    detached = (value.detach(), [3, 4, 6, 7], places.detach(), weights.detach(), backend)
    out = torch.ops.mfuser.ms_deform_attn(*detached)
    torch.library.opcheck(torch.ops.mfuser.ms_deform_attn_bwd.default, (torch.ones_like(out), *detached))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_same(backend):
    maps = [(3, 4), (6, 7)]
    given = inputs(2, 5, 2, 3, 2, maps)
    strided = tuple(t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in given)
    expected = run(lambda v, p, w: ms_deform_attn(v, maps, p, w, backend="reference"), given)
    for a, e in zip(run(lambda v, p, w: ms_deform_attn(v, maps, p, w, backend=backend), strided), expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [-1e9, 1e9, float("inf"), 1.0, 0.0])
def test_far_and_border_places_equal_the_reference(backend, place):
    maps = [(3, 4)]
    value, places, weights = inputs(1, 2, 1, 2, 1, maps, dtype=torch.float32)
    places = torch.full_like(places, place)
    out = ms_deform_attn(value, maps, places, weights, backend=backend)
    far = abs(place) > 1
    expected = torch.zeros_like(out) if far else ms_deform_attn(value, maps, places, weights, backend="reference")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_place_that_is_not_a_number_does_not_crash(backend):
    maps = [(3, 4)]
    value, places, weights = inputs(1, 2, 1, 2, 1, maps)
    out = ms_deform_attn(value, maps, torch.full_like(places, float("nan")), weights, backend=backend)
    assert out.shape == (1, 2, 2)


def test_wrong_shapes_are_named():
    value, places, weights = inputs(1, 2, 1, 2, 1, [(3, 4)])
    with pytest.raises(ValueError, match=r"expected \(B, 6, M, D\)"):
        ms_deform_attn(value, [(2, 3)], places, weights)
    with pytest.raises(ValueError, match="weights are"):
        ms_deform_attn(value, [(3, 4)], places, weights[:, :1])

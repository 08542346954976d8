from __future__ import annotations

import pytest
import torch
from golden_files import fill_by_name, noise, numbers, relative_error

from mfuser.fusion import FUSERS, BidirectionalMVFuser, GatedRMSNorm, MTEnhancer, MTEnhancerLayer, MVFuser
from mfuser.ops import explain, selective_scan
from mfuser.ops.dispatch import rows


@pytest.fixture(scope="module")
def goldens():
    return numbers("units")


@pytest.mark.parametrize(("dim", "batch", "length"), [(64, 2, 50), (1024, 1, 2594)])
def test_mvfuser_equals_the_authors(goldens, dim, batch, length):
    check_mvfuser(goldens, "auto", dim, batch, length)


@pytest.mark.parametrize("backend", [row.name for row in rows("selective_scan")])
def test_mvfuser_equals_the_authors_with_every_backend_of_the_scan(goldens, backend):
    if reason := explain("selective_scan", torch.zeros(1))[backend]:
        pytest.skip(f"{backend}: {reason}")
    check_mvfuser(goldens, backend, 64, 2, 50)


def check_mvfuser(goldens, backend: str, dim: int, batch: int, length: int) -> None:
    unit = f"unit_mvfuser{dim}"
    fuser = MVFuser(dim, backend=backend).eval()
    fill_by_name(fuser, unit)
    x = noise(f"{unit}/x", batch, length, dim).requires_grad_()
    y = fuser.mix(x)
    assert relative_error(goldens, f"{unit}/y", y) < 1e-5
    (y * noise(f"{unit}/probe", batch, length, dim)).sum().backward()
    assert relative_error(goldens, f"{unit}/grad/x", x.grad) < 2e-5
    for name, parameter in fuser.named_parameters():
        assert relative_error(goldens, f"{unit}/grad/{name}", parameter.grad) < 1e-4, name


def test_the_scan_equals_the_authors(goldens):
    shapes = {"u": (2, 6, 20), "delta": (2, 6, 20), "B": (2, 4, 20), "C": (2, 4, 20), "D": (6,), "delta_bias": (6,)}
    given = {name: noise(f"unit_scan/{name}", *shape) for name, shape in shapes.items()}
    given["A"] = -noise("unit_scan/A", 6, 4).exp()
    leaves = {name: tensor.requires_grad_() for name, tensor in given.items()}
    tokens = {name: leaves[name].mT for name in ("u", "delta", "B", "C")}  # recorded as (B, D, L)
    y = selective_scan(**{**leaves, **tokens}, delta_softplus=True).mT
    assert relative_error(goldens, "unit_scan/y", y) < 1e-5
    (y * noise("unit_scan/probe", 2, 6, 20)).sum().backward()
    for name, tensor in leaves.items():
        assert relative_error(goldens, f"unit_scan/grad/{name}", tensor.grad) < 1e-5, name


def test_the_gated_norm_equals_the_authors(goldens):
    norm = GatedRMSNorm(8)
    norm.weight.data = noise("unit_rmsgate/w", 8)
    y = norm(noise("unit_rmsgate/x", 2, 5, 8), noise("unit_rmsgate/z", 2, 5, 8))
    assert relative_error(goldens, "unit_rmsgate/y", y) < 1e-6


@pytest.mark.parametrize(
    ("unit", "make", "dim"),
    [("unit_mte", lambda: MTEnhancerLayer(256, 4, 16, 0.1, "auto"), 256), ("unit_ctx", lambda: MTEnhancer(768), 768)],
)
def test_the_enhancer_equals_the_authors(goldens, unit, make, dim):
    module = make().eval()
    fill_by_name(module, unit)
    text, visual = noise(f"{unit}/text", 2, 19, dim).requires_grad_(), noise(f"{unit}/visual", 2, 50, dim).requires_grad_()
    y = module(text, visual)
    assert relative_error(goldens, f"{unit}/y", y) < 1e-5
    (y * noise(f"{unit}/probe", 2, 19, dim)).sum().backward()
    assert relative_error(goldens, f"{unit}/grad/text", text.grad) < 5e-5
    assert relative_error(goldens, f"{unit}/grad/visual", visual.grad) < 5e-5
    for name, parameter in module.named_parameters():
        assert relative_error(goldens, f"{unit}/grad/{name}", parameter.grad) < 1e-4, name


@pytest.mark.parametrize("name", sorted(FUSERS))
def test_every_fuser_returns_residuals_of_any_pair_of_lengths(name):
    fuser = FUSERS[name](32, state=4)
    for first, second in ((5, 5), (7, 3), (1, 12)):
        vfm, vlm = (torch.randn(2, n, 32, requires_grad=True) for n in (first, second))
        a, b = fuser(vfm, vlm)
        assert a.shape == vfm.shape
        assert b.shape == vlm.shape
        (a.sum() + b.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fuser.parameters())


def test_at_scale_zero_nothing_is_added():
    fuser = MVFuser(32, state=4)
    fuser.scale.data.zero_()
    a, b = fuser(torch.randn(1, 4, 32), torch.randn(1, 4, 32))
    assert not a.any()
    assert not b.any()


def test_information_flows_from_the_foundation_tower_to_the_other_alone():
    fuser = MVFuser(32, state=4).eval()
    fuser.scale.data.fill_(1.0)
    vfm, vlm, other = (torch.randn(1, 6, 32) for _ in range(3))
    first, second = fuser(vfm, vlm)
    moved = fuser(vfm, other)[0]
    # the convolution of width 3 lets the last foundation token see one ahead
    torch.testing.assert_close(first[:, :-1], moved[:, :-1])
    assert not torch.allclose(second, fuser(other, vlm)[1])


def test_first_steps_are_between_a_thousandth_and_a_tenth():
    step = torch.nn.functional.softplus(MVFuser(256).dt_proj.bias)
    assert 9e-4 < step.min().item() < 5e-3
    assert 2e-2 < step.max().item() < 0.11


def test_dropout_is_of_training_alone():
    fuser = MVFuser(32, state=4)
    x = torch.randn(1, 9, 32)
    assert not torch.equal(fuser.mix(x), fuser.mix(x))
    fuser.eval()
    assert torch.equal(fuser.mix(x), fuser.mix(x))


def by_loops(fuser: MVFuser, u: torch.Tensor, *, sane: bool, both_ways: bool) -> torch.Tensor:
    """MVFuser written token by token and channel by channel for u (L, C), after the paper and Vision Mamba's algorithm 1."""
    w = {name: p.detach().double() for name, p in fuser.named_parameters()}
    u, half = u.double(), u.shape[1] // 2
    x, z = (u @ w["in_proj.weight"].T).split(half, 1)

    def convolved(rows, kernel):
        padded = torch.cat([torch.zeros(1, half), rows, torch.zeros(1, half)])
        return torch.stack([(padded[t : t + 3] * kernel[:, 0].T).sum(0) for t in range(len(rows))])

    def silu(value):
        return value / (1 + (-value).exp())

    def scanned(rows, tail):
        out, state = torch.zeros_like(rows), torch.zeros(half, fuser.state).double()
        for t, row in enumerate(rows):
            rank, B, C = (w[f"x_proj{tail}.weight"] @ row).split([fuser.rank, fuser.state, fuser.state])
            bias = w[f"dt_proj{tail}.bias"]
            step = torch.log1p((w[f"dt_proj{tail}.weight"] @ rank + (bias if sane else bias + bias)).exp())
            for c in range(half):
                decay = (-w[f"A_log{tail}"][c].exp() * step[c]).exp()
                state[c] = decay * state[c] + step[c] * row[c] * B
                out[t, c] = (state[c] * C).sum() + w[f"D{tail}"][c] * row[c]
        return out

    x, z = silu(convolved(x, w["conv1d_x.weight"])), convolved(z, w["conv1d_z.weight"])
    y = scanned(x, "")
    if both_ways:
        y = y + scanned(x.flip(0), "_b").flip(0)
    y = y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt() * w["norm.weight"]
    gate = silu(z) if sane else silu(silu(z))
    return (y * gate) @ w["out_proj.weight"].T * w["scale"]


@pytest.mark.parametrize("sane", [False, True])
@pytest.mark.parametrize("name", sorted(FUSERS))
def test_every_fuser_equals_a_plain_loop(name, sane):
    fuser = FUSERS[name](12, state=3, sane=sane).eval()
    with torch.no_grad():
        for parameter in fuser.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    u = torch.randn(9, 12)
    expected = by_loops(fuser, u, sane=sane, both_ways=name == "mvfuser_bidir").float()
    torch.testing.assert_close(fuser.mix(u[None])[0], expected, rtol=1e-3, atol=1e-4)
    # the other variant is another function
    other = by_loops(fuser, u, sane=not sane, both_ways=name == "mvfuser_bidir").float()
    assert not torch.allclose(expected, other, rtol=1e-2)


def test_scanned_both_ways_each_tower_informs_the_other():
    # what travels far is small, and in fp64 nothing else is
    fuser = BidirectionalMVFuser(32, state=4).eval().double()
    fuser.scale.data.fill_(1.0)
    vfm, vlm, other = (torch.randn(1, 6, 32, dtype=torch.float64) for _ in range(3))
    first, second = fuser(vfm, vlm)
    changed = (first - fuser(vfm, other)[0]).abs().amax(-1)
    assert (changed > 1e-12).all(), "every foundation token, not only the one that the convolution lets look ahead"
    assert not torch.allclose(second, fuser(other, vlm)[1])


def test_both_directions_start_alike_and_learn_apart():
    fuser = BidirectionalMVFuser(64)
    assert torch.equal(fuser.A_log, fuser.A_log_b)
    assert fuser.A_log.data_ptr() != fuser.A_log_b.data_ptr()
    one_way = {name for name, _ in MVFuser(64).named_parameters()}
    added = {name for name, _ in fuser.named_parameters()} - one_way
    assert added == {"x_proj_b.weight", "dt_proj_b.weight", "dt_proj_b.bias", "A_log_b", "D_b"}


def test_the_enhancers_steps_start_as_mambas_in_the_sane_variant_alone():
    for sane, low, high in ((False, 0.69, 0.7), (True, 9e-4, 0.11)):
        step = torch.nn.functional.softplus(MTEnhancer(64, sane=sane).decoder[0].cross_attn.dt_proj.bias)
        assert low < step.min().item() <= step.max().item() < high
    assert step.max() / step.min() > 10

from __future__ import annotations

import itertools

import pytest
import torch
from golden_files import fill_by_name, noise, numbers, relative_error
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import mfuser
from mfuser.decoder.mtenhancer import MTEnhancer, MTEnhancerLayer
from mfuser.fusion import (
    FUSERS,
    BiDeformAttn,
    BidirectionalMVFuser,
    Fuser,
    GatedRMSNorm,
    MVFuser,
    SelfAttnConcat,
    SelfAttnSeparate,
    Site,
)
from mfuser.ops import explain, selective_scan
from mfuser.ops.dispatch import rows
from mfuser.towers.meta import unfilled


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


def lengths(name: str, prefixes: tuple[int, int] = (1, 0), cells: int = 6) -> list[tuple[int, int]]:
    """Numbers of tokens that a fuser takes."""
    return [(prefixes[0] + cells, prefixes[1] + cells)] if name == "bi_deform_attn" else [(5, 5), (7, 3), (1, 12)]


def disturbed(fuser: Fuser) -> Fuser:
    """With noise on every weight: some start at zero, and then the ones before them get no gradient."""
    with torch.no_grad():
        for parameter in fuser.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return fuser


def built(name: str, *, prefixes: tuple[int, int] = (1, 0), grid: tuple[int, int] = (2, 3), dim: int = 32) -> Fuser:
    return FUSERS[name](Site(dim, grid, prefixes, state=4))


@pytest.mark.parametrize("name", sorted(FUSERS))
def test_every_fuser_returns_residuals_of_the_lengths_it_is_given(name):
    for first, second in lengths(name):
        fuser = disturbed(built(name))
        vfm, vlm = (torch.randn(2, n, 32, requires_grad=True) for n in (first, second))
        a, b = fuser(vfm, vlm)
        assert a.shape == vfm.shape
        assert b.shape == vlm.shape
        (a.square().sum() + b.square().sum()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fuser.parameters())


@pytest.mark.parametrize("name", sorted(FUSERS))
def test_every_fuser_adds_next_to_nothing_at_first(name):
    fuser, (first, second) = built(name).eval(), lengths(name)[0]
    for residual in fuser(torch.randn(2, first, 32), torch.randn(2, second, 32)):
        assert residual.abs().max() < 0.01


@pytest.mark.parametrize("name", sorted(FUSERS))
def test_every_fuser_learns_from_there_with_all_it_has(name):
    fuser, (first, second) = built(name), lengths(name)[0]
    start = {n: p.detach().clone() for n, p in fuser.named_parameters()}
    vfm, vlm = torch.randn(2, first, 32), torch.randn(2, second, 32)
    target = torch.randn(2, first, 32), torch.randn(2, second, 32)
    optimizer = torch.optim.Adam(fuser.parameters(), 0.01)
    # what comes before a zero moves a step after it, and queries two: where they look starts without them
    for _ in range(3):
        optimizer.zero_grad()
        sum(F.mse_loss(r, t) for r, t in zip(fuser(vfm, vlm), target, strict=True)).backward()
        optimizer.step()
    assert not [n for n, p in fuser.named_parameters() if torch.equal(p, start[n])]


@pytest.mark.parametrize("name", sorted(FUSERS))
def test_every_fuser_has_dropout_in_training_alone(name):
    fuser, (first, second) = disturbed(built(name)), lengths(name)[0]
    vfm, vlm = torch.randn(1, first, 32), torch.randn(1, second, 32)
    assert not torch.equal(fuser(vfm, vlm)[1], fuser(vfm, vlm)[1])
    fuser.eval()
    assert torch.equal(fuser(vfm, vlm)[1], fuser(vfm, vlm)[1])


# the paper's table: parameters in millions, and 4 times the multiply-adds in G, on DINOv2-L with EVA02 at 512 x 512
@pytest.mark.parametrize(
    ("name", "count", "millions", "giga"),
    [
        ("selfattn_concat", 4_198_400, 4.20, 98.64),
        ("selfattn_separate", 8_396_800, 8.40, 71.08),
        ("bi_deform_attn", 3_345_600, 3.35, 34.65),
        ("mvfuser", 1_667_585, 1.67, 17.21),
    ],
)
def test_sizes_and_costs_are_the_papers(name, count, millions, giga):
    with torch.device("meta"):
        fuser = FUSERS[name](Site(1024, (36, 36), (1, 1), backend="torch")).eval()
        tokens = torch.empty(1, 1297, 1024)
    assert sum(p.numel() for p in fuser.parameters()) == count
    assert round(count / 1e6, 2) == millions
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fuser(tokens, tokens)
    # PyTorch counts a multiply-add as two; it leaves out scans, sampling and norms, and so does the paper but for one norm
    assert 2 * counter.get_total_flops() / 1e9 == pytest.approx(giga, rel=1e-3)


def by_hand(fuser: torch.nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    """Attention of x (B, L, C), after "Attention is all you need", section 3.2."""
    batch, length, dim = x.shape
    heads = fuser.num_heads
    q, k, v = (x @ fuser.in_proj_weight.T + fuser.in_proj_bias).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    shares = (q @ k.mT / (dim / heads) ** 0.5).softmax(-1)
    return (shares @ v).transpose(1, 2).flatten(2) @ fuser.out_proj.weight.T + fuser.out_proj.bias


def test_concatenated_self_attention_is_over_all_tokens():
    fuser = disturbed(SelfAttnConcat(128)).eval().double()
    assert fuser.attention.num_heads == 2
    vfm, vlm = torch.randn(2, 5, 128).double(), torch.randn(2, 7, 128).double()
    expected = by_hand(fuser.attention, torch.cat([vfm, vlm], 1))
    torch.testing.assert_close(torch.cat(fuser(vfm, vlm), 1), expected)


def test_separate_self_attention_is_over_each_towers_tokens():
    fuser = disturbed(SelfAttnSeparate(128)).eval().double()
    vfm, vlm = torch.randn(2, 5, 128).double(), torch.randn(2, 7, 128).double()
    first, second = fuser(vfm, vlm)
    torch.testing.assert_close(first, by_hand(fuser.vfm_attention, vfm))
    torch.testing.assert_close(second, by_hand(fuser.vlm_attention, vlm))


@pytest.mark.parametrize(
    ("name", "to_vfm", "to_vlm"),
    [("selfattn_concat", True, True), ("selfattn_separate", False, False), ("bi_deform_attn", True, True)],
)
def test_information_crosses_as_the_ablation_says(name, to_vfm, to_vlm):
    fuser = disturbed(built(name, prefixes=(0, 0))).eval().double()
    vfm, vlm, other = (torch.randn(1, 6, 32, dtype=torch.float64) for _ in range(3))
    first, second = fuser(vfm, vlm)
    # every token of the one, whatever changes in the other; or none, bit for bit
    for crosses, moved in ((to_vfm, first - fuser(vfm, other)[0]), (to_vlm, second - fuser(other, vlm)[1])):
        assert (moved.abs().amax(-1) > 1e-6).all() if crosses else not moved.any()


def by_grid_sampling(fuser: BiDeformAttn, vfm: torch.Tensor, vlm: torch.Tensor) -> torch.Tensor:
    """The same for patches (L, C) of one image, a query, head, grid and point at a time (Zhu et al. 2021, eq. 3)."""
    attention, (rows, columns) = fuser.attention, fuser.grid
    heads, points, dim = 8, 4, vfm.shape[1]
    maps = [attention.value_proj(x).T.view(heads, dim // heads, rows, columns) for x in (vfm, vlm)]
    results = []
    for tower, row, column in itertools.product(range(2), range(rows), range(columns)):
        query = fuser.query_proj((vfm, vlm)[tower][row * columns + column])
        offsets = attention.sampling_offsets(query).view(heads, 2, points, 2)
        weights = attention.attention_weights(query).view(heads, 2 * points).softmax(-1).view(heads, 2, points)
        attended = []
        for head in range(heads):
            total = torch.zeros(dim // heads, dtype=vfm.dtype)
            for grid, point in itertools.product(range(2), range(points)):
                # in cells, from the middle of the query's own one; then -1..1 from edge to edge, as PyTorch has it
                x, y = column + 0.5 + offsets[head, grid, point, 0], row + 0.5 + offsets[head, grid, point, 1]
                place = torch.stack([2 * x / columns - 1, 2 * y / rows - 1]).view(1, 1, 1, 2)
                sample = F.grid_sample(maps[grid][head][None], place, align_corners=False).flatten()
                total = total + weights[head, grid, point] * sample
            attended.append(total)
        results.append(attention.output_proj(torch.cat(attended)))
    return torch.stack(results)


def test_bi_deformable_attention_equals_sampling_one_by_one():
    fuser = disturbed(BiDeformAttn(32, (3, 4), (5, 1))).eval().double()
    vfm, vlm = torch.randn(1, 5 + 12, 32).double(), torch.randn(1, 1 + 12, 32).double()
    first, second = fuser(vfm, vlm)
    with torch.no_grad():
        expected = by_grid_sampling(fuser, vfm[0, 5:], vlm[0, 1:])
    # places are computed in fp32
    torch.testing.assert_close(torch.cat([first[0, 5:], second[0, 1:]]), expected, rtol=1e-4, atol=1e-5)


def test_bi_deformable_attention_leaves_class_and_register_tokens_alone():
    fuser = disturbed(BiDeformAttn(32, (2, 3), (5, 1))).eval()
    vfm, vlm = torch.randn(1, 11, 32), torch.randn(1, 7, 32)
    first, second = fuser(vfm, vlm)
    assert not first[:, :5].any()
    assert not second[:, :1].any()
    changed = torch.cat([torch.randn(1, 5, 32), vfm[:, 5:]], 1), torch.cat([torch.randn(1, 1, 32), vlm[:, 1:]], 1)
    for before, after in zip((first, second), fuser(*changed), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(("vfm", "vlm"), [("dinov3_l", "siglip"), ("dinov2_l", "clip")])
def test_bi_deformable_attention_knows_where_the_towers_patches_begin(vfm, vlm):
    with unfilled():
        model = mfuser.build(
            "mfuser",
            vfm=vfm,
            vlm=vlm,
            fuser="bi_deform_attn",
            image_size=(64, 96),
            token_ids=[[1] * 5] * 19,
            weights="meta",
        )
    model.to("meta").eval()
    # the towers' tokens fit, or it would raise
    with torch.no_grad():
        features, _, visual = model.encode(torch.empty(2, 3, 64, 96, device="meta"))
    assert features[2].shape == (2, 2048, 4, 6)
    assert visual.shape[1] == 24


def test_tokens_that_do_not_fit_the_grid_are_refused():
    fuser = BiDeformAttn(32, (2, 3), (5, 1))
    with pytest.raises(ValueError, match="7 and 7 tokens, expected 11 and 7: 5 and 1 before a grid of 2 x 3"):
        fuser(torch.randn(1, 7, 32), torch.randn(1, 7, 32))
    with pytest.raises(ValueError, match="dim 12 is not divisible by heads 8"):
        BiDeformAttn(12, (2, 3), (5, 1))


@pytest.mark.parametrize("name", sorted(FUSERS))
def test_a_model_trains_with_every_fuser_and_travels(name, tmp_path):
    model = mfuser.build("mfuser", vfm="tiny", vlm="tiny", image_size=(32, 64), fuser=name, weights="random").train()
    optimizer = torch.optim.AdamW(model.groups(2e-3, 0.01))
    batch = mfuser.Batch(torch.rand(2, 3, 32, 64), torch.zeros(2, 32, 64, dtype=torch.long))
    values = []
    for _ in range(4):
        loss = torch.stack(list(model.loss(batch).values())).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    assert values[-1] < values[0]
    mfuser.save(model.eval(), tmp_path)
    again, images = mfuser.load(tmp_path).eval(), torch.rand(1, 3, 32, 64)
    assert again.options["fuser"] == name
    with torch.no_grad():
        assert torch.equal(model(images), again(images))


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


def by_loops(fuser: MVFuser, u: torch.Tensor, *, double_bias: bool, double_gate: bool, both_ways: bool) -> torch.Tensor:
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
            step = torch.log1p((w[f"dt_proj{tail}.weight"] @ rank + (bias + bias if double_bias else bias)).exp())
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
    gate = silu(silu(z)) if double_gate else silu(z)
    return (y * gate) @ w["out_proj.weight"].T * w["scale"]


@pytest.mark.parametrize("double_gate", [False, True])
@pytest.mark.parametrize("double_bias", [False, True])
@pytest.mark.parametrize("name", ["mvfuser", "mvfuser_bidir"])
def test_every_scanning_fuser_equals_a_plain_loop(name, double_bias, double_gate):
    fuser = FUSERS[name](Site(12, (2, 2), (1, 1), state=3, double_bias=double_bias, double_gate=double_gate)).eval()
    with torch.no_grad():
        for parameter in fuser.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    u = torch.randn(9, 12)
    flags = {"double_bias": double_bias, "double_gate": double_gate}
    expected = by_loops(fuser, u, both_ways=name == "mvfuser_bidir", **flags).float()
    torch.testing.assert_close(fuser.mix(u[None])[0], expected, rtol=1e-3, atol=1e-4)
    # each flag the other way is another function
    for flag in flags:
        other = by_loops(fuser, u, both_ways=name == "mvfuser_bidir", **flags | {flag: not flags[flag]}).float()
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


def test_the_enhancers_steps_start_as_mambas_where_asked():
    for mamba_steps, low, high in ((False, 0.69, 0.7), (True, 9e-4, 0.11)):
        step = torch.nn.functional.softplus(MTEnhancer(64, mamba_steps=mamba_steps).decoder[0].cross_attn.dt_proj.bias)
        assert low < step.min().item() <= step.max().item() < high
    assert step.max() / step.min() > 10

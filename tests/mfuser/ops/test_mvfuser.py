"""MVFuser's block against the modules that it composes: the CUDA sources emulated, Triton's under its interpreter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from golden_files import fill_by_name, noise, numbers, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mfuser.decoder.mtenhancer import MTEnhancer
from mfuser.fusion import BidirectionalMVFuser, MVFuser
from mfuser.ops import mvfuser

from .mvfuser_block import (
    SCANS,
    as_precise,
    autocast,
    errors,
    kernels,
    make,
    of_the_operator,
    run,
    tokens,
    truth,
    weights_of,
)

__all__ = ["kernels"]  # a fixture

# width, state, batch, length, double bias, double gate: h = 24 and rank 3; rank 4; h = 6, which no vector fits and cuda refuses
CASES = [
    (48, 16, 1, 65, True, True),
    (48, 4, 2, 65, False, False),
    (48, 4, 2, 1, True, False),
    (64, 4, 1, 2, False, True),
    (12, 3, 2, 3, True, True),
]
# MTEnhancer's; rows in several pieces
WIDE_CASES = [(256, 16, 2, 5, True, True), (520, 4, 1, 3, True, True), (136, 12, 1, 3, False, False)]


def named(case: tuple) -> str:
    return "x".join(map(str, case[:4])) + case[4] * "-bias" + case[5] * "-gate"


def equal_composition(device: str, width: int, state: int, batch: int, length: int, double_bias: bool, double_gate: bool) -> None:
    fuser = make(width, state, double_bias=double_bias, double_gate=double_gate, device=device)
    joint = tokens(batch, length, width, device=device)
    expected = run(fuser, fuser.composed, joint)
    assert max(errors(run(fuser, fuser.mix, joint), expected).values()) < 1e-5
    # and both are right
    assert max(errors(expected, truth(fuser, joint)).values()) < 1e-4


@pytest.mark.parametrize("case", CASES, ids=named)
def test_value_and_every_gradient_equal_the_composition(kernels, case):
    if kernels[0] == "cuda" and case[1] % 4:
        pytest.skip("refused")
    equal_composition(kernels[1], *case)


@of_the_operator
@pytest.mark.parametrize("case", WIDE_CASES, ids=named)
def test_wide_rows_equal_the_composition(kernels, case):
    equal_composition(kernels[1], *case)


def test_it_equals_the_authors(kernels):
    unit, goldens = "unit_mvfuser64", numbers("units")
    fuser = MVFuser(64).eval()
    fill_by_name(fuser, unit)
    fuser.to(kernels[1])
    x = noise(f"{unit}/x", 2, 50, 64).to(kernels[1]).requires_grad_()
    y = fuser.mix(x)
    assert relative_error(goldens, f"{unit}/y", y.cpu()) < 1e-5
    (y * noise(f"{unit}/probe", 2, 50, 64).to(kernels[1])).sum().backward()
    assert relative_error(goldens, f"{unit}/grad/x", x.grad.cpu()) < 2e-5
    for name, parameter in fuser.named_parameters():
        assert relative_error(goldens, f"{unit}/grad/{name}", parameter.grad.cpu()) < 1e-4, name


@pytest.mark.parametrize(
    ("shape", "doubled", "dtype"),
    [
        ((48, 16, 2, 12), True, torch.bfloat16),
        ((48, 16, 2, 12), False, torch.float16),
        ((128, 4, 1, 11), False, torch.bfloat16),
        ((40, 4, 2, 13), True, torch.bfloat16),
    ],
)
def test_under_autocast_it_is_as_precise_as_the_composition(kernels, shape, doubled, dtype):
    width, state, batch, length = shape
    fuser = make(width, state, double_bias=doubled, double_gate=doubled, device=kernels[1])
    joint = tokens(batch, length, width, device=kernels[1])
    expected = truth(fuser, joint)
    actual, composed = (errors(run(fuser, autocast(f, dtype), joint), expected) for f in (fuser.mix, fuser.composed))
    as_precise(actual, composed)
    assert autocast(fuser.mix, dtype)(joint).dtype == dtype


def test_a_model_in_bf16_needs_no_autocast(kernels):
    fuser, joint = make(48, 4, device=kernels[1]).bfloat16(), tokens(2, 7, 48, device=kernels[1]).bfloat16()
    expected = truth(fuser, joint)
    actual, composed = (errors(run(fuser, f, joint), expected) for f in (fuser.mix, fuser.composed))
    as_precise(actual, composed)


@of_the_operator
def test_autocast_of_the_forward_alone_decides(kernels):
    fuser, joint = make(48, 4, device=kernels[1]), tokens(2, 7, 48, device=kernels[1]).requires_grad_()
    grads = []
    for around in (False, True):
        with torch.autocast(kernels[1], torch.bfloat16):
            out = fuser.mix(joint)
        with torch.autocast(kernels[1], torch.bfloat16, enabled=around):
            grads.append(torch.autograd.grad(out, [joint, *fuser.parameters()], torch.ones_like(out)))
    for inside, outside in zip(*grads, strict=True):
        # torch's scan multiplies matrices in its backward, which autocast changes
        torch.testing.assert_close(inside, outside, rtol=0, atol=0.01 * float(outside.abs().max()))


@of_the_operator
def test_strided_tokens_and_gradients(kernels):
    fuser = make(48, 4, device=kernels[1])
    wide = tokens(2, 6, 96, device=kernels[1])
    for joint in (wide[..., :48], wide[:, :3, 48:], wide[:1, :, :48].expand(3, 6, 48), wide[..., :48].mT.contiguous().mT):
        expected = run(fuser, fuser.composed, joint)
        assert max(errors(run(fuser, fuser.mix, joint), expected).values()) < 1e-5
        assert max(errors(run(fuser, autocast(fuser.mix), joint), expected).values()) < 0.05
    joint = wide[..., :48].detach().requires_grad_()
    for function in (fuser.mix, fuser.composed):
        function(joint).sum().backward()  # the gradient is one number, expanded
    doubled, fuser.scale.grad = fuser.scale.grad, None
    fuser.composed(joint).sum().backward()
    torch.testing.assert_close(doubled, 2 * fuser.scale.grad)


@of_the_operator
def test_what_needs_no_gradient_gets_none(kernels):
    fuser, joint = make(48, 4, device=kernels[1]), tokens(2, 7, 48, device=kernels[1])
    expected = run(fuser, fuser.composed, joint)
    names = [name for name, _ in fuser.named_parameters()]
    for kept in (names[::2], names[1::2], ["scale"], ["in_proj.weight"]):
        for name, parameter in fuser.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(name in kept)
        out = fuser.mix(joint)
        probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(out)
        out.backward(probe)
        grads = {name: p.grad.double() for name, p in fuser.named_parameters() if p.grad is not None}
        assert set(grads) == set(kept)
        assert max(errors(grads, {name: expected[name] for name in kept}).values()) < 1e-5
    fuser.requires_grad_(False)
    assert not fuser.mix(joint).requires_grad
    moved = joint.clone().requires_grad_()
    out = fuser.mix(moved)
    out.backward(probe)
    assert errors({"joint": moved.grad.double()}, {"joint": expected["joint"]})["joint"] < 1e-5


@of_the_operator
def test_twice_in_one_graph(kernels):
    fuser, joint = make(48, 4, device=kernels[1]), tokens(1, 9, 48, device=kernels[1])
    expected = run(fuser, lambda x: fuser.composed(x + fuser.composed(x)), joint)
    assert max(errors(run(fuser, lambda x: fuser.mix(x + fuser.mix(x)), joint), expected).values()) < 1e-5


@pytest.mark.parametrize("length", [0, 1])
def test_no_tokens_or_one(kernels, length):
    fuser = make(48, 4, device=kernels[1])
    assert fuser.mix(torch.zeros(2, length, 48, device=kernels[1])).shape == (2, length, 48)
    assert fuser.mix(torch.zeros(0, length, 48, device=kernels[1])).shape == (0, length, 48)


@of_the_operator
def test_the_gradient_of_the_scale_is_there_at_scale_zero(kernels):
    fuser, joint = make(48, 4, device=kernels[1]), tokens(2, 9, 48, device=kernels[1])
    fuser.scale.data.zero_()
    actual = run(fuser, fuser.mix, joint)
    assert not actual["out"].any()
    assert actual["scale"] != 0
    assert max(errors(actual, run(fuser, fuser.composed, joint)).values()) < 1e-5


@of_the_operator
def test_dropout_draws_what_the_composition_draws(kernels):
    fuser, joint = make(48, 4, device=kernels[1]).train(), tokens(2, 7, 48, device=kernels[1])
    results = []
    for function in (fuser.mix, fuser.composed):
        torch.manual_seed(5)
        results.append(run(fuser, function, joint))
    assert 0.05 < (results[0]["out"] == 0).double().mean() < 0.15
    assert max(errors(*results).values()) < 1e-5


@of_the_operator
def test_nothing_is_kept_without_gradients_and_little_with_them(kernels):
    fuser, joint = make(64, 4, device=kernels[1]), tokens(2, 20, 64, device=kernels[1]).requires_grad_()
    kept: list[Tensor] = []
    with (
        torch.autocast(kernels[1], torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        with torch.no_grad():
            fuser.mix(joint)
        assert not kept
        fuser.mix(joint)
    known = {p.data_ptr() for p in [joint, *fuser.parameters()]}
    own = [t for t in kept if t.data_ptr() not in known]
    assert len(own) == 1
    size, gaps = own[0].numel() * own[0].element_size(), 14 * 256
    weights = 2 * sum(p.numel() for name, p in fuser.named_parameters() if "proj.weight" in name) + 4 * (32 * 4 + 32)
    states = 4 * 2 * 32 * 4 * 2  # the scan's, of every 16th token
    # in bf16: tokens, xz (C each), x, z, delta, y (C / 2 each); rank, B, C
    expected = weights + states + 2 * (2 * 20) * (4 * 64 + 4 + 2 * 4)
    assert expected <= size < expected + gaps


@of_the_operator
def test_compiled_under_autocast_the_tokens_are_kept_as_they_are_multiplied(kernels):
    """The operator keeps a copy of its own of tokens that are given in fp32, beside those."""
    fuser, joint = make(64, 4, device=kernels[1]), tokens(2, 20, 64, device=kernels[1]).requires_grad_()
    kept: list[Tensor] = []
    torch._dynamo.reset()
    whole = torch.compile(lambda given: fuser.mix(2 * given), fullgraph=True, backend="aot_eager")
    with (
        torch.autocast(kernels[1], torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        whole(joint)
    assert [t.dtype for t in kept if t.shape == joint.shape] == [torch.bfloat16]


@of_the_operator
def test_a_call_makes_few_operations(kernels):
    """A small batch's launches take the GPU less time than a few dozen operations of torch take the CPU."""
    fuser, joint = make(64, 4, device=kernels[1]), tokens(2, 5, 64, device=kernels[1]).requires_grad_()
    leaves = [joint, *fuser.parameters()]

    def operations(function: Callable[[], object]) -> tuple[object, Counter[str]]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result = function()
        names = (event.key for event in profile.events() if event.key.startswith(("aten::", "mfuser::")))
        return result, Counter(names)

    with torch.autocast(kernels[1], torch.bfloat16):
        out, forward = operations(lambda: fuser.mix(joint))
    probe = torch.ones_like(out)
    _, backward = operations(lambda: torch.autograd.grad(out, leaves, probe))
    with torch.no_grad():
        _, alone = operations(lambda: fuser.mix(joint))
    for counted, most in ((forward, 3), (backward, 13), (alone, 2)):
        assert counted["aten::empty"] + counted["aten::empty_strided"] <= most, counted
        # fill_: new memory is poisoned under test
        assert not set(counted) - {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::fill_"}


@of_the_operator
def test_the_operators_are_well_formed(kernels):
    name, device = kernels
    fuser = make(8, 4, device=device)
    weights = weights_of(fuser)
    for dtype in (torch.float32, torch.bfloat16):
        joint = tokens(2, 2, 8, device=device).requires_grad_()
        options = (fuser.norm.eps, True, False, dtype, name, SCANS[name])
        torch.library.opcheck(torch.ops.mfuser.mvfuser.default, (joint, weights, *options, True))
        detached = [w.detach() for w in weights]
        torch.library.opcheck(torch.ops.mfuser.mvfuser.default, (joint.detach(), detached, *options, False))
        out, *kept = torch.ops.mfuser.mvfuser(joint.detach(), detached, *options, True)
        for needed in ([True] * 12, [False, True] * 6):
            arguments = (torch.ones_like(out), joint.detach(), detached, kept, *options, needed)
            torch.library.opcheck(torch.ops.mfuser.mvfuser_bwd.default, arguments)


@of_the_operator
def test_it_compiles_into_one_graph(kernels):
    fuser, joint = make(24, 4, device=kernels[1]), tokens(2, 5, 24, device=kernels[1])
    torch._dynamo.reset()
    whole = torch.compile(fuser.mix, fullgraph=True, backend="aot_eager")
    assert max(errors(run(fuser, whole, joint), run(fuser, fuser.mix, joint)).values()) < 1e-6
    found = errors(run(fuser, autocast(whole), joint), run(fuser, autocast(fuser.mix), joint))
    assert found.pop("joint") < 2**-8  # the compiled one rounds it to bf16, as a linear layer's is
    assert max(found.values()) < 1e-6


@of_the_operator
def test_it_is_computed_again_under_a_checkpoint(kernels):
    fuser, joint = make(24, 4, device=kernels[1]), tokens(2, 5, 24, device=kernels[1])
    expected = run_backward(fuser, fuser.mix, joint)
    for reentrant in (False, True):
        actual = run_backward(fuser, lambda x, r=reentrant: checkpoint(fuser.mix, x, use_reentrant=r), joint)
        assert max(errors(actual, expected).values()) < 1e-6


def run_backward(fuser: MVFuser, function: Callable[[Tensor], Tensor], joint: Tensor) -> dict[str, Tensor]:
    fuser.zero_grad()
    function(joint.detach().requires_grad_()).square().sum().backward()
    return {name: p.grad.clone() for name, p in fuser.named_parameters()}


def test_both_directions_and_the_enhancer(kernels):
    # the kernels scan one way
    both = BidirectionalMVFuser(24, state=3, backend="torch").eval()
    joint = tokens(1, 5, 24, device=kernels[1])
    both.to(kernels[1])
    assert torch.equal(both.mix(joint), both.composed(joint))
    enhancer = MTEnhancer(24, dim=32, heads=2, state=4, backend="torch").eval().to(kernels[1])
    text, visual = tokens(1, 4, 24, device=kernels[1]), tokens(1, 7, 24, device=kernels[1])
    fused = enhancer(text, visual)
    layer = enhancer.decoder[0].cross_attn
    layer.mix = layer.composed
    torch.testing.assert_close(fused, enhancer(text, visual))


@of_the_operator
def test_wrong_shapes_are_named(kernels):
    fuser, joint = make(24, 4, device=kernels[1]), tokens(1, 5, 24, device=kernels[1])
    weights, backends = weights_of(fuser), (kernels[0], SCANS[kernels[0]])
    options = {"eps": 1e-5, "double_bias": True, "double_gate": True, "backends": backends}
    with pytest.raises(ValueError, match=r"in_proj is \(24, 24\), expected \(24, 23\)"):
        mvfuser(joint[..., :23], *weights, **options)
    with pytest.raises(ValueError, match=r"needs joint \(B, L, C\)"):
        mvfuser(joint[0], *weights, **options)
    with pytest.raises(ValueError, match="tokens are torch.bfloat16, weights torch.float32"):
        mvfuser(joint.bfloat16(), *weights, **options)
    with torch.autocast(kernels[1], torch.bfloat16), pytest.raises(ValueError, match="tokens are torch.float64"):
        mvfuser(joint.double(), *weights, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["cuda", "triton"], indirect=True)
@pytest.mark.parametrize("batch", [2, 9])  # few tokens and many, see the backends' tuning
def test_at_the_published_size(kernels, batch):
    fuser = MVFuser(1024, backend="torch").eval().to(kernels[1])
    joint = tokens(batch, 2594, 1024, device=kernels[1])
    expected = run(fuser, fuser.composed, joint)
    actual, composed = (errors(run(fuser, autocast(f), joint), expected) for f in (fuser.mix, fuser.composed))
    as_precise(actual, composed)
    assert max(errors(run(fuser, fuser.mix, joint), expected).values()) < 1e-3

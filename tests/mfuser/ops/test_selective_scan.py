from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from mfuser.ops import available, selective_scan
from mfuser.ops.selective_scan import reference

from .tolerances import TOL

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")
BACKENDS = [name for name in available("selective_scan") if name != "reference"]
# batch, dim, length, state
SHAPES = [(2, 3, 1, 4), (1, 5, 2, 1), (2, 4, 63, 4), (1, 7, 64, 16), (2, 3, 65, 5), (1, 33, 1000, 4), (1, 2, 2049, 3)]


def inputs(batch, dim, length, state, dtype=torch.float64, seed=0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = {
        "u": draw(batch, dim, length), "delta": draw(batch, dim, length) - 2, "A": -draw(dim, state).exp(),
        "B": draw(batch, state, length), "C": draw(batch, state, length), "D": draw(dim), "delta_bias": draw(dim) - 1,
    }  # fmt: skip
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in made.items()}


def run(given: dict[str, Tensor], backend: str, *, softplus: bool = True) -> dict[str, Tensor]:
    y = selective_scan(*(given[n] for n in NAMES[:6]), delta_bias=given["delta_bias"], delta_softplus=softplus, backend=backend)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad((y.double() * probe).sum(), [given[n] for n in NAMES])
    return {"y": y.detach()} | dict(zip(NAMES, grads, strict=True))


def close(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: str) -> None:
    for name, value in actual.items():
        kind = 0 if name == "y" else 2 if name in ("A", "D", "delta_bias") else 1
        rtol, atol = TOL[dtype][kind]
        # sums over B and L: the tolerance is of their size, not of their cancelled rest
        scale = max(1.0, float(expected[name].abs().max())) if kind else 1.0
        torch.testing.assert_close(
            value.double(), expected[name].double(), rtol=rtol, atol=atol * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_reference_is_the_recurrence_written_out():
    # one channel, one state, constant inputs: h[t] = a h[t-1] + d b u, a geometric series
    length, d, a, b, c, skip, u = 6, 0.5, -0.7, 1.3, 0.9, 2.0, 0.4
    full = torch.full((1, 1, length), u, dtype=torch.float64)
    y = selective_scan(
        full, torch.full_like(full, d), torch.tensor([[a]]).double(), torch.full_like(full, b),
        torch.full_like(full, c), torch.tensor([skip]).double(), backend="reference",
    )  # fmt: skip
    decay = torch.exp(torch.tensor(d * a, dtype=torch.float64))
    t = torch.arange(1, length + 1)
    torch.testing.assert_close(y[0, 0], c * d * b * u * (1 - decay**t) / (1 - decay) + skip * u)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_gradients_by_finite_differences(backend):
    given = inputs(2, 3, 5, 2)
    assert torch.autograd.gradcheck(
        lambda *a: selective_scan(*a[:6], delta_bias=a[6], delta_softplus=True, backend=backend),
        tuple(given[n] for n in NAMES),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_value_and_every_gradient_equal_the_reference(backend, shape, dtype):
    given = inputs(*shape, dtype=getattr(torch, dtype))
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    close(run(given, backend), run(wide, "reference"), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_and_segments_do_not_show(backend, monkeypatch):
    module = import_module("mfuser.ops.selective_scan.torch_backend")
    given = inputs(2, 3, 131, 4)
    expected = run(given, "reference")
    monkeypatch.setattr(module, "_CPU_BLOCK", 2 * 3 * 4 * 20)
    close(run(given, backend), expected, "float64")
    # what other devices than a CPU run
    a, s = (torch.rand(131, 2, 4, 3, dtype=torch.float64) for _ in range(2))
    h = torch.rand(2, 4, 3, dtype=torch.float64)
    segments, one = module._scan_segments(a, s, h), []
    for t in range(131):
        h = a[t] * h + s[t]
        one.append(h)
    torch.testing.assert_close(segments, torch.stack(one))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_same(backend):
    given = inputs(2, 6, 40, 3)
    strided = {n: t.detach() for n, t in given.items()}
    for name in ("u", "delta", "B", "C"):
        # as modules hand them over: (B, L, D) in memory, and a slice of something larger
        wide = torch.full((2, 40, 2 * strided[name].shape[1]), float("nan"), dtype=torch.float64)
        part = wide[:, :, : strided[name].shape[1]]
        part.copy_(strided[name].mT)
        strided[name] = part.mT
    strided = {n: t.requires_grad_() for n, t in strided.items()}
    close(run(strided, backend), run(given, "reference"), "float64")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [-40.0, 30.0], ids=["tiny steps", "huge steps"])
def test_extreme_steps_stay_finite(backend, shift):
    given = inputs(1, 3, 50, 4, dtype=torch.float32)
    with torch.no_grad():
        given["delta"] += shift
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    actual = run(given, backend)
    assert all(torch.isfinite(v).all() for v in actual.values())
    close(actual, run(wide, "reference"), "float32")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_without_the_optional_inputs(backend):
    given = inputs(2, 3, 9, 2)
    delta = given["delta"].detach().exp()
    bare = selective_scan(given["u"], delta, given["A"], given["B"], given["C"], backend=backend)
    zero = torch.zeros(3, dtype=torch.float64)
    full = selective_scan(given["u"], delta, given["A"], given["B"], given["C"], zero, delta_bias=zero, backend=backend)
    torch.testing.assert_close(bare, full)
    bare.sum().backward()
    assert all(given[n].grad is not None for n in ("u", "A", "B", "C"))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("optional", [True, False])
def test_the_operator_is_well_formed(backend, optional):
    given = inputs(2, 3, 7, 2)
    extra = (given["D"], given["delta_bias"], True) if optional else (None, None, False)
    arguments = (*(given[n] for n in NAMES[:5]), *extra, backend)
    torch.library.opcheck(torch.ops.mfuser.selective_scan.default, arguments)
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    y, saved = torch.ops.mfuser.selective_scan(*detached)
    torch.library.opcheck(torch.ops.mfuser.selective_scan_bwd.default, (torch.ones_like(y), *detached[:-1], saved, backend))


def test_only_the_block_states_are_kept_for_the_backward():
    given = inputs(1, 8, 3000, 4, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        selective_scan(*(given[n] for n in NAMES[:6]), delta_bias=given["delta_bias"], delta_softplus=True)
    assert sum(kept) < 2 * sum(t.numel() for t in given.values())
    assert sum(kept) < given["u"].numel() * 4


def test_wrong_shapes_are_named():
    given = inputs(2, 3, 9, 2)
    with pytest.raises(ValueError, match=r"B is \(2, 2, 8\), expected \(2, 2, 9\)"):
        selective_scan(given["u"], given["delta"], given["A"], given["B"][..., :8], given["C"])
    with pytest.raises(ValueError, match="A must be real"):
        selective_scan(given["u"], given["delta"], given["A"].to(torch.complex64), given["B"], given["C"])


def test_an_empty_sequence_is_an_empty_result():
    u = torch.zeros(2, 3, 0)
    assert selective_scan(u, u, torch.zeros(3, 2), torch.zeros(2, 2, 0), torch.zeros(2, 2, 0)).shape == (2, 3, 0)
    assert reference.saved_shape(u, torch.zeros(3, 2)) == (0,)

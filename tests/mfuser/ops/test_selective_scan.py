from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import pytest
import torch
from torch import Tensor

from mfuser.ops import available, selective_scan

from .tolerances import TOL

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
OPTIONAL = NAMES[5:]
BACKENDS = [name for name in available("selective_scan") if name != "reference"]
# batch, length, dim, state
SHAPES = [(2, 1, 3, 4), (1, 2, 5, 1), (2, 63, 4, 4), (1, 64, 7, 16), (2, 65, 3, 5), (1, 1000, 33, 4), (1, 2049, 2, 3)]


def inputs(batch, length, dim, state, dtype=torch.float64, seed=0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = {
        "u": draw(batch, length, dim), "delta": draw(batch, length, dim) - 2, "A": -draw(dim, state).exp(),
        "B": draw(batch, length, state), "C": draw(batch, length, state), "D": draw(dim), "z": draw(batch, length, dim),
        "delta_bias": draw(dim) - 1, "initial_state": draw(batch, dim, state),
    }  # fmt: skip
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in made.items()}


def scan(given: Mapping[str, Tensor], backend: str, *, softplus: bool = True) -> tuple[Tensor, Tensor]:
    return selective_scan(**given, delta_softplus=softplus, return_final_state=True, backend=backend)


def run(given: dict[str, Tensor], backend: str, *, softplus: bool = True) -> dict[str, Tensor]:
    y, state = scan(given, backend, softplus=softplus)
    probe, end = (torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for t in (y, state))
    grads = torch.autograd.grad((y.double() * probe).sum() + (state.double() * end).sum(), list(given.values()))
    return {"y": y.detach(), "state": state.detach()} | dict(zip(given, grads, strict=True))


def close(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: str) -> None:
    for name, value in actual.items():
        kind = 0 if name in ("y", "state") else 2 if name in ("A", "D", "delta_bias") else 1
        rtol, atol = TOL[dtype][kind]
        # sums over B and L: the tolerance is of their size, not of their cancelled rest
        scale = max(1.0, float(expected[name].abs().max())) if kind else 1.0
        torch.testing.assert_close(
            value.double(), expected[name].double(), rtol=rtol, atol=atol * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_reference_is_the_recurrence_written_out():
    # one channel, one state, constant inputs: h[t] = a h[t-1] + d b u, a geometric series
    length, d, a, b, c, skip, u = 6, 0.5, -0.7, 1.3, 0.9, 2.0, 0.4
    full = torch.full((1, length, 1), u, dtype=torch.float64)
    y = selective_scan(
        full, torch.full_like(full, d), torch.tensor([[a]]).double(), torch.full_like(full, b),
        torch.full_like(full, c), torch.tensor([skip]).double(), backend="reference",
    )  # fmt: skip
    decay = torch.exp(torch.tensor(d * a, dtype=torch.float64))
    t = torch.arange(1, length + 1)
    torch.testing.assert_close(y[0, :, 0], c * d * b * u * (1 - decay**t) / (1 - decay) + skip * u)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_gradients_by_finite_differences(backend):
    given = inputs(2, 5, 3, 2)
    assert torch.autograd.gradcheck(lambda *a: scan(dict(zip(NAMES, a, strict=True)), backend), tuple(given.values()))


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
    given = inputs(2, 131, 3, 4)
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
    given = inputs(2, 40, 6, 3)
    strided = {n: t.detach() for n, t in given.items()}
    for name in ("u", "B", "C"):
        # as modules hand them over: a slice of something wider
        wide = torch.full((2, 40, 2 * strided[name].shape[2]), float("nan"), dtype=torch.float64)
        part = wide[:, :, : strided[name].shape[2]]
        strided[name] = part.copy_(strided[name])
    for name in ("delta", "z", "A", "initial_state"):
        strided[name] = strided[name].mT.contiguous().mT  # as Mamba has them: (B, D, L) in memory
    strided = {n: t.requires_grad_() for n, t in strided.items()}
    close(run(strided, backend), run(given, "reference"), "float64")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [-40.0, 30.0], ids=["tiny steps", "huge steps"])
def test_extreme_steps_stay_finite(backend, shift):
    given = inputs(1, 50, 3, 4, dtype=torch.float32)
    with torch.no_grad():
        given["delta"] += shift
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    actual = run(given, backend)
    assert all(torch.isfinite(v).all() for v in actual.values())
    close(actual, run(wide, "reference"), "float32")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("missing", OPTIONAL)
def test_an_absent_input_is_one_that_does_nothing(backend, missing):
    given = inputs(2, 9, 3, 2)
    # silu(z) = 1 at this z
    neutral = torch.full_like(given["z"], 1.2784645427610738) if missing == "z" else torch.zeros_like(given[missing])
    full = run({**given, missing: neutral.requires_grad_()}, backend)
    bare = run({name: tensor for name, tensor in given.items() if name != missing}, backend)
    close(bare, {name: full[name] for name in bare}, "float64")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_steps_without_softplus(backend):
    given = inputs(2, 9, 3, 2)
    positive = {
        **given,
        "delta": given["delta"].detach().exp().requires_grad_(),
        "delta_bias": torch.zeros(3).double().requires_grad_(),
    }
    close(run(positive, backend, softplus=False), run(positive, "reference", softplus=False), "float64")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_sequence_in_two_pieces_is_the_sequence(backend):
    given = {name: tensor.detach() for name, tensor in inputs(2, 21, 3, 2).items()}
    whole, end = scan(given, backend)
    state, parts = given["initial_state"], []
    for piece in (slice(0, 8), slice(8, 21)):
        here = {n: t[:, piece] if n in ("u", "delta", "B", "C", "z") else t for n, t in given.items()}
        y, state = scan({**here, "initial_state": state}, backend)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", ["y", "state"])
def test_either_result_alone_has_gradients(backend, used):
    given = inputs(2, 9, 3, 2)
    results = [scan(given, name)[used == "state"].sum() for name in (backend, "reference")]
    actual, expected = (torch.autograd.grad(r, list(given.values()), allow_unused=True) for r in results)
    for name, a, e in zip(given, actual, expected, strict=True):
        torch.testing.assert_close(a, e, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("optional", [True, False])
def test_the_operator_is_well_formed(backend, optional):
    given = inputs(2, 7, 3, 2)
    arguments = (*(given[n] if optional or n not in OPTIONAL else None for n in NAMES), optional, True, backend)
    torch.library.opcheck(torch.ops.mfuser.selective_scan.default, arguments)
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    y, state, saved = torch.ops.mfuser.selective_scan(*detached)
    torch.library.opcheck(
        torch.ops.mfuser.selective_scan_bwd.default,
        (torch.ones_like(y), torch.ones_like(state), *detached[:-2], saved, backend),
    )


def test_only_the_block_states_are_kept_for_the_backward():
    given = inputs(1, 3000, 8, 4, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        scan(given, "torch")
    # every (B, L, D, N) intermediate is four times u
    assert sum(kept) - sum(t.numel() for t in given.values()) < given["u"].numel() / 2


def test_wrong_shapes_are_named():
    given = inputs(2, 9, 3, 2)
    with pytest.raises(ValueError, match=r"B is \(2, 8, 2\), expected \(2, 9, 2\)"):
        selective_scan(given["u"], given["delta"], given["A"], given["B"][:, :8], given["C"])
    with pytest.raises(ValueError, match="initial_state is"):
        selective_scan(*(given[n] for n in NAMES[:5]), initial_state=given["initial_state"].mT)
    with pytest.raises(ValueError, match="A must be real"):
        selective_scan(given["u"], given["delta"], given["A"].to(torch.complex64), given["B"], given["C"])


def test_an_empty_sequence_is_an_empty_result():
    u, start = torch.zeros(2, 0, 3), torch.ones(2, 3, 2)
    y, state = selective_scan(
        u, u, torch.zeros(3, 2), torch.zeros(2, 0, 2), torch.zeros(2, 0, 2), initial_state=start, return_final_state=True
    )
    assert y.shape == (2, 0, 3)
    assert torch.equal(state, start)

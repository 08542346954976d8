"""Every element of the scan's results and gradients against the recurrence in fp64, however fast a state decays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from .test_selective_scan import BACKENDS, EXACT, GPU, KERNELS, backend, by_backend, precise, scan

__all__ = ["backend"]  # a fixture


def steep(batch: int, length: int, dim: int, state: int, size: float, dtype: str, *, on: str) -> dict[str, Tensor]:
    """Inputs whose state n decays by exp(-size (n + 1)) at each step, about.

    All else is positive: nothing cancels in a gradient, and every element of it has digits to compare.
    """
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5

    made = {
        "u": draw(batch, length, dim),
        "delta": size * (0.9 + draw(batch, length, dim) / 10),
        "A": -torch.arange(1, state + 1, dtype=torch.float64) * (0.9 + draw(dim, state) / 10),
        "B": draw(batch, length, state),
        "C": draw(batch, length, state),
        "D": draw(dim),
        "z": draw(batch, length, dim),
        "delta_bias": draw(dim) / 100,
        "initial_state": draw(batch, dim, state),
    }
    device = "cuda" if GPU and on in KERNELS else "cpu"
    return {name: tensor.to(device, getattr(torch, dtype)).requires_grad_() for name, tensor in made.items()}


def written_out(
    given: Mapping[str, Tensor], probes: Sequence[Tensor], *, softplus: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both results and every gradient in fp64, and the size of what each adds up, if all but A is positive.

    It is the recurrence step by step, differentiated by autograd; delta enters twice, as its two parts have two signs.
    """
    leaves = precise(given)
    twice = {name: leaves[name].detach().clone().requires_grad_() for name in ("delta", "delta_bias")}
    inflow, decay = (part["delta"] + part["delta_bias"] for part in (leaves, twice))
    if softplus:
        inflow, decay = (F.softplus(step) for step in (inflow, decay))
    h, ys = leaves["initial_state"], []
    for t in range(inflow.shape[1]):
        x = leaves["u"][:, t]
        h = torch.exp(decay[:, t, :, None] * leaves["A"]) * h + (inflow[:, t] * x)[..., None] * leaves["B"][:, t, None]
        y = (h * leaves["C"][:, t, None]).sum(-1) + leaves["D"] * x
        ys.append(y * F.silu(leaves["z"][:, t]))
    results = torch.stack(ys, 1), h
    wanted = [*leaves.values(), *twice.values()]
    grads = torch.autograd.grad(results, wanted, [probe.cpu().double() for probe in probes])
    expected = dict(zip(("y", "state", *leaves), (*results, *grads), strict=False))
    sizes = {name: tensor.abs() for name, tensor in expected.items()}
    for name, other in zip(twice, grads[len(leaves) :], strict=True):
        expected[name], sizes[name] = expected[name] + other, sizes[name] + other.abs()
    return expected, sizes


def worst_elements(given: Mapping[str, Tensor], backend: str, *, softplus: bool) -> dict[str, float]:
    """The largest error of any element of each result and gradient, relative to the size of what that element adds up."""
    y, state = scan(given, backend, softplus=softplus)
    generator = torch.Generator().manual_seed(4)
    probes = [(torch.rand(t.shape, generator=generator) + 0.5).bfloat16().to(t) for t in (y, state)]
    grads = torch.autograd.grad((y, state), list(given.values()), probes)
    actual = {"y": y, "state": state} | dict(zip(given, grads, strict=True))
    expected, sizes = written_out(given, probes, softplus=softplus)
    return {n: float(((actual[n].cpu().double() - e) / sizes[n]).detach().abs().max()) for n, e in expected.items()}


STEEP = pytest.mark.parametrize("size", [0.01, 0.3, 2.0, 4.0], ids="steps of about {}".format)


@by_backend("reference", *BACKENDS)
@STEEP
def test_no_element_of_a_gradient_is_off_however_much_a_state_decays_in_a_step(backend, size):
    # at 4, state 16 keeps e-64 of itself: h[t] less its inflow would be rounding alone
    given = steep(2, 21, 3, 16, size, "float32", on=backend)
    # fp32 rounds the exponent of exp(-64) to 4e-6 of it, and Triton and CUDA raise 2 to a power, which rounds twice more
    worst = worst_elements(given, backend, softplus=size == 2.0)
    assert max(worst.values()) < 3e-5, worst


@by_backend(*EXACT)
def test_nor_is_one_in_fp64_which_others_are_measured_by(backend):
    worst = worst_elements(steep(2, 21, 3, 16, 2.0, "float64", on=backend), backend, softplus=True)
    assert max(worst.values()) < 1e-13, worst


@by_backend("torch")
def test_nor_is_one_over_many_blocks_and_steps(backend, monkeypatch):
    monkeypatch.setattr(import_module("mfuser.ops.selective_scan.torch_backend"), "_CPU_BLOCK", 2 * 3 * 16 * 20)
    worst = worst_elements(steep(2, 131, 3, 16, 2.0, "float32", on=backend), backend, softplus=False)
    assert max(worst.values()) < 3e-5, worst


@pytest.mark.gpu
@by_backend(*KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("state", [8, 16, 64])
@pytest.mark.parametrize("length", [21, 300, 2594])
def test_nor_is_one_on_a_gpu_over_several_chunks(backend, dtype, state, length):
    given = steep(2, length, 96, state, 32 / state, dtype, on=backend)
    wide = ("A", "D", "delta_bias", "initial_state")
    given = {n: t.detach().float().requires_grad_() if n in wide else t for n, t in given.items()}
    worst = worst_elements(given, backend, softplus=dtype == "float32")
    assert max(worst[n] for n in (*wide, "state")) < 1e-4, worst
    # one rounding of the result
    assert max(worst.values()) < 0.52 * torch.finfo(getattr(torch, dtype)).eps + 5e-5, worst


@by_backend(*BACKENDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_nor_is_one_where_the_inputs_are_short(backend, dtype):
    given = steep(1, 18, 3, 16, 2.0, dtype, on=backend)
    # A, as modules have it, and the state in fp32
    wide = ("A", "D", "delta_bias", "initial_state")
    given = {n: t.detach().float().requires_grad_() if n in wide else t for n, t in given.items()}
    worst = worst_elements(given, backend, softplus=False)
    assert max(worst[n] for n in (*wide, "state")) < 1e-4, worst
    # half a unit in the last place, or a whole one where Triton's interpreter cuts bf16 off
    assert max(worst.values()) < 1.02 * torch.finfo(getattr(torch, dtype)).eps, worst

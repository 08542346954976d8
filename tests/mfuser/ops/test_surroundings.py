"""What PyTorch does around an operator: compiling, autocasting and checkpointing leave its results as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mfuser.ops import compiled, ms_deform_attn, selective_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """A backend's name and the device of its tensors."""
    if request.param == "emulated":
        with compiled.use(request.getfixturevalue("emulated")):
            yield "cuda", "cpu"
    else:
        yield request.param, DEVICE if request.param == "cuda" else "cpu"


def scanned(name: str, device: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    draw = torch.Generator().manual_seed(0)
    u, delta, B, C = (torch.randn(2, 9, size, generator=draw).to(device) for size in (8, 8, 4, 4))
    A, D = -torch.rand(8, 4, generator=draw).to(device), torch.randn(8, generator=draw).to(device)

    def call(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return 2 * selective_scan(u * u, delta, A, B, C, D, delta_softplus=True, backend=name)

    return call, [u, delta, A, B, C, D]


def attended(name: str, device: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    draw = torch.Generator().manual_seed(0)
    value = torch.randn(2, 13, 2, 4, generator=draw).to(device)
    locations, weights = torch.rand(2, 5, 2, 2, 3, 2, generator=draw).to(device), torch.rand(2, 5, 2, 2, 3, generator=draw)

    def call(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return 2 * ms_deform_attn(value * value, [(2, 2), (3, 3)], locations, weights, backend=name)

    return call, [value, locations, weights.to(device)]


def backward(call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The result and every gradient."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = call(*leaves)
    out.square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


operators = pytest.mark.parametrize("operator", [scanned, attended])


@operators
def test_no_graph_break(operator, backend):
    call, inputs = operator(*backend)
    torch._dynamo.reset()
    whole = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(backward(whole, inputs), backward(call, inputs))


@operators
@pytest.mark.parametrize("reentrant", [False, True])
def test_computed_again_under_a_checkpoint(operator, backend, reentrant):
    call, inputs = operator(*backend)
    again = backward(lambda *leaves: checkpoint(call, *leaves, use_reentrant=reentrant), inputs)
    torch.testing.assert_close(again, backward(call, inputs))


@operators
def test_autocast_changes_no_dtype_inside(operator, backend):
    call, inputs = operator(*backend)
    with torch.autocast(backend[1], torch.bfloat16):
        found = backward(call, inputs)
    torch.testing.assert_close(found, backward(call, inputs))

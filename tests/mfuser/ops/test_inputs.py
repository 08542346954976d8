"""What all operators do alike before a backend sees their tensors: refuse, or answer at once where nothing is to be computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from mfuser.fusion import BidirectionalMVFuser, MVFuser
from mfuser.ops import BackendError, ms_deform_attn, mvfuser, ran_since, selective_scan, tally

from .mvfuser_block import weights_of

BACKENDS = ["auto", "torch", "reference"]
WEIGHTS = ("in_proj", "conv_x", "conv_z", "x_proj", "dt_proj", "dt_bias", "A_log", "D", "norm", "out_proj", "scale")


def scan_inputs(batch: int, length: int, dim: int = 3) -> dict[str, Tensor]:
    shapes = {
        "u": (batch, length, dim),
        "delta": (batch, length, dim),
        "A": (dim, 2),
        "B": (batch, length, 2),
        "C": (batch, length, 2),
        "D": (dim,),
        "z": (batch, length, dim),
        "delta_bias": (dim,),
        "initial_state": (batch, dim, 2),
    }
    return {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}


def points(batch: int, queries: int, heads: int = 2, dim: int = 4, count: int = 2) -> dict[str, Tensor]:
    shapes = {
        "value": (batch, 12, heads, dim),
        "locations": (batch, queries, heads, 1, count, 2),
        "weights": (batch, queries, heads, 1, count),
    }
    return {name: torch.rand(shape).requires_grad_() for name, shape in shapes.items()}


def attend(given: Mapping[str, Tensor], backend: str = "auto") -> Tensor:
    return ms_deform_attn(given["value"], [(3, 4)], given["locations"], given["weights"], backend=backend)


def block(joint: Tensor) -> dict[str, Tensor]:
    return {"joint": joint} | dict(zip(WEIGHTS, weights_of(MVFuser(8, state=4)), strict=True))


def fuse(given: Mapping[str, Tensor]) -> Tensor:
    return mvfuser(**given, eps=1e-5, double_bias=True, double_gate=True, backends=("cuda", "cuda"))


OPERATORS: dict[str, tuple[Callable[..., object], Callable[[], dict[str, Tensor]]]] = {
    "selective_scan": (lambda given: selective_scan(**given), lambda: scan_inputs(1, 3)),
    "ms_deform_attn": (attend, lambda: points(1, 3)),
    "mvfuser": (fuse, lambda: block(torch.randn(1, 3, 8))),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_every_input_of_another_kind_is_refused_by_name(op, dtype):
    call, make = OPERATORS[op]
    for name in make():
        given = {n: t.detach() for n, t in make().items()}
        given[name] = given[name].to(dtype)
        with pytest.raises(TypeError) as caught:
            call(given)
        assert str(caught.value) == (
            f"{op}: {name} must be real and floating point, got {dtype}; "
            "allowed are torch.float32, torch.bfloat16, torch.float16, torch.float64"
        )


@pytest.mark.parametrize("op", OPERATORS)
def test_what_is_no_tensor_is_refused_by_name(op):
    call, make = OPERATORS[op]
    for name in make():
        given = {n: t.detach() for n, t in make().items()}
        given[name] = given[name].tolist() if given[name].dim() else given[name].numpy()
        with pytest.raises(TypeError, match=f"{op}: {name} must be real and floating point, got (list|ndarray)"):
            call(given)


@pytest.mark.parametrize("op", OPERATORS)
def test_an_input_on_another_device_is_refused_by_name(op):
    call, make = OPERATORS[op]
    first, *others = make()
    for name in others:
        given = {n: t.detach() for n, t in make().items()}
        with pytest.raises(ValueError, match=f"{op}: {name} is on meta and {first} on cpu; bring all to one device"):
            call(given | {name: given[name].to("meta")})


@pytest.mark.parametrize("fuser", [MVFuser, BidirectionalMVFuser])
def test_the_block_of_modules_refuses_what_its_kernels_refuse(fuser):
    module = fuser(8, state=4, backend="torch")
    with pytest.raises(TypeError, match="mvfuser: joint must be real and floating point, got torch.int64"):
        module.mix(torch.ones(1, 3, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mvfuser: in_proj is \(8, 8\), expected \(8, 9\)"):
        module.mix(torch.ones(1, 3, 9))
    with pytest.raises(ValueError, match="tokens are torch.float64, weights torch.float32"):
        module.mix(torch.ones(1, 3, 8, dtype=torch.float64))


def zero_gradients(result: Tensor, given: Mapping[str, Tensor]) -> None:
    grads = torch.autograd.grad(result.sum(), list(given.values()))
    for (name, tensor), grad in zip(given.items(), grads, strict=True):
        assert grad.shape == tensor.shape, name
        assert not grad.any(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (0, 0, 3), (2, 5, 0)], ids=str)
def test_a_scan_of_nothing_is_empty_with_zero_gradients(shape, backend):
    given = scan_inputs(*shape)
    with torch.no_grad():
        given["A"].fill_(float("inf"))  # which must not get in
    start = given["initial_state"]
    y, state = selective_scan(**given, delta_softplus=True, return_final_state=True, backend=backend)
    assert y.shape == shape
    assert torch.equal(state, start)
    assert state.data_ptr() != start.data_ptr() or not start.numel()
    zero_gradients(y, given)
    rest = {name: tensor for name, tensor in given.items() if name != "initial_state"}
    zero_gradients(state, rest)
    state = selective_scan(**given, return_final_state=True, backend=backend)[1]
    assert (torch.autograd.grad(state.sum(), start)[0] == 1).all()


def test_a_state_after_nothing_is_a_copy_and_has_the_precision_of_states():
    given = {name: tensor.detach().bfloat16() for name, tensor in scan_inputs(2, 0).items()}
    _, state = selective_scan(**given | {"initial_state": given["initial_state"].float()}, return_final_state=True)
    state.fill_(7)
    assert not (given["initial_state"] == 7).any()
    start = torch.ones(2, 3, 2)
    _, state = selective_scan(**given | {"initial_state": start}, return_final_state=True)
    state.fill_(7)
    assert (start == 1).all()
    _, state = selective_scan(**{n: t for n, t in given.items() if n != "initial_state"}, return_final_state=True)
    assert state.dtype == torch.float32
    assert not state.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3, 0), (2, 3, 2, 0), (2, 3, 2, 4, 0)], ids=str)
def test_attention_to_nothing_is_empty_or_zero_with_zero_gradients(shape, backend):
    given = points(*shape)
    with torch.no_grad():
        given["value"].fill_(float("nan"))
    out = attend(given, backend)
    _, _, heads, dim = given["value"].shape
    assert out.shape == (*shape[:2], heads * dim)
    assert not out.any()
    zero_gradients(out, given)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (0, 0, 8)], ids=str)
@pytest.mark.parametrize("fuser", [MVFuser, BidirectionalMVFuser])
def test_a_block_of_no_tokens_is_empty_with_zero_gradients(fuser, shape):
    module, joint = fuser(8, state=4), torch.randn(shape, requires_grad=True)
    out = module.mix(joint)
    assert out.shape == shape
    zero_gradients(out, {"joint": joint} | dict(module.named_parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        assert module.mix(joint).dtype == torch.bfloat16
    given = block(joint)
    out = fuse(given)  # the operator's own door, in front of kernels that are not here
    assert out.shape == shape
    zero_gradients(out, given)


def test_nothing_counts_as_run_where_there_is_nothing_and_a_wrong_name_is_still_wrong():
    before = tally()
    given = scan_inputs(0, 5)
    selective_scan(**given)
    assert ran_since(before) == {}
    with pytest.raises(BackendError, match="nonsense"):
        selective_scan(**given, backend="nonsense")
    with pytest.raises(BackendError, match="nonsense"):
        attend(points(0, 3), "nonsense")

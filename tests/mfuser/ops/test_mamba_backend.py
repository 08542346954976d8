"""The calls into mamba-ssm's extension, by a stand-in with its interface; and itself, where there is a GPU that has it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mfuser.ops import BackendError, explain, selective_scan
from mfuser.ops.selective_scan import reference

from .test_selective_scan import close, inputs, precise, run, scan

MODULE = "mfuser.ops.selective_scan.mamba_backend"


def check_layout(u, delta, A, B, C, D, z, bias, *others: Tensor | None) -> None:
    """What the extension insists on."""
    batch, dim, length = u.shape
    state = A.shape[1]
    for tensor in (u, delta, z, *others):
        assert tensor is None or (tensor.shape, tensor.dtype) == ((batch, dim, length), u.dtype)
        assert tensor is None or tensor.stride(-1) == 1
    for tensor in (B, C):
        assert (tensor.shape, tensor.dtype, tensor.stride(-1)) == ((batch, 1, state, length), u.dtype, 1)
    for tensor in (A, D, bias):
        assert tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous())


def tokens_first(u, delta, A, B, C, D, z, bias) -> tuple[Tensor | None, ...]:
    return u.mT, delta.mT, A, B[:, 0].mT, C[:, 0].mT, D, None if z is None else z.mT, bias


def fwd(u, delta, A, B, C, D, z, bias, softplus) -> list[Tensor]:
    check_layout(u, delta, A, B, C, D, z, bias)
    given = tokens_first(u, delta, A, B, C, D, z, bias)
    ungated, state, _ = reference.forward(*given[:6], None, bias, None, softplus)
    chunks = -(-u.shape[2] // 2048)
    x = torch.full((u.shape[0], u.shape[1], chunks, 2 * A.shape[1]), float("nan"))
    x[:, :, -1, 1::2] = state
    gated = [] if z is None else [reference.forward(*given, None, softplus)[0].mT.contiguous()]
    return [ungated.mT.contiguous(), x, *gated]


def bwd(u, delta, A, B, C, D, z, bias, dy, x, ungated, dz, softplus, again) -> list[Tensor | None]:
    check_layout(u, delta, A, B, C, D, z, bias, dy, ungated)
    assert x.shape == (u.shape[0], u.shape[1], -(-u.shape[2] // 2048), 2 * A.shape[1])
    assert x.is_contiguous()
    assert (ungated is None) == (z is None)
    assert (dz, again) == (None, False)
    given = tokens_first(u, delta, A, B, C, D, z, bias)
    du, ddelta, dA, dB, dC, dD, dgate, dbias, _ = reference.backward(dy.mT, None, *given, None, softplus, x)
    du, ddelta, dB, dC, dgate = (None if grad is None else grad.mT.to(u.dtype) for grad in (du, ddelta, dB, dC, dgate))
    return [du, ddelta, dA, dB[:, None], dC[:, None], dD, dbias, *([] if dgate is None else [dgate])]


@pytest.fixture
def stand_in(monkeypatch):
    """The backend over the stand-in; it takes CPU tensors."""
    extension = ModuleType("selective_scan_cuda")
    extension.__spec__ = ModuleSpec("selective_scan_cuda", None)
    extension.fwd, extension.bwd = fwd, bwd
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", extension)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    backend = importlib.import_module(MODULE)
    refuses = backend.refuse
    monkeypatch.setattr(backend, "refuse", lambda *tensors: None)
    yield refuses
    sys.modules.pop(MODULE, None)


def without(given: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in given.items() if name not in ("initial_state", *names)}


def gradients(given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    y, state = scan(given, backend)
    probe = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    grads = torch.autograd.grad(y, list(given.values()), probe.to(y))
    return {"y": y.detach(), "state": state.detach()} | dict(zip(given, grads, strict=True))


@pytest.mark.parametrize("absent", [(), ("z",), ("D", "delta_bias")], ids=["everything", "no gate", "no skip, no bias"])
def test_arguments_and_results_find_their_places(stand_in, absent):
    given = without(inputs(2, 7, 3, 4, "float32"), *absent)
    close(gradients(given, "mamba_ssm"), gradients(precise(given), "reference"), "float32")


def test_inputs_of_several_types_are_brought_to_one(stand_in):
    given = without(inputs(2, 7, 3, 4, "bfloat16"))
    given |= {name: given[name].detach().float().requires_grad_() for name in ("A", "D", "delta_bias", "delta")}
    actual = gradients(given, "mamba_ssm")
    close(actual, gradients(precise(given), "reference"), "bfloat16")
    assert all(actual[name].dtype == given[name].dtype for name in given)


def test_the_final_state_has_no_gradient(stand_in):
    with pytest.raises(BackendError, match="mamba_ssm: the final state has no gradient; use backend `triton` or `torch`"):
        run(without(inputs(1, 3, 2, 2, "float32")), "mamba_ssm")


def test_what_it_refuses(stand_in):
    assert stand_in(*inputs(1, 3, 2, 2).values()) == "takes cuda tensors, not cpu"
    with FakeTensorMode():
        given = {n: torch.zeros(t.shape, device="cuda") for n, t in inputs(1, 3, 2, 2, "float32").items()}
        assert stand_in(*given.values()) == "takes no initial state"
        given["initial_state"] = None
        assert stand_in(*given.values()) is None
        assert stand_in(*{**given, "u": given["u"].double()}.values()) == "takes fp32, bf16 and fp16, not torch.float64"
        many = torch.zeros(2, 257, device="cuda")
        assert stand_in(*{**given, "A": many}.values()) == "takes at most 256 states, not 257"


@pytest.mark.parametrize("there", [False, True], ids=["missing", "broken"])
def test_without_the_extension_the_reason_says_how_to_get_it(there, monkeypatch):
    def fail(name: str) -> None:
        raise ImportError("selective_scan_cuda.so: undefined symbol")

    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None) if there else None)
    monkeypatch.setattr(importlib, "import_module", fail)
    reason = explain("selective_scan")["mamba_ssm"]
    cause = "selective_scan_cuda.so: undefined symbol" if there else "No module named 'selective_scan_cuda'"
    assert reason == f"{cause}: MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation -e '.[mamba]'"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [5, 2594])
def test_the_real_one_equals_the_reference(dtype, length):
    if reason := explain("selective_scan")["mamba_ssm"]:
        pytest.skip(f"mamba_ssm: {reason}")
    given = {n: t.detach().cuda().requires_grad_() for n, t in without(inputs(2, length, 5, 16, dtype)).items()}
    close(gradients(given, "mamba_ssm"), gradients(precise(given), "reference"), dtype)
    with pytest.raises(BackendError, match="takes no initial state"):
        selective_scan(**given, initial_state=torch.zeros(2, 5, 16, device="cuda"), backend="mamba_ssm")

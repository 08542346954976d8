"""A norm, with a sum before it, as one kernel, in Triton's interpreter on a CPU, against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mfuser.fast import normed

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = (torch.randn(*shape) + mean).to(DEVICE, dtype)
    return x, torch.rand(shape[-1], device=DEVICE) + 0.5, torch.randn(shape[-1], device=DEVICE)


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x.double(), x.shape[-1:], weight.double(), None if bias is None else bias.double(), eps)


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("width", [1, 24, 1024, 1500])
def test_it_is_the_norm_of_each_row(width, biased, mean):
    x, weight, bias = drawn(2, 3, width, mean=mean)
    given = (weight, bias if biased else None, 1e-6)
    found = normed.layer_norm(x, None, *given, torch.float32)
    torch.testing.assert_close(found.double(), expected(x, *given), rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added_is_added_in_fp32(dtype):
    x, weight, bias = drawn(2, 5, 100)
    added = torch.randn(2, 5, 100, device=DEVICE).to(dtype)
    found = normed.layer_norm(x, added, weight, bias, 1e-6, torch.float32)
    torch.testing.assert_close(found.double(), expected(x.double() + added.double(), weight, bias, 1e-6), rtol=2e-5, atol=2e-5)


def test_what_is_added_has_the_same_shape():
    x, weight, bias = drawn(2, 16)
    with pytest.raises(ValueError, match=r"x is \(2, 16\), but what is added to it \(1, 16\)"):
        normed.layer_norm(x, x[:1], weight, bias, 1e-6, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_result_is_rounded(dtype):
    x, weight, bias = drawn(5, 100, dtype=dtype)
    found, true = normed.layer_norm(x, None, weight, bias, 1e-6, torch.bfloat16), expected(x, weight, bias, 1e-6)
    assert found.dtype is torch.bfloat16
    # Triton's interpreter cuts bits off where a GPU rounds
    assert ((found.double() - true).abs() <= (2**-8 if DEVICE == "cuda" else 2**-7) * true.abs() + 1e-6).all()


def test_rows_may_lie_apart_and_channels_too():
    x, weight, bias = drawn(4, 3, 64)
    for view in (x[:, :2, :32], x.transpose(0, 1), x[..., ::2]):
        own = weight[: view.shape[-1]], bias[: view.shape[-1]]
        found = normed.layer_norm(view, None, *own, 1e-6, torch.float32)
        torch.testing.assert_close(found.double(), expected(view, *own, 1e-6), rtol=2e-5, atol=2e-5)


def test_no_rows_are_no_rows():
    x, *own = drawn(0, 3, 16)
    assert normed.layer_norm(x, None, *own, 1e-6, torch.bfloat16).shape == (0, 3, 16)


def test_the_operator_is_well_formed():
    x, *own = drawn(3, 16)
    for added in (None, x.bfloat16()):
        torch.library.opcheck(normed.layer_norm, (x, added, *own, 1e-6, torch.float32))


def test_a_cpu_keeps_torchs():
    x, weight, _ = drawn(2, 256)
    assert not normed.fuses(x.cpu(), weight, torch.bfloat16)
    if DEVICE == "cuda":
        assert normed.fuses(x, weight, torch.bfloat16)
        assert not normed.fuses(x, weight, torch.float32)
        assert not normed.fuses(x, None, torch.bfloat16)
        assert not normed.fuses(x[:, :64], weight[:64], torch.bfloat16), "narrow rows, such as a head's"
        assert not normed.fuses(x.requires_grad_(), weight, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_rows_of_vit_l_are_as_near_as_a_rounding(dtype):
    x, weight, bias = drawn(8, 1297, 1024, dtype=dtype)
    found, true = normed.layer_norm(x, None, weight, bias, 1e-6, torch.bfloat16), expected(x, weight, bias, 1e-6)
    assert ((found.double() - true).abs() <= 2**-8 * true.abs() + 1e-5).all()

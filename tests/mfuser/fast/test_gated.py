"""A gate and its norm in one kernel, in Triton's interpreter on a CPU, against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.fast import gated

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, width: int, eps: float) -> Tensor:
    gate, hidden = (half[..., :width].double() for half in x.chunk(2, -1))
    own = [None if each is None else each[:width].double() for each in (weight, bias)]
    norm = F.layer_norm(F.silu(gate) * hidden, (width,), *own, eps)
    return F.pad(norm, (0, x.shape[-1] // 2 - width))


def padded(*shape: int, width: int, mean: float = 0.0) -> Tensor:
    return F.pad(torch.randn(*shape, width) + mean, (0, shape_more(width)))


def shape_more(width: int) -> int:
    return -width % 64


@pytest.mark.parametrize("mean", [0.0, 5.0])
@pytest.mark.parametrize(("width", "biased"), [(100, True), (128, False), (683, True)])
def test_it_is_the_norm_of_the_gated_channels(width, biased, mean):
    x = torch.cat([padded(2, 3, width=width, mean=mean), padded(2, 3, width=width, mean=mean)], -1).to(DEVICE)
    weight, bias = (F.pad(torch.rand(width), (0, shape_more(width))).to(DEVICE) for _ in range(2))
    given = (x, weight, bias if biased else None, width, 1e-6)
    found = gated.gated_norm(*given)
    torch.testing.assert_close(found.double(), expected(*given), rtol=2e-5, atol=2e-5)
    assert not found[..., width:].any()


def test_in_16_bits_only_the_result_is_rounded():
    x = torch.cat([padded(4, width=100), padded(4, width=100)], -1).to(DEVICE, torch.bfloat16)
    weight = F.pad(torch.rand(100), (0, 28)).to(DEVICE)
    found = gated.gated_norm(x, weight, None, 100, 1e-6)
    assert found.dtype is torch.bfloat16
    true = expected(x, weight, None, 100, 1e-6)
    # Triton's interpreter cuts bits off where a GPU rounds
    assert ((found.double() - true).abs() <= (2**-8 if DEVICE == "cuda" else 2**-7) * true.abs() + 1e-6).all()


def test_no_rows_are_no_rows():
    assert gated.gated_norm(torch.zeros(0, 3, 16, device=DEVICE), torch.ones(8, device=DEVICE), None, 8, 1e-6).shape == (0, 3, 8)


def test_only_silu_in_16_bits_on_a_gpu_is_fused():
    weight = torch.zeros(8, 4, dtype=torch.bfloat16)
    assert not gated.fuses(nn.SiLU(), nn.LayerNorm(4), weight)
    if DEVICE == "cuda":
        assert gated.fuses(nn.SiLU(), nn.LayerNorm(4), weight.cuda())
        assert not gated.fuses(nn.SiLU(), nn.Identity(), weight.cuda())
        assert not gated.fuses(nn.GELU(), nn.LayerNorm(4), weight.cuda())


@pytest.mark.gpu
def test_on_a_gpu_rows_of_eva02_l_are_as_near_as_a_rounding():
    x = torch.cat([padded(300, width=2730), padded(300, width=2730)], -1).to("cuda", torch.bfloat16)
    weight, bias = (F.pad(torch.rand(2730), (0, shape_more(2730))).cuda() for _ in range(2))
    given = (x, weight, bias, 2730, 1e-6)
    found, true = gated.gated_norm(*given).double(), expected(*given)
    assert ((found - true).abs() <= 2**-8 * true.abs() + 1e-6).all()

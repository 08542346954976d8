"""Bilinear resizing: its gradient by matrix products is that of torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mfuser import resize

SIZES = [((5, 7), (40, 56)), ((9, 4), (20, 31)), ((16, 16), (7, 5)), ((6, 6), (6, 6))]


def by_torch(x: Tensor, size: tuple[int, int], dout: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(F.interpolate(x, size, mode="bilinear", align_corners=False), x, dout)
    return found


@pytest.mark.parametrize(("of", "size"), SIZES)
def test_the_gradient_is_torchs(of, size):
    x = torch.randn(2, 3, *of, dtype=torch.float64, requires_grad=True)
    dout = torch.randn(2, 3, *size, dtype=torch.float64)
    # shares are exact to fp32
    torch.testing.assert_close(resize.gradient(dout, of), by_torch(x, size, dout), rtol=1e-5, atol=1e-5)


def test_autocast_rounds_no_gradient():
    dout = torch.randn(1, 2, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        found = resize.gradient(dout, (5, 5))
    assert torch.equal(found, resize.gradient(dout, (5, 5)))


def test_a_cpu_has_torchs_own():
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    out, dout = resize.bilinear(x, (9, 9)), torch.randn(1, 2, 9, 9)
    assert torch.equal(out, F.interpolate(x, (9, 9), mode="bilinear", align_corners=False))
    (found,) = torch.autograd.grad(out, x, dout)
    assert torch.equal(found, by_torch(x, (9, 9), dout))


@pytest.mark.gpu
@pytest.mark.parametrize(("of", "size"), SIZES)
def test_a_gpu_has_the_same_values_and_the_same_gradient_each_time(of, size):
    x = torch.randn(2, 19, *of, device="cuda", requires_grad=True)
    out, dout = resize.bilinear(x, size), torch.randn(2, 19, *size, device="cuda")
    assert torch.equal(out, F.interpolate(x, size, mode="bilinear", align_corners=False))
    (found,) = torch.autograd.grad(out, x, dout, retain_graph=True)
    (again,) = torch.autograd.grad(out, x, dout)
    assert torch.equal(found, again)
    torch.testing.assert_close(found, by_torch(x, size, dout), rtol=1e-4, atol=1e-4)

"""A norm of padded rows is torch's of the rows without their zeros."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mfuser.padded import norm_of_padded


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_of_padded_rows_leaves_the_zeros_out(mean, bias):
    x = torch.randn(2, 5, 43, dtype=torch.float64) + mean
    weight, shift = torch.rand(43, dtype=torch.float64), torch.rand(43, dtype=torch.float64) if bias else None
    x.requires_grad_()
    expected = F.layer_norm(x, (43,), weight, shift, 1e-6)
    padded = [None if each is None else F.pad(each, (0, 21)) for each in (x, weight, shift)]
    found = norm_of_padded(padded[0], 43, padded[1], padded[2], 1e-6)
    torch.testing.assert_close(found[..., :43], expected, rtol=1e-12, atol=1e-12)
    assert not found[..., 43:].any()
    down = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(expected, x, down)
    (own,) = torch.autograd.grad(found[..., :43], x, down)
    torch.testing.assert_close(own, gradient, rtol=1e-11, atol=1e-12)


def test_rows_of_one_value_are_their_bias():
    x = F.pad(torch.full((3, 6), 7.0), (0, 2))
    bias = F.pad(torch.arange(6.0), (0, 2))
    torch.testing.assert_close(
        norm_of_padded(x, 6, F.pad(torch.ones(6), (0, 2)), bias, 1e-6), bias.expand(3, 8), rtol=0, atol=2e-3
    )

"""Attention by tiles that a GPU copies by itself: in Triton's interpreter against torch's in fp64, and which tensors fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mfuser.fast import attention

pytest.importorskip("triton")
from mfuser.fast import attention_tma_triton_backend as tma

ON_GPU = torch.cuda.is_available()
HOPPER = ON_GPU and torch.cuda.get_device_capability()[0] >= 9
DEVICE, TYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float16)  # the interpreter has no products of bf16
needs_tiles = pytest.mark.skipif(ON_GPU and not HOPPER, reason="this GPU copies no tiles by itself")


def packed(length: int, width: int, heads: int = 2) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(2, length, 3, heads, width).to(DEVICE, TYPE).permute(2, 0, 3, 1, 4).unbind(0)


def launched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, width = q.shape
    out = q.new_full((batch, length, heads, width), float("nan")).transpose(1, 2)
    tma.launch(q, k, v, out)
    return out


def agrees(found: Tensor, *given: Tensor) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        true = F.scaled_dot_product_attention(*(each.double() for each in given))
    assert (found.double() - true).norm() <= (2**-8 if TYPE is torch.bfloat16 else 2**-11) * true.norm()


@needs_tiles
@pytest.mark.parametrize("length", [64, 70, 128, 200])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_it_is_torchs(length, width):
    given = packed(length, width)
    agrees(launched(*given), *given)


@needs_tiles
@pytest.mark.parametrize("queries", [1, 63, 130])
def test_queries_may_be_more_or_fewer_than_keys_and_lie_elsewhere(queries):
    _, k, v = packed(100, 64)
    q = 3 * torch.randn(2, queries, 2, 64).to(DEVICE, TYPE).transpose(1, 2)
    agrees(launched(q, k, v.contiguous()), q, k, v)


@needs_tiles
def test_scores_below_zero_are_not_outweighed_by_keys_that_are_not_there():
    q, k, v = packed(70, 64)
    q, k = -q.abs(), k.abs()  # zeros behind the last key would be the largest
    agrees(launched(q, k, v), q, k, v)


def test_what_lies_apart_by_no_multiple_of_16_bytes_does_not_fit():
    whole = torch.empty(2, 100, 3, 36, dtype=torch.bfloat16)
    assert tma._aligned(whole[..., :32].transpose(1, 2)) is False, "72 bytes from head to head"
    assert tma._aligned(torch.empty(2, 100, 3, 40, dtype=torch.bfloat16)[..., :32].transpose(1, 2)) is True
    assert tma._aligned(torch.empty(2, 100, 3, 40, dtype=torch.bfloat16)[..., 1:33].transpose(1, 2)) is False, (
        "it begins at 2 bytes"
    )
    assert tma._aligned(whole[..., :1, :32].expand(-1, -1, 4, -1).transpose(1, 2)) is False, "one head for all"
    assert tma._aligned(torch.empty(2, 3, 32, 100, dtype=torch.bfloat16).mT) is False, "channels apart"


@pytest.mark.gpu
@pytest.mark.parametrize("length", [63, 64, 1297])
def test_on_a_gpu_both_kernels_agree(length):
    given = packed(length, 64, heads=16)
    assert tma.fits(*given) is (HOPPER and length >= tma.KEYS)
    found = attention.attention(*given)
    agrees(found, *given)
    q, k, v = given
    apart = torch.empty(*k.shape[:-1], 65, device="cuda", dtype=k.dtype)[..., 1:].copy_(k)
    assert not tma.fits(q, apart, v)
    agrees(attention.attention(q, apart, v), *given)

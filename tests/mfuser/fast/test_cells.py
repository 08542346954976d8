"""The ends of a pixel decoder, cell by cell, against its own methods; and in which order what they return lies in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfuser.decoder.pixel_decoder import PixelDecoder
from mfuser.fast import cells, compiled

SHAPES = [(2, 3), (4, 6), (8, 12)]  # coarsest first
CHANNELS = (10, 12, 14, 16)  # finest first


def decoder(text: bool, dtype: torch.dtype = torch.float64) -> Any:
    """A pixel decoder none of whose parameters is zero or one."""
    torch.manual_seed(0)
    made = PixelDecoder(CHANNELS, 6 if text else None, classes=3, dim=8, layers=1, heads=2, points=2, ffn_dim=16, groups=2)
    for parameter in made.parameters():
        nn.init.uniform_(parameter, 0.1, 0.6)
    return made.to(dtype).eval().requires_grad_(False)


def maps(dtype: torch.dtype = torch.float64, *, channels_last: bool = False) -> list[Tensor]:
    """Four, finest first; the finest is no multiple of the next."""
    torch.manual_seed(1)
    sides = [(15, 23), *reversed(SHAPES)]
    made = [torch.randn(2, c, *side, dtype=dtype) for c, side in zip(CHANNELS, sides, strict=True)]
    return [each.contiguous(memory_format=torch.channels_last) if channels_last else each for each in made]


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, sum(h * w for h, w in SHAPES), 8, dtype=dtype)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("text", [True, False])
def test_both_ends_are_equal(text, channels_last):
    d, given = decoder(text), maps(channels_last=channels_last)
    before = d.enter(given[:0:-1]), d.leave(tokens(), SHAPES, given[0])
    assert cells.take(d, torch.float64)
    after = d.enter(given[:0:-1]), d.leave(tokens(), SHAPES, given[0])
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", [True, False])
def test_a_whole_decoder_is_equal(text):
    d, given = decoder(text), (maps(), torch.randn(2, 3, 6, dtype=torch.float64) if text else None)
    before = d(*given)
    assert cells.take(d, torch.float64)
    torch.testing.assert_close(d(*given), before, rtol=1e-12, atol=1e-12)


def test_a_norm_far_from_zero_is_that_of_torch():
    norm = nn.GroupNorm(2, 8)
    x = 1000 + torch.randn(2, 5, 7, 8, generator=torch.Generator().manual_seed(0))
    found = cells.Groups(norm, torch.float32)(x)
    expected = norm.double()(x.double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)  # the values themselves are rounded to 3e-5


def test_types_in_16_bits_are_those_of_autocast():
    d, given = decoder(False, torch.float32), maps(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        before = d.enter(given[:0:-1]), d.leave(tokens(torch.float32), SHAPES, given[0])
        cells.take(d, torch.bfloat16)
        after = d.enter(given[:0:-1]), d.leave(tokens(torch.float32), SHAPES, given[0])
    assert after[0].dtype is torch.float32
    assert after[1][0].dtype is before[1][0].dtype is torch.bfloat16
    assert (after[0] - before[0]).norm() < 0.01 * before[0].norm()
    assert (after[1][0] - before[1][0]).float().norm() < 0.01 * before[1][0].float().norm()
    assert all(torch.equal(one, other) for one, other in zip(after[1][1], before[1][1], strict=True))


def test_maps_are_views_of_cells():
    d, given = decoder(True), maps(channels_last=True)
    cells.take(d, torch.float64)
    features, found = d.leave(tokens(), SHAPES, given[0])
    assert features.permute(0, 2, 3, 1).is_contiguous(), "a product with queries reads it as it is"
    assert len({each.untyped_storage().data_ptr() for each in found}) == 1
    assert all(each.stride(1) == 1 for each in found)
    assert d.ends["leave"].weight.is_contiguous(memory_format=torch.channels_last)


def test_each_end_is_compiled_whole():
    d, given = decoder(True, torch.float32), maps(torch.float32, channels_last=True)
    before = d.enter(given[:0:-1]), d.leave(tokens(torch.float32), SHAPES, given[0])
    cells.take(d, torch.float32)
    torch._dynamo.reset()
    assert compiled.compile_layers(d, (cells.Enter, cells.Leave)) == 2
    with compiled.compiling(), torch.no_grad():
        after = d.enter(given[:0:-1]), d.leave(tokens(torch.float32), SHAPES, given[0])
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert after[1][0].permute(0, 2, 3, 1).is_contiguous()


def test_convolutions_of_another_kind_are_left_alone():
    class Other(nn.Conv2d):
        """One that does more than a plain one."""

    d = decoder(True)
    d.output_conv.conv = Other(8, 8, 3, padding=1, bias=False)
    assert not cells.take(d, torch.float32)
    assert not cells.take(nn.ModuleList(), torch.float32)
    assert isinstance(d.enter(maps()[:0:-1]), Tensor)

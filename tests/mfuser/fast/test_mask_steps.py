"""The steps of a mask decoder in a prepared copy, and what all of them read, against its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mfuser import batch_first
from mfuser.decoder.mask_decoder import MaskDecoder
from mfuser.fast import compiled, queries

SHAPES = [(2, 3), (4, 6), (8, 12)]


def decoder() -> Any:
    torch.manual_seed(0)
    return MaskDecoder(dim=16, layers=4, heads=2, ffn_dim=32).eval().requires_grad_(False)


def given() -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Maps, mask features, queries and positions."""
    torch.manual_seed(1)
    cells = [torch.randn(2, *shape, 16).permute(0, 3, 1, 2) for shape in (*SHAPES, (16, 24))]
    return cells[:3], cells[3], torch.randn(2, 5, 16), torch.randn(5, 16)


@pytest.mark.parametrize("last", [True, False])
def test_outputs_are_equal(last):
    d = decoder()
    before = d(*given(), last=last)
    assert queries.take(d, torch.float32)
    torch.testing.assert_close(d(*given(), last=last), before, rtol=0, atol=0)


def test_keys_and_values_in_16_bits_are_those_that_products_would_round():
    d = decoder()
    batch_first.take(d)
    with torch.autocast("cpu", torch.bfloat16):
        before = d(*given(), last=True)
        queries.take(d, torch.bfloat16)
        after = d(*given(), last=True)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_each_map_is_read_once_for_all_layers(monkeypatch):
    d = decoder()
    queries.take(d, torch.bfloat16)
    made, own = [], d.reading.forward
    monkeypatch.setattr(d.reading, "forward", lambda *each: made.append(own(*each)) or made[-1])
    with torch.autocast("cpu", torch.bfloat16):
        d(*given())
    assert len(made) == 1
    assert [each.dtype for pair in made[0] for each in pair] == [torch.bfloat16] * 6
    assert all(each.is_contiguous() for pair in made[0] for each in pair)


def test_what_is_read_is_compiled_whole():
    d = decoder()
    before = d(*given())
    queries.take(d, torch.float32)
    torch._dynamo.reset()
    assert compiled.compile_layers(d, (queries.Memories,)) == 1
    with compiled.compiling(), torch.no_grad():
        torch.testing.assert_close(d(*given()), before, rtol=1e-4, atol=1e-4)

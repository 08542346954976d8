"""Attention computed image by image: outputs and gradients are torch's, and no weight is read once for every token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfuser
from mfuser import batch_first, blocks, fast
from mfuser.replaced import replacement

BATCH, QUERIES, TOKENS, DIM, HEADS = 3, 5, 14, 24, 4


def drawn(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(1)
    attention = nn.MultiheadAttention(DIM, HEADS, **({"batch_first": True} | options)).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    return attention


def masks() -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    looks_away = torch.rand(BATCH * HEADS, QUERIES, TOKENS, generator=generator) < 0.4
    looks_away[..., 0] = False
    return {
        "none": None,
        "by head": looks_away,
        "shared": looks_away[0],
        "numbers": torch.randn(BATCH * HEADS, QUERIES, TOKENS, dtype=torch.float64, generator=generator),
    }


def step(attention: nn.MultiheadAttention, mask: Tensor | None, width: int = DIM) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(QUERIES, DIM), (TOKENS, width), (TOKENS, width)]
    given = [torch.randn(BATCH, *shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    out, weights = attention(*given, attn_mask=mask, need_weights=False)
    assert weights is None
    return [out, *torch.autograd.grad(out.square().sum(), [*given, *attention.parameters()])]


@pytest.mark.parametrize("mask", masks())
def test_it_is_torchs(mask):
    attention = drawn()
    changed = copy.deepcopy(attention)
    assert batch_first.take(changed) == 1
    torch.testing.assert_close(step(changed, masks()[mask]), step(attention, masks()[mask]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"bias": False}, {"kdim": 16, "vdim": 16}], ids=["no bias", "other widths"])
def test_so_it_is_of_other_builds(options):
    attention = drawn(**options)
    changed = copy.deepcopy(attention)
    assert batch_first.take(changed) == 1
    width = options.get("kdim", DIM)
    torch.testing.assert_close(step(changed, None, width), step(attention, None, width), rtol=1e-10, atol=1e-10)


def test_what_asks_for_weights_or_for_padding_gets_them_from_torch():
    attention = drawn()
    tokens = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64)
    padding = torch.arange(TOKENS).expand(BATCH, -1) > 9
    expected = [*attention(tokens, tokens, tokens), *attention(tokens, tokens, tokens, key_padding_mask=padding)]
    batch_first.take(attention)
    found = [*attention(tokens, tokens, tokens), *attention(tokens, tokens, tokens, key_padding_mask=padding)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_it_is_called_as_torchs():
    """By position, too, and by the layers of torch that hold one."""
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 32, dropout=0.0, batch_first=True).double()
    tokens = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    attention = layer.self_attn
    expected = [layer(tokens), layer(tokens, mask, is_causal=True), attention(tokens, tokens, tokens, None, False, mask)[0]]
    assert batch_first.take(layer) == 1
    found = [layer(tokens), layer(tokens, mask, is_causal=True), attention(tokens, tokens, tokens, None, False, mask)[0]]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"batch_first": False}, {"dropout": 0.1}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_would_be_another_is_left_alone(options):
    assert batch_first.take(drawn(**options)) == 0


def test_a_copy_is_torchs():
    attention = drawn()
    batch_first.take(attention)
    assert copy.deepcopy(attention).forward.__func__ is nn.MultiheadAttention.forward


def largest_batch_of_products(run: Any) -> int:
    """Return the most matrices of any batched product of a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        run()
    shapes = [event.input_shapes for event in profile.events() if event.name in ("aten::bmm", "aten::baddbmm")]
    return max((shape[0][0] for shape in shapes if shape and shape[0]), default=0)


def test_no_product_of_a_compiled_layer_is_one_for_each_token():
    """What torch's own makes of tokens first: (L, B, D) times as many copies of a weight."""
    model = mfuser.build("mfuser", vfm="tiny", vlm="tiny", image_size=(64, 64), weights="random")
    ready = fast.prepare(model, dtype=torch.float32)
    images, heads = torch.rand(2, 3, 64, 64), model.mask_decoder.heads
    assert "attention" in ready.rewritten
    # traced and decomposed as for a kernel, which then is not made
    with torch.compiler.set_stance("default", force_backend="aot_eager_decomp_partition"):
        ready(images)
        assert largest_batch_of_products(lambda: ready(images)) <= 2 * heads
    blocks.compile_blocks(model)
    assert all(replacement(layer.cross_attn, batch_first._attend) for layer in model.pixel_decoder.layers)

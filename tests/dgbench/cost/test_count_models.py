"""Counts of known models and of this project's parts against formulas written by hand and the numbers of papers."""

from __future__ import annotations

import pytest
import timm
import torch
from counting import counted, meta, only
from torch import nn

import mfuser
from dgbench.cost.count import CONVENTIONS, Cost, CountError, count
from mfuser.decoder.mtenhancer import MTEnhancer
from mfuser.decoder.pixel_decoder import PixelDecoder
from mfuser.decoder.queries import TextMaskDecoder
from mfuser.fusion import FUSERS, MVFuser, Site


def vit_block(tokens: int, width: int, hidden: int) -> int:
    return tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width


@pytest.mark.parametrize("fused", [True, False])
def test_vit_b_16_costs_what_the_literature_says(fused: bool) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0)
    for block in model.blocks:
        block.attn.fused_attn = fused
    found = count(model, meta(1, 3, 224, 224))
    by_hand = 196 * 768 * 3 * 16**2 + 12 * vit_block(197, 768, 3072)
    assert found.total == Cost(by_hand)
    assert found.total.products / 1e9 == pytest.approx(17.563, abs=5e-4)
    # without the products of attention, as many tools count it
    products = 12 * 2 * 197**2 * 768
    assert (found.total.products - products) / 1e9 == pytest.approx(16.848, abs=5e-4)
    assert found.by_module["blocks.3.mlp"] == Cost(2 * 197 * 768 * 3072)
    assert found.by_module["blocks.3"] == found.by_module["blocks.11"] == Cost(vit_block(197, 768, 3072))
    assert sum((cost for cost in found.by_operator.values()), Cost()) == found.total


def test_multihead_attention_is_counted_although_torch_would_fuse_it() -> None:
    attention = nn.MultiheadAttention(1024, 16, batch_first=True).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    cost = counted(lambda x, a: a(x, x, x, need_weights=False)[0], meta(1, 2594, 1024), parts=(attention,))
    assert cost == Cost(4 * 2594 * 1024**2 + 2 * 2594**2 * 1024)
    assert before == torch.backends.mha.get_fastpath_enabled() == True  # noqa: E712  both are what torch starts with


@pytest.mark.parametrize("enabled", [True, False])
def test_the_setting_of_the_fused_path_is_put_back_also_after_an_error(enabled: bool) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        only(nn.Linear(3, 3), 3)
        assert torch.backends.mha.get_fastpath_enabled() is enabled
        with pytest.raises(CountError):
            counted(torch.cdist, meta(3, 4), meta(3, 4))
        assert torch.backends.mha.get_fastpath_enabled() is enabled
        with pytest.raises(ZeroDivisionError):
            counted(lambda x: x / (1 // 0), meta(3))
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_the_large_tower_of_source_only() -> None:
    with torch.device("meta"):
        model = mfuser.build("source-only", backbone="dinov2_l", image_size=(512, 512), weights="meta")
    found = count(model.to("meta"), meta(1, 3, 512, 512))
    patches = 36 * 36  # 512 holds 36 patches of 14
    tower = patches * 1024 * 3 * 14**2 + 24 * vit_block(patches + 1, 1024, 4096)
    assert found.by_module["encoder"] == Cost(tower)
    assert found.by_module["head"] == Cost(patches * 1024 * 19)
    assert found.total == Cost(tower + patches * 1024 * 19, 4 * 19 * 512**2)


def mvfuser_cost(dim: int, tokens: int, state: int = 16) -> Cost:
    """The specification's section 5 and 14: linear layers, two depthwise convolutions, a scan of half the channels."""
    half, rank = dim // 2, -(-dim // 16)
    a_token = dim * dim + 2 * 3 * half + half * (rank + 2 * state) + rank * half + half * dim
    inner = tokens * half
    return Cost(tokens * a_token, 0, 9 * inner * state + inner, inner)


def test_mvfuser_is_1_657_856_products_a_token_and_its_scan() -> None:
    cost = count(MVFuser(1024, backend="torch").to("meta"), meta(1, 1297, 1024), meta(1, 1297, 1024)).total
    assert cost == mvfuser_cost(1024, 2594)
    assert cost.products == 1_657_856 * 2594
    # the table of the specification, in G: linear layers and convolutions, and with the skip
    assert f"{4 * cost.products / 1e9:.3f}" == "17.202"
    assert f"{CONVENTIONS['paper'].total(cost) / 1e9:.3f}" == "17.207"


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("mvfuser", mvfuser_cost(1024, 2594)),
        # projections and convolutions are shared; the other direction brings steps, B and C of its own
        (
            "mvfuser_bidir",
            mvfuser_cost(1024, 2594) + Cost(2594 * (512 * 96 + 64 * 512), 0, 9 * 2594 * 512 * 16 + 2594 * 512, 2594 * 512),
        ),
        ("selfattn_concat", Cost(4 * 2594 * 1024**2 + 2 * 2594**2 * 1024)),
        ("selfattn_separate", Cost(2 * (4 * 1297 * 1024**2 + 2 * 1297**2 * 1024))),
        ("bi_deform_attn", Cost(2592 * 3264 * 1024, 5 * 2592 * 8 * 2 * 4 * 128)),
    ],
)
def test_every_fuser(name: str, by_hand: Cost) -> None:
    fuser = FUSERS[name](Site(1024, (36, 36), (1, 1), backend="torch"))
    assert count(fuser.to("meta"), meta(1, 1297, 1024), meta(1, 1297, 1024)).total == by_hand


def test_the_text_enhancer() -> None:
    classes, image, text, dim = 19, 1297, 768, 256
    found = count(MTEnhancer(text, backend="torch").to("meta"), meta(1, classes, text), meta(1, image, text)).total
    outside = (image + classes) * text * dim + classes * dim * text
    inside = 4 * classes * dim**2 + 2 * classes**2 * dim + 2 * classes * dim * 4 * dim
    assert found == Cost(outside + inside) + mvfuser_cost(dim, classes + image + classes)


def pixel_decoder_cost(g: int, text: int, channels: int = 2048, dim: int = 256, layers: int = 6) -> Cost:
    """The specification's section 10, for maps of g/2, g, 2g and 4g."""
    tokens, finest, classes = (g // 2) ** 2 + g**2 + (2 * g) ** 2, (4 * g) ** 2, 19
    samples = 8 * 3 * 4  # heads, scales, points
    deformable = tokens * dim * (2 * dim + 3 * samples)
    texts = 2 * tokens * dim**2 + 2 * classes * dim**2 + 2 * tokens * classes * dim
    layer = deformable + texts + 2 * tokens * dim * 2048
    convolutions = tokens * channels * dim + finest * (channels * dim + 9 * dim**2 + dim**2)
    sampling = layers * 5 * tokens * samples * (dim // 8) + 4 * dim * finest
    return Cost(convolutions + classes * text * dim + layers * layer, sampling)


def test_the_pixel_decoder() -> None:
    maps = [meta(1, 2048, side, side) for side in (64, 32, 16, 8)]
    decoder = PixelDecoder(2048, 768, backend="torch").to("meta")
    found = counted(lambda text, d: d(maps, text), meta(1, 19, 768), parts=(decoder,))
    assert found == pixel_decoder_cost(16, 768)


def mask_decoder_cost(g: int, text: int, dim: int = 256, layers: int = 9, *, last: bool) -> Cost:
    """The specification's section 10: layers take the maps of g/2, g and 2g in turn, and all outputs share one head."""
    classes, finest = 19, (4 * g) ** 2
    maps = [(g // 2) ** 2, g**2, (2 * g) ** 2]
    products, sampling = classes * (text * dim + dim * dim), 0
    for i in range(layers):
        keys = maps[i % 3]
        cross = 2 * classes * dim**2 + 2 * keys * dim**2 + 2 * classes * keys * dim
        itself = 4 * classes * dim**2 + 2 * classes**2 * dim
        products += cross + itself + 2 * classes * dim * 2048
        sampling += 4 * classes * keys
    heads = (layers + 1) * (3 * classes * dim**2 + classes * dim * finest)
    return Cost(products + heads + (1 if last else layers + 1) * classes * dim * 20, sampling)


@pytest.mark.parametrize("last", [True, False])
def test_the_mask_decoder(last: bool) -> None:
    maps = [meta(1, 256, side, side) for side in (8, 16, 32)]
    decoder = TextMaskDecoder(768).to("meta")
    found = counted(
        lambda text, pixels, d: d(maps, pixels, text, last=last), meta(1, 19, 768), meta(1, 256, 64, 64), parts=(decoder,)
    )
    assert found == mask_decoder_cost(16, 768, last=last)

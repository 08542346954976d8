"""The mask decoder with queries of other kinds than text, and the pixel decoder without text, as Mask2Former has them."""

from __future__ import annotations

import re

import pytest
import torch
from golden_files import noise, numbers, relative_error
from named_weights import named_tensor
from torch import nn

from mfuser.decoder.mask_decoder import MaskDecoder
from mfuser.decoder.neck import four_scales, upsampling
from mfuser.decoder.pixel_decoder import PixelDecoder
from mfuser.decoder.queries import LearnedQueries, TextMaskDecoder

# our name -> that of Mask2Former's own decoder, which CLOUDS has below `sem_seg_head.predictor.`
RENAMES = [
    (r"^layers\.(\d+)\.cross_attn\.", r"transformer_cross_attention_layers.\1.multihead_attn."),
    (r"^layers\.(\d+)\.norm1\.", r"transformer_cross_attention_layers.\1.norm."),
    (r"^layers\.(\d+)\.self_attn\.", r"transformer_self_attention_layers.\1.self_attn."),
    (r"^layers\.(\d+)\.norm2\.", r"transformer_self_attention_layers.\1.norm."),
    (r"^layers\.(\d+)\.ffn\.0\.", r"transformer_ffn_layers.\1.linear1."),
    (r"^layers\.(\d+)\.ffn\.2\.", r"transformer_ffn_layers.\1.linear2."),
    (r"^layers\.(\d+)\.norm3\.", r"transformer_ffn_layers.\1.norm."),
    (r"^post_norm\.", "decoder_norm."),
    (r"^mask_embed\.([024])\.", lambda m: f"mask_embed.layers.{int(m[1]) // 2}."),
]


def fill(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        parameter.data = torch.from_numpy(named_tensor(f"sem_seg_head.predictor.{name}", tuple(parameter.shape)))


def test_masks_of_learned_queries_equal_the_authors():
    # CLOUDS' decoder is Mask2Former's but for the classes, which no mask depends on
    goldens = numbers("clouds")
    decoder, queries = MaskDecoder(dim=32, layers=3, heads=4, ffn_dim=64).eval(), LearnedQueries(7, 32)
    fill(decoder)
    fill(queries)
    maps = [noise(f"clouds/feat{i}", 2, 32, side, side + 1) for i, side in enumerate((3, 6, 12))]
    outputs = decoder(maps, noise("clouds/mask_features", 2, 32, 24, 25), *queries(2))
    assert len(outputs) == 4
    for i, (_, masks) in enumerate(outputs[:-1]):
        assert relative_error(goldens, f"aux{i}.masks_q0", masks[:, 0]) < 1e-5
    assert relative_error(goldens, "pred_masks", outputs[-1][1][:, :, ::2, ::2]) < 1e-5


def test_positions_of_each_image_are_taken_too():
    decoder = MaskDecoder(dim=32, layers=2, heads=4, ffn_dim=48)
    maps = [torch.randn(2, 32, side, side) for side in (2, 4, 8)]
    features, queries, positions = torch.randn(2, 32, 16, 16), torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    ((classes, masks),) = decoder(maps, features, queries, positions, last=True)
    assert (classes.shape, masks.shape) == ((2, 5, 20), (2, 5, 16, 16))
    for b in range(2):
        alone = decoder([m[b : b + 1] for m in maps], features[b : b + 1], queries[b : b + 1], positions[b], last=True)
        torch.testing.assert_close(alone[0], (classes[b : b + 1], masks[b : b + 1]))


def test_text_queries_keep_their_names_and_places_in_checkpoints():
    plain = list(MaskDecoder(dim=32, layers=1, heads=4, ffn_dim=48).state_dict())
    own = ["text_proj.0.weight", "text_proj.0.bias", "text_proj.2.weight", "text_proj.2.bias", "query_embed.weight"]
    assert list(TextMaskDecoder(24, dim=32, layers=1, heads=4, ffn_dim=48).state_dict()) == own + plain


def test_a_head_without_text_has_the_weights_of_mask2former():
    # 20,565,204 of VLTSeg's head: mmdet's Mask2Former for maps of 1,024 channels and 100 queries
    parts = PixelDecoder(1024, ffn_dim=1024), MaskDecoder(), LearnedQueries()
    assert sum(p.numel() for part in parts for p in part.parameters()) == 20_565_204


def test_every_parameter_of_a_pixel_decoder_without_text_learns():
    decoder = PixelDecoder((8, 12, 16, 20), dim=32, layers=2, heads=4, points=2, ffn_dim=48, groups=8, backend="torch")
    for parameter in decoder.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # where attention looks depends on nothing at first
    maps = [torch.randn(2, channels, side, side) for channels, side in zip((8, 12, 16, 20), (16, 8, 4, 2), strict=True)]
    features, scales = decoder(maps)
    assert features.shape == (2, 32, 16, 16)
    assert [tuple(s.shape) for s in scales] == [(2, 32, 2, 2), (2, 32, 4, 4), (2, 32, 8, 8)]
    (features.square().sum() + sum(s.square().sum() for s in scales)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())


def test_without_text_the_pixel_decoder_is_the_one_whose_text_says_nothing():
    sizes = {"dim": 32, "layers": 1, "heads": 4, "points": 2, "ffn_dim": 48, "groups": 8, "backend": "torch"}
    without, with_text = PixelDecoder(8, **sizes), PixelDecoder(8, 24, **sizes)
    with_text.load_state_dict(without.state_dict(), strict=False)
    layer = with_text.layers[0]
    nn.init.zeros_(layer.cross_attn.out_proj.weight)
    # norms of what is normed already, but for their eps
    for norm in (layer.norm1, layer.norm2, layer.norm3, with_text.post_norm, without.layers[0].norm1, without.layers[0].norm3):
        norm.eps = 0.0
    maps = [torch.randn(1, 8, side, side) for side in (16, 8, 4, 2)]
    torch.testing.assert_close(without(maps)[0], with_text(maps, torch.randn(1, 19, 24))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("text_dim", "text", "given"), [(None, torch.zeros(1, 19, 24), "a text"), (24, None, "no text")])
def test_a_text_that_does_not_fit_the_pixel_decoder_is_refused(text_dim, text, given):
    decoder = PixelDecoder(8, text_dim, dim=32, layers=1, heads=4, groups=8, backend="torch")
    with pytest.raises(ValueError, match=f"got {given}.*built with text_dim={text_dim}"):
        decoder([torch.zeros(1, 8, side, side) for side in (16, 8, 4, 2)], text)


def test_channels_of_three_maps_are_refused():
    with pytest.raises(ValueError, match=r"in_channels are \[8, 12, 16\], expected those of 4 maps, finest first"):
        PixelDecoder((8, 12, 16), dim=32, groups=8)


def test_the_neck_makes_four_scales_of_one_grid():
    fpn1, fpn2 = upsampling(6)
    maps = [torch.randn(2, 6, 4, 6) for _ in range(4)]
    found = four_scales(maps, fpn1, fpn2)
    assert [tuple(m.shape) for m in found] == [(2, 6, 16, 24), (2, 6, 8, 12), (2, 6, 4, 6), (2, 6, 2, 3)]
    assert torch.equal(found[2], maps[2])
    assert torch.equal(found[3], maps[3].unflatten(2, (2, 2)).unflatten(4, (3, 2)).amax((3, 5)))

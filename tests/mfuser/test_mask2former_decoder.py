"""Mask2Former's decoder as a part of methods: queries, scores, initialisation, and the neck without parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mfuser.decoder.mask2former import Mask2Former, window_scores
from mfuser.decoder.mask_decoder import class_scores
from mfuser.decoder.neck import bilinear_scales, four_taps
from mfuser.decoder.sizes import SIZES
from mfuser.towers.vit import VisionEncoder

TINY = {**SIZES["tiny"], "backend": "torch"}


def maps(channels: int = 8, batch: int = 2) -> list[torch.Tensor]:
    return [torch.randn(batch, channels, side, side) for side in (16, 8, 4, 2)]


def test_with_learned_queries_it_has_the_weights_of_mmdetections_head():
    assert sum(p.numel() for p in Mask2Former(1024).parameters()) == 20_565_204


def test_it_starts_as_mmdetections_head():
    torch.manual_seed(0)
    decoder = Mask2Former(1024, mask_layers=2, pixel_layers=2)
    pixel, layer = decoder.pixel_decoder, decoder.mask_decoder.layers[0]
    bounds = {
        pixel.input_convs[0].conv.weight: (6 / (1024 + 256)) ** 0.5,
        pixel.lateral_conv.conv.weight: (3 / 1024) ** 0.5,
        pixel.output_conv.conv.weight: (3 / (9 * 256)) ** 0.5,
        pixel.mask_feature.weight: (3 / 256) ** 0.5,
        pixel.layers[0].self_attn.value_proj.weight: (6 / 512) ** 0.5,
    }
    for weight, bound in bounds.items():
        assert 0.99 * bound < weight.abs().max() <= bound
    normal = {layer.self_attn.in_proj_weight: 256 + 768, layer.ffn[0].weight: 256 + 2048, pixel.layers[1].ffn[2].weight: 1280}
    for weight, fans in normal.items():
        assert weight.std().item() == pytest.approx((2 / fans) ** 0.5, rel=0.02)
        assert weight.abs().max() > 3.5 * weight.std()  # of a normal distribution
    assert not pixel.layers[0].self_attn.sampling_offsets.weight.any()
    assert decoder.queries.query_feat.weight.std().item() == pytest.approx(1, rel=0.05)


def test_given_queries_stand_in_for_learned_ones():
    learned = Mask2Former(8, queries=5, **TINY)
    given = Mask2Former(8, queries=None, **TINY)
    given.load_state_dict(learned.state_dict(), strict=False)
    features = maps()
    expected = learned(features)
    found = given(features, learned.queries.query_feat.weight.expand(2, -1, -1), learned.queries.query_embed.weight)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)


def test_queries_that_are_missing_or_not_asked_for_are_refused():
    with pytest.raises(ValueError, match="no learned queries; give queries and positions"):
        Mask2Former(8, queries=None, **TINY)(maps())
    with pytest.raises(ValueError, match="learned queries; give none"):
        Mask2Former(8, queries=5, **TINY)(maps(), torch.zeros(2, 5, 64), torch.zeros(5, 64))


def test_every_loss_term_moves_a_parameter():
    torch.manual_seed(0)
    decoder = Mask2Former(8, queries=6, **TINY)
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[:, :, 32:] = 11
    terms = decoder.loss(decoder(maps()), labels)
    assert len(terms) == 3 * (TINY["mask_layers"] + 1)
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, list(decoder.parameters()), retain_graph=True, allow_unused=True)
        assert term > 0, name
        assert any(g is not None and g.any() for g in gradients), name


def test_scores_of_a_window_come_from_enlarged_masks():
    classes, masks = torch.randn(1, 4, 20), torch.randn(1, 4, 6, 6) * 5
    larger = torch.stack(
        [
            torch.from_numpy(np.array(Image.fromarray(m.numpy(), mode="F").resize((24, 24), Image.Resampling.BILINEAR)))
            for m in masks[0]
        ]
    )
    torch.testing.assert_close(window_scores(classes, masks, (24, 24)), class_scores(classes, larger[None]), rtol=1e-4, atol=1e-5)


def test_bilinear_scales_are_an_images_bilinear_resizing():
    grid = [torch.randn(1, 1, 8, 12) for _ in range(4)]
    found = bilinear_scales(grid)
    assert [tuple(m.shape[2:]) for m in found] == [(32, 48), (16, 24), (8, 12), (4, 6)]
    for i in (0, 1):
        height, width = found[i].shape[2:]
        image = Image.fromarray(grid[i][0, 0].numpy(), mode="F").resize((width, height), Image.Resampling.BILINEAR)
        torch.testing.assert_close(found[i][0, 0], torch.from_numpy(np.array(image)), rtol=1e-5, atol=1e-5)
    assert torch.equal(found[2], grid[2])
    torch.testing.assert_close(found[3], nn.functional.avg_pool2d(grid[3], 2))  # halfway between two pixels each way


def test_maps_are_taken_from_the_published_blocks_and_their_shares_of_other_depths():
    assert four_taps(24) == (7, 11, 15, 23)
    assert four_taps(12) == (3, 5, 7, 11)
    assert four_taps(3) == (0, 1, 1, 2)


def test_tapped_maps_are_those_of_the_blocks_with_what_comes_after_them():
    encoder = VisionEncoder("tiny", (32, 32)).eval()
    images = torch.rand(1, 3, 32, 32)
    tokens = encoder.embed(images)
    expected = []
    for i in range(encoder.depth):
        tokens = encoder.block(i, tokens)
        tokens = torch.cat([tokens[:, : encoder.prefix], tokens[:, encoder.prefix :] * (i + 2)], 1)
        expected.append(encoder.as_map(tokens))
    found = encoder.tapped(images, (0, 2, 2), lambda i, patches: patches * (i + 2))
    for one, other in zip(found, (expected[0], expected[2], expected[2]), strict=True):
        torch.testing.assert_close(one, other)

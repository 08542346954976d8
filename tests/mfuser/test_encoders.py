from __future__ import annotations

import pytest
import torch
from golden_files import noise, numbers, relative_error

from mfuser.encoders import ENCODERS, VisionEncoder
from mfuser.pretrained import fill


@pytest.mark.parametrize("size", [(64, 64), (32, 64), (96, 32)])
def test_a_tower_stepped_by_hand_is_timms_own_forward(size):
    tower = VisionEncoder("tiny", size).eval()
    images = torch.rand(2, 3, *size)
    tokens = tower.embed(images)
    for i in range(tower.depth):
        tokens = tower.block(i, tokens)
    patches = tower.trunk.patch_embed.proj((images - tower.mean) / tower.std).flatten(2).transpose(1, 2)
    expected = tower.trunk.norm(tower.trunk.blocks(tower.trunk.norm_pre(tower.trunk._pos_embed(patches))))
    torch.testing.assert_close(tower.finish(tokens), expected)
    rows, columns = tower.grid
    assert (rows * tower.patch, columns * tower.patch) == size
    assert tower.as_map(tokens).shape == (2, tower.dim, rows, columns)
    # row by row
    torch.testing.assert_close(tower.as_map(tokens)[0, :, 0, 1], tokens[0, tower.prefix + 1])


@pytest.mark.parametrize("name", [n for n, row in ENCODERS.items() if row.timm])
def test_a_shallow_copy_of_each_published_tower_equals_timms_own(name):
    # two blocks and a small grid of the real class, with its own arguments
    tower = VisionEncoder(name, (64, 64), depth=2, embed_dim=64, num_heads=4, patch=16)
    fill(tower)
    tower.eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(std=0.1)
    images = torch.rand(1, 3, 64, 64)
    tokens = tower.embed(images)
    for i in range(tower.depth):
        tokens = tower.block(i, tokens)
    if ENCODERS[name].class_token_twice:
        # what the release does when it loads the tower: the class embedding becomes part of the class position
        with torch.no_grad():
            tower.trunk.pos_embed[:, :1] += tower.trunk.cls_token
    expected = tower.trunk.forward_features((images - tower.mean) / tower.std)
    torch.testing.assert_close(tower.finish(tokens), expected, rtol=1e-4, atol=1e-5)


def test_eva_turns_its_tokens_as_the_authors_do():
    goldens = numbers("units")
    # head width 64 and a grid of 36 x 36 as at full size
    tower = VisionEncoder("eva02", (512, 512), depth=1, embed_dim=128, num_heads=2)
    assert tower.grid == (36, 36)
    fill(tower)
    tower.embed(torch.rand(1, 3, 512, 512))
    sine, cosine = tower._rope.chunk(2, -1)
    assert relative_error(goldens, "unit_rope/cos", cosine) < 1e-6
    assert relative_error(goldens, "unit_rope/sin", sine) < 1e-6
    from timm.layers import apply_rot_embed_cat

    q = noise("unit_rope/q", 1, 2, 1296, 64)
    assert relative_error(goldens, "unit_rope/rotated", apply_rot_embed_cat(q, tower._rope)) < 1e-6


def test_pixels_beyond_the_last_whole_patch_do_not_matter():
    tower = VisionEncoder("dinov2_l", (40, 40), depth=1, embed_dim=64, num_heads=1, patch=14)
    fill(tower)
    images = torch.rand(1, 3, 40, 40)
    before = tower.embed(images)
    assert tower.grid == (2, 2)
    images[:, :, 28:] = 0
    torch.testing.assert_close(tower.embed(images), before)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="not a multiple of the patch of `tiny`, 8"):
        VisionEncoder("tiny", (60, 64))
    tower = VisionEncoder("tiny", (64, 64))
    with pytest.raises(ValueError, match=r"grid of \(8, 16\); it was built for \(8, 8\)"):
        tower.embed(torch.rand(1, 3, 64, 128))
    with pytest.raises(ValueError, match="unknown vision tower `dinov9`"):
        VisionEncoder("dinov9", (64, 64))

from __future__ import annotations

import pytest
import torch
from golden_files import noise, numbers, relative_error

from mfuser.towers.loading import fill
from mfuser.towers.table import TOWERS, plain
from mfuser.towers.vit import VisionEncoder


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


@pytest.mark.parametrize("name", [n for n in plain() if TOWERS[n].timm])
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
    if TOWERS[name].class_token_twice:
        # what the release does when it loads the tower: the class embedding becomes part of the class position
        with torch.no_grad():
            tower.trunk.pos_embed[:, :1] += tower.trunk.cls_token
    # a model that classifies by the mean of its tokens has its norm behind the mean
    expected = tower.trunk.fc_norm(tower.trunk.forward_features((images - tower.mean) / tower.std))
    torch.testing.assert_close(tower.finish(tokens), expected, rtol=1e-4, atol=1e-5)


def test_eva_turns_its_tokens_as_the_authors_do():
    goldens = numbers("units")
    # head width 64 and a grid of 36 x 36 as at full size
    tower = VisionEncoder("eva02", (512, 512), depth=1, embed_dim=128, num_heads=2)
    assert tower.grid == (36, 36)
    fill(tower)
    rope = tower.rope()
    sine, cosine = rope.chunk(2, -1)
    assert relative_error(goldens, "unit_rope/cos", cosine) < 1e-6
    assert relative_error(goldens, "unit_rope/sin", sine) < 1e-6
    from timm.layers import apply_rot_embed_cat

    q = noise("unit_rope/q", 1, 2, 1296, 64)
    assert relative_error(goldens, "unit_rope/rotated", apply_rot_embed_cat(q, rope)) < 1e-6


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


# small models of timm's by class: learned positions; the norm behind the mean; a pooling head; registers; rotary
# positions with a class token and four registers; rotary tables of each block
BY_NAME = [
    "test_vit",
    "test_vit2",
    "test_vit3",
    "vit_wee_patch16_reg1_gap_256",
    "vit_tiny_patch16_224",
    "vit_tiny_patch16_dinov3_qkvb",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch16_rope_mixed_224",
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model", BY_NAME)
def test_any_plain_model_of_timms_is_stepped_as_timm_runs_it(model, training):
    import timm

    size = (64, 96)
    tower = VisionEncoder(f"timm:{model}", size).train(training)
    theirs = timm.create_model(model, img_size=size, num_classes=0, drop_rate=0.0).train(training)
    state = {name: torch.randn_like(value) * 0.1 for name, value in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    tower.trunk.load_state_dict({n: v for n, v in state.items() if not n.startswith("attn_pool")}, assign=True)
    images = torch.rand(2, 3, *size)
    tokens = tower.embed(images)
    for i in range(tower.depth):
        tokens = tower.block(i, tokens)
    expected = theirs.forward_features((images - tower.mean) / tower.std)
    # a model that classifies by the mean of its tokens has its norm behind the mean
    torch.testing.assert_close(tower.finish(tokens), theirs.fc_norm(expected), rtol=1e-4, atol=1e-5)
    assert tokens.shape == (2, tower.prefix + 24, tower.dim)
    assert tower.as_map(tokens).shape == (2, tower.dim, 4, 6)
    assert all(p.grad is not None for p in _used(tower, tokens))


def _used(tower, tokens):
    tower.finish(tokens).sum().backward()
    return tower.parameters()


def test_dinov3_sees_the_whole_image_from_minus_one_to_one_whatever_the_grid():
    # the authors' rotary table: cell centres from -1 to 1, periods 100^(0 ... 1); half of a head turns with the row
    tower = VisionEncoder("dinov3_l", (64, 96), depth=1, embed_dim=128, num_heads=2)
    fill(tower)
    rope = tower.rope()
    period = 100 ** (torch.arange(16) / 16)
    rows, columns = ((torch.arange(n) + 0.5) / n * 2 - 1 for n in tower.grid)
    angles = [2 * torch.pi * position[:, None] / period for position in (rows, columns)]
    angle = torch.cat([angles[0][:, None].expand(4, 6, 16), angles[1][None].expand(4, 6, 16)], -1).flatten(0, 1).repeat(1, 2)
    torch.testing.assert_close(rope, torch.cat([angle.sin(), angle.cos()], -1), rtol=1e-4, atol=1e-5)


BLOCK = 12 * 1024**2 + 13 * 1024  # of a ViT-L: qkv, projection, MLP, two norms
STEM = 16 * 16 * 3 * 1024 + 1024 + 2 * 1024  # patches of 16 pixels and the last norm


@pytest.mark.parametrize(
    ("name", "prefix", "classes", "parameters"),
    [
        # layer scale, a class token with its position
        ("dinov2_l", 1, 1, 24 * (BLOCK + 2 * 1024) + STEM + (1 + 1025) * 1024),
        # positions of patches alone
        ("dinov2_l_reg4", 5, 1, 24 * (BLOCK + 2 * 1024) + STEM + (5 + 1024) * 1024),
        # no positions, no bias on queries, keys and values
        ("dinov3_l", 5, 1, 24 * (BLOCK - 3 * 1024 + 2 * 1024) + STEM + 5 * 1024),
        ("timm:vit_large_patch16_dinov3.lvd1689m", 5, 1, 24 * (BLOCK - 3 * 1024 + 2 * 1024) + STEM + 5 * 1024),
        ("siglip2", 0, 0, 24 * BLOCK + STEM + 1024 * 1024),
    ],
)
def test_towers_at_full_size_have_their_shapes(name, prefix, classes, parameters):
    tower = VisionEncoder(name, (512, 512), patch=16)
    assert all(p.is_meta for p in tower.parameters())
    assert (tower.grid, tower.dim, tower.depth, tower.prefix, tower.classes) == ((32, 32), 1024, 24, prefix, classes)
    assert sum(p.numel() for p in tower.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_tiny_patch61_224", "timm has no model `vit_tiny_patch61_224`; did you mean .*vit_tiny_patch16_224"),
        ("timm:vit_tiny_patch16_224.nope", "timm has no weights `nope` of `vit_tiny_patch16_224`; there are: augreg"),
        ("timm:resnet18", "`timm:resnet18` is one of timm's `resnet` and cannot be stepped block by block"),
        ("timm:vit_tiny_r_s16_p8_224", "one of timm's `vision_transformer_hybrid` and cannot be stepped"),
    ],
)
def test_what_is_no_tower_says_why(name, message):
    with pytest.raises(ValueError, match=message):
        VisionEncoder(name, (64, 64))


def test_an_image_smaller_than_a_patch_is_refused():
    with pytest.raises(ValueError, match=r"image size \(8, 64\) holds no whole patch of `dinov3_l`, 16"):
        VisionEncoder("dinov3_l", (8, 64))


@pytest.mark.parametrize("size", [(504, 504), (768, 768), (512, 1024)])
@pytest.mark.parametrize("name", [n for n in plain() if TOWERS[n].timm])
def test_every_tower_is_built_for_any_size(name, size):
    tower = VisionEncoder(name, size, depth=1, embed_dim=64, num_heads=1)
    fill(tower)
    rows, columns = (side // tower.patch for side in size)
    assert tower.grid == (rows, columns)
    with torch.no_grad():
        tokens = tower.block(0, tower.embed(torch.rand(1, 3, *size)))
    assert tokens.shape == (1, tower.prefix + rows * columns, 64)


def test_frozen_clip_drops_paths_in_training_from_none_to_a_tenth():
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in VisionEncoder("clip", (32, 32)).trunk.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.arange(24) / 23 * 0.1)
    tower = VisionEncoder("clip", (32, 32), depth=12, embed_dim=64, num_heads=1).requires_grad_(False)
    fill(tower)
    tokens = torch.rand(64, 5, 64)

    def last(training: bool, rows: slice) -> torch.Tensor:
        return tower.train(training).block(11, tokens[rows])

    # with its rate of a tenth on attention and MLP, about a fifth of 64 images lose one of them
    plain = last(False, slice(None))
    torch.testing.assert_close(plain[:1], last(False, slice(1)))
    changed = ~torch.isclose(last(True, slice(None)), plain, rtol=1e-4, atol=1e-5).flatten(1).all(1)
    assert changed.any()
    torch.testing.assert_close(tower.train().block(0, tokens), tower.eval().block(0, tokens))

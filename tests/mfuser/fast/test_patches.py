"""What makes a tower's tokens, as one layer, against the tower itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mfuser.fast import compiled, patches
from mfuser.towers.loading import fill
from mfuser.towers.vit import VisionEncoder

SIZE = (64, 96)
TOWERS = {  # with what they have before the first block
    "dinov2_b": "a class token",
    "dinov3_s": "registers and no positions",
    "eva02_b": "positions and a rotary table",
    "clip_b": "a class token twice, and a norm",
    "siglip_b": "neither class token nor registers",
}


def encoder(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A tower of two blocks, none of whose parameters is zero or one."""
    torch.manual_seed(0)
    made = VisionEncoder(name, SIZE, depth=2, embed_dim=32, num_heads=2)
    fill(made)
    for parameter in made.parameters():
        nn.init.uniform_(parameter, 0.1, 0.6)
    return made.to(dtype).eval().requires_grad_(False)


def images(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(2, 3, *SIZE, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TOWERS)
def test_the_tokens_of_every_kind_of_tower_are_equal(name):
    tower = encoder(name)
    before = tower.embed(images())
    assert patches.take(tower, torch.float64, torch.float64)
    assert isinstance(tower.embedding, patches.Embedding)
    torch.testing.assert_close(tower.embed(images()), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TOWERS)
def test_tokens_in_16_bits_are_those_of_autocast(name, stream):
    tower = encoder(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        before = tower.embed(images(torch.float32))
        patches.take(tower, torch.bfloat16, stream)
        after = tower.embed(images(torch.float32))
    assert after.dtype is stream
    assert after.is_contiguous()
    assert (after - before).norm() < 0.005 * before.norm()


@pytest.mark.parametrize("size", [(28, 42), (31, 45)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_patch_projection_is_equal_and_leaves_out_what_is_no_whole_patch(size, bias):
    conv = nn.Conv2d(3, 8, 14, 14, bias=bias, dtype=torch.float64).requires_grad_(False)
    given = torch.rand(2, 3, *size, dtype=torch.float64)
    ready = patches.Patches(conv, torch.float64)
    assert ready.weight.shape == (8, 640), "588 columns are no multiple of 16 bytes"
    torch.testing.assert_close(ready(given), conv(given), rtol=1e-12, atol=1e-12)


def test_images_of_another_size_are_refused_by_the_towers_own_words():
    tower = encoder("dinov2_b")
    found = []
    for _ in range(2):
        with pytest.raises(ValueError, match=r"images of \(64, 64\) give `dinov2_b` a grid of") as caught:
            tower.embed(images()[..., :64])
        found.append(str(caught.value))
        patches.take(tower, torch.float64, torch.float64)
    assert found[0] == found[1]


def test_a_stem_of_several_convolutions_is_left_alone():
    tower = VisionEncoder("tiny", (64, 64)).eval()
    given = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = tower.embed(given)
        assert not patches.take(tower, torch.float32, torch.float32)
        assert torch.equal(tower.embed(given), before)
    assert "embedding" not in tower._modules


def test_a_trunk_with_positions_of_its_own_keeps_them():
    tower = encoder("dinov2_b")

    class Other(type(tower.trunk)):
        """A trunk whose positions are doubled."""

        def _pos_embed(self, x):
            return 2 * super()._pos_embed(x)

    tower.trunk.__class__ = Other
    before = tower.embed(images())
    assert patches.take(tower, torch.float64, torch.float64), "its projection is a product all the same"
    assert "embedding" not in tower._modules
    torch.testing.assert_close(tower.embed(images()), before, rtol=1e-12, atol=1e-12)


def test_it_is_compiled_whole():
    tower = encoder("clip_b", torch.float32)
    before = tower.embed(images(torch.float32))
    patches.take(tower, torch.float32, torch.float32)
    torch._dynamo.reset()
    assert compiled.compile_layers(tower, (patches.Embedding,)) == 1
    with compiled.compiling(), torch.no_grad():
        torch.testing.assert_close(tower.embed(images(torch.float32)), before, rtol=1e-4, atol=1e-4)

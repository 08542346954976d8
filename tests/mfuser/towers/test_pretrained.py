from __future__ import annotations

import pytest
import torch
from golden_files import VARIANTS, description, numbers, relative_error
from named_weights import named_tensor
from safetensors.torch import save_file

import mfuser
from mfuser.methods import build
from mfuser.towers.loading import fill, fitted, load_tower, published
from mfuser.towers.meta import unfilled
from mfuser.towers.vit import VisionEncoder
from mfuser.towers.weights import WeightsNotFound, files

OPEN_CLIP = {
    "eva02": "EVA02-L-14-336",
    "clip": "ViT-L-14-336-quickgelu",
    "siglip": "ViT-L-16-SigLIP-384",
    "siglip2": "ViT-L-16-SigLIP2-512",
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_published_tables_and_kernels_are_resampled_as_the_authors_do(variant):
    goldens, sources = numbers(f"init_{variant}"), description(f"init_{variant}")["sources"]
    for key, golden in (row for row in _RESAMPLED[variant].items()):
        value = torch.from_numpy(named_tensor(key, sources[key]))
        tower, name, shape, prefix = golden[1:]
        actual = fitted(tower, name, value, torch.empty(shape, device="meta"), prefix)
        assert relative_error(goldens, golden[0], actual) < 1e-6, key


_DINO = {
    "ckpt_dino.pos_embed": ("backbone.dinov2.pos_embed", "dinov2_l", "pos_embed"),
    "ckpt_dino.patch_embed.proj.weight": ("backbone.dinov2.patch_embed.proj.weight", "dinov2_l", "patch_embed.proj.weight"),
}


def _dino(grid: int, patch: int) -> dict[str, tuple]:
    shapes = ((1, grid**2 + 1, 1024), (1024, 3, patch, patch))
    return {key: (*row, shape, 1) for (key, row), shape in zip(_DINO.items(), shapes, strict=True)}


# source -> (golden, tower, our name in its part, our shape, class tokens)
_RESAMPLED: dict[str, dict[str, tuple]] = {
    "eva": {
        **_dino(36, 14),
        "ckpt_eva.visual.pos_embed": ("backbone.pos_embed", "eva02", "pos_embed", (1, 1297, 1024), 1),
        "ckpt_eva.visual.patch_embed.proj.weight": (
            "backbone.patch_embed.proj.weight",
            "eva02",
            "patch_embed.proj.weight",
            (1024, 3, 14, 14),
            1,
        ),
        "ckpt_eva.text.positional_embedding": (
            "text_encoder.positional_embedding",
            "eva02",
            "positional_embedding",
            (13, 768),
            0,
        ),
    },
    "clip": {
        **_dino(32, 16),
        "ckpt_clip.visual.positional_embedding": (
            "backbone.positional_embedding",
            "clip",
            "pos_embed",
            (1, 1025, 1024),
            1,
        ),
        "ckpt_clip.visual.conv1.weight": (
            "backbone.conv1.weight",
            "clip",
            "patch_embed.proj.weight",
            (1024, 3, 16, 16),
            1,
        ),
        "ckpt_clip.positional_embedding": (
            "text_encoder.positional_embedding",
            "clip",
            "positional_embedding",
            (10, 768),
            0,
        ),
    },
    "siglip": dict(_dino(32, 16)),
}


@pytest.mark.parametrize("vlm", sorted(OPEN_CLIP))
def test_every_tensor_of_a_tower_is_in_open_clips_own_model(vlm):
    # the file on the Hub is open_clip's state_dict: its names and shapes are known without it
    import open_clip

    with torch.device("meta"):  # else it draws every value first
        theirs = open_clip.create_model(OPEN_CLIP[vlm], pretrained=None, load_weights=False, device="meta").state_dict()
    # SigLIP's ids do for SigLIP2
    variant = next(v for v, name in VARIANTS.items() if vlm.startswith(name))
    with unfilled():
        model = build(
            "mfuser",
            vlm=vlm,
            vfm="dinov2_l",
            token_ids=description(f"layout_{variant}")["tokens"],
            weights="meta",
        )
    resampled = ("pos_embed", "patch_embed.proj.weight", "positional_embedding")
    used = set()
    for part, module in (("trunk", model.vlm.trunk), ("head", model.embedding), ("text", model.text.tower)):
        for name, tensor in module.state_dict().items():
            if "adapter" in name:
                continue
            source = published(vlm, part)(name)
            value = source.read(theirs)  # a missing name raises
            used |= set(source.keys)
            if name not in resampled:
                assert [n for n in value.shape if n != 1] == [n for n in tensor.shape if n != 1], name
    left = {key for key in theirs if key not in used and "attn_mask" not in key}
    assert left <= {"logit_scale", "logit_bias"}


def test_a_tower_is_filled_from_a_published_file(tmp_path):
    # timm's own model of the same class, saved as the Hub has it, must compute what ours does after loading
    from timm.models.vision_transformer import VisionTransformer

    small = {"embed_dim": 64, "depth": 2, "num_heads": 2, "init_values": 1e-1}
    theirs = VisionTransformer(img_size=42, patch_size=14, num_classes=0, **small).eval()
    file = tmp_path / "model.safetensors"
    save_file(theirs.state_dict(), file)
    tower = VisionEncoder("dinov2_l", (42, 42), **small)
    load_tower("dinov2_l", file, {"trunk": tower.trunk})
    images = torch.rand(1, 3, 42, 42)
    tokens = tower.eval().embed(images)
    for i in range(tower.depth):
        tokens = tower.block(i, tokens)
    torch.testing.assert_close(tower.finish(tokens), theirs.forward_features((images - tower.mean) / tower.std))


def test_a_file_that_is_not_the_towers_is_named(tmp_path):
    tower = VisionEncoder("dinov2_l", (28, 28), embed_dim=64, depth=1, num_heads=2, patch=14)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: .*; delete it and run: dgbench download dinov2_l"):
        load_tower("dinov2_l", file, {"trunk": tower.trunk})
    save_file({"something": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="is not `dinov2_l`: it has no tensor 'cls_token'"):
        load_tower("dinov2_l", file, {"trunk": tower.trunk})


@pytest.mark.parametrize("vlm", sorted(OPEN_CLIP))
def test_missing_weights_name_every_file_and_what_to_do(vlm, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsNotFound) as caught:
        mfuser.build("mfuser", vlm=vlm)
    assert "timm/vit_large_patch14_dinov2.lvd142m/model.safetensors (1.2 GB)" in caught.value.message
    for row in files(vlm):
        assert f"{row.repo}/{row.file} ({row.size})" in caught.value.message
    assert f"run: dgbench download dinov2_l {vlm} (the files go to {tmp_path};" in caught.value.hint


def test_tiny_towers_need_no_file():
    mfuser.build("source-only", backbone="tiny", image_size=(64, 64))


def test_unfilled_parameters_take_no_memory_and_fill_gives_them_values():
    with unfilled():
        norm, linear = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)
    model = torch.nn.Sequential(norm, linear)
    assert all(p.is_meta for p in model.parameters())
    fill(model)
    assert torch.equal(norm.weight, torch.ones(8))
    assert not linear.bias.any()
    assert 0 < linear.weight.std() < 0.1
    assert not torch.nn.Linear(2, 2).weight.is_meta

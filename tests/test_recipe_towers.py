"""Which recipe towers and backbones stand for that are named on the command line."""

from __future__ import annotations

import pytest

from dgbench.errors import RecipeError
from dgbench.recipe import load_recipe, resolve


@pytest.mark.parametrize(
    ("towers", "recipe", "added"),
    [
        ({"vlm": "siglip2"}, "mfuser/siglip-gta", ["method.vlm=siglip2"]),
        ({"vlm": "SigLIP2", "source": "cityscapes"}, "mfuser/siglip-city", ["method.vlm=siglip2"]),
        ({"vfm": "dinov3_l"}, "mfuser/eva02-gta", ["method.vfm=dinov3_l"]),
        ({"vfm": "dinov3_l", "vlm": "clip"}, "mfuser/clip-gta", ["method.vfm=dinov3_l"]),
        ({"vfm": "dinov3_l", "source": "streets-game"}, "mfuser/eva02-gta", ["method.vfm=dinov3_l", "data.source=streets-game"]),
        ({"vfm": "timm:vit_base_patch16_224"}, "mfuser/eva02-gta", ["method.vfm=timm:vit_base_patch16_224"]),
        ({"vfm": "tiny"}, "streets/mfuser-scratch", []),
        ({"vfm": "mini_vfm"}, "streets/mfuser", []),
        ({"vlm": "small"}, "streets/mfuser-gpu", []),
        ({"vlm": "siglip2", "source": "streets-rain"}, "mfuser/siglip-gta", ["method.vlm=siglip2", "data.source=streets-rain"]),
    ],
)
def test_a_tower_without_a_recipe_takes_that_of_the_nearest(towers: dict[str, str], recipe: str, added: list[str]) -> None:
    assert resolve("mfuser", **towers) == (recipe, added)


def test_the_recipe_of_siglip2_is_siglips_with_the_tower_changed(caplog: pytest.LogCaptureFixture) -> None:
    name, flags = resolve("mfuser", vlm="siglip2")
    assert "no recipe has these towers: this is mfuser/siglip-gta with method.vlm=siglip2" in caplog.text
    recipe, usual = load_recipe(name, flags=flags), load_recipe("mfuser/siglip-gta")
    assert recipe.method.variant == "dinov2_l + siglip2"
    assert (recipe.data, recipe.train, recipe.optim) == (usual.data, usual.train, usual.optim)


@pytest.mark.parametrize(
    ("method", "towers", "told"),
    [
        ("mfuser", {"vlm": "dinov2_l"}, "--vlm dinov2_l has no text tower"),
        ("mfuser", {"vlm": "siglib"}, "--vlm: unknown tower `siglib`"),
        ("mfuser", {"vfm": "dinov9"}, "--vfm: unknown tower `dinov9`"),
        ("source-only", {"vlm": "clip"}, "`source-only` has no vlm"),
    ],
)
def test_a_tower_that_cannot_be_is_refused(method: str, towers: dict[str, str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        resolve(method, **towers)


@pytest.mark.parametrize(
    ("method", "backbone", "recipe"),
    [
        ("tldr", "resnet101", "tldr/resnet101_v1c-gta"),
        ("tldr", "resnet50", "tldr/resnet50_v1c-gta"),
        ("tldr", "tiny", "streets/tldr"),
        ("famix", "resnet101", "famix/clip_rn101-gta"),
        ("famix", "resnet50", "famix/clip_rn50-gta"),
        ("famix", "tiny", "streets/famix"),
        ("erm", "tiny", "streets/erm"),
        ("erm", "resnet101", "erm/resnet101-gta"),
    ],
)
def test_a_kind_of_backbone_means_the_one_that_the_method_is_tabulated_with(method: str, backbone: str, recipe: str) -> None:
    assert resolve(method, backbone=backbone) == (recipe, [])

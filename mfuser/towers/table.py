"""The table of vision towers: names, how timm builds them, what their images look like. Nothing heavy is imported for it."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Any

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Tower:
    """One row of ENCODERS: how timm builds it and what its images look like."""

    timm: str | None  # model name; None: built from `options` alone
    patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    options: dict[str, Any] = field(default_factory=dict)
    class_token_twice: bool = False  # the class embedding is also part of the class position, see `embed`


# those that have a text tower, too, and can stand for `vlm`
LANGUAGE = ("eva02", "clip", "siglip", "siglip2", "tiny", "small")

ENCODERS: dict[str, Tower] = {
    "dinov2_l": Tower("vit_large_patch14_dinov2", 14, *_IMAGENET),
    "dinov2_l_reg4": Tower("vit_large_patch14_reg4_dinov2", 14, *_IMAGENET),
    # rotary positions alone, a class token and four registers
    "dinov3_l": Tower("vit_large_patch16_dinov3", 16, *_IMAGENET),
    "eva02": Tower("eva02_large_patch14_clip_336", 14, *_CLIP),
    # the release adapts CLIP's 14-pixel patches to 16, and DINOv2's with them
    "clip": Tower("vit_large_patch14_clip_quickgelu_336", 16, *_CLIP, {"drop_path_rate": 0.1}, class_token_twice=True),
    # its pooling head is asked in a way of our own, see methods/mfuser.py
    "siglip": Tower("vit_large_patch16_siglip_384", 16, *_HALF, {"act_layer": "gelu_tanh", "global_pool": ""}),
    "siglip2": Tower("vit_large_patch16_siglip_512", 16, *_HALF, {"act_layer": "gelu_tanh", "global_pool": ""}),
    # trained from scratch on streets-*: on a CPU in minutes, and on one GPU
    "tiny": Tower(None, 8, *_IMAGENET, {"embed_dim": 64, "depth": 3, "num_heads": 2}),
    "small": Tower(None, 8, *_IMAGENET, {"embed_dim": 256, "depth": 8, "num_heads": 4}),
}

TIMM = "timm:"  # before the name of a model of timm's
_FAMILIES = ("vision_transformer", "eva", "deit")  # its modules of plain transformers


def tower(name: str) -> Tower:
    """The row of a tower: one of ENCODERS, or for `timm:<model>` what timm says of it.

    Raises: ValueError for a name that neither knows, and for a model that is no plain transformer.
    """
    if name in ENCODERS:
        return ENCODERS[name]
    if not name.startswith(TIMM):
        raise ValueError(f"unknown vision tower `{name}`; choose from {', '.join(sorted(ENCODERS))}, or {TIMM}<model>")
    import timm

    model = name.removeprefix(TIMM)
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models("*vit*") + timm.list_models("eva*"))
        raise ValueError(f"timm has no model `{architecture}`" + (f"; did you mean {', '.join(near)}?" if near else ""))
    family = timm.model_entrypoint(architecture).__module__.rpartition(".")[2]
    if family not in _FAMILIES:
        raise ValueError(
            f"`{name}` is one of timm's `{family}` and cannot be stepped block by block; "
            f"plain transformers are in {', '.join(_FAMILIES)}"
        )
    try:
        described = timm.get_pretrained_cfg(model)
    except RuntimeError:
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
        raise ValueError(f"timm has no weights `{tag}` of `{architecture}`; there are: {', '.join(tags)}") from None
    mean, std = (described.mean, described.std) if described else _IMAGENET
    # timm's constructors take 16 where a name does not say
    patch = re.search(r"patch(\d+)", architecture)
    return Tower(model, int(patch[1]) if patch else 16, mean, std)

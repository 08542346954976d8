"""The table of towers.

A row says how a tower is built, where its weights are, how their file names its tensors, and which text encoder it has.
Importing it needs neither torch nor timm.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mfuser.towers.files import HubFile, PackagedFile
from mfuser.towers.key_rules import CLIP_CNN_FILE, EVA_CLIP_FILE, OPENAI_FILE, SIGLIP_FILE, TIMM_FILE, Rules

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class TextTower:
    """The text encoder of an image tower, and how their outputs are combined."""

    open_clip: str | None  # configuration name; None: the tiny tower
    contexts: int  # context rows that the release learns
    tokenizer: str | HubFile  # open_clip's model whose tokenizer is used, or a vocabulary that open_clip does not bring along
    # a row of mfuser.towers.embedding.EMBEDDINGS; none: the image tower's maps are never brought to the text's space
    embedding: Literal["sum", "projected", "pooled", "none"]
    causal: bool = True
    pad: int = 0  # padding id of a tokenizer from a file
    dim: int | None = None  # width of the embeddings of the tiny tower; None: the model's choice


@dataclass(frozen=True)
class Tower:
    """One row of TOWERS."""

    timm: str | None  # model name; None: built from `options` alone
    patch: int  # pixels of a token's side; of a convolutional tower, the stride of its coarsest map
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    options: Mapping[str, Any] = field(default_factory=dict)  # further arguments of timm's constructor
    width: int = 0
    depth: int = 0  # blocks
    weights: HubFile | PackagedFile | None = None  # None: trained from scratch
    keys: Mapping[str, Rules] = field(default_factory=lambda: TIMM_FILE)  # of that file, by part
    dead: tuple[str, ...] = ()  # patterns of unused tensors of that file
    text: TextTower | None = None
    resample: Literal["bicubic", "bilinear"] = "bicubic"  # how positions and patch kernels are fitted to other sizes
    class_token_twice: bool = False  # the class embedding is also part of the class position, see `VisionEncoder.embed`
    channels: tuple[int, ...] = ()  # of the four maps of a convolutional tower, finest first; () of a plain transformer
    size: Literal["full", "small", "tiny"] = "full"  # of the decoder that goes with it, see `mfuser.decoder.sizes`

    @property
    def role(self) -> Literal["vfm", "vlm", "both", "cnn"]:
        """Its role: foundation tower, vision-language tower, or, trained from scratch, either; or convolutional network."""
        if self.channels:
            return "cnn"
        return "both" if self.scratch else "vlm" if self.text else "vfm"

    @property
    def scratch(self) -> bool:
        """Whether it has no weights of its own and is trained from scratch."""
        return self.timm is None and self.weights is None

    @property
    def files(self) -> list[HubFile]:
        """The files that it is loaded from: weights, and the tokenizer's vocabulary where that is a file of its own."""
        tokenizer = self.text.tokenizer if self.text else None
        return [file for file in (self.weights, tokenizer) if isinstance(file, HubFile)]


def _mini_file(tower: str, digest: str) -> PackagedFile:
    return PackagedFile(f"{tower}.safetensors", digest, "Apache-2.0")


def _timm_file(model: str, gigabytes: float, licence: str = "Apache-2.0") -> HubFile:
    return HubFile(f"timm/{model}", "model.safetensors", gigabytes, licence)


def _resnet_file(model: str, gigabytes: float) -> HubFile:
    return HubFile(f"timm/{model}.tv_in1k", "model.safetensors", gigabytes, "BSD-3-Clause")


def _clip_file(model: str, gigabytes: float, licence: str = "MIT") -> HubFile:
    return HubFile(f"timm/{model}", "open_clip_model.safetensors", gigabytes, licence)


_SIGLIP_WORDS = HubFile("timm/ViT-B-16-SigLIP", "tokenizer.json", 0.0024, "Apache-2.0")
# its pooling head is used in a special way, see PooledEmbedding
_SIGLIP: dict[str, Any] = {"act_layer": "gelu_tanh", "global_pool": ""}
_TINY = {"embed_dim": 64, "depth": 3, "num_heads": 2}
_MINI = {"embed_dim": 128, "depth": 6, "num_heads": 4, "norm_in_stem": False}
_SMALL = {"embed_dim": 256, "depth": 8, "num_heads": 4}
_SCALARS = (r"^logit_scale$", r"^logit_bias$")  # of the contrastive loss, read by name

TOWERS: dict[str, Tower] = {
    "dinov2_s": Tower(
        "vit_small_patch14_dinov2",
        14,
        *_IMAGENET,
        width=384,
        depth=12,
        weights=_timm_file("vit_small_patch14_dinov2.lvd142m", 0.088),
        dead=(r"^mask_token$",),
    ),
    "dinov2_b": Tower(
        "vit_base_patch14_dinov2",
        14,
        *_IMAGENET,
        width=768,
        depth=12,
        weights=_timm_file("vit_base_patch14_dinov2.lvd142m", 0.35),
        dead=(r"^mask_token$",),
    ),
    "dinov2_l": Tower(
        "vit_large_patch14_dinov2",
        14,
        *_IMAGENET,
        width=1024,
        depth=24,
        weights=_timm_file("vit_large_patch14_dinov2.lvd142m", 1.2),
        dead=(r"^mask_token$",),
    ),
    "dinov2_l_reg4": Tower(
        "vit_large_patch14_reg4_dinov2",
        14,
        *_IMAGENET,
        width=1024,
        depth=24,
        weights=_timm_file("vit_large_patch14_reg4_dinov2.lvd142m", 1.2),
        dead=(r"^mask_token$",),
    ),
    # rotary positions alone, a class token and four registers
    "dinov3_s": Tower(
        "vit_small_patch16_dinov3",
        16,
        *_IMAGENET,
        width=384,
        depth=12,
        weights=_timm_file("vit_small_patch16_dinov3.lvd1689m", 0.086, "DINOv3"),
    ),
    "dinov3_b": Tower(
        "vit_base_patch16_dinov3",
        16,
        *_IMAGENET,
        width=768,
        depth=12,
        weights=_timm_file("vit_base_patch16_dinov3.lvd1689m", 0.34, "DINOv3"),
    ),
    "dinov3_l": Tower(
        "vit_large_patch16_dinov3",
        16,
        *_IMAGENET,
        width=1024,
        depth=24,
        weights=_timm_file("vit_large_patch16_dinov3.lvd1689m", 1.2, "DINOv3"),
    ),
    # Rein's: trained on masked images, and fed as DINOv2 is. Rein reads the authors' own resampling of these weights from
    # patches of 14 to 16 pixels; here that is done when they are loaded
    "eva02_l_mim": Tower(
        "eva02_large_patch14_224",
        16,
        *_IMAGENET,
        width=1024,
        depth=24,
        weights=_timm_file("eva02_large_patch14_224.mim_m38m", 1.2, "MIT"),
    ),
    # VLTSeg's: the image tower of EVA02-CLIP at 224, without the norm before the projection of the attention, which its
    # code has not, and fed with ImageNet's mean and deviation
    "eva02_l_224": Tower(
        "eva02_large_patch14_clip_224",
        14,
        *_IMAGENET,
        {"scale_attn_inner": False},
        width=1024,
        depth=24,
        weights=_clip_file("eva02_large_patch14_clip_224.merged2b_s4b_b131k", 1.7),
        keys={"trunk": EVA_CLIP_FILE["trunk"]},
        dead=(r"^visual\.trunk\.blocks\.\d+\.attn\.norm\.", r"^visual\.trunk\.head\.", r"^text\.", *_SCALARS),
    ),
    "eva02_b": Tower(
        "eva02_base_patch16_clip_224",
        16,
        *_CLIP,
        width=768,
        depth=12,
        weights=_clip_file("eva02_base_patch16_clip_224.merged2b_s8b_b131k", 0.6),
        keys=EVA_CLIP_FILE,
        dead=_SCALARS,
        text=TextTower("EVA02-B-16", 8, "EVA02-B-16", "sum"),
    ),
    "eva02": Tower(
        "eva02_large_patch14_clip_336",
        14,
        *_CLIP,
        width=1024,
        depth=24,
        weights=_clip_file("eva02_large_patch14_clip_336.merged2b_s6b_b61k", 1.7),
        keys=EVA_CLIP_FILE,
        dead=_SCALARS,
        text=TextTower("EVA02-L-14-336", 8, "EVA02-L-14-336", "sum"),
    ),
    "clip_b": Tower(
        "vit_base_patch16_clip_quickgelu_224",
        16,
        *_CLIP,
        {"drop_path_rate": 0.1},
        width=768,
        depth=12,
        weights=_clip_file("vit_base_patch16_clip_224.openai", 0.6),
        keys=OPENAI_FILE,
        dead=_SCALARS,
        text=TextTower("ViT-B-16-quickgelu", 5, "ViT-B-16", "projected"),
        resample="bilinear",
        class_token_twice=True,
    ),
    # the release adapts CLIP's 14-pixel patches to 16, and DINOv2's with them
    "clip": Tower(
        "vit_large_patch14_clip_quickgelu_336",
        16,
        *_CLIP,
        {"drop_path_rate": 0.1},
        width=1024,
        depth=24,
        weights=_clip_file("vit_large_patch14_clip_336.openai", 1.7),
        keys=OPENAI_FILE,
        dead=_SCALARS,
        text=TextTower("ViT-L-14-336-quickgelu", 5, "ViT-L-14-336", "projected"),
        resample="bilinear",
        class_token_twice=True,
    ),
    "siglip_b": Tower(
        "vit_base_patch16_siglip_512",
        16,
        *_HALF,
        _SIGLIP,
        width=768,
        depth=12,
        weights=_clip_file("ViT-B-16-SigLIP-512", 0.82, "Apache-2.0"),
        keys=SIGLIP_FILE,
        dead=_SCALARS,
        text=TextTower("ViT-B-16-SigLIP-512", 5, _SIGLIP_WORDS, "pooled", causal=False, pad=1),
        resample="bilinear",
    ),
    "siglip": Tower(
        "vit_large_patch16_siglip_384",
        16,
        *_HALF,
        _SIGLIP,
        width=1024,
        depth=24,
        weights=_clip_file("ViT-L-16-SigLIP-384", 2.6, "Apache-2.0"),
        keys=SIGLIP_FILE,
        dead=_SCALARS,
        text=TextTower("ViT-L-16-SigLIP-384", 5, _SIGLIP_WORDS, "pooled", causal=False, pad=1),
        resample="bilinear",
    ),
    "siglip2_b": Tower(
        "vit_base_patch16_siglip_512",
        16,
        *_HALF,
        _SIGLIP,
        width=768,
        depth=12,
        weights=_clip_file("ViT-B-16-SigLIP2-512", 1.5, "Apache-2.0"),
        keys=SIGLIP_FILE,
        dead=_SCALARS,
        text=TextTower(
            "ViT-B-16-SigLIP2-512",
            5,
            HubFile("timm/ViT-B-16-SigLIP2-512", "tokenizer.json", 0.034, "Apache-2.0"),
            "pooled",
            causal=False,
        ),
        resample="bilinear",
    ),
    "siglip2": Tower(
        "vit_large_patch16_siglip_512",
        16,
        *_HALF,
        _SIGLIP,
        width=1024,
        depth=24,
        weights=_clip_file("ViT-L-16-SigLIP2-512", 3.5, "Apache-2.0"),
        keys=SIGLIP_FILE,
        dead=_SCALARS,
        text=TextTower(
            "ViT-L-16-SigLIP2-512",
            5,
            HubFile("timm/ViT-L-16-SigLIP2-512", "tokenizer.json", 0.034, "Apache-2.0"),
            "pooled",
            causal=False,
        ),
        resample="bilinear",
    ),
    # trained from scratch on streets-*: on a CPU in minutes, and on one GPU
    "tiny": Tower(None, 8, *_IMAGENET, _TINY, width=64, depth=3, text=TextTower(None, 5, "ViT-B-16", "sum"), size="tiny"),
    "small": Tower(None, 8, *_IMAGENET, _SMALL, width=256, depth=8, text=TextTower(None, 5, "ViT-B-16", "sum"), size="small"),
    # pretrained on rendered streets and part of this package, see docs/mini.md
    "mini_vfm": Tower(
        None,
        16,
        *_IMAGENET,
        _MINI,
        width=128,
        depth=6,
        weights=_mini_file("mini_vfm", "7f5911be3dc5156eba77560fabb7411ce8a4b5b32ccbac1336d4ba84792fba9f"),
        size="tiny",
    ),
    "mini_vlm": Tower(
        None,
        16,
        *_IMAGENET,
        _MINI,
        width=128,
        depth=6,
        weights=_mini_file("mini_vlm", "3352ae9fecc223ac68aba7d944d42b41bd311a36567d6fbd87c60c4f4709504a"),
        keys=EVA_CLIP_FILE,
        text=TextTower(None, 5, "ViT-B-16", "sum", dim=128),
        size="tiny",
    ),
    # convolutional networks, see `mfuser.towers.cnn`: CLIP's layers behind the maps, to an image's embedding, are not built
    "convnext_l_clip": Tower(
        "convnext_large",
        32,
        *_CLIP,
        width=1536,
        depth=36,
        weights=HubFile(
            "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup", "open_clip_pytorch_model.safetensors", 1.4, "MIT"
        ),
        keys=CLIP_CNN_FILE,
        dead=(r"^visual\.trunk\.head\.", r"^visual\.head\.", *_SCALARS),
        text=TextTower("convnext_large_d_320", 0, "convnext_large_d_320", "none"),
        channels=(192, 384, 768, 1536),
    ),
    "tiny_cnn": Tower(
        None,
        32,
        *_IMAGENET,
        {"layers": (1, 1, 1, 1), "channels": (32, 48, 64, 96), "stem_type": "deep", "stem_width": 16},
        width=96,
        depth=4,
        text=TextTower(None, 0, "ViT-B-16", "none"),
        channels=(32, 48, 64, 96),
    ),
    # ResNets, see `mfuser.towers.resnet`: torchvision's first weights (IMAGENET1K_V1), without their classifier
    "resnet18": Tower(
        "resnet18",
        32,
        *_IMAGENET,
        width=512,
        depth=8,
        weights=_resnet_file("resnet18", 0.047),
        dead=(r"^fc\.",),
        channels=(64, 128, 256, 512),
    ),
    "resnet50": Tower(
        "resnet50",
        32,
        *_IMAGENET,
        width=2048,
        depth=16,
        weights=_resnet_file("resnet50", 0.1),
        dead=(r"^fc\.",),
        channels=(256, 512, 1024, 2048),
    ),
    "resnet101": Tower(
        "resnet101",
        32,
        *_IMAGENET,
        width=2048,
        depth=33,
        weights=_resnet_file("resnet101", 0.18),
        dead=(r"^fc\.",),
        channels=(256, 512, 1024, 2048),
    ),
    # trained from scratch on streets-*
    "tiny_resnet": Tower(
        None,
        32,
        *_IMAGENET,
        {"layers": (1, 1, 1, 1), "channels": (32, 48, 64, 96), "stem_type": "deep", "stem_width": 16},
        width=96,
        depth=4,
        channels=(32, 48, 64, 96),
    ),
}

TIMM = "timm:"  # prefix of a timm model's name
_FAMILIES = ("vision_transformer", "eva", "deit")  # its modules of plain transformers


def with_text() -> list[str]:
    """Return the plain transformers that also have a text encoder and can be used as `vlm`."""
    return [name for name, row in TOWERS.items() if row.text and not row.channels]


def plain() -> list[str]:
    """Return the plain transformers, which can be used as `vfm`."""
    return [name for name, row in TOWERS.items() if not row.channels]


def tower(name: str) -> Tower:
    """Return the row of a tower: one of TOWERS, or for `timm:<model>` one made from timm's description.

    Raises: ValueError for an unknown name, and for a model that is no plain transformer.
    """
    if name in TOWERS:
        return TOWERS[name]
    if not name.startswith(TIMM):
        raise ValueError(f"unknown vision tower `{name}`; choose from {', '.join(sorted(TOWERS))}, or {TIMM}<model>")
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
    # timm's constructors use 16 if the name does not state it
    patch = re.search(r"patch(\d+)", architecture)
    return Tower(model, int(patch[1]) if patch else 16, mean, std)

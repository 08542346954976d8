"""Evaluation protocols. Two scores are comparable only if all fields of their protocols agree.

Published papers differ in test size, label grid and the Mapillary label map, which changes the average
of three targets by 2 to 2.5 points for one and the same checkpoint (Tang et al., AAAI 2025, table 1). Every record
therefore carries the hash of its protocol together with its domain's row, and no table ranks across two hashes.

`docs/protocol.md` says where each preset's values come from. `dgbench.data.resizing` and `dgbench.engine.scoring`
implement the fields.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from dgbench.errors import RecipeError, spelled, unknown

if TYPE_CHECKING:
    from dgbench.data.domain import Domain

Size = tuple[int, int]  # (H, W)
MapillaryMap = Literal["robustnet", "openseg", "wd2-policy"]

# train ids over which SYNTHIA's papers average: it has no terrain, truck and train; 13 leaves out wall, fence and pole too
CLASS_SETS: dict[int, tuple[int, ...]] = {
    19: tuple(range(19)),
    16: tuple(c for c in range(19) if c not in (9, 14, 16)),
    13: tuple(c for c in range(19) if c not in (3, 4, 5, 9, 14, 16)),
}


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a checkpoint is scored on a domain. All fields but `follows` enter the hash."""

    name: str
    follows: str = ""  # whose evaluation it is
    version: int = 2  # raised when the meaning of a field changes
    mapillary_map: MapillaryMap = "robustnet"

    # image and label alike, before anything else
    halved: tuple[str, ...] = ()  # domains halved by Rein's offline script: Pillow's bicubic, label nearest
    square: Mapping[str, int] = field(default_factory=dict)  # RobustNet's: this high, then cropped or padded to a square

    # the size at which the model sees the image; by default that of the file
    fit: Mapping[str, Size] = field(default_factory=dict)  # domain -> (H, W) box, aspect ratio kept (mmcv's rescale)
    short_edge: int | None = None  # every image's short edge is resized to this (detectron2's)
    resize: Literal["opencv-bilinear", "pillow-bilinear", "pillow-bicubic"] = "opencv-bilinear"  # OpenCV's has no antialiasing
    label_grid: Literal["original", "resized"] = "original"  # resized: the label is resized to the image's size, nearest

    # how the model is applied to the image
    window: Literal["crop", "whole"] = "crop"  # slides the training crop; the last window is shifted back to the border
    stride: float = 2 / 3  # of the window: 341 for 512, 683 for 1024; overlaps are averaged
    upsampling: Literal["method", "masks", "scores"] = "method"  # mask logits are upsampled before or after combining them
    scales: tuple[float, ...] = (1.0,)  # of the test size; the softmax of several is averaged
    flip: bool = False  # the mirrored image too

    # how the score is computed
    classes: Literal[19, 16, 13] = 19  # the mean runs over these; the confusion matrix is of all 19
    absent_classes: Literal["skip", "unlabelled", "zero"] = "skip"  # see `dgbench.metrics.miou`
    checkpoint: Literal["last"] = "last"  # never chosen by a target's labels

    @property
    def digest(self) -> str:
        """8 hex digits of the protocol alone, shown with its name."""
        return _sha256(self._content())[:8]

    def _content(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "follows"}

    def prepared_size(self, domain: str, size: Size) -> Size:
        """Return the (H, W) of image and label after `halved` or `square`, from that of the files."""
        height, width = size
        if _family(domain, self.halved):
            return height // 2, width // 2
        side = self.square.get(_family(domain, self.square))
        return (side, side) if side else (height, width)

    def test_size(self, domain: str, size: Size, scale: float = 1.0) -> Size:
        """Return the (H, W) at which an image of `size` (H, W) of this domain is shown to the model.

        A box keeps the aspect ratio: long edge at most the box's long edge, short edge at most its short edge. Both
        this and the short edge round half up, as mmcv and detectron2 do.
        """
        height, width = self.prepared_size(domain, size)
        ratio = 1.0
        if box := self.fit.get(_family(domain, self.fit)):
            ratio = min(max(box) / max(height, width), min(box) / min(height, width))
        elif self.short_edge is not None:
            ratio = self.short_edge / min(height, width)
        ratio *= scale
        return max(1, int(height * ratio + 0.5)), max(1, int(width * ratio + 0.5))

    def stride_of(self, window: Size) -> Size:
        """Return the (H, W) step between windows of (H, W) pixels."""
        return max(1, round(window[0] * self.stride)), max(1, round(window[1] * self.stride))


def _family(domain: str, named: Mapping[str, Any] | tuple[str, ...]) -> str:
    """Return under which of the named domains this one falls, or "": `acdc-fog` is measured like `acdc`."""
    bare = domain.partition("@")[0]
    return next((name for name in (bare, bare.partition("-")[0]) if name in named), "")


_UNIFIED = Protocol("unified", "our proposal: one rule for all", fit={"mapillary": (1024, 2048)})
_VLTSEG = Protocol(
    "vltseg-real",
    "VLTSeg trained on real images",
    upsampling="masks",
    stride=768 / 1024,
    fit={"cityscapes": (1024, 2048), "bdd100k": (1024, 2048), "mapillary": (1024, 2048), "acdc": (1080, 1920)},
)
_HALF_SIZE = dict.fromkeys(("cityscapes", "bdd100k", "mapillary", "acdc"), (512, 1024))

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        _UNIFIED,
        Protocol(
            "paper-full",
            "tqdm, MFuser",
            mapillary_map="openseg",
            upsampling="scores",
            fit={"cityscapes": (1024, 2048), "bdd100k": (720, 1280), "mapillary": (1024, 2048)},
        ),
        Protocol(
            "paper-half",
            "Rein and SET with 512 crops",
            mapillary_map="openseg",
            upsampling="masks",
            halved=("mapillary",),
            fit={"cityscapes": (512, 1024), "bdd100k": (720, 1280), "mapillary": (512, 1024), "acdc": (540, 960)},
        ),
        Protocol(
            "soma",
            "SoMA with 512 crops",
            mapillary_map="openseg",
            upsampling="masks",
            halved=("mapillary",),
            fit={"cityscapes": (1024, 2048), "bdd100k": (720, 1280), "mapillary": (1024, 2048), "acdc": (540, 960)},
        ),
        Protocol(
            "vltseg-synthetic",
            "VLTSeg trained on GTA5 or SYNTHIA",
            upsampling="masks",
            stride=426 / 512,
            fit={"cityscapes": (512, 1024), "bdd100k": (512, 1024), "mapillary": (512, 1024), "acdc": (540, 960)},
        ),
        _VLTSEG,
        replace(
            _VLTSEG,
            name="vltseg-tta",
            follows="VLTSeg, as sent to test servers",
            scales=(1.0, 1.25, 1.5, 1.75, 2.0, 2.25),
            flip=True,
        ),
        Protocol(
            "clouds",
            "CLOUDS",
            short_edge=1024,
            resize="pillow-bilinear",
            label_grid="resized",
            window="whole",
            upsampling="masks",
            absent_classes="unlabelled",
        ),
        Protocol("robustnet", "RobustNet, WildNet, SHADE (ResNet), FAMix", square={"mapillary": 1536}, window="whole"),
        Protocol("tldr", "TLDR: whole images at their stored size", window="whole"),
        Protocol("shade-mit", "SHADE with MiT-B5: whole images within 1024x512", window="whole", fit=_HALF_SIZE),
        Protocol(
            "san-saw",
            "SAN-SAW: images and labels at 1024x512",
            fit=_HALF_SIZE,
            resize="pillow-bicubic",
            label_grid="resized",
            window="whole",
        ),
        # SYNTHIA has 16 of the classes
        replace(_UNIFIED, name="unified-16", follows="unified, SYNTHIA's 16 classes", classes=16),
        replace(_UNIFIED, name="unified-13", follows="unified, 13 of them", classes=13),
        # 8 windows of 512 in an image of 1024x2048 instead of 18
        replace(_UNIFIED, name="unified-tiled", follows="unified, windows side by side: 2.25 times less work", stride=1.0),
    )
}


def lookup(name: str) -> Protocol:
    """Return the preset of this name, in lower or upper case.

    Raises: RecipeError naming the nearest one.
    """
    known = spelled(name, PROTOCOLS)
    if known is None:
        raise RecipeError(*unknown("protocol", name, PROTOCOLS))
    return PROTOCOLS[known]


@dataclass(frozen=True, slots=True)
class Preset:
    """A protocol as `dgbench protocols` shows it."""

    name: str
    digest: str
    follows: str
    rules: dict[str, str]  # aspect of the evaluation -> its rule, in words


def presets(name: str | None = None) -> list[Preset]:
    """Return one preset, or all of them, in words.

    Raises: RecipeError for an unknown name.
    """
    chosen = [lookup(name)] if name else list(PROTOCOLS.values())
    return [Preset(p.name, p.digest, p.follows, _in_words(p)) for p in chosen]


def _in_words(p: Protocol) -> dict[str, str]:
    """Return every field that enters the hash; sizes as H x W."""
    sizes = {}
    for domain in ("cityscapes", "bdd100k", "mapillary", "acdc"):
        box = p.fit.get(domain)
        text = f"fit {box[0]}x{box[1]}" if box else f"short edge {p.short_edge}" if p.short_edge else "as the file"
        if domain in p.halved:
            text = f"half, {text}"
        sizes[domain] = f"square {p.square[domain]}" if domain in p.square else text
    scales = "" if p.scales == (1.0,) else "scales " + ", ".join(f"{scale:g}" for scale in p.scales)
    return {
        "Mapillary's map": p.mapillary_map,
        **sizes,
        "others": f"short edge {p.short_edge}" if p.short_edge else "as the file",
        "resized by": p.resize,
        "label grid": p.label_grid,
        "window": "training crop" if p.window == "crop" else "whole image",
        "stride": f"{p.stride:.3g} of it" if p.window == "crop" else "none",
        "upsampling": p.upsampling,
        "tta": " + ".join(filter(None, (scales, "flip" * p.flip))) or "none",
        "classes": str(p.classes),
        "absent classes": p.absent_classes,
        "checkpoint": p.checkpoint,
        "version": str(p.version),
    }


def label_map(protocol: Protocol, domain: Domain) -> str:
    """Return the label map by which this domain's labels are read."""
    theirs = [f"mapillary-{name}" for name in get_args(MapillaryMap)]
    return f"mapillary-{protocol.mapillary_map}" if domain.label_map in theirs else domain.label_map


def domain_row(
    domain: Domain, split: str, label_map: str, size: tuple[int, int] | None, revision: str | None = None
) -> dict[str, Any]:
    """Return what determines the pixels and labels of a scored split; enters the hash.

    Args:
        revision: of the files that are read, where they may differ from the published ones; default: the domain's.
    """
    revision = revision or domain.revision()
    row: dict[str, Any] = {"name": domain.name, "split": split, "revision": revision, "label_map": label_map}
    return row if size is None else row | {"size": list(size)}


def protocol_hash(protocol: Protocol, domain_row: Mapping[str, Any]) -> str:
    """Return a 12-digit hash of everything that a score depends on besides the model.

    Args:
        domain_row: what determines the pixels and labels of the domain: name, split, revision, label map, and for rendered
            domains the size. JSON-able.
    """
    return _sha256({"protocol": protocol._content(), "domain": dict(domain_row)})[:12]


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

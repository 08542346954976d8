"""What a score was measured under. Two numbers are comparable only if everything in here agrees.

The published papers do not: they differ in test size, label grid and the Mapillary label map, which moves the average
of three targets by 2 to 2.5 points for one and the same checkpoint (Tang et al., AAAI 2025, table 1). Every record
therefore carries the hash of its protocol together with its domain's row, and no table ranks across two hashes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dgbench.errors import RecipeError, unknown

if TYPE_CHECKING:
    from dgbench.data.domains import Domain


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a checkpoint is scored on a domain. All fields enter the hash."""

    name: str
    version: int = 1  # raised when the meaning of a field changes
    label_space: str = "cityscapes-19"
    fit: Mapping[str, tuple[int, int]] = field(
        default_factory=dict
    )  # domain -> (H, W) box an image is fitted into; absent: file size
    interpolation: Literal["bilinear"] = "bilinear"  # of test images
    antialias: bool = False  # mmseg resizes with OpenCV, which has none; it shows when 2048 shrinks to 1024
    halved: tuple[str, ...] = ()  # domains whose images and labels are halved before anything else (Rein's offline script)
    label_grid: Literal["original", "halved"] = "original"  # scores are upsampled to the label's size
    window: Literal["crop", "whole"] = "crop"  # the sliding window is the training crop
    stride: float = 2 / 3  # of the window: 341 for 512, 683 for 1024
    merge: Literal["mean"] = "mean"  # overlapping windows; the last one is shifted back to the border
    upsampling: Literal["method"] = "method"  # where mask scores are upsampled is part of the method
    tta: Literal["none"] = "none"
    mapillary_map: Literal["robustnet", "openseg", "wd2-policy"] = "robustnet"
    absent_classes: Literal["skip"] = "skip"  # a class in neither label nor prediction is left out of the mean
    ignored_pixels: Literal["skip"] = "skip"  # whatever is predicted there costs nothing
    checkpoint: Literal["last"] = "last"  # never chosen by a target's labels

    def test_size(self, domain: str, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (H, W) at which an image of `size` (H, W) of this domain is shown to the model.

        A box keeps the aspect ratio: long edge at most the box's long edge, short edge at most its short edge
        (mmcv's rescale, which rounds half up).
        """
        height, width = size
        if domain in self.halved:
            height, width = height // 2, width // 2
        if (box := _row(self.fit, domain)) is None:
            return height, width
        scale = min(max(box) / max(height, width), min(box) / min(height, width))
        return int(height * scale + 0.5), int(width * scale + 0.5)

    def stride_of(self, window: tuple[int, int]) -> tuple[int, int]:
        """Return the (H, W) step between windows of (H, W) pixels."""
        return max(1, round(window[0] * self.stride)), max(1, round(window[1] * self.stride))


def _row(table: Mapping[str, tuple[int, int]], domain: str) -> tuple[int, int] | None:
    # `acdc-fog` and `streets-fog@0.6` are measured like the family they belong to
    return table.get(domain) or table.get(domain.partition("@")[0].partition("-")[0])


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        # our own proposal: the files' own sizes (Mapillary bounded), labels untouched, one Mapillary map for all
        Protocol("unified", fit={"mapillary": (1024, 2048)}),
        # what the configs of tqdm and MFuser do
        Protocol(
            "paper-full",
            fit={"cityscapes": (1024, 2048), "bdd100k": (720, 1280), "mapillary": (1024, 2048)},
            mapillary_map="openseg",
        ),
        # what the 512-crop configs of Rein and SET do
        Protocol(
            "paper-half",
            fit={"cityscapes": (512, 1024), "bdd100k": (720, 1280), "mapillary": (512, 1024), "acdc": (540, 960)},
            halved=("mapillary",),
            label_grid="halved",
            mapillary_map="openseg",
        ),
    )
}  # fmt: skip


def lookup(name: str) -> Protocol:
    """Return the preset of this name.

    Raises: RecipeError naming the nearest one.
    """
    if name not in PROTOCOLS:
        raise RecipeError(*unknown("protocol", name, PROTOCOLS))
    return PROTOCOLS[name]


def label_map(protocol: Protocol, domain: Domain) -> str:
    """Return the label map by which this domain's labels are read."""
    return f"mapillary-{protocol.mapillary_map}" if domain.base == "mapillary" else domain.label_map


def domain_row(
    domain: Domain, split: str, label_map: str, size: tuple[int, int] | None, revision: str | None = None
) -> dict[str, Any]:
    """Return what fixes the pixels and labels of a scored split; enters the hash.

    Args:
        revision: of the files that are read, where they may differ from the published ones; default: the domain's.
    """
    revision = revision or domain.revision()
    row: dict[str, Any] = {"name": domain.name, "split": split, "revision": revision, "label_map": label_map}
    return row if size is None else row | {"size": list(size)}


def protocol_hash(protocol: Protocol, domain_row: Mapping[str, Any]) -> str:
    """Return 12 hex digits that change with anything that changes what a score means.

    Args:
        domain_row: what fixes the pixels and labels of the domain: name, split, revision, label map, and for rendered
            domains the size. JSON-able.
    """
    content = json.dumps({"protocol": asdict(protocol), "domain": dict(domain_row)}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()[:12]

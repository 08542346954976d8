"""Two published tables of backbones, as they are printed: UPerNet on ADE20K and Mask R-CNN on COCO; needs no torch.

Both are of VMamba's paper and repository. The same numbers stand in many papers since Swin, and their "FLOPs" are
multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Printed:
    """One row as it is printed.

    Attributes:
        backbone: its name.    trunk: its name in `mfuser.towers.pyramid`.    parameters: in millions.
        operations: in 1e9 multiply-accumulates; None where the table has none.
        scores: in %, by their column's name; None where the table has none.
        dim: width of UPerNet's head.    cause: why our count differs, if by more than rounding.
        without_auxiliary: the printed parameters leave the auxiliary head out.
    """

    backbone: str
    trunk: str
    parameters: int
    operations: int | None
    scores: Mapping[str, float | None]
    dim: int = 512
    cause: str = ""
    without_auxiliary: bool = False


@dataclass(frozen=True, slots=True)
class PrintedTable:
    """A table: its rows, what was measured how, and where it was read.

    Attributes:
        size: (H, W) of the image that is counted.    score: the column of `Printed.scores` that is plotted.
        tolerance: by which a count may differ without a cause, in %.
        calibration: a trunk, and the parameters and operations (1e9) that VMamba's counter (analyze/flops.py) prints for it.
    """

    name: str
    title: str
    size: tuple[int, int]
    scores: tuple[str, ...]
    score: str
    cite: str
    read: str
    training: tuple[str, ...]
    tolerance: float
    calibration: tuple[str, int, float]
    rows: tuple[Printed, ...] = field(repr=False)


_CITE = "Liu et al., VMamba, NeurIPS 2024, arXiv:2401.10166, and its repository MzeroMiko/VMamba, commit 2ed52ead"
_READ = "2026-11-29"


def _ade(backbone: str, trunk: str, single: float, multi: float | None, parameters: int, operations: int | None) -> Printed:
    return Printed(backbone, trunk, parameters, operations, {"mIoU SS": single, "mIoU MS": multi})


_ADE20K = (
    _ade("ResNet-50", "resnet50_deep", 42.1, 42.8, 67, 953),
    _ade("DeiT-S + MLN", "deit_s_mln", 43.8, 45.1, 58, 1217),
    _ade("Swin-T", "swin_t", 44.5, 45.8, 60, 945),
    _ade("ConvNeXt-T", "convnext_t", 46.0, 46.7, 60, 939),
    _ade("NAT-T", "nat_t", 47.1, 48.4, 58, 934),
    Printed(
        "Vim-S",
        "vim_s",
        46,
        None,
        {"mIoU SS": 44.9, "mIoU MS": None},
        dim=384,
        cause="the released configuration has 45.4 M; with the classifier of 1,000 classes, which its code deletes, it is 45.8 M",
    ),
    _ade("VMamba-T", "vmamba_t", 47.9, 48.8, 62, 949),
    _ade("ResNet-101", "resnet101_deep", 43.8, 44.9, 86, 1030),
    _ade("DeiT-B + MLN", "deit_b_mln", 45.5, 47.2, 144, 2007),
    _ade("Swin-S", "swin_s", 47.6, 49.5, 81, 1039),
    _ade("ConvNeXt-S", "convnext_s", 48.7, 49.6, 82, 1027),
    _ade("NAT-S", "nat_s", 48.0, 49.5, 82, 1010),
    _ade("VMamba-S", "vmamba_s", 50.6, 51.2, 82, 1028),
    _ade("Swin-B", "swin_b", 48.1, 49.7, 121, 1188),
    _ade("ConvNeXt-B", "convnext_b", 49.1, 49.9, 122, 1170),
    _ade("NAT-B", "nat_b", 48.5, 49.7, 123, 1137),
    Printed(
        "RepLKNet-31B",
        "replknet_31b",
        112,
        1170,
        {"mIoU SS": 49.9, "mIoU MS": 50.6},
        cause="the printed parameters are those without the auxiliary head",
        without_auxiliary=True,
    ),
    _ade("VMamba-B", "vmamba_b", 51.0, 51.6, 122, 1170),
)

_WINDOWS = "windows of 7 x 7 pad the third stage's map of 50 x 80 to 56 x 84, which the printed number does not have"
_SWIN_S = f"{_WINDOWS}; Swin's own repository prints 359 G for this network"
_SWAPPED = "the repository's README prints 384 G, its counter 349 G: two digits are swapped; 349 is taken"


def _coco(backbone: str, parameters: int, operations: int, first: tuple[float, float], third: tuple[float, float]) -> Printed:
    trunk = backbone.lower().replace("-", "_")
    names = ("AP box 1x", "AP mask 1x", "AP box 3x", "AP mask 3x")
    scores = {name: value or None for name, value in zip(names, (*first, *third), strict=True)}
    cause = {"Swin-S": _SWIN_S, "Swin-B": _WINDOWS, "VMamba-S": _SWAPPED}.get(backbone, "")
    return Printed(backbone, trunk, parameters, operations, scores, cause=cause)


_NONE = (0.0, 0.0)  # a schedule without a row
_MASKRCNN = (
    _coco("Swin-T", 48, 267, (42.7, 39.3), (46.0, 41.6)),
    _coco("ConvNeXt-T", 48, 262, (44.2, 40.1), (46.2, 41.7)),
    _coco("NAT-T", 48, 258, _NONE, (47.7, 42.6)),
    _coco("VMamba-T", 50, 271, (47.3, 42.7), (48.8, 43.7)),
    _coco("Swin-S", 69, 354, (44.8, 40.9), (48.2, 43.2)),
    _coco("ConvNeXt-S", 70, 348, (45.4, 41.8), (47.9, 42.9)),
    _coco("NAT-S", 70, 330, _NONE, (48.4, 43.2)),
    _coco("VMamba-S", 70, 349, (48.7, 43.7), (49.9, 44.2)),
    _coco("Swin-B", 107, 496, (46.9, 42.3), _NONE),
    _coco("ConvNeXt-B", 108, 486, (47.0, 42.7), _NONE),
    _coco("VMamba-B", 108, 485, (49.2, 44.1), _NONE),
)

TABLES: dict[str, PrintedTable] = {
    "ade20k": PrintedTable(
        "ade20k",
        "UPerNet on ADE20K",
        (512, 2048),
        ("mIoU SS", "mIoU MS"),
        "mIoU SS",
        _CITE,
        _READ,
        (
            "mIoU: crops of 512x512, 160k iterations of 16 images, AdamW 6e-5 (ResNets: SGD 0.01); SS one scale, MS ratios "
            "0.5-1.75 and flips.",
            "Vim-S: 60k iterations of 32 images, a head of width 384, tested on windows of 512 with stride 341.",
        ),
        0.2,
        ("resnet50_deep", 66_516_108, 952.616667136),
        _ADE20K,
    ),
    "maskrcnn": PrintedTable(
        "maskrcnn",
        "Mask R-CNN on COCO",
        (800, 1280),
        ("AP box 1x", "AP mask 1x", "AP box 3x", "AP mask 3x"),
        "AP box 1x",
        _CITE,
        _READ,
        ("AP: 1x is 12 epochs, 3x 36 epochs with several scales.",),
        0.5,
        ("resnet50", 44_396_000, 260.152304640),
        _MASKRCNN,
    ),
}

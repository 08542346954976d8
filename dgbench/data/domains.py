"""The table of domains: what each is, where its files lie on disk, and how its labels are to be read.

Adding a domain is adding a row. `streets-*` are rendered by `dgbench.data.streets` and need no files; every other row
describes the official folder layout below a data root, read in place.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from dgbench.errors import DataError, unknown


@dataclass(frozen=True, slots=True)
class Layout:
    """How to find the files of one split below the domain's folder."""

    images: str  # glob, relative to the domain's folder
    to_label: tuple[tuple[str, str], ...]  # replacements that turn an image's relative path into its label's
    count: int  # images in the complete split


@dataclass(frozen=True, slots=True)
class Domain:
    """One domain (not "dataset": a role in a domain-generalisation experiment)."""

    name: str
    title: str
    splits: dict[str, int]  # split -> images in it
    size: str  # W x H, as published
    label_map: str  # key of dgbench.data.labels.LABEL_MAPS
    licence: str
    access: str  # "procedural", "open", "account" or "request"
    homepage: str = ""
    folders: tuple[str, ...] = ()  # names its folder may have below the data root
    layouts: dict[str, Layout] = field(default_factory=dict)  # empty: procedural
    aliases: tuple[str, ...] = ()
    severity: float | None = None  # streets only, from `name@severity`

    @property
    def procedural(self) -> bool:
        return not self.layouts

    @property
    def base(self) -> str:
        return self.name.partition("@")[0]

    def root(self, data_root: Path) -> Path | None:
        """The domain's folder below `data_root`, or None when there is none."""
        return next((data_root / f for f in self.folders if (data_root / f).is_dir()), None)

    def revision(self) -> str:
        """What pins the data that a score was computed on; part of the protocol hash."""
        if self.procedural:
            from dgbench.data.streets import VERSION

            return f"streets-v{VERSION}"
        return "official"

    def require_split(self, split: str) -> None:
        if split not in self.splits:
            raise DataError(f"`{self.name}` has no split `{split}`", f"its splits are {', '.join(f'`{s}`' for s in self.splits)}")


def _folders(name: str, title: str, size: str, label_map: str, licence: str, access: str, homepage: str,
             folders: tuple[str, ...], layouts: dict[str, Layout], aliases: tuple[str, ...] = ()) -> Domain:  # fmt: skip
    splits = {split: layout.count for split, layout in layouts.items()}
    return Domain(name, title, splits, size, label_map, licence, access, homepage, folders, layouts, aliases)


STREETS_SPLITS = {"train": 4000, "val": 100}
RENDER_SIZE = (256, 512)  # (H, W) where nothing else is asked for

_STREETS = {
    "streets-game": "clean, saturated, one camera: the source",
    "streets-city": "muted colours, sensor noise, denser traffic",
    "streets-adverse": "night, rain, fog and snow",
    "streets-night": "night with lamps and headlights",
    "streets-rain": "rain, wet ground",
    "streets-fog": "fog by depth",
    "streets-snow": "snow cover and falling snow",
    "streets-world": "other cameras, left-hand traffic, other architecture",
}

_WITH_SEVERITY = ("streets-adverse", "streets-night", "streets-rain", "streets-fog", "streets-snow")

_CITYSCAPES_LABEL = (("leftImg8bit/", "gtFine/"), ("_leftImg8bit.png", "_gtFine_labelIds.png"))
_ACDC_LABEL = (("rgb_anon/", "gt/"), ("_rgb_anon.png", "_gt_labelTrainIds.png"))
_NON_COMMERCIAL = "research, non-commercial"


def _acdc(condition: str, count: int) -> Domain:
    suffix = f"-{condition}" if condition != "*" else ""
    return _folders(
        f"acdc{suffix}", f"ACDC{suffix.replace('-', ', ')}", "1920x1080", "train-ids", _NON_COMMERCIAL, "account",
        "https://acdc.vision.ee.ethz.ch", ("acdc", "ACDC"),
        {"val": Layout(f"rgb_anon/{condition}/val/*/*_rgb_anon.png", _ACDC_LABEL, count)},
    )  # fmt: skip


_TABLE: tuple[Domain, ...] = (
    *(
        Domain(name, title, dict(STREETS_SPLITS), "any", "train-ids", "Apache-2.0", "procedural")
        for name, title in _STREETS.items()
    ),
    _folders(
        "gta5", "GTA5 (Playing for Data)", "1914x1052", "gta5-ids", _NON_COMMERCIAL, "open",
        "https://download.visinf.tu-darmstadt.de/data/from_games/", ("gta5", "gta", "GTA5", "GTA"),
        {"train": Layout("images/*.png", (("images/", "labels/"),), 24966)}, ("gta",),
    ),
    _folders(
        "cityscapes", "Cityscapes", "2048x1024", "cityscapes-ids", _NON_COMMERCIAL, "account",
        "https://www.cityscapes-dataset.com/downloads/", ("cityscapes", "Cityscapes"),
        {s: Layout(f"leftImg8bit/{s}/*/*_leftImg8bit.png", _CITYSCAPES_LABEL, n)
         for s, n in (("train", 2975), ("val", 500))}, ("city",),
    ),
    _folders(
        "bdd100k", "BDD100K (10k set)", "1280x720", "train-ids", _NON_COMMERCIAL, "account",
        "http://bdd-data.berkeley.edu", ("bdd100k", "bdd"),
        {s: Layout(f"images/10k/{s}/*.jpg", (("images/10k/", "labels/sem_seg/masks/"), (".jpg", ".png")), n)
         for s, n in (("train", 7000), ("val", 1000))}, ("bdd",),
    ),
    _folders(
        "mapillary", "Mapillary Vistas v1.2", "varies", "mapillary-robustnet", "CC BY-NC-SA 4.0", "request",
        "https://www.mapillary.com/dataset/vistas", ("mapillary", "mapillary_vistas"),
        {s: Layout(f"{folder}/images/*.jpg", (("/images/", "/labels/"), (".jpg", ".png")), n)
         for s, folder, n in (("train", "training", 18000), ("val", "validation", 2000))}, ("vistas",),
    ),
    _acdc("*", 406), _acdc("fog", 100), _acdc("night", 106), _acdc("rain", 100), _acdc("snow", 100),
)  # fmt: skip

DOMAINS: dict[str, Domain] = {d.name: d for d in _TABLE}


def names() -> tuple[str, ...]:
    """Every domain's name, aliases left out."""
    return tuple(DOMAINS)


def lookup(name: str) -> Domain:
    """The row of a name or alias; `streets-fog@0.6` sets a severity in 0..1.

    Raises: DataError naming the nearest known domain, or what a severity may be.
    """
    base, at, suffix = name.partition("@")
    row = DOMAINS.get(base) or next((d for d in DOMAINS.values() if base in d.aliases), None)
    if row is None:
        raise DataError(*unknown("domain", base, [*DOMAINS, *(a for d in DOMAINS.values() for a in d.aliases)]))
    if not at:
        return row
    return _with_severity(row, suffix)


def _with_severity(row: Domain, text: str) -> Domain:
    if row.name not in _WITH_SEVERITY:
        raise DataError(f"`{row.name}` has no severity", f"these do: {', '.join(_WITH_SEVERITY)}; for example `streets-fog@0.6`")
    try:
        severity = float(text)
    except ValueError:
        severity = -1.0
    if not 0 <= severity <= 1:
        raise DataError(f"severity `{text}` of `{row.name}` is not a number in 0..1", "for example `streets-fog@0.6`")
    return replace(row, name=f"{row.name}@{severity:g}", severity=severity)


def data_root(given: Path | None = None) -> Path:
    """Where dataset folders lie: the argument, else DGBENCH_DATA, else `./data`."""
    return given or Path(os.environ.get("DGBENCH_DATA", "data"))


def cache_root() -> Path:
    """Where rendered images and statistics are kept: DGBENCH_CACHE, else the user's cache folder."""
    if path := os.environ.get("DGBENCH_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dgbench"

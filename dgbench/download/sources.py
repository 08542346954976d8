"""The sources of each domain's files: archives, sizes, checksums, and how they can be obtained.

Adding a source is adding a row. Sizes are as published (GB of 10^9 bytes, rounded); a size that the server states has priority.
Sizes and URLs are from the owners' pages, read through public copies in November 2026.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from dgbench.data.domains import built_in

Way = Literal["open", "csDownload", "browser", "hub"]


@dataclass(frozen=True, slots=True)
class Archive:
    """One file that the owner of a data set offers.

    `gives` are globs below the domain's folder, `|` between alternatives: each matches a file once the archive is
    unpacked, and an archive of another name is recognised by them.
    """

    name: str
    gigabytes: float | None
    gives: tuple[str, ...]
    url: str | None = None
    md5: str | None = None
    grows: float = 1.05  # approximate ratio of unpacked to packed bytes
    needed: bool = True  # False: the domain is complete without it
    other_names: tuple[str, ...] = ()  # other official names of the same archive


@dataclass(frozen=True, slots=True)
class Source:
    """How to get one domain, and the other domains that lie in the same folder."""

    domain: str
    way: Way
    archives: tuple[Archive, ...]
    tops: tuple[str, ...]  # top-level names of the official layout; folders above them in archives are removed
    terms: str  # the owner's terms of use; "" if the licence is enough
    steps: tuple[str, ...] = ()  # in a browser
    also: tuple[str, ...] = ()
    repo: str | None = None  # on the Hub
    revision: str = "main"
    patterns: tuple[str, ...] = ()
    md5: tuple[tuple[str, str], ...] = ()  # of further archives that can be used instead, by name

    @property
    def must_be_accepted(self) -> bool:
        """Whether a user has to agree to the terms before anything is transferred."""
        return bool(self.terms)

    def place(self, member: str) -> str:
        """Return where a member of one of its archives belongs, below the domain's folder."""
        parts = member.split("/")
        # deeper than this, it is a folder of the data set with the same name
        for depth, part in enumerate(parts[:4]):
            if part in self.tops:
                return "/".join(parts[depth:])
        return member

    def known_md5(self, name: str) -> str | None:
        """Return the checksum that the owner states for an archive of this name."""
        listed = {archive.name: archive.md5 for archive in self.archives} | dict(self.md5)
        return listed.get(name)


def matches(path: str, glob: str) -> bool:
    """Return whether a relative path matches a glob in which `*` stays within one folder; `|` separates alternatives."""
    parts = path.split("/")
    for alternative in glob.split("|"):
        wanted = alternative.split("/")
        if len(wanted) == len(parts) and all(map(fnmatchcase, parts, wanted)):
            return True
    return False


def source(name: str) -> Source | None:
    """Return the source of a domain or alias; None where there is nothing to fetch (`streets-*`, domains of the user's own)."""
    row = built_in(name)
    return next((s for s in SOURCES.values() if row is not None and (row.name == s.domain or row.name in s.also)), None)


def _each(glob: str) -> tuple[str, ...]:
    return tuple(glob.format(split) for split in ("train", "val"))


_GTA = "https://download.visinf.tu-darmstadt.de/data/from_games"
# GB of the ten archives of images and of labels
_GTA_SIZES = (
    (5.71, 0.0692),
    (5.73, 0.0718),
    (5.72, 0.0674),
    (5.55, 0.0688),
    (5.67, 0.0761),
    (5.31, 0.0697),
    (5.66, 0.0707),
    (5.95, 0.0702),
    (5.74, 0.0714),
    (5.31, 0.0685),
)
_BDD = "https://dl.cv.ethz.ch/bdd100k/data"
_ZURICH = "https://data.vision.ee.ethz.ch/csakarid/shared/GCMA_UIoU"
_RESEARCH = "for research, teaching and other non-commercial use only; it may not be passed on"

_TABLE = (
    Source(
        "gta5",
        "open",
        (
            *(
                Archive(f"{n:02d}_images.zip", sizes[0], ("images/*.png",), f"{_GTA}/data/{n:02d}_images.zip")
                for n, sizes in enumerate(_GTA_SIZES, 1)
            ),
            *(
                Archive(f"{n:02d}_labels.zip", sizes[1], ("labels/*.png",), f"{_GTA}/data/{n:02d}_labels.zip")
                for n, sizes in enumerate(_GTA_SIZES, 1)
            ),
            Archive(
                "read_mapping.zip", 0.001, ("read_mapping/split.mat|split.mat",), f"{_GTA}/code/read_mapping.zip", needed=False
            ),
        ),
        ("images", "labels", "read_mapping"),
        "for research and teaching only; the images remain under the terms of the game's publisher",
    ),
    Source(
        "synthia",
        "open",
        (
            Archive(
                "SYNTHIA_RAND_CITYSCAPES.rar",
                20,
                ("RGB/*.png", "GT/LABELS/*.png"),
                "http://synthia-dataset.cvc.uab.cat/SYNTHIA_RAND_CITYSCAPES.rar",
            ),
        ),
        ("RGB", "GT", "Depth"),
        "CC BY-NC-SA 3.0: non-commercial use, with attribution, passed on under the same terms",
    ),
    Source(
        "urbansyn",
        "hub",
        (),
        ("rgb", "ss"),
        "",
        repo="UrbanSyn/UrbanSyn",
        patterns=("rgb/*", "ss/*", "README.md", "LICENSE*"),
    ),
    Source(
        "cityscapes",
        "csDownload",
        (
            Archive("gtFine_trainvaltest.zip", 0.241, _each("gtFine/{}/*/*_gtFine_labelIds.png"), grows=5),
            Archive("leftImg8bit_trainvaltest.zip", 11, _each("leftImg8bit/{}/*/*_leftImg8bit.png")),
        ),
        ("leftImg8bit", "gtFine"),
        _RESEARCH,
    ),
    Source(
        "bdd100k",
        "open",
        (
            Archive("10k_images_train.zip", 0.746, ("images/10k/train/*.jpg",), f"{_BDD}/10k_images_train.zip"),
            Archive("10k_images_val.zip", 0.143, ("images/10k/val/*.jpg",), f"{_BDD}/10k_images_val.zip"),
            Archive(
                "bdd100k_sem_seg_labels_trainval.zip",
                0.419,
                ("labels/sem_seg/masks/train/*.png", "labels/sem_seg/masks/val/*.png"),
                f"{_BDD}/bdd100k_sem_seg_labels_trainval.zip",
                md5="9a2968dde3345eeb689cffb1e26f9c78",
                grows=2,
            ),
        ),
        ("images", "labels"),
        "for education, research and not-for-profit use; commercial use only for members of the consortium",
        md5=(("bdd100k_images_10k.zip", "08f26aecceda982568063d3d5873378e"),),
    ),
    Source(
        "mapillary",
        "browser",
        (
            Archive(
                "mapillary-vistas-dataset_public_v1.2.zip",
                20,
                (
                    "training/images/*.jpg",
                    "validation/images/*.jpg",
                    "training/labels/*.png|training/v1.2/labels/*.png",
                    "validation/labels/*.png|validation/v1.2/labels/*.png",
                ),
                other_names=("mapillary-vistas-dataset_public_v2.0.zip",),
            ),
        ),
        ("training", "validation", "testing", "config.json", "config_v1.2.json", "config_v2.0.json"),
        "CC BY-NC-SA 4.0 (research edition): non-commercial use, with attribution, passed on under the same terms",
        steps=(
            "open https://www.mapillary.com/dataset/vistas, choose the research edition and fill in the form",
            "accept the research use licence; the link comes by e-mail, which can take days",
            "download mapillary-vistas-dataset_public_v1.2.zip, or version 2.0: it holds the labels of v1.2 as well",
        ),
    ),
    Source(
        "mapillary-v2",
        "browser",
        (
            Archive(
                "mapillary-vistas-dataset_public_v2.0.zip",
                29,
                (
                    "training/images/*.jpg",
                    "validation/images/*.jpg",
                    "training/v2.0/labels/*.png",
                    "validation/v2.0/labels/*.png",
                ),
            ),
        ),
        ("training", "validation", "testing", "config_v1.2.json", "config_v2.0.json"),
        "CC BY-NC-SA 4.0 (research edition): non-commercial use, with attribution, passed on under the same terms",
        steps=(
            "open https://www.mapillary.com/dataset/vistas, choose the research edition and fill in the form",
            "accept the research use licence; the link comes by e-mail, which can take days",
            "download version 2.0; where it comes as volumes (.z01, .z02, ..., .zip), keep them in one folder",
        ),
    ),
    Source(
        "acdc",
        "browser",
        (
            Archive("rgb_anon_trainvaltest.zip", 15.6, _each("rgb_anon/*/{}/*/*_rgb_anon.png")),
            Archive("gt_trainval.zip", 0.127, _each("gt/*/{}/*/*_gt_labelTrainIds.png"), grows=2),
        ),
        ("rgb_anon", "gt"),
        _RESEARCH,
        steps=(
            "open https://acdc.vision.ee.ethz.ch, register and log in, then open https://acdc.vision.ee.ethz.ch/download",
            "accept the licence agreement",
            "download rgb_anon_trainvaltest.zip (15.6 GB) and gt_trainval.zip (127 MB)",
        ),
        also=("acdc-fog", "acdc-night", "acdc-rain", "acdc-snow"),
    ),
    Source(
        "dark-zurich",
        "open",
        (
            Archive(
                "Dark_Zurich_val_anon.zip",
                None,
                ("rgb_anon/val/night/*/*_rgb_anon.png", "gt/val/night/*/*_gt_labelTrainIds.png"),
                f"{_ZURICH}/Dark_Zurich_val_anon.zip",
            ),
        ),
        ("rgb_anon", "gt"),
        _RESEARCH,
    ),
    Source(
        "idd",
        "browser",
        (
            Archive(
                "idd-segmentation.tar.gz",
                18.5,
                (*_each("leftImg8bit/{}/*/*_leftImg8bit.*"), *_each("gtFine/{}/*/*_gtFine_polygons.json")),
                other_names=("idd-20k-I.tar.gz",),
            ),
        ),
        ("leftImg8bit", "gtFine"),
        "for research only, non-commercial",
        steps=(
            "open https://idd.insaan.iiit.ac.in, register and log in, then open https://idd.insaan.iiit.ac.in/dataset/download/",
            "accept the terms of use",
            'download "IDD Segmentation (IDD 20k Part I)" (18.5 GB): idd-segmentation.tar.gz',
        ),
    ),
    Source(
        "wilddash2",
        "browser",
        (Archive("wd_public_v2p0.zip", None, ("images/*.jpg|images/*.png", "panoptic/*.png", "panoptic.json")),),
        ("images", "panoptic", "panoptic.json", "instances", "semantic"),
        "for research, non-commercial; an institutional e-mail address is needed",
        steps=(
            "open https://wilddash.cc, register with an institutional e-mail address (approval takes days) and log in",
            "open https://wilddash.cc/download and accept the licence",
            "download wd_public_v2p0.zip; wd_both_02.zip is the benchmark without labels and is not needed",
        ),
    ),
)

SOURCES: dict[str, Source] = {row.domain: row for row in _TABLE}

"""The table of domains: what each is, where its files lie on disk, and how its labels are to be read.

Adding a domain is adding a row. `streets-*` are rendered by `dgbench.streets` and need no files; every other row
describes folders below a data root, as published and as other repositories arrange them, all read in place. Names, also of
users' domains, are looked up in `dgbench.data.catalog`.
"""

from __future__ import annotations

from functools import partial

from dgbench.data.domain import Domain, Layout, Split

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
    "streets-pretrain": "towns, cameras and vehicles that no other domain has, by day",
}
_PRETRAINING = ("streets-pretrain",)

WITH_SEVERITY = ("streets-adverse", "streets-night", "streets-rain", "streets-fog", "streets-snow")

_NON_COMMERCIAL = "research, non-commercial"
_SERVER = "its labels are withheld: predictions are scored by the benchmark's server"


def _ids_or_train_ids(
    name: str,
    images: str,
    renamed: tuple[tuple[str, str], ...],
    encoding: str,
    count: int | None = None,
    only: tuple[str, ...] = (),
) -> tuple[Layout, Layout]:
    """Return the published labels, and train ids that a converter wrote next to them."""
    mapped = (*renamed, (".png", "_labelTrainIds.png"))
    return (
        Layout(name, images, renamed, encoding, only=only, count=count),
        Layout(f"{name}, train ids", images, mapped, label_map="train-ids", only=only, count=count),
    )


def _gta(split: str = "", folders: tuple[str, ...] = (), count: int | None = None) -> tuple[Layout, ...]:
    """Return RobustNet's splits of GTA5, in a folder of their own or listed in text files; by default everything."""
    renamed = (("images/", "labels/"),)
    if not split:
        # RobustNet leaves 15 images of one colour out of its train part
        parts = _ids_or_train_ids("all of RobustNet's parts", "images/*/*.png", renamed, "ids", 24951)
        return (*_ids_or_train_ids("official", "images/*.png", renamed, "ids"), *parts)
    text = f"gtav_split_{split}.txt"
    return (
        *(layout for f in folders for layout in _ids_or_train_ids(f"images/{f}", f"images/{f}/*.png", renamed, "ids", count)),
        *_ids_or_train_ids(f"listed in {text}", "images/*.png", renamed, "ids", count, (text, f"split_data/{text}")),
    )


def _synthia(split: str = "") -> tuple[Layout, ...]:
    """Return RobustNet's splits of SYNTHIA, by default everything."""
    renamed = (("RGB/", "GT/LABELS/"),)
    if not split:
        parts = _ids_or_train_ids("all of RobustNet's parts", "RGB/*/*.png", renamed, "rgb16")
        return (*_ids_or_train_ids("official", "RGB/*.png", renamed, "rgb16"), *parts)
    text = f"synthia_split_{split}.txt"
    return (
        *_ids_or_train_ids(f"RGB/{split}", f"RGB/{split}/*.png", renamed, "rgb16"),
        *_ids_or_train_ids(f"listed in {text}", "RGB/*.png", renamed, "rgb16", None, (text, f"split_data/{text}")),
    )


_GTA_SIZES = "reported to have image and label of different sizes"
# bupt-ai-cz/IAST-ECCV2020#2
_GTA_BAD = {"15188": _GTA_SIZES, "17705": _GTA_SIZES} | {
    f"{i:05d}": "left out by IAST"
    for first, last in ((2154, 2158), (4634, 4637), (7115, 7119), (9683, 9688), (12050, 12054))
    for i in range(first, last + 1)
}


def _cityscapes(split: str) -> tuple[Layout, ...]:
    def layout(name: str, suffix: str, label_map: str | None = None) -> Layout:
        renamed = (("leftImg8bit/", "gtFine/"), ("_leftImg8bit.png", f"_gtFine_{suffix}.png"))
        return Layout(name, f"leftImg8bit/{split}/*/*_leftImg8bit.png", renamed, label_map=label_map)

    return layout("official", "labelIds"), layout("train ids", "labelTrainIds", "train-ids")


def _bdd(split: str) -> tuple[Layout, ...]:
    def layout(name: str, folder: str, suffix: str, encoding: str = "ids") -> Layout:
        renamed = (("images/10k/", f"labels/sem_seg/{folder}/"), (".jpg", suffix))
        return Layout(name, f"images/10k/{split}/*.jpg", renamed, encoding)

    return (
        layout("official", "masks", ".png"),
        layout("colour maps, train ids", "colormaps", "_labelTrainIds.png"),
        layout("colour maps", "colormaps", ".png", "colors"),
        Layout("seg, 2018", f"seg/images/{split}/*.jpg", (("/images/", "/labels/"), (".jpg", "_train_id.png"))),
        Layout("seg, 2018", f"images/{split}/*.jpg", (("images/", "labels/"), (".jpg", "_train_id.png"))),
        Layout("images/, labels/", f"images/{split}/*.jpg", (("images/", "labels/"), (".jpg", ".png"))),
    )


_BDD_BAD = {
    split: {
        **dict.fromkeys(unlabelled, "no label in the archives before June 2021 (bdd100k#103)"),
        **dict.fromkeys(imageless, "no image in the archives before June 2021 (bdd100k#103)"),
    }
    for split, unlabelled, imageless in (
        (
            "train",
            ("3d581db5-2564fb7e", "52e3fd10-c205dec2", "781756b0-61e0a182", "78ac84ba-07bd30c2"),
            ("fee92217-63b3f87f", "ff1e4d6d-f4d85cfd", "ff3d3536-04986e25", "ff3da814-c3463a43"),
        ),
        ("val", ("80a9e37d-e4548ac1", "9342e334-33d167eb"), ("ff55861e-a06b953c", "ff7b98c7-3cb964ac")),
    )
}


def _mapillary(split: str, folder: str) -> tuple[Layout, ...]:
    images, beside = f"{folder}/images/*.jpg", ("/images/", "/labels/")
    note = "train ids of an unknown conversion: it is not known which of the three maps it used"
    converted = partial(Layout, label_map="train-ids", revision="converted", note=note)
    apart = (f"{folder}/images/", f"cityscapes_trainIdLabel/{split}/label/")
    layouts = (
        Layout("official v1.2", images, (beside, (".jpg", ".png"))),
        Layout("official v2.0 archive", images, (("/images/", "/v1.2/labels/"), (".jpg", ".png"))),
        converted("train ids", images, (beside, (".jpg", "_labelTrainIds.png"))),
        converted("cityscapes_trainIdLabel", images, (apart, (".jpg", ".png"))),
        converted("cityscapes_trainIdLabel, suffixed", images, (apart, (".jpg", "_labelTrainIds.png"))),
    )
    if split == "train":
        return layouts
    note = f"images and labels were halved before (Rein's script): scores are those of the smaller labels; {note}"
    half = converted(
        "half", "half/val_img/*.jpg", (("val_img/", "val_label/"), (".jpg", ".png")), revision="half", halved=True, note=note
    )
    return (*layouts, half)


def _acdc(condition: str, train: int, val: int) -> Domain:
    suffix = f"-{condition}" if condition != "*" else ""

    def layouts(split: str) -> tuple[Layout, ...]:
        images = f"rgb_anon/{condition}/{split}/*/*_rgb_anon.png"
        labels = ("rgb_anon/", "gt/")
        found = [
            Layout("official", images, (labels, ("_rgb_anon.png", "_gt_labelTrainIds.png"))),
            Layout("label ids", images, (labels, ("_rgb_anon.png", "_gt_labelIds.png")), label_map="cityscapes-ids"),
        ]
        if condition == "*":
            flat = (labels, ("_rgb_anon.png", "_gt_labelTrainIds.png"))
            found.append(Layout("flattened", f"rgb_anon/{split}/*_rgb_anon.png", flat, note="as HRDA's recipe arranges it"))
        return tuple(found)

    return Domain(
        name=f"acdc{suffix}",
        title=f"ACDC{suffix.replace('-', ', ')}",
        role="both",
        size="1080x1920",
        label_map="train-ids",
        splits={"train": Split(train, layouts("train")), "val": Split(val, layouts("val"))},
        withheld={"test": _SERVER},
        licence=_NON_COMMERCIAL,
        access="account",
        homepage="https://acdc.vision.ee.ethz.ch",
        folders=("acdc", "ACDC"),
    )


def _idd(split: str) -> tuple[Layout, ...]:
    def layouts(image: str, tail: str) -> tuple[Layout, ...]:
        def labelled(name: str, label: str, encoding: str = "ids", label_map: str | None = None, note: str = "") -> Layout:
            renamed = (("leftImg8bit/", "gtFine/"), (f"_leftImg8bit.{image}", f"_gtFine_{label}"))
            images, revision = f"leftImg8bit/{split}/*/*_leftImg8bit.{image}", name if note else "official"
            return Layout(name + tail, images, renamed, encoding, label_map, revision=revision, note=note)

        made = "made by AutoNUE's script, with terrain for non-drivable fallback"
        merged = "animals count as persons, groups of poles as poles; terrain and train share values with others and are ignored"
        return (
            labelled("official", "polygons.json", "polygons"),
            labelled("ids", "labelids.png"),
            labelled("csTrainIds", "labelcsTrainIds.png", label_map="train-ids", note=made),
            labelled("level3Ids", "labellevel3Ids.png", label_map="idd-level3", note=merged),
        )

    # part I has PNG images, part II JPEG
    return layouts("png", "") + layouts("jpg", ", JPEG")


_TABLE: tuple[Domain, ...] = (
    *(
        Domain(
            name=name,
            title=title,
            role="pretrain" if name in _PRETRAINING else "both",
            splits={s: Split(n) for s, n in STREETS_SPLITS.items()},
            size="any",
            label_map="train-ids",
            licence="Apache-2.0",
            access="procedural",
        )
        for name, title in _STREETS.items()
    ),
    Domain(
        name="gta5",
        title="GTA5 (Playing for Data)",
        role="source",
        size="1052x1914",
        label_map="gta5-ids",
        splits={
            split: Split(count, layouts, _GTA_BAD)
            for split, count, layouts in (
                ("train", 24966, _gta()),
                ("official-train", 12403, _gta("train", ("train",), 12388)),
                ("official-val", 6382, _gta("val", ("valid", "val"))),
                ("official-test", 6181, _gta("test", ("test",))),
            )
        },
        licence=_NON_COMMERCIAL,
        access="open",
        homepage="https://download.visinf.tu-darmstadt.de/data/from_games/",
        folders=("gta5", "gta", "GTA5", "GTA", "GTAV", "gtav"),
        aliases=("gta",),
    ),
    Domain(
        name="synthia",
        title="SYNTHIA-RAND-CITYSCAPES, 16 of the 19 classes",
        role="source",
        size="760x1280",
        splits={
            "train": Split(9400, _synthia()),
            "robustnet-train": Split(6580, _synthia("train")),
            "robustnet-val": Split(2820, _synthia("val")),
        },
        label_map="synthia-ids",
        licence="CC BY-NC-SA 3.0",
        access="open",
        homepage="https://synthia-dataset.net",
        folders=("synthia", "SYNTHIA", "RAND_CITYSCAPES"),
    ),
    Domain(
        name="urbansyn",
        title="UrbanSyn",
        role="source",
        size="1024x2048",
        label_map="urbansyn-ids",
        splits={"train": Split(7539, (Layout("official", "rgb/rgb_*.png", (("rgb/rgb_", "ss/ss_"),)),))},
        licence="CC BY-SA 4.0",
        access="open",
        homepage="https://huggingface.co/datasets/UrbanSyn/UrbanSyn",
        folders=("urbansyn", "UrbanSyn"),
    ),
    Domain(
        name="cityscapes",
        title="Cityscapes",
        role="both",
        size="1024x2048",
        label_map="cityscapes-ids",
        splits={s: Split(n, _cityscapes(s)) for s, n in (("train", 2975), ("val", 500))},
        withheld={"test": "its labels are dummies: predictions are scored by the benchmark's server"},
        licence=_NON_COMMERCIAL,
        access="account",
        homepage="https://www.cityscapes-dataset.com/downloads/",
        folders=("cityscapes", "Cityscapes"),
        aliases=("city",),
    ),
    Domain(
        name="bdd100k",
        title="BDD100K (10k set)",
        role="both",
        size="720x1280",
        label_map="train-ids",
        splits={s: Split(n, _bdd(s), _BDD_BAD[s]) for s, n in (("train", 7000), ("val", 1000))},
        withheld={"test": _SERVER},
        licence=_NON_COMMERCIAL,
        access="open",
        homepage="https://dl.cv.ethz.ch/bdd100k/data/",
        folders=("bdd100k", "bdd", "bdd-100k", "bdd100k_seg"),
        aliases=("bdd",),
    ),
    Domain(
        name="mapillary",
        title="Mapillary Vistas v1.2",
        role="both",
        size="varies",
        label_map="mapillary-robustnet",
        splits={s: Split(n, _mapillary(s, f)) for s, f, n in (("train", "training", 18000), ("val", "validation", 2000))},
        label_maps=("mapillary-robustnet", "mapillary-openseg", "mapillary-wd2-policy"),
        withheld={"test": _SERVER},
        licence="CC BY-NC-SA 4.0",
        access="request",
        homepage="https://www.mapillary.com/dataset/vistas",
        folders=("mapillary", "mapillary_vistas", "Mapillary"),
        aliases=("vistas",),
    ),
    Domain(
        name="mapillary-v2",
        title="Mapillary Vistas v2.0, 124 classes",
        role="target",
        size="varies",
        label_map="",
        splits={
            s: Split(n, (Layout("official v2.0", f"{f}/images/*.jpg", (("/images/", "/v2.0/labels/"), (".jpg", ".png"))),))
            for s, f, n in (("train", "training", 18000), ("val", "validation", 2000))
        },
        licence="CC BY-NC-SA 4.0",
        access="request",
        homepage="https://www.mapillary.com/dataset/vistas",
        folders=("mapillary-v2", "mapillary", "mapillary_vistas", "Mapillary"),
        legend="config_v2.0.json",
        withheld={"test": _SERVER},
    ),
    _acdc("*", 1600, 406),
    _acdc("fog", 400, 100),
    _acdc("night", 400, 106),
    _acdc("rain", 400, 100),
    _acdc("snow", 400, 100),
    Domain(
        name="dark-zurich",
        title="Dark Zurich",
        role="target",
        size="1080x1920",
        label_map="train-ids",
        splits={
            "val": Split(
                50,
                (
                    Layout(
                        "official",
                        "rgb_anon/val/night/*/*_rgb_anon.png",
                        (("rgb_anon/", "gt/"), ("_rgb_anon.png", "_gt_labelTrainIds.png")),
                    ),
                ),
            )
        },
        withheld={"train": "it has no labels", "test": _SERVER},
        licence=_NON_COMMERCIAL,
        access="open",
        homepage="https://www.trace.ethz.ch/publications/2019/GCMA_UIoU/",
        folders=("dark-zurich", "dark_zurich", "Dark_Zurich", "DarkZurich", "Dark_Zurich_val_anon"),
        aliases=("dark_zurich",),
    ),
    Domain(
        name="idd",
        title="India Driving Dataset, part I",
        role="both",
        size="1080x1920",
        label_map="idd-autonue",
        splits={s: Split(n, _idd(s)) for s, n in (("train", 6993), ("val", 981))},
        withheld={"test": _SERVER},
        label_maps=("idd-autonue", "idd-no-terrain"),
        licence=_NON_COMMERCIAL,
        access="account",
        homepage="https://idd.insaan.iiit.ac.in",
        folders=("idd", "IDD", "IDD_Segmentation", "idd20k"),
    ),
    Domain(
        name="wilddash2",
        title="WildDash 2, public part",
        role="target",
        size="1080x1920",
        label_map="wilddash2-policy",
        splits={
            "val": Split(
                4256,
                (
                    Layout("official", "images/*.jpg", (("images/", "panoptic/"), (".jpg", ".png")), "panoptic"),
                    Layout("label ids", "images/*.jpg", (("images/", "labels/"), (".jpg", ".png"))),
                    Layout("label ids by pano2sem", "images/*.jpg", (("images/", "semantic/"), (".jpg", "_labelIds.png"))),
                ),
            )
        },
        label_maps=("wilddash2-policy", "wilddash2-on-rails"),
        withheld={"test": _SERVER},
        licence=_NON_COMMERCIAL,
        access="account",
        homepage="https://wilddash.cc",
        folders=("wilddash2", "wilddash", "WildDash2", "wd_public_02", "wd_public_v2p0"),
        aliases=("wilddash",),
    ),
)

DOMAINS: dict[str, Domain] = {d.name: d for d in _TABLE}


def built_in(name: str) -> Domain | None:
    """Return the row of the table with this name or alias, in lower or upper case."""
    name = name.lower()
    return DOMAINS.get(name) or next((d for d in DOMAINS.values() if name in d.aliases), None)

"""Small data sets in the owners' own archives: one or two images a split, packed as the official files are."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (16, 8)


def picture(seed: int, suffix: str) -> bytes:
    pixels = np.random.default_rng(seed).integers(256, size=(SIZE[1], SIZE[0], 3), dtype=np.uint8)
    return _encoded(Image.fromarray(pixels), "JPEG" if suffix == ".jpg" else "PNG")


def labels(value: int, mode: str = "L") -> bytes:
    image = Image.new(mode, SIZE, value)
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
    return _encoded(image, "PNG")


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def zipped(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            # a time of its own would make other bytes every other second
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def tarred(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def gta5() -> dict[str, bytes]:
    found = {"read_mapping.zip": zipped({"read_mapping/split.mat": b"MATLAB 5.0", "read_mapping/read_mapping.m": b"%"})}
    for n in range(1, 11):
        found[f"{n:02d}_images.zip"] = zipped({f"images/{n:05d}.png": picture(n, ".png")})
        found[f"{n:02d}_labels.zip"] = zipped({f"labels/{n:05d}.png": labels(7, "P")})
    return found


def bdd100k() -> dict[str, bytes]:
    masks = {f"bdd100k/labels/sem_seg/masks/{split}/{split}.png": labels(0) for split in ("train", "val")}
    colours = {name.replace("masks", "colormaps"): labels(0) for name in masks}
    found = {f"10k_images_{s}.zip": zipped({f"bdd100k/images/10k/{s}/{s}.jpg": picture(1, ".jpg")}) for s in ("train", "val")}
    return found | {"bdd100k_sem_seg_labels_trainval.zip": zipped(masks | colours)}


def cityscapes() -> dict[str, bytes]:
    images, ids = {"README": b"images", "license.txt": b"terms"}, {"README": b"of the labels", "license.txt": b"terms"}
    for split, city in (("train", "aachen"), ("val", "lindau"), ("test", "berlin")):
        stem = f"{split}/{city}/{city}_000000_000019"
        images[f"leftImg8bit/{stem}_leftImg8bit.png"] = picture(2, ".png")
        ids[f"gtFine/{stem}_gtFine_labelIds.png"] = labels(7)
        ids[f"gtFine/{stem}_gtFine_polygons.json"] = b"{}"
    return {"leftImg8bit_trainvaltest.zip": zipped(images), "gtFine_trainvaltest.zip": zipped(ids)}


def acdc() -> dict[str, bytes]:
    images, ids = {}, {}
    for condition in ("fog", "night", "rain", "snow"):
        for split in ("train", "train_ref", "val", "val_ref", "test"):
            stem = f"{condition}/{split}/GP01/GP01_frame_0001"
            images[f"rgb_anon/{stem}_rgb_anon.png"] = picture(3, ".png")
            if split in ("train", "val"):
                ids[f"gt/{stem}_gt_labelTrainIds.png"] = labels(0)
    return {"rgb_anon_trainvaltest.zip": zipped(images), "gt_trainval.zip": zipped(ids)}


def mapillary(version: str = "v1.2") -> dict[str, bytes]:
    files = {"README": b"Mapillary", f"config_{version}.json": b"{}"}
    for folder in ("training", "validation"):
        files[f"{folder}/images/a.jpg"] = picture(4, ".jpg")
        for labelled in ("",) if version == "v1.2" else ("v1.2/", "v2.0/"):
            files[f"{folder}/{labelled}labels/a.png"] = labels(13, "P")
    return {f"mapillary-vistas-dataset_public_{version}.zip": zipped(files)}


def idd() -> dict[str, bytes]:
    polygons = {
        "imgWidth": SIZE[0],
        "imgHeight": SIZE[1],
        "objects": [{"label": "road", "polygon": [[0, 0], [16, 0], [16, 8], [0, 8]]}],
    }
    files = {}
    for split in ("train", "val"):
        files[f"IDD_Segmentation/leftImg8bit/{split}/0/f_leftImg8bit.png"] = picture(5, ".png")
        files[f"IDD_Segmentation/gtFine/{split}/0/f_gtFine_polygons.json"] = json.dumps(polygons).encode()
    return {"idd-segmentation.tar.gz": tarred(files)}


def wilddash2() -> dict[str, bytes]:
    told = {"annotations": [{"file_name": "a.png", "image_id": "a", "segments_info": [{"id": 0, "category_id": 7}]}]}
    files = {
        "images/a.jpg": picture(6, ".jpg"),
        "panoptic/a.png": _encoded(Image.new("RGB", SIZE, 0), "PNG"),
        "panoptic.json": json.dumps(told).encode(),
        "license.txt": b"terms",
    }
    return {"wd_public_v2p0.zip": zipped(files)}


def dark_zurich() -> dict[str, bytes]:
    stem = "val/night/GOPR0356/GOPR0356_frame_000321"
    files = {f"rgb_anon/{stem}_rgb_anon.png": picture(7, ".png"), f"gt/{stem}_gt_labelTrainIds.png": labels(0)}
    return {"Dark_Zurich_val_anon.zip": zipped(files)}


OFFICIAL = {
    "gta5": gta5,
    "bdd100k": bdd100k,
    "cityscapes": cityscapes,
    "acdc": acdc,
    "mapillary": mapillary,
    "mapillary-v2": lambda: mapillary("v2.0"),
    "idd": idd,
    "wilddash2": wilddash2,
    "dark-zurich": dark_zurich,
}


def written(archives: Mapping[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in archives.items():
        (folder / name).write_bytes(content)
    return folder

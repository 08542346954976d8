"""Archives for the servers that score the test splits of Cityscapes and ACDC.

Cityscapes: grey PNGs of label ids in the images' size, anywhere in the archive, one for each image, whose names begin with city,
sequence and frame: `<city>_<sequence>_<frame>*.png` (cityscapesScripts, evalPixelLevelSemanticLabeling.py, `getPrediction`; its
authors on label ids: mcordts/cityscapesScripts#117).

ACDC: grey PNGs of train ids in the images' size, 1920x1080, called as the images are (the rules of its page
acdc.vision.ee.ethz.ch/submit as the README of DTBS repeats them; names, and one folder `labelTrainIds`, as HRDA and Refign write
what they send). The server scores all conditions, or one that is chosen there (tpy001/VFMSeg#2): `acdc-fog` makes the archive of
fog alone.
"""

from __future__ import annotations

import io
import logging
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dgbench import atomic
from dgbench.data.domain import UNFINISHED, Domain
from dgbench.data.domains import DOMAINS
from dgbench.data.places import data_root
from dgbench.errors import DataError
from dgbench.progress import Progress

if TYPE_CHECKING:
    from dgbench.engine.tested import Tested

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Server:
    """What a benchmark's server takes."""

    domain: str
    count: int  # images of its test split
    globs: tuple[str, ...]  # where they lie below the domain's folder: as published, and as people rearrange them
    image: str  # regular expression of an image's name
    entry: str  # what the image's entry of the archive is called, by the groups of `image`
    label_ids: bool  # Cityscapes' label ids, else train ids


def _acdc(condition: str, count: int) -> Server:
    every = condition == "*"
    globs = (f"rgb_anon/{condition}/test/*/*_rgb_anon.png", *(("rgb_anon/test/*_rgb_anon.png",) if every else ()))
    domain = "acdc" if every else f"acdc-{condition}"
    return Server(domain, count, globs, r"(.+_rgb_anon\.png)", r"labelTrainIds/\1", label_ids=False)


SERVERS: Mapping[str, Server] = {
    server.domain: server
    for server in (
        Server(
            "cityscapes",
            1525,
            ("leftImg8bit/test/*/*_leftImg8bit.png",),
            r"(.+_\d{6}_\d{6})_leftImg8bit\.png",
            r"\1_pred_labelIds.png",
            label_ids=True,
        ),
        _acdc("*", 2000),
        *(_acdc(condition, 500) for condition in ("fog", "night", "rain", "snow")),
    )
}


@dataclass(frozen=True, slots=True)
class Submission:
    """An archive that was written."""

    server: str
    path: Path
    n_images: int
    n_expected: int  # of the whole test split
    encoding: str  # "label ids" or "train ids"
    protocol: str
    model: str


def images_of(name: str, root: Path | None = None, folder: Path | None = None, *, partial: bool = False) -> list[Path]:
    """The images of a server's test split, by name.

    Args:
        name: of `SERVERS`.
        folder: where they lie, at any depth; default: the domain's folder below the data root.
        partial: more or fewer than the whole split are all right.

    Raises: DataError if there are none, if two have one name, or if their number is not the split's.
    """
    server = SERVERS[name]
    row, where = DOMAINS[server.domain], folder
    if folder is not None:
        found = [path for path in folder.rglob("*.png") if re.fullmatch(server.image, path.name) and path.name[0] != "."]
    else:
        found, where = _below(row, server, root)
    if not found:
        first = server.globs[0]
        raise DataError(
            f"no test image of {row.title} in {where or data_root(root)}",
            f"unpack them so that `{data_root(root) / row.folders[0] / first}` finds them, or name their folder: --images FOLDER",
        )
    if twice := next((path for path, n in Counter(path.name for path in found).items() if n > 1), None):
        raise DataError(f"two images below {where} are called {twice}", "--images takes the folder of the test split alone")
    if len(found) != server.count and not partial:
        advice = "unpack the rest of the split" if len(found) < server.count else "--images takes the folder of this split alone"
        raise DataError(
            f"{len(found)} of the {server.count} test images of {row.title} are in {where}"
            if len(found) < server.count
            else f"{len(found)} test images of {row.title} are in {where}, the split has {server.count}",
            f"{advice}, or try the archive with --partial: the server takes whole ones only",
        )
    return sorted(found, key=lambda path: path.name)


def _below(row: Domain, server: Server, root: Path | None) -> tuple[list[Path], Path | None]:
    """The most images that a folder has in one layout, and that folder."""
    best: list[Path] = []
    where = row.root(data_root(root))
    for folder in row.roots(data_root(root)):
        if (folder / UNFINISHED).exists():
            raise DataError(
                f"files are being added to {folder}, or that was interrupted", f"finish it: dgbench download {row.name}"
            )
        for glob in server.globs:
            found = [path for path in folder.glob(glob) if path.name[0] != "." and re.fullmatch(server.image, path.name)]
            if len(found) > len(best):
                best, where = found, folder
    return best, where


def submit(name: str, images: Sequence[Path], model: Tested, out: Path, *, progress: Progress) -> Submission:
    """Segment the images as `dgbench eval` does, and write the archive: the same images and model make the same bytes.

    Raises: DataError for an image that cannot be read: nothing is written then.
    """
    from PIL import Image

    from dgbench.data.dataset import read_image
    from dgbench.data.sheet import label_ids

    server, row = SERVERS[name], DOMAINS[SERVERS[name].domain]
    content = io.BytesIO()
    sizes: Counter[str] = Counter()
    progress.start(f"segmenting {name} test", len(images), "images")
    try:
        # PNGs are compressed already
        with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
            for path in images:
                image = read_image(path)
                height, width = image.shape[:2]
                sizes[f"{height}x{width}"] += 1
                label = model.segment(image, row, (height, width))
                png = io.BytesIO()
                Image.fromarray(label_ids(label) if server.label_ids else label).save(png, "PNG")
                # an entry of no date: 1980-01-01
                entry = zipfile.ZipInfo(re.sub(server.image, server.entry, path.name))
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, png.getvalue())
                progress.advance()
    finally:
        progress.stop()
    atomic.write(out, content.getvalue())
    if odd := {size: n for size, n in sizes.items() if size != row.size}:
        told = ", ".join(f"{n} of {size}" for size, n in odd.items())
        _log.warning(f"images of {row.title} are {row.size} (H x W), here are {told}: the server wants the published size")
    return Submission(
        name,
        out,
        len(images),
        server.count,
        "label ids" if server.label_ids else "train ids",
        model.rules.name,
        model.title,
    )

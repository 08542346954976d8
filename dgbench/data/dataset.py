"""The dataset class for all domains: an index of samples, each decoded to an RGB image and a map of train ids.

Images of rendered domains are cached (`dgbench.data.rendered`). Files of other domains are read in place, with labels
mapped and checked when they are read.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dgbench.data import files, pixels
from dgbench.data.decode import read_label
from dgbench.data.domain import Domain
from dgbench.data.domains import RENDER_SIZE
from dgbench.data.images import Part, UnsuitableError, decode, opened, orientation, upright
from dgbench.data.index import Found, stem
from dgbench.data.index import index as index_files
from dgbench.data.rendered import Rendered
from dgbench.errors import DataError
from dgbench.progress import Progress


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image."""

    name: str
    image: NDArray[np.uint8]  # (H, W, 3) RGB
    label: NDArray[np.uint8]  # (H, W) train ids, 255 = ignore


class SegDataset:
    """The samples of one split of a domain.

    Args:
        domain: the row of a domain, as `dgbench.data.catalog.lookup` finds it.
        split: "train" or "val", or another that the domain has.
        root: data root for folder domains (default: DGBENCH_DATA or `./data`).
        size: (H, W). Rendered domains are rendered at it; images of folder domains are resized to it (bilinear with
            antialiasing) and their labels are left as they are. None keeps files as they are; rendered domains then
            are 256x512.
        limit: use the first `limit` samples only.
        label_map: read labels by this map instead of the domain's own (Mapillary has three in use). If only converted labels
            (train ids) are on the disk, those are read, and `label_map` says so.

    `available` is the number of images in the complete split, `extra` how many more are on the disk, `found` the files
    (None if rendered), `label_map` the map that they are read by, `policy` the name under which a score of these labels is
    recorded.

    Raises: DataError when the folder, a file or a label is missing or malformed. A few labels are read at once, so that
        files of a wrong encoding are noticed before any time is spent.
    """

    def __init__(
        self,
        domain: Domain,
        split: str,
        *,
        root: Path | None = None,
        size: tuple[int, int] | None = None,
        limit: int | None = None,
        label_map: str | None = None,
    ) -> None:
        self.domain = domain
        self.domain.require_split(split)
        self.split = split
        self.size = size if size or not self.domain.procedural else RENDER_SIZE
        self.label_map = self.domain.read_by(label_map)
        self.policy = self.label_map.name
        self.found: Found | None = None
        self.extra = 0
        if self.domain.procedural:
            self.available = self.domain.splits[split].count or 0
            if limit is not None and limit > self.available:
                raise DataError(
                    f"`{self.domain.name}` has {self.available} {split} images, {limit} were asked for",
                    "ask for fewer, or leave the limit out",
                )
            self._count = limit or self.available
            return
        listed = index_files(self.domain, split, root)
        self.found, self._rows = listed.found, listed.rows
        layout = self.found.layout
        if layout.label_map is not None:
            self.label_map = self.domain.read_by(layout.label_map)
            # equal labels have the same name, whether they are mapped here or were before
            self.policy = self.policy if layout.revision == "official" else layout.label_map
        self.available, self.extra = self.found.expected, self.found.extra
        self._count = min(len(self._rows), limit or len(self._rows))
        _tell(self.found)
        for i in sorted({0, self._count // 2, self._count - 1}):
            self.label(i)

    def __len__(self) -> int:
        return self._count

    @property
    def parts(self) -> tuple[SegDataset, ...]:
        """The datasets that it is made of: itself; see `dgbench.data.union`."""
        return (self,)

    def locate(self, index: int) -> tuple[SegDataset, int]:
        """Return the dataset that holds an image, and the image's place in it."""
        return self, index

    @property
    def exported(self) -> bool:
        """Whether the files of a published set are read, but hold scenes that `dgbench data export` wrote."""
        return self.found is not None and self.found.rendered

    @property
    def revision(self) -> str:
        """Identifier of pixels and labels; part of the protocol hash."""
        return self.domain.revision() if self.found is None else self.found.revision()

    def name(self, index: int) -> str:
        """Return the sample's stable name: its path below the domain's folder, or its index."""
        return f"{index:06d}" if self.found is None else str(self._rows[index]["id"])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._count:
            raise IndexError(f"index {index} of {self._count}")
        if self.found is None:
            return Sample(self.name(index), *self._rendered().pair(index))
        row = self._rows[index]
        image = image_of(row)
        label = self._read_label(row)
        if image.shape[:2] != label.shape:
            raise DataError(
                f"{row['image']['path'] or row['id']} is {image.shape[1]}x{image.shape[0]} but its label {label_path(row)} is "
                f"{label.shape[1]}x{label.shape[0]}",
                "the pair is damaged or mismatched: download it again, or move both files out of the folder; "
                f"`dgbench data verify {self.domain.name} --split {self.split}` lists all such pairs",
            )
        if self.size is not None:
            image = _resized(image, self.size)
        return Sample(row["id"], image, label)

    def image(self, index: int, part: Part | None = None) -> NDArray[np.uint8]:
        """Return only the image, (H, W, 3) RGB at the dataset's size, or a part of it: cheaper than the whole sample."""
        if self.found is None:
            image = self._rendered().image(index)
        elif self.size is None:
            return image_of(self._rows[index], part)
        else:
            image = _resized(image_of(self._rows[index]), self.size)
        return image if part is None else part.of(image)

    def image_size(self, index: int) -> tuple[int, int]:
        """Return (H, W) of `image`, from the file's header."""
        return self.size or size_of(self._rows[index])

    @property
    def folder(self) -> Path | None:
        """The folder in which the domain's files lie; None where they are rendered."""
        return None if self.found is None else self.found.folder

    def fingerprint(self) -> str:
        """Return a 16-digit hash that changes with the labels: of names, sizes and times of the files, and the label map."""
        digest = hashlib.sha256()

        def enter(*what: object) -> None:
            digest.update(f"{what}\n".encode())

        enter(self.domain.name, self.revision, self.split, len(self), self.size if self.found is None else None)
        enter(self.label_map.name, sorted(self.label_map.classes.items()), pixels.VERSION)
        for path in [] if self.found is None else self.found.label_files(len(self)):
            with suppress(FileNotFoundError):  # a broken link: reported when it is read
                state = path.stat()
                enter(path.name, state.st_size, state.st_mtime_ns)
        return digest.hexdigest()[:16]

    def label(self, index: int) -> NDArray[np.uint8]:
        """Return only the label, (H, W) train ids as the file has them: cheaper than the whole sample."""
        if self.found is None:
            return self._rendered().label(index)
        return self._read_label(self._rows[index])

    def _read_label(self, row: dict[str, Any]) -> NDArray[np.uint8]:
        assert self.found is not None
        return read_label(label_path(row), self.label_map, self.found.layout.encoding, row["label"]["bytes"])

    def _rendered(self) -> Rendered:
        assert self.size is not None
        return Rendered(self.domain.name, self.split, self.size, self.domain.revision())

    def prepare(self, progress: Progress, workers: int | None = None) -> None:
        """Render images that are not in the cache, in parallel. Does nothing for other domains."""
        if self.domain.procedural:
            self._rendered().prepare(self._count, progress, workers)


def _tell(found: Found) -> None:
    """Warn once about the files that are read, where they differ from the published ones."""
    what = f"{found.domain.name} {found.split}"
    known = found.domain.splits[found.split].known_bad
    for kind, paths in (("images without a label", found.unlabelled), ("labels without an image", found.imageless)):
        if strange := [path for path in paths if stem(path) not in known]:
            _warn(f"{what}: {len(strange)} {kind} in {found.folder}, the first is {strange[0]}; they are left out")
    if found.left_out:
        _warn(f"{what}: {len(found.left_out)} pairs that are known to be bad are left out: {', '.join(found.left_out)}")
    if len(found) < found.expected:
        _warn(f"{what}: {len(found)} of its {found.expected} images are on this disk, scores will be marked as partial")
    if found.extra and not found.rendered:
        _warn(
            f"{what}: {len(found)} images are in {found.folder}, {found.extra} more than the {found.expected} that are "
            "published: which ones are foreign is not known, scores will be marked as partial"
        )
    if found.rendered:
        _warn(f"{what}: {found.folder} holds rendered scenes (dgbench data export), not the published set; records say so")
    if found.layout.note:
        _warn(f"{what}: read from the layout `{found.layout.name}`: {found.layout.note}")


@cache
def _warn(text: str) -> None:
    logging.getLogger(__name__).warning(text)


def label_path(row: dict[str, Any]) -> Path:
    """Return the file of a row's label; for rows that hold bytes, a name for messages, which is not opened."""
    return Path(row["label"]["path"] or row["id"])


def image_of(row: dict[str, Any], part: Part | None = None) -> NDArray[np.uint8]:
    """Return (H, W, 3) RGB of a row's image or of a part of it, from its file or its bytes.

    Raises: DataError naming the file or the row when it cannot be read as an image, or when its EXIF turns it and its label
        is not turned so.
    """
    data = image_bytes(row)
    image = decoded(row, data, part)
    if problem := turned_apart(row, data):
        raise DataError(
            f"{_image_name(row)} {problem}",
            "turn the pixels and remove the flag where labels were drawn on what a viewer shows (ImageMagick: mogrify "
            "-auto-orient), else remove the flag alone (exiftool -Orientation=)",
        )
    return image


def decoded(row: dict[str, Any], data: bytes, part: Part | None = None) -> NDArray[np.uint8]:
    """Return (H, W, 3) RGB of a row's image or of a part of it, from the result of `image_bytes`.

    Raises: DataError naming the file or the row when it cannot be read as an image.
    """
    with _explained(_image_name(row)):
        return decode(data, part)


def turned_apart(row: dict[str, Any], data: bytes) -> str:
    """Return what is wrong with a pair whose image has an EXIF rotation and whose label has another; "" if nothing is."""
    turned = orientation(data)
    if turned == 1:
        return ""
    of_label = row["label"]["bytes"]
    if orientation(files.content(label_path(row), "label") if of_label is None else of_label) == turned:
        return ""
    return f"is to be turned when shown (EXIF orientation {turned}), but its label {label_path(row).name} is not"


def image_bytes(row: dict[str, Any]) -> bytes:
    """Return the content of a row's image file.

    Raises: DataError naming the file when it cannot be read.
    """
    path, data = row["image"]["path"], row["image"]["bytes"]
    return bytes(data) if data is not None else files.content(path, "image")


def _image_name(row: dict[str, Any]) -> str:
    return str(row["id"] if row["image"]["bytes"] is not None else row["image"]["path"])


def size_of(row: dict[str, Any]) -> tuple[int, int]:
    """Return (H, W) of a row's image, by its header.

    Raises: DataError naming the file or the row when it cannot be read as an image.
    """
    path, data = row["image"]["path"], row["image"]["bytes"]
    source = files.opened(path, "image") if data is None else io.BytesIO(data)
    with source, _explained(path or row["id"]), opened(source) as file:
        return file.height, file.width


def _resized(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def read_photo(path: Path) -> NDArray[np.uint8]:
    """Return (H, W, 3) RGB of an image file as a viewer shows it, with its EXIF orientation applied.

    Raises: DataError naming the file when it cannot be read as an image.
    """
    with _explained(path):
        return upright(files.content(path, "image"))


def read_image(path: Path, size: tuple[int, int] | None = None, *, part: Part | None = None) -> NDArray[np.uint8]:
    """Return (H, W, 3) RGB of an image file, resized to `size` = (H, W) when given (bilinear, antialiased); or a part of that.

    Raises: DataError naming the file when it cannot be read as an image.
    """
    with _explained(path):
        image = decode(files.content(path, "image"), part if size is None else None)
    if size is None:
        return image
    return _resized(image, size) if part is None else part.of(_resized(image, size))


@contextmanager
def _explained(path: Path | str) -> Iterator[None]:
    """Turn errors of an image file into a DataError that names it."""
    try:
        yield
    except UnsuitableError as error:
        raise DataError(f"{path} {error}", "save it with 8 bits a channel, at the brightness that it is to have") from None
    except files.DAMAGED as error:
        said, hint = files.damage(error)
        raise DataError(
            f"{path} cannot be read as an image: {said}",
            hint or "the file is damaged, incomplete or not an image: download it again, or move it out of the folder",
        ) from None

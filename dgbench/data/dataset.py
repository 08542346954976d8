"""One class that reads every domain: an index of samples, each decoded to an RGB image and a map of train ids.

Rendered domains are kept as PNG files in the cache folder, written whole or not at all, so that a second run reads
what the first rendered. Folder domains are read in place, with labels mapped on the fly and checked.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dgbench.data.domains import RENDER_SIZE, Domain, cache_root, data_root, lookup
from dgbench.data.images import Part, decode
from dgbench.data.labels import LABEL_MAPS, LabelMap
from dgbench.errors import DataError
from dgbench.progress import Progress
from dgbench.resources import usable_cores

_FEW = 16  # images that are rendered sooner than a pool of processes starts


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image."""

    name: str
    image: NDArray[np.uint8]  # (H, W, 3) RGB
    label: NDArray[np.uint8]  # (H, W) train ids, 255 = ignore


class SegDataset:
    """The samples of one split of a domain.

    Args:
        domain: a name of `dgbench.data.domains`, with or without a severity.
        split: "train" or "val".
        root: data root for folder domains (default: DGBENCH_DATA or `./data`).
        size: (H, W). Rendered domains are rendered at it; images of folder domains are resized to it (bilinear with
            antialiasing) and their labels are left as they are. None keeps files as they are; rendered domains then
            are 256x512.
        limit: use the first `limit` samples only.
        label_map: read labels by this map instead of the domain's own (Mapillary has three in use).

    Raises: DataError when the folder, a file or a label is missing or malformed.
    """

    def __init__(self, domain: str, split: str, *, root: Path | None = None, size: tuple[int, int] | None = None,
                 limit: int | None = None, label_map: str | None = None) -> None:  # fmt: skip
        self.domain = lookup(domain)
        self.label_map = LABEL_MAPS[label_map or self.domain.label_map]
        self.domain.require_split(split)
        self.split = split
        self.size = size if size or not self.domain.procedural else RENDER_SIZE
        self.available = self.domain.splits[split]
        self._files: list[tuple[str, Path, Path]] = []
        self._folder: Path | None = None
        if self.domain.procedural:
            if limit is not None and limit > self.available:
                raise DataError(
                    f"`{self.domain.name}` has {self.available} {split} images, {limit} were asked for",
                    "ask for fewer, or leave the limit out",
                )
            self._count = limit or self.available
        else:
            self._files = _index(self.domain, split, data_root(root))
            self._folder = self.domain.root(data_root(root))
            self.available = len(self._files)
            self._files = self._files[:limit]
            self._count = len(self._files)

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        """The sample's stable name: its path below the domain's folder, or its index."""
        return f"{index:06d}" if self.domain.procedural else self._files[index][0]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._count:
            raise IndexError(f"index {index} of {self._count}")
        if self.domain.procedural:
            return Sample(self.name(index), *_cached_render(self._render_key(), index))
        name, image_path, label_path = self._files[index]
        image = read_image(image_path, self.size)
        label = read_label(label_path, self.label_map)
        if self.size is None and image.shape[:2] != label.shape:
            raise DataError(
                f"{image_path} is {image.shape[1]}x{image.shape[0]} but its label {label_path} is "
                f"{label.shape[1]}x{label.shape[0]}",
                "the pair is damaged or mismatched: download it again, or move both files out of the folder",
            )
        return Sample(name, image, label)

    def image(self, index: int, part: Part | None = None) -> NDArray[np.uint8]:
        """Only the image, (H, W, 3) RGB, or only a part of it: cheaper than the whole sample."""
        if self.domain.procedural:
            image = _cached_file(self._render_key(), index, 0)
            return image if part is None else part.of(image)
        return read_image(self._files[index][1], self.size, part=part)

    def image_size(self, index: int) -> tuple[int, int]:
        """(H, W) at which the image comes, told by its header."""
        if self.size is not None:
            return self.size
        return read_size(self._files[index][1])

    @property
    def folder(self) -> Path | None:
        """The folder in which the domain's files lie; None where they are rendered."""
        return self._folder

    def fingerprint(self) -> str:
        """16 hex digits that change when a label may have changed: names, sizes and times of the files, and the label map."""
        what = (self.domain.name, self.domain.revision(), self.split, self.size if self.domain.procedural else None)
        digest = hashlib.sha256(repr((what, self.label_map.name, sorted(self.label_map.classes.items()))).encode())
        for index in range(len(self)):
            digest.update(f"\n{self.name(index)}".encode())
            if not self.domain.procedural:
                state = self._files[index][2].stat()
                digest.update(f" {state.st_size} {state.st_mtime_ns}".encode())
        return digest.hexdigest()[:16]

    def label(self, index: int) -> NDArray[np.uint8]:
        """Only the label, (H, W) train ids: cheaper than the whole sample."""
        if self.domain.procedural:
            return _cached_file(self._render_key(), index, 1)
        return read_label(self._files[index][2], self.label_map)

    def _render_key(self) -> _RenderKey:
        assert self.size is not None
        return _RenderKey(self.domain.name, self.split, self.size, self.domain.revision())

    def prepare(self, progress: Progress, workers: int | None = None) -> None:
        """Render what is not in the cache yet, in parallel. Folder domains have nothing to prepare."""
        if not self.domain.procedural:
            return
        key = self._render_key()
        missing = [i for i in range(self._count) if not key.image(i).exists()]
        if not missing:
            return
        workers = workers or min(usable_cores(), 32)
        progress.start(f"rendering {self.domain.name} {self.split}", len(missing), "images")
        try:
            if workers == 1 or len(missing) <= _FEW:
                for index in missing:
                    progress.advance(_render_many(key, [index]))
                return
            chunks = [missing[i : i + 8] for i in range(0, len(missing), 8)]
            # spawn: the parent may hold threads (torch, BLAS) that a fork would copy in a broken state
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                pending = [pool.submit(_render_many, key, chunk) for chunk in chunks]
                try:
                    for done in as_completed(pending):
                        progress.advance(done.result())
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        finally:
            progress.stop()


@dataclass(frozen=True, slots=True)
class _RenderKey:
    """Where one rendered split lies in the cache."""

    domain: str
    split: str
    size: tuple[int, int]
    revision: str

    def folder(self) -> Path:
        return cache_root() / self.revision / self.domain / f"{self.size[1]}x{self.size[0]}" / self.split

    def image(self, index: int) -> Path:
        return self.folder() / f"{index:06d}.png"

    def label(self, index: int) -> Path:
        return self.folder() / f"{index:06d}_labelTrainIds.png"


def _render_many(key: _RenderKey, indices: Sequence[int]) -> int:
    key.folder().mkdir(parents=True, exist_ok=True)
    for index in indices:
        _render_one(key, index)
    return len(indices)


def _render_one(key: _RenderKey, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    from dgbench.data import streets

    image, label = streets.render(key.domain, key.split, index, key.size)
    # the image is written last: where it exists, the pair is complete
    _write_png(key.label(index), label)
    _write_png(key.image(index), image)
    return image, label


def _write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        Image.fromarray(pixels).save(temporary, "PNG", compress_level=1)
        os.replace(temporary, path)
    except OSError as error:
        # a full disk raises without a file name
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _cached_render(key: _RenderKey, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    if not key.image(index).exists():
        key.folder().mkdir(parents=True, exist_ok=True)
        return _render_one(key, index)
    try:
        return np.asarray(Image.open(key.image(index))), np.asarray(Image.open(key.label(index)))
    except (OSError, UnidentifiedImageError):
        # the cache is ours and reproducible to the byte, so a damaged file is rendered again
        return _render_one(key, index)


def _cached_file(key: _RenderKey, index: int, which: int) -> NDArray[np.uint8]:
    """The image (0) or the label (1) alone."""
    if key.image(index).exists():
        with suppress(OSError, UnidentifiedImageError):  # a damaged one is rendered again
            return np.asarray(Image.open((key.image(index), key.label(index))[which]))
    return _cached_render(key, index)[which]


def _index(domain: Domain, split: str, root: Path) -> list[tuple[str, Path, Path]]:
    folder = domain.root(root)
    layout = domain.layouts[split]
    if folder is None:
        raise DataError(
            f"`{domain.name}` is not on this disk: no folder {' or '.join(f'`{f}`' for f in domain.folders)} in {root}",
            f"get it from {domain.homepage} ({domain.access}) so that `{root / domain.folders[0] / layout.images}` "
            "finds its images, or point --root or DGBENCH_DATA at the folder that holds it",
        )
    images = sorted(folder.glob(layout.images))
    if not images:
        raise DataError(
            f"`{domain.name}` {split}: no image matches {folder / layout.images}",
            f"unpack the official archives into {folder} without renaming; see {domain.homepage}",
        )
    files, unpaired = [], []
    for image in images:
        relative = image.relative_to(folder).as_posix()
        label = relative
        for old, new in layout.to_label:
            label = label.replace(old, new)
        if (folder / label).is_file():
            files.append((relative, image, folder / label))
        else:
            unpaired.append(folder / label)
    if unpaired:
        raise DataError(
            f"`{domain.name}` {split}: {len(unpaired)} of {len(images)} images have no label; the first missing file "
            f"is {unpaired[0]}",
            "unpack the label archive, or move images without labels out of the folder",
        )
    return files


def read_image(path: Path, size: tuple[int, int] | None = None, *, part: Part | None = None) -> NDArray[np.uint8]:
    """(H, W, 3) RGB of an image file, resized to `size` = (H, W) when given (bilinear, antialiased); or a part of that.

    Raises: DataError naming the file when it cannot be read as an image.
    """
    with _explained(path):
        image = decode(path.read_bytes(), part if size is None else None)
    if size is None:
        return image
    if image.shape[:2] != size:
        image = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return image if part is None else part.of(image)


def read_size(path: Path) -> tuple[int, int]:
    """(H, W) of an image file, by its header.

    Raises: DataError naming the file when it cannot be read as an image.
    """
    with _explained(path), Image.open(path) as file:
        return file.height, file.width


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Within, what is wrong with an image file becomes a DataError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"no such image: {path}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, an image file was expected") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, PermissionError):
            raise DataError(f"no permission to read {path}") from None
        raise DataError(
            f"{path} cannot be read as an image: {_first_line(error)}",
            "the file is damaged, incomplete or not an image: download it again, or move it out of the folder",
        ) from None


def read_label(path: Path, label_map: LabelMap) -> NDArray[np.uint8]:
    """(H, W) train ids of an 8-bit grey or palette label file.

    Raises: DataError naming the file and the offending values when it holds anything outside the map.
    """
    try:
        with Image.open(path) as file:
            if file.mode not in ("L", "P", "1"):
                raise DataError(
                    f"{path} is a {file.mode} image, not an 8-bit label map",
                    "this looks like a colour rendering of the labels: the file with ids is needed",
                )
            stored = np.asarray(file)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(
            f"{path} cannot be read as a label map: {_first_line(error)}",
            "the file is damaged or incomplete: download it again",
        ) from None
    stored = stored.astype(np.uint8)
    # OpenCV's tables: counting the values and indexing in NumPy takes ten times as long, more than the decoding
    if cv2.LUT(stored, (~label_map.known).astype(np.uint8)).any():
        strange = [int(v) for v in np.unique(stored) if not label_map.known[v]]
        allowed = sorted(label_map.classes)
        raise DataError(
            f"{path} holds label {'values' if len(strange) > 1 else 'value'} {', '.join(map(str, strange[:8]))}"
            f"{', ...' if len(strange) > 8 else ''}, which the label map `{label_map.name}` does not know "
            f"({allowed[0]}..{max(allowed)} and 255)",
            "the labels are in another encoding than this domain's official files, or damaged: unpack the official "
            "label archive again",
        )
    return np.asarray(cv2.LUT(stored, label_map.table))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

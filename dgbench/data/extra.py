"""Streams of further training images that a method declares: style images, wild images, generated images with labels.

A recipe names a folder or a domain for each under `data.extra`, or `textures`, procedural ones in place of a collection. The
image for each position of a batch, and its crop, depend on (seed, stream, position) alone, so that a resumed run sees the same
ones. Files that a method declares beside its streams, such as a network that it trains with, are given there, too.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset, read_image
from dgbench.data.decode import read_label, read_stored
from dgbench.data.images import SUFFIXES
from dgbench.data.labels import named
from dgbench.data.photometric import PRESETS
from dgbench.data.sampling import UniformSampler
from dgbench.data.textures import COUNT, NAME, VERSION, texture
from dgbench.data.transforms import TrainView
from dgbench.errors import DataError, RecipeError, suggest
from dgbench.progress import Progress

if TYPE_CHECKING:
    from dgbench.data.custom import UserDomain
    from mfuser.segmentor import Extra, ExtraFile

Pixels = NDArray[np.uint8]
_LABEL_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, slots=True)
class Textures:
    """Procedural textures of one size (H, W)."""

    size: tuple[int, int]

    def __len__(self) -> int:
        return COUNT


@dataclass(frozen=True, slots=True)
class Stream:
    """The images of one stream, and their labels or segments if it has some."""

    name: str
    size: tuple[int, int]  # (H, W) to which they are cropped
    beside: str  # what comes with each image: `labels`, `segments`, or "" for nothing
    source: SegDataset | Textures | Sequence[tuple[Path, Path | None]]  # a domain, or files of images and labels
    stretch: bool = False  # resized to the size, whatever their aspect ratio, instead of cropped
    augmented: bool = False  # mirrored and distorted as the source's crops are

    def __len__(self) -> int:
        return len(self.source)

    def digest(self) -> str:
        """Return a 16-digit hash of the images' names."""
        if isinstance(self.source, SegDataset):
            names = [self.source.domain.name, self.source.revision, *map(self.source.name, range(len(self)))]
        elif isinstance(self.source, Textures):
            names = [NAME, str(VERSION), str(COUNT)]
        else:
            names = ["/".join(image.parts[-2:]) for image, _ in self.source]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]

    def prepare(self, progress: Progress) -> None:
        """Render the images of rendered domains."""
        if isinstance(self.source, SegDataset):
            self.source.prepare(progress)

    def crop(self, index: int, rng: np.random.Generator) -> tuple[Pixels, Pixels | None]:
        """Return an image (H, W, 3) of the stream's size, and its label or segments (H, W).

        The image is resized so that its shorter side just covers the size, and cropped at random; with `stretch` resized alone.

        Raises: DataError naming the file that cannot be read, or the pair that does not fit.
        """
        image, label = self._read(index)
        height, width = image.shape[:2]
        scale = max(self.size[0] / height, self.size[1] / width)
        covering = (max(self.size[0], round(height * scale)), max(self.size[1], round(width * scale)))
        whole = self.size if self.stretch else covering
        if whole != (height, width):
            image = np.asarray(cv2.resize(image, whole[::-1], interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR))
            label = label if label is None else np.asarray(cv2.resize(label, whole[::-1], interpolation=cv2.INTER_NEAREST))
        top, left = (int(rng.integers(side - part + 1)) for side, part in zip(whole, self.size, strict=True))
        place = slice(top, top + self.size[0]), slice(left, left + self.size[1])
        return image[place], None if label is None else label[place]

    def _read(self, index: int) -> tuple[Pixels, Pixels | None]:
        if isinstance(self.source, SegDataset):
            if self.beside:
                sample = self.source[index]
                return sample.image, sample.label
            return self.source.image(index), None
        if isinstance(self.source, Textures):
            return texture(index, self.source.size), None
        path, label_path = self.source[index]
        image = read_image(path)
        if label_path is None:
            return image, None
        label = read_label(label_path, named("train-ids")) if self.beside == "labels" else _numbers(label_path)
        if label.shape != image.shape[:2]:
            raise DataError(
                f"{path} is {image.shape[0]}x{image.shape[1]} (H x W), but its label {label_path} is "
                f"{label.shape[0]}x{label.shape[1]}",
                "the pair is damaged or mismatched: make it again, or move both files out of the folder",
            )
        return image, label


def streams(
    declared: Sequence[Extra],
    given: Mapping[str, str],
    method: str,
    crop: tuple[int, int],
    targets: Sequence[str],
    root: Path | None = None,
    domains: Mapping[str, UserDomain] | None = None,
    files: Sequence[ExtraFile] = (),
) -> list[Stream]:
    """Return the streams that a method declares, from the locations in the recipe.

    Args:
        given: a folder, a domain's name or `textures` by stream.    crop: (H, W) of the training crop.
        targets: domains that must stay unseen.    domains: the recipe's own declarations.
        files: what else may be given, see `files_of`.

    Raises: RecipeError for a stream that is not given, or given and not declared; DataError for a folder that is not there,
        holds no image, or images without labels.
    """
    known = [extra.name for extra in declared] + [file.name for file in files]
    if unknown := [name for name in given if name not in known]:
        name = unknown[0]
        near = suggest(name, known)
        has = f"it has {', '.join(f'`{one}`' for one in known)}" if known else "it needs no further images"
        raise RecipeError(
            f"data.extra: `{method}` has no stream `{name}` ({given[name]}): {has}",
            f"did you mean `{near}`?" if near else f"remove data.extra.{name}",
        )
    if missing := [extra for extra in declared if extra.name not in given]:
        named_ = ", ".join(f"`{extra.name}`" for extra in missing)
        beside = missing[0].beside
        what = f"a folder with images/ and {beside}/" if beside else "a folder of images"
        also = "" if missing[0].segments else ", or a domain's name" if beside else f", a domain's name, or {NAME}"
        raise RecipeError(
            f"`{method}` trains with further images, but data.extra does not say where {named_} are",
            f"--set data.extra.{missing[0].name}=PATH, {what}{also}",
        )
    return [_stream(extra, given[extra.name], method, crop, targets, root, domains) for extra in declared]


def files_of(declared: Sequence[ExtraFile], given: Mapping[str, str], method: str) -> dict[str, Path]:
    """Return the files that a method declares, from the recipe's `data.extra`; of optional ones those that are given.

    Raises: RecipeError for one that the method needs and the recipe does not give; DataError for one that is not there.
    """
    found = {}
    for file in declared:
        if file.name in given:
            found[file.name] = Path(given[file.name])
            if not found[file.name].is_file():
                raise DataError(
                    f"data.extra.{file.name} of `{method}`: {given[file.name]} is not a file", f"it should be {file.what}"
                )
        elif not file.optional:
            more = f"; or {file.instead}" if file.instead else ""
            raise RecipeError(
                f"`{method}` trains with {file.what}, but data.extra does not say where it is",
                f"--set data.extra.{file.name}=PATH{more}",
            )
    return found


def digest_of(file: Path) -> str:
    """Return the first 16 digits of a file's sha256."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def _stream(
    extra: Extra,
    place: str,
    method: str,
    crop: tuple[int, int],
    targets: Sequence[str],
    root: Path | None,
    domains: Mapping[str, UserDomain] | None,
) -> Stream:
    size = crop if extra.size == "crop" else extra.size
    what = f"data.extra.{extra.name} of `{method}`"
    if place == NAME:
        if extra.beside:
            raise RecipeError(f"{what}: {NAME} have no {extra.beside}", f"give a folder with images/ and {extra.beside}/")
        return Stream(extra.name, size, "", Textures(size), augmented=extra.augmented)
    folder = Path(place)
    if not folder.is_dir():
        try:
            row = lookup(place, root, domains)
        except DataError:
            problem = "is not a folder" if folder.exists() else "is not there"
            raise DataError(f"{what}: {place} {problem}", f"give a folder of {extra.name} images, or a domain's name") from None
        if row.name in targets:
            raise RecipeError(f"{what}: `{row.name}` is one of the targets, which must be unseen", "name another one")
        if extra.segments:
            raise RecipeError(f"{what}: the domain `{row.name}` has no segments", "give a folder with images/ and segments/")
        return Stream(extra.name, size, extra.beside, SegDataset(row, "train", root=root), extra.stretch, extra.augmented)
    beside, are = extra.beside, "of train ids" if extra.labels else "of segments' numbers"
    if not beside:
        files = _files(folder, SUFFIXES)
        if not files:
            raise DataError(f"{what}: no image in {folder}", f"images end in {', '.join(SUFFIXES)}")
        return Stream(extra.name, size, "", [(path, None) for path in files], extra.stretch, extra.augmented)
    images, labels = folder / "images", folder / beside
    for part in (images, labels):
        if not part.is_dir():
            raise DataError(f"{what}: {folder} has no folder {part.name}/", f"it should hold images/ and {beside}/, {are}")
    by_stem = {path.relative_to(labels).with_suffix(""): path for path in _files(labels, _LABEL_SUFFIXES)}
    pairs = [(path, by_stem.get(path.relative_to(images).with_suffix(""))) for path in _files(images, SUFFIXES)]
    if not pairs:
        raise DataError(f"{what}: no image in {images}", f"images end in {', '.join(SUFFIXES)}")
    if alone := [path for path, label in pairs if label is None]:
        raise DataError(
            f"{what}: {len(alone)} of {len(pairs)} images have no label in {labels}, the first is {alone[0]}",
            f"each needs a file {are} of the same name, {alone[0].stem}.png",
        )
    return Stream(extra.name, size, beside, pairs, extra.stretch, extra.augmented)


def _numbers(path: Path) -> Pixels:
    """Segments' numbers of a file of 8 bits, as it stores them."""
    stored = read_stored(path, named("train-ids"))
    if stored.max() > 255:
        raise DataError(f"{path} holds segments up to {stored.max()}, expected 0 to 254, and 255 for none", "make it of 8 bits")
    return stored.astype(np.uint8)


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files below a folder with these suffixes, in an order that does not depend on the file system."""
    found = [path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file()]
    hidden = [path for path in found if any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return sorted(set(found) - set(hidden), key=lambda path: path.relative_to(folder).as_posix())


class WithExtras(torch.utils.data.Dataset[tuple[Tensor, Tensor, dict[str, Tensor]]]):
    """A mapping from a position in training to image, label and the streams' images and labels, all uint8."""

    def __init__(self, view: TrainView, streams: Sequence[Stream], seed: int) -> None:
        self.view, self.streams = view, streams
        self._seeds = [_seed(seed, stream.name) for stream in streams]
        self._samplers = [UniformSampler(len(stream), own) for stream, own in zip(streams, self._seeds, strict=True)]

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        extra = {}
        for stream, seed, sampler in zip(self.streams, self._seeds, self._samplers, strict=True):
            index, _ = sampler.draw(position)
            rng = np.random.default_rng([seed, 2, position])
            image, label = stream.crop(index, rng)
            if stream.augmented:
                image, label = self._augmented(image, label, rng)
            extra[stream.name] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
            if label is not None:
                extra[f"{stream.name}_{stream.beside}"] = torch.from_numpy(np.ascontiguousarray(label))
        return *self.view[position], extra

    def _augmented(self, image: Pixels, label: Pixels | None, rng: np.random.Generator) -> tuple[Pixels, Pixels | None]:
        """Mirror and distort as the crops of the source."""
        how = self.view.augmentation
        if rng.random() < how.flip:
            image, label = cv2.flip(image, 1), label if label is None else cv2.flip(label, 1)
        return PRESETS[how.photometric](image, rng), label


def _seed(seed: int, name: str) -> int:
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])

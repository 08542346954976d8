"""Time the training loader and the papers' plain pipeline, one process with one thread, on files like GTA5's.

    python benchmarks/loader.py            # writes benchmarks/loader.md
    python benchmarks/loader.py --quick    # every path in seconds, on small files that mean nothing

The files are rendered: scenes of `streets-game` at 1914x1052, as PNG (2.5 MB each; GTA5's have 2.3 MB) with palette labels of
Cityscapes ids in GTA5's folders, and as JPEG in BDD100K's. The plain pipeline is what mmsegmentation and DAFormer do: decode
all of the image and the label with Pillow, resize both by a factor of 0.5 to 2 with Pillow, crop 512x512 so that no class
has more than 75 %, flip, distort colours in floating point; with rare-class sampling, all of it again until the crop
holds the class. Both sides end in a float image and an int64 label, and draw scenes from one list. They take turns.
Times are the processor's own: the files lie in the system's cache, and what else the machine does should not count.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dgbench import streets
from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset
from dgbench.data.images import FORMATS, Part, decode
from dgbench.data.labels import CLASSES, IGNORE, palette
from dgbench.data.sampling import RareClassSampler, UniformSampler, class_counts
from dgbench.data.transforms import Augmentation, Sampler, TrainView, to_model
from dgbench.environment import code_commit
from dgbench.progress import Silent

HERE = Path(__file__).parent
CPU = torch.device("cpu")
TEMPERATURE = 100.0  # of rare-class sampling in tqdm's and MFuser's configs: every class about as often
SIZE, CROP = (1052, 1914), (512, 512)


# ---- files


def write_files(root: Path, count: int, size: tuple[int, int]) -> None:
    """Write `count` scenes below `root`, once as GTA5 and once as BDD100K."""
    ids = np.zeros(256, np.uint8)
    ids[: len(CLASSES)] = [c.label_id for c in CLASSES]
    colours = np.zeros((256, 3), np.uint8)
    colours[ids[: len(CLASSES)]] = palette()[: len(CLASSES)]
    png, jpg = root / "gta5", root / "bdd100k"
    folders = [png / "images", png / "labels", jpg / "images/10k/train", jpg / "labels/sem_seg/masks/train"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, label = streets.render("streets-game", "train", number, size)
        stem = f"{number + 1:05d}"
        Image.fromarray(image).save(folders[0] / f"{stem}.png", compress_level=6)
        indexed = Image.fromarray(ids[label]).convert("P")
        indexed.putpalette(colours.tobytes())
        indexed.save(folders[1] / f"{stem}.png")
        Image.fromarray(image).save(folders[2] / f"{stem}.jpg", quality=95)
        Image.fromarray(label).save(folders[3] / f"{stem}.png")


# ---- the plain pipeline


@dataclass
class Plain:
    """The papers' order of work, in Pillow and NumPy."""

    pairs: Sequence[tuple[Path, Path]]
    table: NDArray[np.uint8]  # stored label value -> train id
    sampler: Sampler
    a: Augmentation
    seed: int = 0

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        index, wanted = self.sampler.draw(position)
        rng = np.random.default_rng([self.seed, position])
        image, label = self.once(index, rng)
        for _ in range(10):
            if wanted is None or (label == wanted.train_id).sum() > wanted.pixels:
                break
            image, label = self.once(index, rng)
        chw = np.ascontiguousarray(image.transpose(2, 0, 1))
        return torch.from_numpy(chw).div_(255)[None], torch.from_numpy(label.astype(np.int64))[None]

    def once(self, index: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        with Image.open(self.pairs[index][0], formats=FORMATS) as file:
            picture = file.convert("RGB")
        with Image.open(self.pairs[index][1], formats=FORMATS) as file:
            mask = Image.fromarray(cv2.LUT(np.asarray(file), self.table))  # the papers convert their labels beforehand
        scale = rng.uniform(*self.a.scale)
        size = (int(picture.width * scale + 0.5), int(picture.height * scale + 0.5))
        image = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
        label = np.asarray(mask.resize(size, Image.Resampling.NEAREST))
        for _ in range(11):
            top = int(rng.integers(max(0, label.shape[0] - self.a.crop[0]) + 1))
            left = int(rng.integers(max(0, label.shape[1] - self.a.crop[1]) + 1))
            part = label[top : top + self.a.crop[0], left : left + self.a.crop[1]]
            values, counts = np.unique(part, return_counts=True)
            counts = counts[values != IGNORE]
            if len(counts) > 1 and counts.max() / counts.sum() < self.a.cat_max_ratio:
                break
        label = part
        image = image[top : top + self.a.crop[0], left : left + self.a.crop[1]]
        if rng.random() < self.a.flip:
            image, label = image[:, ::-1], label[:, ::-1]
        image = self.distorted(image, rng)
        below, right = self.a.crop[0] - label.shape[0], self.a.crop[1] - label.shape[1]
        image = np.pad(image, ((0, below), (0, right), (0, 0)))
        return image.astype(np.float32), np.pad(label, ((0, below), (0, right)), constant_values=IGNORE)

    @staticmethod
    def distorted(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        def affine(values: NDArray[np.uint8], gain: float = 1, offset: float = 0) -> NDArray[np.uint8]:
            return np.clip(values.astype(np.float32) * np.float32(gain) + np.float32(offset), 0, 255).astype(np.uint8)

        if rng.random() < 0.5:
            image = affine(image, offset=rng.uniform(-32, 32))
        first = rng.random() < 0.5
        if first and rng.random() < 0.5:
            image = affine(image, rng.uniform(0.5, 1.5))
        if rng.random() < 0.5:
            hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV)
            hsv[:, :, 1] = affine(hsv[:, :, 1], rng.uniform(0.5, 1.5))
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if rng.random() < 0.5:
            hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV)
            hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + rng.integers(-18, 18)) % 180
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if not first and rng.random() < 0.5:
            image = affine(image, rng.uniform(0.5, 1.5))
        return image


# ---- measuring


@dataclass(frozen=True)
class Row:
    """Images a second of one core, median over the repeats."""

    files: str
    sampling: str
    plain: float
    ours: float
    ratio: float  # median over the repeats' ratios


def compare(
    name: str, domain: str, root: Path, a: Augmentation, size: tuple[int, int], *, samples: int, repeats: int
) -> Iterator[Row]:
    """Time both pipelines on one kind of files, in turns."""
    dataset = SegDataset(lookup(domain), "train", root=root)
    pairs = [(path, Path(str(path).replace(*swap))) for path, swap in _paths(root, domain)]
    counts = class_counts(dataset, Silent())
    samplers: dict[str, Sampler] = {
        "uniform": UniformSampler(len(dataset), 0),
        "rare classes": RareClassSampler(counts, TEMPERATURE, 0, None if size == SIZE else size),
    }
    for sampling, sampler in samplers.items():
        plain = Plain(pairs, dataset.label_map.table, sampler, a)
        view = TrainView(dataset, sampler, a, 0)
        rates = []
        for repeat in range(repeats + 1):
            positions = range(repeat * samples, (repeat + 1) * samples)
            rates.append((rate(plain.__getitem__, positions), rate(lambda p, v=view: _finished(v, p), positions)))
        warm = rates[1:]  # the first pass warms caches up
        plain_rate, our_rate = (statistics.median(side) for side in zip(*warm, strict=True))
        yield Row(name, sampling, plain_rate, our_rate, statistics.median(b / a for a, b in warm))


def _paths(root: Path, domain: str) -> Iterator[tuple[Path, tuple[str, str]]]:
    if domain == "gta5":
        for path in sorted((root / "gta5/images").glob("*.png")):
            yield path, ("/images/", "/labels/")
    else:
        for path in sorted((root / "bdd100k/images/10k/train").glob("*.jpg")):
            yield path, ("/images/10k/train/" + path.name, "/labels/sem_seg/masks/train/" + path.stem + ".png")


def _finished(view: TrainView, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    image, label = view[position]
    return to_model(image[None], label[None], CPU)


def rate(load: Callable[[int], object], positions: range) -> float:
    """Return images a second."""
    begun = time.process_time()
    for position in positions:
        load(position)
    return len(positions) / (time.process_time() - begun)


def floors(root: Path, repeats: int) -> dict[str, float]:
    """Return the median milliseconds of the steps that cannot be left out, on the first files."""
    png = [path.read_bytes() for path in sorted((root / "gta5/images").glob("*.png"))[:8]]
    jpg = [path.read_bytes() for path in sorted((root / "bdd100k/images/10k/train").glob("*.jpg"))[:8]]
    mask = [path.read_bytes() for path in sorted((root / "gta5/labels").glob("*.png"))[:8]]
    width, height = Image.open(BytesIO(png[0]), formats=FORMATS).size
    upper = Part(0, 0, height // 2, width // 2)

    def pillow(data: bytes) -> NDArray[np.uint8]:
        return np.asarray(Image.open(BytesIO(data), formats=FORMATS).convert("RGB"))

    return {
        "PNG, Pillow": milliseconds(pillow, png, repeats),
        "PNG, dgbench": milliseconds(decode, png, repeats),
        "PNG, dgbench, a part that ends at half its height": milliseconds(lambda data: decode(data, upper), png, repeats),
        "JPEG, Pillow": milliseconds(pillow, jpg, repeats),
        "JPEG, dgbench": milliseconds(decode, jpg, repeats),
        "palette label, Pillow": milliseconds(lambda data: np.asarray(Image.open(BytesIO(data), formats=FORMATS)), mask, repeats),
    }


def milliseconds(call: Callable[[bytes], object], files: Sequence[bytes], repeats: int) -> float:
    """Return the median over files and repeats."""
    times = []
    for data in [*files[:1], *(files * repeats)]:
        begun = time.process_time()
        call(data)
        times.append(1e3 * (time.process_time() - begun))
    return statistics.median(times[1:])


# ---- the report


def processor() -> str:
    """Return the processor's name and its number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names) or '?'} cores"


def markdown(rows: Sequence[Row], decoding: dict[str, float], about: dict[str, str]) -> str:
    """Return the report as Markdown."""
    lines = ["# Throughput of the training loader", ""]
    lines += ["By `python benchmarks/loader.py`; its head says what is compared. Images a second of one core, one thread: median"]
    lines += ["over the repeats, in which both pipelines take turns. ratio: median of the repeats' own.", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += ["", "| files | sampling | plain, images/s | dgbench, images/s | ratio |", "|---|---|---|---|---|"]
    lines += [f"| {r.files} | {r.sampling} | {r.plain:.1f} | {r.ours:.1f} | {r.ratio:.2f} |" for r in rows]
    lines += ["", "What cannot be left out, ms an image:", "", "| decoding | ms |", "|---|---|"]
    lines += [f"| {name} | {ms:.1f} |" for name, ms in decoding.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=40, help="scenes to write")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="the table; default: loader.md beside this script, none with --quick")
    parser.add_argument("--quick", action="store_true", help="every path in seconds, on small files that mean nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    size, crop = ((132, 240), (64, 64)) if given.quick else (SIZE, CROP)
    files, repeats = (4, 1) if given.quick else (given.files, given.repeats)
    a = Augmentation(crop, (0.5, 2.0), 0.75, 0.5)
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        print(f"writing {files} scenes of {size[1]}x{size[0]}", file=sys.stderr)
        write_files(root, files, size)
        rows: list[Row] = []
        for name, domain in (("PNG", "gta5"), ("JPEG", "bdd100k")):
            for row in compare(name, domain, root, a, size, samples=files, repeats=repeats):
                rows.append(row)
                print(f"{row.files}, {row.sampling}: {row.plain:.1f} and {row.ours:.1f} images/s", file=sys.stderr)
        decoding = floors(root, repeats)
        bytes_each = sum(path.stat().st_size for path in (root / "gta5/images").glob("*.png")) / files
    commit, dirty = code_commit()
    about = {
        "processor": processor(),
        "files": f"{files} of {size[1]}x{size[0]}, a PNG {bytes_each / 1e6:.1f} MB",
        "crop": f"{crop[1]}x{crop[0]}",
        "repeats": f"{repeats} of {files} images",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": f"{commit}{', changed since' if dirty else ''}",
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "pillow", "numpy"))
        + f", OpenCV {cv2.__version__}",
        "run": f"{time.process_time() - begun:.0f} s",
        "load": f"{os.getloadavg()[0]:.1f} at the end",
    }
    text = markdown(rows, decoding, about)
    out = given.out or (None if given.quick else HERE / "loader.md")
    if out is not None:
        out.write_text(text, encoding="utf-8")
        print(f"written: {out}", file=sys.stderr)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The cache of rendered images: what is damaged or another image's is rendered again, and what kills left is removed."""

from __future__ import annotations

import io
import os
import platform
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dgbench import streets
from dgbench.data import rendered
from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset
from dgbench.data.rendered import Rendered
from dgbench.progress import Silent

SIZE = (32, 64)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DGBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def dataset(n: int = 2, domain: str = "streets-city", split: str = "val") -> SegDataset:
    found = SegDataset(lookup(domain), split, size=SIZE, limit=n)
    found.prepare(Silent(), workers=1)
    return found


def files(cache: Path, index: int = 0) -> tuple[Path, Path]:
    """The image and the label."""
    image, label = sorted(cache.rglob(f"{index:06d}*.png"))
    return image, label


def assert_right(data: SegDataset, index: int = 0) -> None:
    image, label = streets.render(data.domain.name, data.split, index, SIZE)
    sample = data[index]
    assert np.array_equal(sample.image, image)
    assert np.array_equal(sample.label, label)


def test_a_flipped_bit_is_noticed_wherever_it_is(cache: Path) -> None:
    data = dataset(1)
    key = Rendered(data.domain.name, "val", SIZE, data.revision)
    for which, path in enumerate(files(cache)):
        good = path.read_bytes()
        for bit in random.Random(0).sample(range(8 * len(good)), 300):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            assert key._kept(0, which) is None, (path.name, bit)
        path.write_bytes(good)
        assert key._kept(0, which) is not None


@pytest.mark.parametrize("which", [0, 1], ids=["image", "label"])
def test_damaged_pixels_that_decoders_accept_are_rendered_again(cache: Path, which: int) -> None:
    data = dataset(1)
    path = files(cache)[which]
    good = path.read_bytes()
    accepted = None
    for bit in range(8 * good.index(b"IDAT") + 100, 8 * len(good) - 200):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        try:
            shown = np.asarray(Image.open(io.BytesIO(bytes(bad))))
        except (OSError, SyntaxError):
            continue
        if not np.array_equal(shown, np.asarray(Image.open(path))):
            accepted = bytes(bad)
            break
    if accepted is None:
        pytest.skip("this decoder refuses every one")
    path.write_bytes(accepted)
    assert np.array_equal((data.image, data.label)[which](0), streets.render("streets-city", "val", 0, SIZE)[which])
    assert path.read_bytes() == good
    path.write_bytes(accepted)
    assert_right(data)


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "read"])
@pytest.mark.parametrize("which", [0, 1], ids=["image", "label"])
def test_files_of_another_image_are_rendered_again(cache: Path, which: int, prepared: bool) -> None:
    data = dataset(2)
    shutil.copyfile(files(cache, 1)[which], files(cache, 0)[which])
    if prepared:
        data.prepare(Silent(), workers=1)
        assert files(cache, 0)[which].read_bytes() != files(cache, 1)[which].read_bytes()
    assert_right(data)


@pytest.mark.parametrize(("domain", "split"), [("streets-game", "val"), ("streets-city", "train"), ("streets-city@0.5", "val")])
def test_files_of_another_domain_or_split_are_rendered_again(cache: Path, domain: str, split: str) -> None:
    if "@" in domain:
        domain = "streets-fog@0.5"
    (other := dataset(1, domain, split))[0]
    foreign = files(cache)
    kept = [path.read_bytes() for path in foreign]
    shutil.rmtree(cache)
    data = dataset(1)
    for path, content in zip(files(cache), kept, strict=True):
        path.write_bytes(content)
    assert_right(data)
    assert other.domain.name != data.domain.name or other.split != data.split


def test_files_without_a_name_inside_as_older_versions_wrote_them_are_rendered_again(cache: Path) -> None:
    data = dataset(1)
    for path in files(cache):
        with Image.open(path) as image:
            pixels = np.zeros_like(np.asarray(image))
        Image.fromarray(pixels).save(path)
    data.prepare(Silent(), workers=1)
    assert_right(data)


def test_what_is_kept_is_png_to_others_and_says_what_it_is(cache: Path) -> None:
    data = dataset(1)
    for path, pixels in zip(files(cache), streets.render("streets-city", "val", 0, SIZE), strict=True):
        with Image.open(path) as image:
            assert isinstance(image, PngImagePlugin.PngImageFile)
            assert np.array_equal(np.asarray(image), pixels)
            assert image.text["dgbench"].startswith(f"{data.revision} streets-city val 000000 64x32 ")


def test_a_second_call_renders_nothing_and_writes_nothing(cache: Path) -> None:
    dataset(2)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert_right(dataset(2), 1)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_what_dead_processes_left_is_removed_and_what_others_write_is_not(cache: Path) -> None:
    dataset(1)
    folder = files(cache)[0].parent
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = platform.node().replace(".", "_")
    left = [f".000000.png.{host}-{gone.pid}.tmp", f".000001_labelTrainIds.png.{gone.pid}"]
    running = [f".000000.png.{host}-1.tmp", f".000000.png.another-{gone.pid}.tmp", ".hidden", "notes.txt"]
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked for its status
    left.append(f".000003.png.{host}-{zombie.pid}.tmp")
    for name in [*left, *running]:
        (folder / name).touch()
    dataset(1)
    zombie.wait()
    assert not [name for name in left if (folder / name).exists()]
    assert all((folder / name).exists() for name in running)


def test_a_file_that_was_cut_or_has_more_behind_its_end_is_not_whole(cache: Path) -> None:
    dataset(1)
    data = files(cache)[1].read_bytes()
    assert rendered._whole(data, 8)
    assert not any(rendered._whole(data[:length], 8) for length in range(8, len(data)))
    assert not rendered._whole(data + b"\0", 8)

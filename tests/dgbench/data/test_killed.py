"""Renderings and exports that were killed, at each change of the disk or at any moment, are completed by the next call."""

from __future__ import annotations

import os
import random
import time
import uuid
from pathlib import Path

import kills
import numpy as np
import pytest

from dgbench import streets
from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset
from dgbench.data.export import export
from dgbench.progress import Silent

SIZE = (32, 64)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks")


def rendered(cache: Path, n: int = 2, workers: int = 1) -> SegDataset:
    os.environ["DGBENCH_CACHE"] = str(cache)
    data = SegDataset(lookup("streets-city"), "val", size=SIZE, limit=n)
    data.prepare(Silent(), workers=workers)
    return data


def exported(out: Path) -> None:
    if not (out / "cityscapes").exists():
        export("streets-city", "cityscapes", out, n=1, size=SIZE, splits=["val"])


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DGBENCH_CACHE", str(tmp_path / "cache"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_rendering_killed_at_any_change_of_the_disk_is_completed_to_the_same_bytes(tmp_path: Path) -> None:
    rendered(tmp_path / "whole", n=1)
    expected = content(tmp_path / "whole")
    found = kills.stops(lambda: rendered(tmp_path / "counted", n=1), tmp_path / "counted")
    assert len({stop.what for stop in found}) >= 4  # image and label, each opened and renamed
    for number, stop in enumerate(found):
        cache = tmp_path / str(number)
        assert kills.kill(lambda cache=cache: rendered(cache, n=1), cache, stop), stop
        rendered(cache, n=1)
        assert content(cache) == expected, stop


# every fourth moment, before, within and after writes; at night all
@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.full)])
def test_an_export_killed_at_any_change_of_the_disk_is_made_anew_and_leaves_nothing_else(stride: int, tmp_path: Path) -> None:
    exported(tmp_path / "whole")
    expected = content(tmp_path / "whole")
    found = kills.stops(lambda: exported(tmp_path / "counted"), tmp_path / "counted")
    for number, stop in enumerate(found[::stride]):
        out = tmp_path / str(number)
        assert kills.kill(lambda out=out: exported(out), out, stop), stop
        # a part never looks like the whole
        assert content(out / "cityscapes") in ({}, {name[len("cityscapes/") :]: data for name, data in expected.items()}), stop
        exported(out)
        assert content(out) == expected, stop


def _marked(mark: str) -> list[str]:
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (place / "environ").read_bytes() and " Z " not in (place / "stat").read_text():
                found.append(place.name)
        except OSError:
            continue
    return found


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_a_rendering_by_several_processes_killed_at_random_moments_leaves_none_and_is_completed(tmp_path: Path) -> None:
    dice = random.Random(0)
    # the moments are drawn from how long it takes on this machine, the shortest of what was seen
    long = min(kills.duration(lambda cache=cache: rendered(cache, n=60, workers=2)) for cache in (tmp_path / "a", tmp_path / "b"))  # type: ignore[misc]
    killed = 0
    for number in range(30):
        cache, mark = tmp_path / str(number), uuid.uuid4().hex

        def action(cache: Path = cache, mark: str = mark) -> None:
            os.environ["MARK"] = mark
            rendered(cache, n=60, workers=2)

        begun = time.monotonic()
        if kills.kill_after(action, dice.uniform(0, long)) == -9:
            killed += 1
        else:
            long = min(long, time.monotonic() - begun)
        end = time.monotonic() + 30
        while left := _marked(mark):
            assert time.monotonic() < end, (number, left, time.monotonic() - begun)
            time.sleep(0.05)
        data = rendered(cache, n=60, workers=1) if number % 10 == 0 else rendered(cache, n=4)
        assert not list(cache.rglob(".*"))
        for index in (0, len(data) - 1):
            image, label = streets.render("streets-city", "val", index, SIZE)
            assert np.array_equal(data[index].image, image)
            assert np.array_equal(data[index].label, label)
    assert killed > 15

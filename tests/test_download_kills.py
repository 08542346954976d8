"""Downloads that are killed, at every step and at any moment: the same command ends with the same files, and nothing beside."""

from __future__ import annotations

import io
import random
import signal
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import kills
import pytest
from loopback_files import Server, serving
from small_sets import zipped
from typer.testing import CliRunner

from dgbench import cli
from dgbench.data.domain import UNFINISHED
from dgbench.download.stage import MANIFEST

ARCHIVE = "dark-zurich/Dark_Zurich_val_anon.zip"


def packed() -> bytes:
    noise = random.Random(0)
    files = {f"rgb_anon/val/night/a/{n}_rgb_anon.png": noise.randbytes(20_000) for n in range(6)}
    return zipped(files | {name.replace("rgb_anon", "gt", 1).replace("_rgb_anon", "_gt_labelTrainIds"): b"y" for name in files})


@pytest.fixture
def server() -> Iterator[Server]:
    with serving({ARCHIVE: packed()}) as running:
        yield running


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DGBENCH_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "data"


def download(data: Path, server: Server) -> int:
    arguments = ["download", "dark-zurich", "--mirror", server.url, "--yes", "--root", str(data)]
    return CliRunner().invoke(cli.app, arguments, prog_name="dgbench").exit_code


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(packed())) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def see_that_it_is_taken_up(data: Path, server: Server) -> None:
    """Whole or not there after the kill; whole and alone after the same command."""
    folder = data / "dark-zurich"
    if folder.exists() and not (folder / UNFINISHED).exists():
        assert {name: have for name, have in content(folder).items() if name != MANIFEST} == expected()
    assert download(data, server) == 0
    assert {name: have for name, have in content(folder).items() if name != MANIFEST} == expected()
    assert [path.name for path in data.iterdir()] == ["dark-zurich"]


@pytest.mark.parametrize("stride", [61, pytest.param(1, marks=pytest.mark.full)])
def test_a_download_that_is_killed_at_any_change_is_taken_up(stride: int, server: Server, tmp_path: Path, data: Path) -> None:
    moments = kills.stops(lambda: download(data, server), data)
    assert len(moments) > 60
    for number, stop in enumerate(moments[::stride]):
        place = tmp_path / str(number)
        kills.kill(lambda place=place: download(place, server), place, stop)  # type: ignore[misc]
        see_that_it_is_taken_up(place, server)


@pytest.mark.parametrize("times", [3, pytest.param(30, marks=pytest.mark.full)])
def test_a_download_that_is_killed_at_any_moment_is_taken_up(times: int, server: Server, tmp_path: Path, data: Path) -> None:
    moments = random.Random(times)
    long = kills.duration(lambda: download(data, server))
    hit = 0
    for number in range(times):
        place = tmp_path / str(number)
        server.faults = [moments.choice([None, "cut", "reset"])]
        begun = time.monotonic()
        if kills.kill_after(lambda place=place: download(place, server), moments.uniform(0, long)) == -signal.SIGKILL:  # type: ignore[misc]
            hit += 1
        else:
            long = min(long, time.monotonic() - begun)
        server.faults = []
        see_that_it_is_taken_up(place, server)
    assert hit >= times // 2

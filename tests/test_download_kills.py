"""Downloads that are killed, at every step and at any moment: the same command ends with the same files, and nothing beside."""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from loopback_files import Server, serving
from small_sets import zipped
from typer.testing import CliRunner

from dgbench import cli
from dgbench.data.domain import UNFINISHED
from dgbench.data.stage import MANIFEST

ARCHIVE = "dark-zurich/Dark_Zurich_val_anon.zip"
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate", "shutil.rmtree"}


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


def forked(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def stopped_at(step: int, data: Path, server: Server) -> bool:
    """Download in a child that is killed when it is about to change the disk for the `step`th time."""

    def work() -> None:
        left = [step]

        def watch(event: str, told: tuple[object, ...]) -> None:
            opened = event == "open" and isinstance(told[2], int) and told[2] & (os.O_WRONLY | os.O_RDWR)
            if (event in CHANGES or opened) and str(data) in str(told):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        download(data, server)

    return os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1]) == -signal.SIGKILL


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


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.full)])
def test_a_download_that_is_killed_before_any_change_is_taken_up(stride: int, server: Server, tmp_path: Path, data: Path) -> None:
    step = 1
    while stopped_at(step, tmp_path / str(step), server):
        see_that_it_is_taken_up(tmp_path / str(step), server)
        step += stride
    assert step > 30  # about forty changes


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.full)])
def test_a_download_that_is_killed_at_any_moment_is_taken_up(kills: int, server: Server, tmp_path: Path, data: Path) -> None:
    moments = random.Random(kills)
    begun = time.monotonic()
    os.waitpid(forked(lambda: download(tmp_path / "whole", server)), 0)
    long = time.monotonic() - begun
    hit = 0
    for n in range(kills):
        place = tmp_path / str(n)
        server.faults = [moments.choice([None, "cut", "reset"])]
        child = forked(lambda place=place: download(place, server))  # type: ignore[misc]
        time.sleep(moments.uniform(0, 1.1) * long)
        os.kill(child, signal.SIGKILL)
        hit += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        server.faults = []
        see_that_it_is_taken_up(place, server)
    assert hit >= kills // 2

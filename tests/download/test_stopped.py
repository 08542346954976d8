"""Downloads of domains that are stopped in the middle: by a kill, by Ctrl-C, by a full disk."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import kills
import pytest
from domain_downloads import below, done, refused, run, started
from loopback_files import Server
from small_sets import acdc, written, zipped

from dgbench.data.domain import UNFINISHED
from dgbench.download.stage import MANIFEST


def many_files(count: int) -> bytes:
    files = {f"rgb_anon/val/night/a/{n}_rgb_anon.png": b"%d" % n for n in range(count)}
    return zipped(files | {name.replace("rgb_anon", "gt", 1).replace("rgb_anon", "gt_labelTrainIds"): b"y" for name in files})


@pytest.mark.parametrize("moment", ["transfer", "unpack"])
def test_a_kill_at_any_moment_is_taken_up(moment: str, mirror: Server, data: Path, tmp_path: Path) -> None:
    mirror.files["dark-zurich/Dark_Zurich_val_anon.zip"] = content = many_files(600)
    mirror.bytes_until = 100_000 if moment == "transfer" else None  # and no more: the kill may take its time
    home = data / ".dgbench-download" / "dark-zurich"
    part = home / "archives" / "Dark_Zurich_val_anon.zip.part"

    def action() -> None:
        run(data, "dark-zurich", "--mirror", mirror.url, "--yes")

    if moment == "transfer":
        assert kills.kill_when(action, lambda: part.is_file() and part.stat().st_size > 50_000) == -signal.SIGKILL
    else:
        kills.kill_at(action, data, "30_rgb_anon.png")
        assert list((home / "parts" / ".Dark_Zurich_val_anon.zip.unpacking").rglob("*.png"))
    assert not (data / "dark-zurich").exists()
    kept = part.stat().st_size if moment == "transfer" else len(content)
    mirror.bytes_until = None
    mirror.requests.clear()
    done(run(data, "dark-zurich", "--mirror", mirror.url, "--yes"))
    assert [ranged for _, ranged in mirror.bodies()] == ([f"bytes={kept}-"] if moment == "transfer" else [])
    (tmp_path / "set.zip").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        archive.extractall(tmp_path / "expected")
    found = below(data / "dark-zurich")
    del found[MANIFEST]
    assert found == below(tmp_path / "expected")
    assert [path.name for path in data.iterdir()] == ["dark-zurich"]


def killed_at(step: int, arguments: tuple[str, ...], data: Path) -> bool:
    """Run a command in a child that kills itself when it is about to change the disk for the `step`th time."""
    changes = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "shutil.rmtree"}
    child = os.fork()
    if child == 0:
        left = [step]

        def watch(event: str, told: tuple[object, ...]) -> None:
            opened = event == "open" and isinstance(told[2], int) and told[2] & (os.O_WRONLY | os.O_RDWR)
            # of the files of an archive the first stands for all
            rest = ".unpacking" in str(told[0]) and "gt/fog/train" not in str(told[0])
            if (event in changes or opened) and str(data) in str(told[0]) and not rest:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            run(data, *arguments)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["new", "added to"])
def test_a_kill_at_any_step_leaves_a_whole_set_or_none(kind: str, stride: int, data: Path, tmp_path: Path) -> None:
    packed = {"rgb_anon_trainvaltest.zip": {}, "gt_trainval.zip": {}}
    for name, content in acdc().items():
        (tmp_path / "a.zip").write_bytes(content)
        with zipfile.ZipFile(tmp_path / "a.zip") as archive:
            packed[name] = {member: archive.read(member) for member in archive.namelist() if "/fog/" in member}
    written({name: zipped(files) for name, files in packed.items()}, tmp_path / "Downloads")
    expected = packed["rgb_anon_trainvaltest.zip"] | packed["gt_trainval.zip"]
    arguments = ("acdc", "--from", str(tmp_path / "Downloads"))
    step = 1
    while True:
        shutil.rmtree(data, ignore_errors=True)
        if kind == "added to":
            written({"a_rgb_anon.png": b"mine"}, data / "acdc/rgb_anon/fog/train/mine")
        if not killed_at(step, arguments, data):
            break
        if (data / "acdc").exists() and not (data / "acdc" / UNFINISHED).exists():
            now = {path: content for path, content in below(data / "acdc").items() if "mine" not in path}
            assert not now or {path: content for path, content in now.items() if path != MANIFEST} == expected, step
        done(run(data, *arguments))
        now = {path: content for path, content in below(data / "acdc").items() if "mine" not in path and path != MANIFEST}
        assert now == expected, step
        assert [path.name for path in data.iterdir()] == ["acdc"], step
        step += stride
    assert step > 30  # about fifty changes


def test_ctrl_c_keeps_what_came_and_says_how_to_go_on(mirror: Server, data: Path) -> None:
    mirror.files["dark-zurich/Dark_Zurich_val_anon.zip"] = many_files(1000)
    mirror.bytes_per_second = 1e5  # three seconds for all: the signal comes in the middle on a busy machine, too
    process = started(data, mirror, "dark-zurich")
    part = data / ".dgbench-download/dark-zurich/archives/Dark_Zurich_val_anon.zip.part"
    while not (part.is_file() and part.stat().st_size > 50_000):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, told = process.communicate(timeout=20)
    assert process.returncode == 130, told
    assert output == ""
    assert "0.00 GB that were received are kept. To continue, run again: dgbench download dark-zurich --mirror" in told
    assert "Traceback" not in told
    assert part.stat().st_size > 50_000


def test_a_disk_that_fills_up_while_unpacking_is_told(mirror: Server, data: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    mirror.files["dark-zurich/Dark_Zurich_val_anon.zip"] = zipped({"rgb_anon/val/night/a/1_rgb_anon.png": bytes(300_000)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        message = refused(run(data, "dark-zurich", "--mirror", mirror.url, "--yes"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = data / ".dgbench-download/dark-zurich/archives/Dark_Zurich_val_anon.zip"
    assert f"the disk is full: {kept.name} does not fit into {data} unpacked; the archive is kept in {kept}" in message
    assert kept.is_file()
    assert not list(data.rglob("*.unpacking"))


def own_disk() -> bool:
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not own_disk(), reason="needs the right to mount a small disk of its own")
def test_a_disk_that_others_fill_during_the_transfer_is_told(mirror: Server, data: Path) -> None:
    data.mkdir()
    mirror.files["dark-zurich/Dark_Zurich_val_anon.zip"] = many_files(2000)
    mirror.bytes_per_second = 5e5
    # 8 MB, which the plan finds enough; then somebody else writes 7 MB
    script = (
        f"mount -t tmpfs -o size=8m none {data}; (while ! ls {data}/.dgbench-download/*/archives/*.part; do sleep 0.05; done; "
    )
    script += f'cat /dev/zero > {data}/other) >/dev/null 2>&1 & exec "$@"'
    process = started(data, mirror, "dark-zurich", before=("unshare", "-rm", "sh", "-c", script, "sh"))
    output, told = process.communicate(timeout=60)
    assert process.returncode == 1, told
    assert "error: the disk is full: " in told
    assert "bytes are kept in" in told
    assert "it goes on from there" in told
    assert output == ""

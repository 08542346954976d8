"""Domains as a user downloads them: from a mirror on the loopback that misbehaves, or from archives that are here already."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback_files import Server, serving
from small_sets import OFFICIAL, acdc, bdd100k, cityscapes, dark_zurich, gta5, labels, mapillary, picture, written, zipped
from typer.testing import CliRunner, Result

from dgbench import cli
from dgbench.data.catalog import lookup
from dgbench.data.domain import UNFINISHED
from dgbench.data.index import find
from dgbench.download.stage import MANIFEST, Stage, read_manifest
from dgbench.errors import DataError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def mirror() -> Iterator[Server]:
    with serving(
        {f"{name}/{archive}": content for name, make in OFFICIAL.items() for archive, content in make().items()}
    ) as server:
        yield server


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DGBENCH_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "data"


def run(data: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["download", *arguments, "--root", str(data)], prog_name="dgbench")


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    return result.stderr[result.stderr.index("error: ") :]


def below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def counts(name: str, data: Path) -> dict[str, int]:
    row = lookup(name)
    return {split: len(find(row, split, data)) for split in row.splits if split in ("train", "val")}


# ---- from a mirror


def test_domains_come_whole_and_are_then_here(mirror: Server, data: Path) -> None:
    result = run(data, "gta", "dark-zurich", "--mirror", mirror.url, "--yes", "--json")
    rows = {row["name"]: row for row in json.loads(done(result))}
    assert {name: row["state"] for name, row in rows.items()} == {"gta5": "downloaded", "dark-zurich": "downloaded"}
    assert rows["gta5"]["files"] == 22
    assert counts("gta5", data) == {"train": 10}
    assert counts("dark-zurich", data) == {"val": 1}
    assert sorted(path.name for path in data.iterdir()) == ["dark-zurich", "gta5"]  # nothing of the work is left
    assert len(mirror.bodies()) == 22
    mirror.requests.clear()
    again = run(data, "gta5", "dark-zurich", "--mirror", mirror.url, "--yes")
    assert done(again).count("already here") == 2
    assert not mirror.requests


def test_the_manifest_lists_archives_and_files(mirror: Server, data: Path) -> None:
    done(run(data, "acdc", "--mirror", mirror.url, "--yes"))
    manifest = json.loads((data / "acdc" / MANIFEST).read_text())
    packed = acdc()
    for archive in manifest["archives"]:
        assert archive["sha256"] == hashlib.sha256(packed[archive["name"]]).hexdigest()
        assert archive["bytes"] == len(packed[archive["name"]])
        assert archive["source"] == f"{mirror.url}/acdc/{archive['name']}"
    listed = {path: size for archive in manifest["archives"] for path, size in archive["files"].items()}
    assert listed == {path: len(content) for path, content in below(data / "acdc").items() if path != MANIFEST}


def test_a_file_that_is_gone_brings_its_archive_again(mirror: Server, data: Path) -> None:
    done(run(data, "acdc", "--mirror", mirror.url, "--yes"))
    whole = below(data / "acdc")
    lost = next(path for path in (data / "acdc").rglob("*_gt_labelTrainIds.png"))
    lost.unlink()
    mirror.requests.clear()
    done(run(data, "acdc-fog", "--mirror", mirror.url, "--yes"))
    assert [path for path, _ in mirror.bodies()] == ["acdc/gt_trainval.zip"]
    now = below(data / "acdc")
    assert {path: now[path] for path in whole if path != MANIFEST} == {p: c for p, c in whole.items() if p != MANIFEST}
    assert read_manifest(data / "acdc") is not None


def test_the_plan_says_what_is_needed_and_moves_nothing(mirror: Server, data: Path) -> None:
    done(run(data, "dark-zurich", "--mirror", mirror.url, "--yes"))
    mirror.requests.clear()
    plan = json.loads(done(run(data, "dark-zurich", "gta5", "idd", "dinov2_l", "--mirror", mirror.url, "--dry-run", "--json")))
    needs = {need["name"]: need for need in plan["needs"]}
    assert needs["dark-zurich"]["state"] == "here"
    size = sum(map(len, gta5().values()))
    assert (needs["gta5"]["files"], needs["gta5"]["bytes"], needs["gta5"]["licence"]) == (21, size, "research, non-commercial")
    assert needs["dinov2_l"]["kind"] == "tower"
    assert plan["free"] == pytest.approx(shutil.disk_usage(data).free, rel=0.1)
    assert plan["room"] >= size
    assert not mirror.bodies()
    assert [path.name for path in data.iterdir()] == ["dark-zurich"]
    assert "21" in done(run(data, "gta5", "--mirror", mirror.url, "--dry-run"))


def test_terms_are_shown_and_must_be_accepted(mirror: Server, data: Path) -> None:
    message = refused(run(data, "gta5", "--mirror", mirror.url))
    assert "GTA5 (Playing for Data): for research and teaching only" in message
    assert f"dgbench download gta5 --mirror {mirror.url} --root {data} --yes" in message
    assert not mirror.bodies()
    assert not data.exists() or not list(data.iterdir())


@pytest.mark.parametrize(("answer", "state"), [("y\n", 0), ("n\n", 1)])
def test_a_terminal_is_asked(answer: str, state: int, mirror: Server, data: Path) -> None:
    import pty

    controller, terminal = os.openpty() if not hasattr(pty, "openpty") else pty.openpty()
    command = [sys.executable, "-m", "dgbench", "download", "dark-zurich", "--mirror", mirror.url, "--root", str(data)]
    process = subprocess.Popen(
        command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True
    )
    os.write(controller, answer.encode())
    _, told = process.communicate(timeout=60)
    os.close(controller), os.close(terminal)
    assert process.returncode == state, told
    assert "Dark Zurich: for research, teaching" in told
    assert (data / "dark-zurich").is_dir() is (state == 0)


def test_a_log_has_a_line_when_a_file_begins_and_ends(mirror: Server, data: Path) -> None:
    size = len(dark_zurich()["Dark_Zurich_val_anon.zip"])
    lines = run(data, "dark-zurich", "--mirror", mirror.url, "--yes").stderr.splitlines()
    assert lines[0].split() == ["name", "state", "files", "size", "licence"]
    assert f"Dark_Zurich_val_anon.zip: {size} B" in lines
    assert f"Dark_Zurich_val_anon.zip: {size} B in 0s" in lines
    assert any(line.startswith("unpacking Dark_Zurich_val_anon.zip: ") and line.endswith(" in 0s") for line in lines)
    assert run(data, "gta5", "--mirror", mirror.url, "--yes", "--quiet").stderr == ""


def test_a_terminal_shows_a_bar_for_each_file(mirror: Server, data: Path) -> None:
    mirror.bytes_per_second = 10_000
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "dgbench", "download", "acdc", "--mirror", mirror.url, "--root", str(data), "--yes"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment(TERM="xterm", COLUMNS="100"))
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 65536):
            shown += block
    except OSError:  # how Linux tells that the other side is closed
        pass
    os.close(ours)
    assert process.wait() == 0, shown
    text = shown.decode()
    assert re.search(r"gt_trainval.zip +\S*━", text)
    assert re.search(r"rgb_anon_trainvaltest.zip +\S*━.* kB/s", text)
    assert text.count("rgb_anon_trainvaltest.zip") > 2  # it moved


def test_no_room_is_told_before_any_byte(mirror: Server, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10_000, 5_000, 5_000))
    message = refused(run(data, "gta5", "--mirror", mirror.url, "--yes"))
    assert message.startswith("error: not enough room: 0.0 GB are needed in")
    assert "make room there, name fewer domains at once" in message
    assert not mirror.bodies()


@pytest.mark.parametrize("switch", ["DGBENCH_OFFLINE"])
def test_offline_says_what_to_run_elsewhere(switch: str, mirror: Server, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(switch, "1")
    message = refused(run(data, "gta5", "--yes"))
    assert f"{switch}=1 forbids downloads; not on this machine: gta5 (21 files, about 57.1 GB)" in message
    assert f"dgbench download gta5 --root {data}, and copy {data} here" in message
    assert done(run(data, "gta5", "--dry-run"))
    assert not mirror.requests


def test_a_bad_line_does_not_matter(mirror: Server, data: Path) -> None:
    mirror.faults = ["cut"]
    done(run(data, "dark-zurich", "acdc", "--mirror", mirror.url, "--yes", "--jobs", "1"))
    assert counts("acdc", data) == {"train": 4, "val": 4}


def test_what_one_domain_lacks_does_not_stop_the_others(mirror: Server, data: Path) -> None:
    del mirror.files["acdc/gt_trainval.zip"]
    result = run(data, "acdc", "dark-zurich", "mapillary", "--mirror", mirror.url, "--yes", "--json")
    message = refused(result)
    assert f"does not give out {mirror.url}/acdc/gt_trainval.zip: it has no such file (404)" in message
    assert {row["name"] for row in json.loads(result.stdout)} == {"dark-zurich", "mapillary"}
    assert not (data / "acdc").exists()
    mirror.files["acdc/gt_trainval.zip"] = acdc()["gt_trainval.zip"]
    mirror.requests.clear()
    done(run(data, "acdc", "--mirror", mirror.url, "--yes"))
    assert [path for path, _ in mirror.bodies()] == ["acdc/gt_trainval.zip"]  # the images had come


def test_an_archive_that_a_set_can_do_without_is_not_missed(mirror: Server, data: Path) -> None:
    del mirror.files["gta5/read_mapping.zip"]
    result = run(data, "gta5", "--mirror", mirror.url, "--yes")
    assert "gta5 is complete without read_mapping.zip" in done(result) + result.stderr
    mirror.requests.clear()
    assert "already here" in done(run(data, "gta5", "--mirror", mirror.url, "--yes"))


HOSTILE = {
    "leaves": zipped({"rgb_anon/val/night/a/1_rgb_anon.png": b"x", "../../../outside.png": b"bad"}),
    "truncated": dark_zurich()["Dark_Zurich_val_anon.zip"][:-200],
    "other": zipped({"holiday/1.jpg": b"x"}),
    "page": b"<!DOCTYPE html><html>log in</html>",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_bad_archive_leaves_nothing_and_can_be_mended(kind: str, mirror: Server, data: Path) -> None:
    good = mirror.files["dark-zurich/Dark_Zurich_val_anon.zip"]
    mirror.files["dark-zurich/Dark_Zurich_val_anon.zip"] = HOSTILE[kind]
    message = refused(run(data, "dark-zurich", "acdc", "--mirror", mirror.url, "--yes"))
    assert "Dark_Zurich_val_anon.zip" in message
    assert "the archive is removed; run again: dgbench download" in message
    assert not (data / "dark-zurich").exists()
    assert counts("acdc", data) == {"train": 4, "val": 4}
    assert not list(data.parent.rglob("outside.png"))
    mirror.files["dark-zurich/Dark_Zurich_val_anon.zip"] = good
    done(run(data, "dark-zurich", "--mirror", mirror.url, "--yes"))
    assert counts("dark-zurich", data) == {"val": 1}


def test_a_wrong_checksum_is_refused(mirror: Server, data: Path) -> None:
    # the labels here are not the published file, whose md5 is known
    message = refused(run(data, "bdd", "--mirror", mirror.url, "--yes"))
    found = hashlib.md5(bdd100k()["bdd100k_sem_seg_labels_trainval.zip"]).hexdigest()
    assert f"its md5 is {found}, stated is 9a2968dde3345eeb689cffb1e26f9c78" in message
    assert not (data / "bdd100k").exists()


def test_no_half_set_is_ever_seen(mirror: Server, data: Path) -> None:
    """While nine of ten archives are unpacked, a loader still finds no folder."""
    mirror.faults = [(404, {})]
    refused(run(data, "gta5", "--mirror", mirror.url, "--yes", "--jobs", "1"))
    assert not (data / "gta5").exists()
    assert len(Stage(data / "gta5").receipts()) == 20


def test_two_at_once_do_not_get_into_each_others_way(mirror: Server, data: Path) -> None:
    with Stage(data / "dark-zurich").locked():
        message = refused(run(data, "dark-zurich", "--mirror", mirror.url, "--yes"))
    assert f"another dgbench is downloading into {data / 'dark-zurich'}" in message
    done(run(data, "dark-zurich", "--mirror", mirror.url, "--yes"))


# ---- passwords, and what one domain may not do to another


def test_a_password_in_the_address_of_a_mirror_is_used_and_nowhere_told(mirror: Server, data: Path) -> None:
    address = mirror.url.replace("://", "://user:se%2Fcret@")
    del mirror.files["acdc/gt_trainval.zip"]
    mirror.faults = [(503, {})]
    results = [run(data, "acdc", "dark-zurich", "--mirror", address, *more) for more in (["--dry-run"], ["--yes"], ["--json"])]
    mirror.files["dark-zurich/Dark_Zurich_val_anon.zip"] = HOSTILE["truncated"]
    shutil.rmtree(data / "dark-zurich")
    results.append(run(data, "dark-zurich", "--mirror", address, "--yes"))
    assert [result.exit_code for result in results] == [0, 1, 1, 1]
    assert set(mirror.logins) == {"Basic dXNlcjpzZS9jcmV0"}
    stored = b"".join(path.read_bytes() for path in data.rglob("*.json"))
    assert mirror.url.encode() in stored
    shown = "".join(result.stdout + result.stderr for result in results) + stored.decode()
    assert not re.search("cret|user:", shown)
    assert f"run again: dgbench download dark-zurich --mirror {mirror.url}" in results[-1].stderr
    process = started(data, Server(address, {}), "nosuch")
    assert "cret" not in "".join(process.communicate())


@pytest.mark.parametrize(
    "address",
    ["nas/sets", "ftp://nas/sets", "http://", "http://[1/sets", "http://us er:secret@nas", "http://user:sec/ret@nas"],
)
def test_a_mirror_that_is_no_address_is_refused_at_once(address: str, data: Path) -> None:
    message = refused(run(data, "dark-zurich", "--mirror", address, "--yes"))
    assert "is not the URL of a server" in message
    assert not [word for word in ("secret", "sec/ret", "ret@") if word in message]
    assert not data.exists()


def test_a_token_of_a_mirror_stays_at_the_end_of_each_address(mirror: Server, data: Path) -> None:
    for name in list(mirror.files):
        mirror.files[f"{name}?token=hidden"] = mirror.files.pop(name)
    done(run(data, "dark-zurich", "--mirror", f"{mirror.url}/?token=hidden", "--yes"))
    assert counts("dark-zurich", data) == {"val": 1}
    assert "hidden" not in (data / "dark-zurich" / MANIFEST).read_text()


def test_what_the_file_system_refuses_one_domain_does_not_stop_the_others(mirror: Server, data: Path) -> None:
    home = data / ".dgbench-download"
    written({"parts": b"a file where a folder belongs"}, home / "acdc")
    result = run(data, "acdc", "dark-zurich", "mapillary", "--mirror", mirror.url, "--yes", "--json")
    assert str(home / "acdc/parts") in refused(result)
    assert {row["name"] for row in json.loads(result.stdout)} == {"dark-zurich", "mapillary"}
    (home / "acdc/parts").unlink()
    done(run(data, "acdc", "--mirror", mirror.url, "--yes"))


def test_a_domain_that_is_being_downloaded_elsewhere_does_not_stop_the_others(mirror: Server, data: Path) -> None:
    with Stage(data / "acdc").locked():
        result = run(data, "acdc", "dark-zurich", "--mirror", mirror.url, "--yes", "--json")
    assert f"another dgbench is downloading into {data / 'acdc'}" in refused(result)
    assert [row["name"] for row in json.loads(result.stdout)] == ["dark-zurich"]


def test_a_damaged_archive_of_the_users_does_not_stop_the_others(data: Path, tmp_path: Path) -> None:
    written(dark_zurich() | mapillary() | acdc(), tmp_path / "Downloads")
    (tmp_path / "Downloads/gt_trainval.zip").write_bytes(acdc()["gt_trainval.zip"][:-30])
    arguments = ("acdc", "dark-zurich", "mapillary", "--from", str(tmp_path / "Downloads"))
    result = run(data, *arguments, "--json")
    message = refused(result)
    assert message.startswith("error: ")
    assert "gt_trainval.zip is" in message
    assert {row["name"] for row in json.loads(result.stdout)} == {"dark-zurich", "mapillary"}
    assert "gt_trainval.zip" in refused(run(data, *arguments, "--dry-run"))


@pytest.mark.parametrize("name", [MANIFEST, UNFINISHED])
def test_an_archive_does_not_bring_files_that_only_dgbench_writes(name: str, mirror: Server, data: Path) -> None:
    stem = "val/night/a/a"
    files = {f"rgb_anon/{stem}_rgb_anon.png": b"x", f"gt/{stem}_gt_labelTrainIds.png": b"y", name: b"{}"}
    mirror.files["dark-zurich/Dark_Zurich_val_anon.zip"] = zipped(files)
    assert f"holds `{name}`, which only dgbench writes" in refused(run(data, "dark-zurich", "--mirror", mirror.url, "--yes"))
    assert not (data / "dark-zurich").exists()


# ---- stopped in the middle


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DGBENCH_", "HF_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "NO_PROXY": "127.0.0.1", **more}


def started(data: Path, server: Server, *names: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-m", "dgbench", "download", *names, "--mirror", server.url, "--root", str(data), "--yes"]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def many_files(count: int) -> bytes:
    files = {f"rgb_anon/val/night/a/{n}_rgb_anon.png": b"%d" % n for n in range(count)}
    return zipped(files | {name.replace("rgb_anon", "gt", 1).replace("rgb_anon", "gt_labelTrainIds"): b"y" for name in files})


@pytest.mark.parametrize("moment", ["transfer", "unpack"])
def test_a_kill_at_any_moment_is_taken_up(moment: str, mirror: Server, data: Path, tmp_path: Path) -> None:
    mirror.files["dark-zurich/Dark_Zurich_val_anon.zip"] = content = many_files(600)
    mirror.bytes_per_second = 2e5 if moment == "transfer" else None
    home = data / ".dgbench-download" / "dark-zurich"
    part, half = home / "archives" / "Dark_Zurich_val_anon.zip.part", home / "parts" / ".Dark_Zurich_val_anon.zip.unpacking"

    def begun() -> bool:
        if moment == "transfer":
            return part.is_file() and part.stat().st_size > 50_000
        return (half / "rgb_anon/val/night/a/30_rgb_anon.png").exists()

    process = started(data, mirror, "dark-zurich")
    while not begun():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (data / "dark-zurich").exists()
    kept = part.stat().st_size if moment == "transfer" else len(content)
    mirror.bytes_per_second = None
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
    mirror.bytes_per_second = 3e5
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


# ---- from what is here


@pytest.mark.parametrize("name", [name for name in OFFICIAL if name != "bdd100k"])
def test_a_folder_of_archives_becomes_the_domain(name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGBENCH_OFFLINE", "1")
    downloads = written(OFFICIAL[name](), tmp_path / "Downloads")
    before = below(downloads)
    row = json.loads(done(run(data, name, "--from", str(downloads), "--json")))[0]
    assert row["state"] == "unpacked"
    assert all(count > 0 for count in counts(name, data).values())
    assert Path(row["folder"]) == data / lookup(name).folders[0]
    assert below(downloads) == before
    assert "already here" in done(run(data, name))


def test_one_archive_at_a_time_waits_for_the_others(data: Path, tmp_path: Path) -> None:
    downloads = written(acdc(), tmp_path / "Downloads")
    message = refused(run(data, "acdc", "--from", str(downloads / "gt_trainval.zip")))
    assert "Missing: rgb_anon_trainvaltest.zip; unpacked already and waiting for it: gt_trainval.zip" in message
    assert not (data / "acdc").exists()
    done(run(data, "acdc", "--from", str(downloads / "rgb_anon_trainvaltest.zip")))
    assert counts("acdc", data) == {"train": 4, "val": 4}


def test_archives_are_known_by_what_is_in_them(data: Path, tmp_path: Path) -> None:
    downloads = tmp_path / "Downloads"
    written({"An_o5cmHOsS1VbLdaKx.zip": mapillary()["mapillary-vistas-dataset_public_v1.2.zip"]}, downloads / "new")
    written({"gt_trainval (1).zip": acdc()["gt_trainval.zip"], "images.zip": acdc()["rgb_anon_trainvaltest.zip"]}, downloads)
    written({"holiday.zip": zipped({"1.jpg": b"x"}), "broken.zip": b"PK nothing", "notes.txt": b""}, downloads)
    done(run(data, "mapillary", "acdc", "--from", str(downloads)))
    assert counts("mapillary", data) == {"train": 1, "val": 1}
    assert counts("acdc", data) == {"train": 4, "val": 4}


def test_one_archive_may_stand_for_several(data: Path, tmp_path: Path) -> None:
    both = {f"bdd100k/images/10k/{s}/{s}.jpg": picture(1, ".jpg") for s in ("train", "val", "test")}
    masks = {f"bdd100k/labels/sem_seg/masks/{s}/{s}.png": labels(0) for s in ("train", "val")}
    written({"my images.zip": zipped(both), "my labels.zip": zipped(masks)}, tmp_path / "Downloads")
    done(run(data, "bdd", "--from", str(tmp_path / "Downloads")))
    assert counts("bdd100k", data) == {"train": 1, "val": 1}


def test_an_official_name_with_other_content_is_told(data: Path, tmp_path: Path) -> None:
    downloads = written({**acdc(), "gt_trainval.zip": zipped({"other.txt": b"x"})}, tmp_path / "Downloads")
    message = refused(run(data, "acdc", "--from", str(downloads)))
    assert f"{downloads / 'gt_trainval.zip'} has the name of an archive of `acdc`, but holds no `gt/*/train/*/*" in message


def test_a_known_archive_that_differs_from_the_published_one_is_told(data: Path, tmp_path: Path) -> None:
    downloads = written(bdd100k(), tmp_path / "Downloads")
    message = refused(run(data, "bdd", "--from", str(downloads)))
    assert "bdd100k_sem_seg_labels_trainval.zip is damaged, or another file than its owner states" in message
    assert (downloads / "bdd100k_sem_seg_labels_trainval.zip").is_file()


@pytest.mark.skipif(shutil.which("zip") is None, reason="needs Info-ZIP")
def test_mapillary_comes_in_volumes(data: Path, tmp_path: Path) -> None:
    whole = written({"set.zip": mapillary("v2.0")["mapillary-vistas-dataset_public_v2.0.zip"]}, tmp_path)
    with zipfile.ZipFile(whole / "set.zip") as archive:
        archive.extractall(tmp_path / "in")
    (tmp_path / "in/training/images/large.jpg").write_bytes(os.urandom(200_000))
    (tmp_path / "Downloads").mkdir()
    target = tmp_path / "Downloads/mapillary-vistas-dataset_public_v2.0.zip"
    subprocess.run(["zip", "-q", "-r", "-s", "64k", str(target), "."], cwd=tmp_path / "in", check=True)
    done(run(data, "mapillary-v2", "mapillary", "--from", str(tmp_path / "Downloads")))
    assert counts("mapillary-v2", data) == {"train": 1, "val": 1}
    assert counts("mapillary", data) == {"train": 1, "val": 1}


def test_a_set_that_lies_in_the_folder_of_another_is_here(data: Path, tmp_path: Path) -> None:
    downloads = written(mapillary("v2.0"), tmp_path / "Downloads")
    done(run(data, "mapillary", "--from", str(downloads)))
    row = json.loads(done(run(data, "mapillary-v2", "--json")))[0]
    assert (row["state"], row["folder"]) == ("here", str(data / "mapillary"))


@pytest.mark.parametrize("given", ["", "..", "inner"])
def test_an_unpacked_tree_is_linked(given: str, data: Path, tmp_path: Path) -> None:
    place = tmp_path / "disk" / ("cityscapes/cityscapes" if given == "inner" else "cityscapes")
    for content in cityscapes().values():
        (tmp_path / "a.zip").write_bytes(content)
        with zipfile.ZipFile(tmp_path / "a.zip") as archive:
            archive.extractall(place)
    before = below(place)
    row = json.loads(done(run(data, "city", "--from", str(place.parent if given else place), "--json")))[0]
    assert row["state"] == "linked"
    assert "train 1 of 2,975 (official), val 1 of 500 (official)" in row["note"]
    assert counts("cityscapes", data) == {"train": 1, "val": 1}
    assert (data / "cityscapes").resolve() == place
    assert below(place) == before
    assert "already here" in done(run(data, "cityscapes"))


def test_a_tree_that_is_none_is_refused_and_not_linked(data: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "idd" / "photos").mkdir(parents=True)
    message = refused(run(data, "idd", "--from", str(tmp_path / "disk")))
    assert "does not hold `idd` in a layout that is known" in message
    assert not (data / "idd").is_symlink()
    assert "no such file or folder: " in refused(run(data, "idd", "--from", str(tmp_path / "nowhere")))


def test_a_tree_in_another_layout_is_linked(data: Path, tmp_path: Path) -> None:
    written({f"{n}.png": picture(1, ".png") for n in range(3)}, tmp_path / "converted" / "images" / "train")
    written({f"{n}_labelTrainIds.png": labels(0) for n in range(3)}, tmp_path / "converted" / "labels" / "train")
    row = json.loads(done(run(data, "gta5", "--from", str(tmp_path / "converted"), "--json")))[0]
    assert row["state"] == "linked"
    assert counts("gta5", data) == {"train": 3}


def test_a_folder_of_the_name_does_not_hide_the_archives(data: Path, tmp_path: Path) -> None:
    downloads = written(OFFICIAL["idd"](), tmp_path / "Downloads")
    (downloads / "idd" / "photos").mkdir(parents=True)
    assert json.loads(done(run(data, "idd", "--from", str(downloads), "--json")))[0]["state"] == "unpacked"


def test_a_set_that_is_here_in_another_layout_is_left_alone(mirror: Server, data: Path) -> None:
    # converted by the scripts of a paper
    written({f"{n}.png": picture(1, ".png") for n in range(3)}, data / "gta" / "images")
    written({f"{n}_labelTrainIds.png": labels(0) for n in range(3)}, data / "gta" / "labels")
    row = json.loads(done(run(data, "gta5", "--mirror", mirror.url, "--json")))[0]
    assert (row["state"], row["folder"], row["files"]) == ("here", str(data / "gta"), None)
    assert "official, train ids" in row["note"]
    assert not mirror.bodies()


def test_what_a_folder_lacks_is_added_to_it(mirror: Server, data: Path, tmp_path: Path) -> None:
    archives = written(acdc(), tmp_path / "archives")
    with zipfile.ZipFile(archives / "rgb_anon_trainvaltest.zip") as archive:
        archive.extractall(data / "ACDC")
    done(run(data, "acdc", "--mirror", mirror.url, "--yes"))
    assert [path for path, _ in mirror.bodies()] == ["acdc/gt_trainval.zip"]
    assert counts("acdc", data) == {"train": 4, "val": 4}
    assert not (data / "ACDC" / UNFINISHED).exists()
    assert [path.name for path in data.iterdir()] == ["ACDC"]


def test_files_of_the_users_own_are_never_overwritten(mirror: Server, data: Path) -> None:
    written({"license.txt": b"my notes"}, data / "cityscapes")
    message = refused(run(data, "cityscapes", "--mirror", mirror.url, "--yes"))
    assert f"{data / 'cityscapes' / 'license.txt'} is there already and is not the file that was downloaded" in message
    assert below(data / "cityscapes") == {"license.txt": b"my notes"}
    (data / "cityscapes" / "license.txt").unlink()
    mirror.requests.clear()
    done(run(data, "cityscapes", "--mirror", mirror.url, "--yes"))
    assert not mirror.bodies()  # nothing was transferred twice
    assert counts("cityscapes", data) == {"train": 1, "val": 1}


def test_an_interrupted_addition_is_not_read_and_is_finished(mirror: Server, data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(written(acdc(), tmp_path) / "rgb_anon_trainvaltest.zip") as archive:
        archive.extractall(data / "acdc")
    mirror.faults = [(404, {})]
    refused(run(data, "acdc", "--mirror", mirror.url, "--yes"))
    (data / "acdc" / UNFINISHED).write_text("")  # as a kill in the middle of adding leaves it
    (data / "acdc" / "gt/fog/val/GP01").mkdir(parents=True)
    with pytest.raises(DataError, match="files are being added to"):
        find(lookup("acdc"), "val", data)
    plan: dict[str, Any] = json.loads(done(run(data, "acdc", "--mirror", mirror.url, "--dry-run", "--json")))
    assert plan["needs"][0]["state"] == "to fetch"
    done(run(data, "acdc", "--mirror", mirror.url, "--yes"))
    assert counts("acdc", data) == {"train": 4, "val": 4}
    assert not (data / "acdc" / UNFINISHED).exists()


# ---- by hand


@pytest.mark.parametrize("name", ["mapillary", "acdc", "idd", "wilddash2"])
def test_a_site_that_wants_a_browser_comes_with_steps(name: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_sockets(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "create_connection", no_sockets)
    message = refused(run(data, name))
    assert f"`{name}` can only be downloaded in a browser. Missing: " in message
    assert "  1. open https://" in message
    assert f"run: dgbench download {name} --from FOLDER" in message


def test_what_must_be_done_by_hand_does_not_stop_the_rest(data: Path, tmp_path: Path) -> None:
    downloads = written(dark_zurich(), tmp_path / "Downloads")
    arguments = ("acdc", "dark-zurich", "--from", str(downloads))
    told = done(run(data, *arguments, "--dry-run"))
    assert "by hand" in told
    assert "dgbench download acdc tells the steps" in told
    result = run(data, *arguments)
    assert "`acdc` can only be downloaded in a browser" in refused(result)
    assert "dark-zurich" in result.stdout
    assert counts("dark-zurich", data) == {"val": 1}

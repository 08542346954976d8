"""Domains from a mirror on the loopback that misbehaves."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from domain_downloads import below, counts, done, environment, refused, run, started
from loopback_files import Server
from small_sets import acdc, bdd100k, dark_zurich, gta5, mapillary, written, zipped

from dgbench.data.domain import UNFINISHED
from dgbench.download.stage import MANIFEST, Stage, read_manifest


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
    assert any(re.fullmatch(rf"Dark_Zurich_val_anon\.zip: {size} B in \d+s", line) for line in lines)
    assert any(re.fullmatch(r"unpacking Dark_Zurich_val_anon\.zip: .* in \d+s", line) for line in lines)
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

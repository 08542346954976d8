"""Domains from archives and trees that are here already, and those that a user must fetch by hand."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from domain_downloads import below, counts, done, refused, run
from loopback_files import Server
from small_sets import OFFICIAL, acdc, bdd100k, cityscapes, dark_zurich, labels, mapillary, picture, written, zipped

from dgbench.data.catalog import lookup
from dgbench.data.domain import UNFINISHED
from dgbench.data.index import find
from dgbench.errors import DataError


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

"""The table of sources against the table of domains, and against archives packed as the owners pack theirs."""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from small_sets import OFFICIAL

from dgbench.data import catalog, domains
from dgbench.download.sources import SOURCES, matches, source

DOCS = Path(__file__).parents[3] / "docs" / "download.md"


def names_in(name: str, content: bytes) -> list[str]:
    if name.endswith(".zip"):
        return zipfile.ZipFile(io.BytesIO(content)).namelist()
    return tarfile.open(fileobj=io.BytesIO(content)).getnames()


def test_every_published_domain_has_a_source_and_every_source_a_domain() -> None:
    published = {name for name, row in domains.DOMAINS.items() if not row.procedural}
    listed = {name for row in SOURCES.values() for name in (row.domain, *row.also)}
    assert listed == published
    assert source("acdc-fog") is source("acdc")
    assert source("bdd") is SOURCES["bdd100k"]
    assert source("streets-fog@0.5") is None


@pytest.mark.parametrize("name", SOURCES)
def test_a_row_says_how_the_set_is_handed_out(name: str) -> None:
    row = SOURCES[name]
    commercial = catalog.lookup(name).licence.startswith("CC BY-SA")
    assert row.must_be_accepted is not commercial
    assert bool(row.steps) is (row.way == "browser")
    assert (row.way == "hub") is (row.repo is not None) is (not row.archives)
    for archive in row.archives:
        assert (archive.url is not None) is (row.way == "open")
        assert archive.url is None or (urlsplit(archive.url).scheme in ("http", "https") and archive.url.endswith(archive.name))
        assert archive.gives
        assert archive.md5 is None or len(archive.md5) == 32
    assert len({archive.name for archive in row.archives}) == len(row.archives)


@pytest.mark.parametrize("name", SOURCES)
def test_the_list_of_domains_says_of_access_what_the_way_to_fetch_it_needs(name: str) -> None:
    needs = {"open": ("open",), "hub": ("open",), "csDownload": ("account",), "browser": ("account", "request")}
    assert catalog.lookup(name).access in needs[SOURCES[name].way]


def test_the_docs_say_of_access_what_the_list_of_domains_says() -> None:
    words = {"open": ("open", "the Hub; free"), "account": ("an account",), "request": ("a form",)}
    rows = re.findall(r"^\| (`[a-z`, 0-9-]+) \| [^|]+ \| ([^|]+) \|$", DOCS.read_text(encoding="utf-8"), re.M)
    told = {name: text for names, text in rows for name in re.findall(r"`([^`]+)`", names)}
    assert told.keys() == SOURCES.keys()
    assert not {name: text for name, text in told.items() if not text.startswith(words[catalog.lookup(name).access])}


@pytest.mark.parametrize("name", OFFICIAL)
def test_what_an_archive_gives_is_what_its_owner_packs(name: str) -> None:
    row, packed = SOURCES[name], OFFICIAL[name]()
    assert set(packed) == {archive.name for archive in row.archives}
    for archive in row.archives:
        placed = [row.place(member) for member in names_in(archive.name, packed[archive.name])]
        assert not [glob for glob in archive.gives if not any(matches(path, glob) for path in placed)]


@pytest.mark.parametrize(
    ("name", "member", "place"),
    [
        ("bdd100k", "bdd100k/images/10k/val/a.jpg", "images/10k/val/a.jpg"),
        ("gta5", "images/00001.png", "images/00001.png"),
        ("synthia", "RAND_CITYSCAPES/GT/LABELS/0.png", "GT/LABELS/0.png"),
        ("idd", "IDD_Segmentation/gtFine/val/0/a_gtFine_polygons.json", "gtFine/val/0/a_gtFine_polygons.json"),
        ("mapillary", "mapillary-vistas/validation/images/a.jpg", "validation/images/a.jpg"),
        ("wilddash2", "wd_public_02/panoptic.json", "panoptic.json"),
        ("acdc", "rgb_anon/fog/val/gt/a_rgb_anon.png", "rgb_anon/fog/val/gt/a_rgb_anon.png"),
        ("cityscapes", "license.txt", "license.txt"),
    ],
)
def test_what_stands_above_the_official_layout_is_cut_off(name: str, member: str, place: str) -> None:
    assert SOURCES[name].place(member) == place


@pytest.mark.parametrize(
    ("path", "glob", "expected"),
    [
        ("images/1.png", "images/*.png", True),
        ("images/train/1.png", "images/*.png", False),
        ("other/images/1.png", "images/*.png", False),
        ("split.mat", "read_mapping/split.mat|split.mat", True),
        ("a/v1.2/labels/1.png", "a/labels/*.png|a/v1.2/labels/*.png", True),
    ],
)
def test_a_star_stays_within_a_folder(path: str, glob: str, expected: bool) -> None:
    assert matches(path, glob) is expected

"""Archives from outside: what is in them comes out byte for byte, and nothing ever leaves the folder."""

from __future__ import annotations

import os
import random
import resource
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest
from made_archives import below, listed, nothing_outside, special, stored, tarred, zipped

from dgbench.download.archives import ArchiveError, Limits, members, safe_path, unpack
from dgbench.errors import DataError

FILES = {"images/00001.png": b"one" * 100, "images/sub/00002.png": random.Random(1).randbytes(5000), "README": b""}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_comes_out_as_it_went_in(method: int, tmp_path: Path) -> None:
    archive = zipped(tmp_path / "set.zip", FILES, method)
    assert sorted(members(archive)) == sorted(FILES)
    assert unpack(archive, tmp_path / "out") == {name: len(content) for name, content in FILES.items()}
    assert below(tmp_path / "out") == FILES


@pytest.mark.parametrize("kind", ["", "gz", "bz2", "xz"])
def test_a_tar_comes_out_as_it_went_in(kind: str, tmp_path: Path) -> None:
    archive = tarred(tmp_path / f"set.tar.{kind}".rstrip("."), *FILES.items(), mode=f"w:{kind}")
    assert sorted(members(archive)) == sorted(FILES)
    unpack(archive, tmp_path / "out")
    assert below(tmp_path / "out") == FILES


def test_an_archive_is_known_by_its_bytes_not_by_its_name(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "set.tar.gz", FILES)
    unpack(archive, tmp_path / "out")
    assert below(tmp_path / "out") == FILES


def test_members_are_placed_and_left_out(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "set.zip", FILES)
    unpack(archive, tmp_path / "out", lambda name: name.removeprefix("images/") if name.endswith(".png") else None)
    assert set(below(tmp_path / "out")) == {"00001.png", "sub/00002.png"}


def test_backslashes_separate_folders(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "set.zip", {"RAND\\GT\\LABELS\\0.png": b"x", "RAND\\RGB\\": b""})
    unpack(archive, tmp_path / "out")
    assert below(tmp_path / "out") == {"RAND/GT/LABELS/0.png": b"x"}


def test_what_systems_add_is_left_out(tmp_path: Path) -> None:
    clutter = {"__MACOSX/images/._1.png": b"x", "images/.DS_Store": b"x", "images/Thumbs.db": b"x", "images/._1.png": b"x"}
    unpack(zipped(tmp_path / "set.zip", {**FILES, **clutter}), tmp_path / "out")
    assert below(tmp_path / "out") == FILES


ESCAPES = ["../out.png", "images/../../out.png", "/tmp/out.png", "..\\out.png", "C:\\out.png", "c:out.png", "\\out.png", "a\nb"]


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_path_that_leaves_the_folder_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    files = [("images/1.png", b"good"), (name, b"bad")]
    archive = zipped(tmp_path / "set.zip", dict(files)) if kind == "zip" else tarred(tmp_path / "set.tar", *files)
    with pytest.raises(ArchiveError, match="is not unpacked: `.*` would be written outside the folder"):
        unpack(archive, tmp_path / "out")
    nothing_outside(tmp_path, archive.name)


@pytest.mark.parametrize("name", ["images/1.png", "./images//1.png", "a..b/c...d", "dir/..png", "ünï/1.png"])
def test_ordinary_paths_are_kept(name: str) -> None:
    assert safe_path(name) == name.replace("./images//", "images/")


@pytest.mark.parametrize(
    "entry",
    [
        special("link", tarfile.SYMTYPE, "/etc/passwd"),
        special("link", tarfile.SYMTYPE, "images/1.png"),
        special("hard", tarfile.LNKTYPE, "../outside"),
        special("pipe", tarfile.FIFOTYPE),
        special("device", tarfile.CHRTYPE),
    ],
    ids=lambda entry: f"{entry.name}-{entry.linkname}",
)
def test_links_and_devices_are_refused(entry: tarfile.TarInfo, tmp_path: Path) -> None:
    archive = tarred(tmp_path / "set.tar", entry, ("link/1.png", b"through"))
    with pytest.raises(ArchiveError, match="is a link or a device"):
        unpack(archive, tmp_path / "out")
    nothing_outside(tmp_path, archive.name)


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    # as Info-ZIP stores one
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to("/etc")
    info = zipfile.ZipInfo("link")
    info.create_system, info.external_attr = 3, (tmp_path / "in" / "link").lstat().st_mode << 16
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr(info, "/etc")
        archive.writestr("link/passwd", b"bad")
    with pytest.raises(ArchiveError, match="`link` is a link or a device"):
        unpack(tmp_path / "set.zip", tmp_path / "out")
    assert not (tmp_path / "out" / "link").exists()


@pytest.mark.parametrize("pair", [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a/b", "a\\b")])
def test_a_path_given_twice_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    archive = tarred(tmp_path / "set.tar", *((name, b"x") for name in pair))
    with pytest.raises(ArchiveError, match="twice"):
        unpack(archive, tmp_path / "out")


SMALL = Limits(ratio=100, always=1 << 16, files=50)


def test_a_bomb_is_refused_by_what_it_declares(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "set.zip", {f"{n}.png": bytes(1 << 20) for n in range(4)})
    assert archive.stat().st_size * 100 < 4 << 20
    with pytest.raises(ArchiveError, match="it unpacks to at least 4,194,304 bytes, more than"):
        unpack(archive, tmp_path / "out", limits=SMALL)
    assert not below(tmp_path / "out")


def test_a_bomb_that_declares_little_is_stopped(tmp_path: Path) -> None:
    path = zipped(tmp_path / "set.zip", {"0.png": bytes(4 << 20)})
    lying = path.read_bytes().replace(struct.pack("<I", 4 << 20), struct.pack("<I", 1000))
    path.write_bytes(lying)
    with pytest.raises(ArchiveError, match="longer than declared|is damaged"):
        unpack(path, tmp_path / "out", limits=SMALL)
    assert sum(map(len, below(tmp_path / "out").values())) <= 1000


def test_a_bomb_in_a_tar_is_stopped_on_the_way(tmp_path: Path) -> None:
    archive = tarred(tmp_path / "set.tar.gz", *((f"{n}.png", bytes(1 << 20)) for n in range(40)), mode="w:gz")
    with pytest.raises(ArchiveError, match="it unpacks to at least"):
        unpack(archive, tmp_path / "out", limits=SMALL)
    assert sum(map(len, below(tmp_path / "out").values())) < 12 << 20


def test_more_files_than_any_set_has_are_refused(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "set.zip", {f"{n}.png": b"" for n in range(51)})
    with pytest.raises(ArchiveError, match="it holds more than 50 files"):
        unpack(archive, tmp_path / "out", limits=SMALL)


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar", "tar.xz"])
@pytest.mark.parametrize("left", [0.3, 0.8])
def test_a_truncated_archive_is_refused(kind: str, left: float, tmp_path: Path) -> None:
    files = {f"{n}.png": random.Random(n).randbytes(20_000) for n in range(5)}
    path = tmp_path / f"set.{kind}"
    if kind == "zip":
        zipped(path, files)
    else:
        tarred(path, *files.items(), mode=f"w:{kind.removeprefix('tar').lstrip('.')}")
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    with pytest.raises(ArchiveError, match="damaged or cut off"):
        unpack(path, tmp_path / "out")


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = zipped(tmp_path / "set.zip", FILES, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[content.index(FILES["images/sub/00002.png"]) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="damaged or cut off: Bad CRC-32"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "what"), [(b"<!DOCTYPE html>", "a web page"), (b"hello" * 300, "not an archive"), (b"", "not")]
)
def test_what_is_no_archive_is_told(content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(content)
    with pytest.raises(ArchiveError, match=f"set.zip is {what}"):
        unpack(tmp_path / "set.zip", tmp_path / "out")


@pytest.mark.skipif(shutil.which("zip") is None, reason="needs Info-ZIP")
def test_a_zip_with_a_password_is_told(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"x" * 1000)
    subprocess.run(["zip", "-q", "-P", "secret", "set.zip", "1.png"], cwd=tmp_path, check=True)
    with pytest.raises(ArchiveError, match="is locked by a password"):
        unpack(tmp_path / "set.zip", tmp_path / "out")


@pytest.mark.skipif(shutil.which("zip") is None, reason="needs Info-ZIP")
def test_a_split_zip_is_read_from_its_volumes(tmp_path: Path) -> None:
    content = {f"training/images/{n}.jpg": random.Random(n).randbytes(40_000) for n in range(8)}
    for name, data in content.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    subprocess.run(["zip", "-q", "-r", "-s", "64k", "set.zip", "training"], cwd=tmp_path, check=True)
    assert (tmp_path / "set.z04").is_file()
    assert sorted(members(tmp_path / "set.zip")) == sorted(content)
    unpack(tmp_path / "set.zip", tmp_path / "out")
    assert below(tmp_path / "out") == content
    (tmp_path / "set.z02").unlink()
    with pytest.raises(DataError, match=r"set.zip is the last of \d volumes, and set.z02 is not beside it"):
        unpack(tmp_path / "set.zip", tmp_path / "again")


def test_a_large_split_zip_speaks_of_volumes_in_zip64_records(tmp_path: Path) -> None:
    # by APPNOTE.TXT 4.3.14 to 4.3.16: two volumes, one file in each, the end records in 64-bit form
    first, second = stored("a.jpg", b"A" * 500), stored("b.jpg", b"B" * 700)
    (tmp_path / "set.z01").write_bytes(b"PK\x07\x08" + first)
    directory = listed("a.jpg", b"A" * 500, volume=0, offset=4) + listed("b.jpg", b"B" * 700, volume=1, offset=0)
    start, size = len(second), len(directory)
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 1, 1, 2, 2, size, start)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 1, start + size, 2)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "set.zip").write_bytes(second + directory + end64 + locator + end)
    unpack(tmp_path / "set.zip", tmp_path / "out")
    assert below(tmp_path / "out") == {"a.jpg": b"A" * 500, "b.jpg": b"B" * 700}


def rar(files: Mapping[str, bytes]) -> bytes:
    """A rar (version 4) of stored files, as technote.txt of WinRAR describes it."""

    def block(kind: int, flags: int, rest: bytes) -> bytes:
        head = struct.pack("<BHH", kind, flags, 7 + len(rest)) + rest
        return struct.pack("<H", zlib.crc32(head) & 0xFFFF) + head

    content = b"Rar!\x1a\x07\x00" + block(0x73, 0, bytes(6))
    for name, data in files.items():
        fields = (len(data), len(data), 3, zlib.crc32(data), 0x21 << 16, 20, 0x30, len(name), 0o100644)
        content += block(0x74, 0x8000, struct.pack("<IIBIIBBHI", *fields) + name.encode()) + data
    return content + block(0x7B, 0x4000, b"")


@pytest.mark.skipif(shutil.which("bsdtar") is None and shutil.which("unrar") is None, reason="needs bsdtar or unrar")
def test_a_rar_is_unpacked_by_a_program_that_is_here(tmp_path: Path) -> None:
    files = {"RAND_CITYSCAPES/RGB/0.png": b"x" * 1000, "RAND_CITYSCAPES/GT/LABELS/0.png": random.Random(0).randbytes(3000)}
    (tmp_path / "set.rar").write_bytes(rar(files))
    assert unpack(tmp_path / "set.rar", tmp_path / "out") == {name: len(content) for name, content in files.items()}
    assert below(tmp_path / "out") == files


@pytest.mark.skipif(shutil.which("bsdtar") is None, reason="needs bsdtar")
@pytest.mark.parametrize("fault", ["cut", "escape"])
def test_a_rar_that_is_damaged_or_hostile_is_refused(fault: str, tmp_path: Path) -> None:
    content = rar({"0.png" if fault != "escape" else "../0.png": b"x" * 1000})
    if fault == "cut":
        content = content[:500]
    (tmp_path / "set.rar").write_bytes(content)
    with pytest.raises(ArchiveError, match="outside the folder" if fault == "escape" else "damaged or cut off: bsdtar says: "):
        unpack(tmp_path / "set.rar", tmp_path / "out")
    nothing_outside(tmp_path, "set.rar")


def test_without_a_program_for_rar_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "set.rar").write_bytes(rar({"0.png": b"x"}))
    with pytest.raises(ArchiveError, match="neither `bsdtar` nor `unrar` is on this machine") as caught:
        unpack(tmp_path / "set.rar", tmp_path / "out")
    assert "apt install libarchive-tools" in str(caught.value.hint)


def test_no_room_is_known_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zipped(tmp_path / "set.zip", FILES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(DataError, match="no room to unpack set.zip: it takes 5,300 bytes"):
        unpack(archive, tmp_path / "out")
    assert not below(tmp_path / "out")


def test_a_disk_that_fills_up_says_at_which_file(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "set.zip", {"0.png": bytes(500), "1.png": random.Random(0).randbytes(300_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            unpack(archive, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_exists_is_not_unpacked_into(tmp_path: Path) -> None:
    # a link could wait in it
    (tmp_path / "out").mkdir()
    os.symlink("/etc", tmp_path / "out" / "images")
    with pytest.raises(FileExistsError):
        unpack(zipped(tmp_path / "set.zip", FILES), tmp_path / "out")

"""Archives from outside: what is in them comes out byte for byte, and nothing ever leaves the folder."""

from __future__ import annotations

import gc
import gzip
import io
import os
import random
import resource
import shutil
import struct
import subprocess
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from dgbench.download.archives import ArchiveError, Limits, members, safe_path, unpack
from dgbench.errors import DataError

FILES = {"images/00001.png": b"one" * 100, "images/sub/00002.png": random.Random(1).randbytes(5000), "README": b""}


def zipped(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return path


def tarred(path: Path, *entries: tarfile.TarInfo | tuple[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for entry in entries:
            if isinstance(entry, tuple):
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                archive.addfile(info, io.BytesIO(entry[1]))
            else:
                archive.addfile(entry)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def nothing_outside(folder: Path, *expected: str) -> None:
    """No link anywhere, and beside the staging folder just what the test put there."""
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    assert {path.name for path in folder.iterdir()} <= {"out", *expected}


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
    first, second = _stored("a.jpg", b"A" * 500), _stored("b.jpg", b"B" * 700)
    (tmp_path / "set.z01").write_bytes(b"PK\x07\x08" + first)
    directory = _listed("a.jpg", b"A" * 500, volume=0, offset=4) + _listed("b.jpg", b"B" * 700, volume=1, offset=0)
    start, size = len(second), len(directory)
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 1, 1, 2, 2, size, start)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 1, start + size, 2)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "set.zip").write_bytes(second + directory + end64 + locator + end)
    unpack(tmp_path / "set.zip", tmp_path / "out")
    assert below(tmp_path / "out") == {"a.jpg": b"A" * 500, "b.jpg": b"B" * 700}


def _stored(name: str, data: bytes) -> bytes:
    head = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, 0, 0, 0, 0x21, zlib.crc32(data), len(data), len(data), len(name), 0)
    return head + name.encode() + data


def _listed(name: str, data: bytes, volume: int, offset: int) -> bytes:
    crc, size = zlib.crc32(data), len(data)
    values = (b"PK\x01\x02", 20, 20, 0, 0, 0, 0x21, crc, size, size, len(name), 0, 0, volume, 0, 0, offset)
    return struct.pack("<4sHHHHHHIIIHHHHHII", *values) + name.encode()


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


# ---- damage that the readers of Python's library do not notice, and archives made to exhaust them


def packed_tar(path: Path, kind: str, files: Mapping[str, bytes]) -> Path:
    """A tar as GNU tar and the compressors' own programs make it."""
    for name, content in files.items():
        (path.parent / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "in" / name).write_bytes(content)
    program = {"tar.gz": "gzip", "tar.bz2": "bzip2", "tar.xz": "xz"}[kind]
    if shutil.which("tar") is None or shutil.which(program) is None:
        pytest.skip(f"needs tar and {program}")
    subprocess.run(["tar", f"--use-compress-program={program}", "-cf", path, *files], cwd=path.parent / "in", check=True)
    return path


NOISE = {f"{n}.png": random.Random(n).randbytes(3000) for n in range(4)}


@pytest.mark.parametrize("kind", ["tar.gz", "tar.bz2", "tar.xz"])
def test_every_flipped_bit_of_a_packed_tar_is_found_or_changes_nothing(kind: str, tmp_path: Path) -> None:
    path = packed_tar(tmp_path / f"set.{kind}", kind, NOISE)
    whole = path.read_bytes()
    unnoticed = []
    generator = random.Random(1)
    # the checksum of the whole is in the last bytes, after tar's end mark
    for at in [*generator.sample(range(len(whole)), 40), *range(len(whole) - 60, len(whole))]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << generator.randrange(8)]) + whole[at + 1 :])
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        try:
            unpack(path, tmp_path / "out")
        except ArchiveError:
            continue
        unnoticed.append(at)
        assert below(tmp_path / "out") == NOISE, at
    # gzip's time and name, and bits between blocks
    assert len(unnoticed) < 8


def test_a_wrong_checksum_behind_the_end_mark_is_found(tmp_path: Path) -> None:
    path = packed_tar(tmp_path / "set.tar.gz", "tar.gz", NOISE)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # of the CRC-32 in gzip's last eight bytes
    path.write_bytes(content)
    assert subprocess.run(["gzip", "-t", path], capture_output=True).returncode == 1
    with pytest.raises(ArchiveError, match="set.tar.gz is damaged or cut off: CRC check failed"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_what_follows_the_end_of_an_archive_is_refused(kind: str, tmp_path: Path) -> None:
    mode = "w:gz" if kind == "tar.gz" else "w"
    path = tarred(tmp_path / f"set.{kind}", *NOISE.items(), mode=mode)
    path.write_bytes(path.read_bytes() + b"<html>bad gateway</html>")
    with pytest.raises(ArchiveError, match="damaged or cut off"):
        unpack(path, tmp_path / "out")
    # zeros are padding
    tarred(path, *NOISE.items(), mode=mode)
    path.write_bytes(path.read_bytes() + bytes(20_000))
    unpack(path, tmp_path / "whole")
    assert below(tmp_path / "whole") == NOISE


def test_a_damaged_header_is_not_the_end_of_a_plain_tar(tmp_path: Path) -> None:
    path = tarred(tmp_path / "set.tar", *NOISE.items())
    content = bytearray(path.read_bytes())
    content[content.index(b"2.png")] ^= 4
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="the header at byte 7,168 cannot be read"):
        unpack(path, tmp_path / "out")


def test_a_plain_tar_without_its_end_mark_is_cut_off(tmp_path: Path) -> None:
    path = tarred(tmp_path / "set.tar", *NOISE.items())
    for length in (4 * 3584, 4 * 3584 + 100):
        path.write_bytes(path.read_bytes()[:length].ljust(length, b"\0"))
        with pytest.raises(ArchiveError, match="without an end mark"):
            unpack(path, tmp_path / f"out{length}")


def peak_of(path: Path, into: Path) -> float:
    """MiB of Python's memory that it takes at most to refuse an archive, listing it and unpacking it."""
    gc.collect()
    tracemalloc.start()
    try:
        for work in (lambda: members(path), lambda: unpack(path, into)):
            with pytest.raises(ArchiveError) as caught:
                work()
            assert len(caught.value.message) < 500
            assert len(caught.value.message.splitlines()) == 1
        return tracemalloc.get_traced_memory()[1] / (1 << 20)
    finally:
        tracemalloc.stop()


def hostile(kind: str, path: Path) -> None:
    block = tarfile.TarInfo("x.png")
    with gzip.open(path, "wb", compresslevel=1) as file:
        if kind in ("pax", "gnu name", "global"):
            # a header of 100 MB packs to less than half a megabyte
            block.type = {"pax": tarfile.XHDTYPE, "gnu name": tarfile.GNUTYPE_LONGNAME, "global": tarfile.XGLTYPE}[kind]
            block.size = 100 << 20
            file.write(block.tobuf())
            for _ in range(100):
                file.write(b"x" * (1 << 20))
        elif kind == "nested":
            block.type, block.size = tarfile.XHDTYPE, 512
            file.write((block.tobuf() + b"12 path=abc\n".ljust(512, b"\0")) * 5000)
        elif kind == "many globals":
            for n in range(60):
                text = b"%d a%03d=" % (1_000_000, n)
                block.type, block.size = tarfile.XGLTYPE, 1_000_000
                file.write(block.tobuf() + text.ljust(999_999, b"y") + b"\n" + bytes(-1_000_000 % 512))
                file.write(tarfile.TarInfo(f"{n}.png").tobuf())
        elif kind == "sparse":
            # GNU's old form: a map of a file that goes on and on
            info = bytearray(tarfile.TarInfo("x.png").tobuf(tarfile.GNU_FORMAT))
            info[156:157], info[482:483] = tarfile.GNUTYPE_SPARSE, b"\1"
            info[148:156] = b"%06o\0 " % (256 + sum(info[:148]) + sum(info[156:]))
            file.write(info)
            more = (b"00000000001\0" * 42)[:504] + b"\1" + bytes(7)
            for _ in range(100):
                file.write(more * 2048)
        file.write(bytes(1024))


@pytest.mark.parametrize("kind", ["pax", "gnu name", "global", "nested", "many globals", "sparse"])
def test_headers_of_a_tar_are_bounded(kind: str, tmp_path: Path) -> None:
    hostile(kind, tmp_path / "set.tar.gz")
    assert peak_of(tmp_path / "set.tar.gz", tmp_path / "out") < 20
    assert set(below(tmp_path / "out")) <= {"0.png"}


def test_a_zip_with_a_table_of_contents_of_millions_is_refused(tmp_path: Path) -> None:
    entry = _listed("0.png", b"", volume=0, offset=0)
    size = 65 << 20
    with (tmp_path / "set.zip").open("wb") as file:
        file.write(b"PK\x03\x04")
        file.write(entry * (size // len(entry)))
        file.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 65535, 65535, size // len(entry) * len(entry), 4, 0))
    with pytest.raises(ArchiveError, match="its table of contents is larger than 64 MiB"):
        unpack(tmp_path / "set.zip", tmp_path / "out")


@pytest.mark.parametrize("field", ["size", "GNU.sparse.map", "path"])
def test_numbers_of_headers_that_are_none_are_damage(field: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("1.png")
        info.pax_headers = {field: {"size": "-512", "GNU.sparse.map": "1,x", "path": "9" * 5000 + "/1.png"}[field]}
        archive.addfile(info)
    with pytest.raises(ArchiveError) as caught:
        unpack(tmp_path / "set.tar", tmp_path / "out")
    assert len(caught.value.message) < 500


def test_a_member_that_leads_back_does_not_read_for_ever(tmp_path: Path) -> None:
    # a negative size in base 256, which sends tarfile back to where it has been
    block = bytearray(tarfile.TarInfo("1.png").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (b"\xff" * 10) + b"\xfe\x00"
    block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
    (tmp_path / "set.tar").write_bytes(bytes(block) + bytes(10240))
    with pytest.raises(ArchiveError, match="damaged or cut off"):
        unpack(tmp_path / "set.tar", tmp_path / "out")


def test_names_in_latin_1_become_names_in_unicode(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        info = tarfile.TarInfo("bilder/café.png")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    assert unpack(tmp_path / "set.tar", tmp_path / "out") == {"bilder/café.png": 1}
    assert (tmp_path / "out/bilder/café.png").read_bytes() == b"x"
    assert members(tmp_path / "set.tar") == ["bilder/café.png"]


def test_a_zip_whose_names_are_not_what_it_says_is_damaged(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("caf\u00e9.png", b"x")
    (tmp_path / "set.zip").write_bytes((tmp_path / "set.zip").read_bytes().replace("é".encode(), b"\xe9\xff"))
    with pytest.raises(ArchiveError, match="damaged or cut off"):
        unpack(tmp_path / "set.zip", tmp_path / "out")


@pytest.mark.parametrize("name", ["a\x1b[31m.png", "a\x9b31m.png", "a\u202egnp.png", "x" * 5000 + ".png"])
def test_a_name_that_is_none_is_refused_in_one_short_line(name: str, tmp_path: Path) -> None:
    tarred(tmp_path / "set.tar", (name, b"x"))
    with pytest.raises(ArchiveError) as caught:
        unpack(tmp_path / "set.tar", tmp_path / "out")
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500

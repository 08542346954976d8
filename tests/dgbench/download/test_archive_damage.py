"""Damage that the readers of Python's library do not notice, and archives made to exhaust them."""

from __future__ import annotations

import gc
import gzip
import io
import random
import shutil
import struct
import subprocess
import tarfile
import tracemalloc
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from made_archives import below, listed, tarred

from dgbench.download.archives import ArchiveError, members, unpack


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
            # a header of 40 MB packs to less than a fifth of a megabyte
            block.type = {"pax": tarfile.XHDTYPE, "gnu name": tarfile.GNUTYPE_LONGNAME, "global": tarfile.XGLTYPE}[kind]
            block.size = 40 << 20
            file.write(block.tobuf())
            for _ in range(40):
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
    entry = listed("0.png", b"", volume=0, offset=0)
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

"""Data folders of anybody's making: what is no image, what would hang or fill the memory, and names that are no text."""

from __future__ import annotations

import ast
import io
import json
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from dgbench import cli
from dgbench.data.dataset import read_image, read_photo, size_of
from dgbench.data.decode import read_stored
from dgbench.data.index import mismatch
from dgbench.data.labels import named
from dgbench.errors import DataError

ROOT = Path(__file__).parents[3]
MAP = named("train-ids")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*extra: bytes, size: tuple[int, int] = (8, 4)) -> bytes:
    """A grey PNG of zeros that says to be of `size` (W, H), with chunks before its pixels."""
    head = struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(4 * 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def readers(path: Path) -> list[Callable[[], object]]:
    row = {"id": "x", "image": {"path": str(path), "bytes": None}, "label": {"path": str(path), "bytes": None}}
    return [
        lambda: read_image(path),
        lambda: read_photo(path),
        lambda: size_of(row),
        lambda: read_stored(path, MAP),
        lambda: read_stored(path, MAP, "colors"),
    ]


def refusals(path: Path) -> list[str]:
    """What readers of images, of sizes and of labels say about a file."""
    said = []
    for read in readers(path):
        with pytest.raises(DataError) as refused:
            read()
        assert str(path) in refused.value.message
        assert "\n" not in refused.value.message
        said.append(refused.value.message)
    return said


def test_no_image_is_opened_in_every_format_that_pillow_knows() -> None:
    files = [path for folder in ("dgbench", "mfuser", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    calls = [
        (path.name, node.lineno, node)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open")
    ]
    assert len(calls) > 5
    assert not [(name, line) for name, line, call in calls if "formats" not in {keyword.arg for keyword in call.keywords}]


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICNS", "PPM"])
def test_other_formats_are_refused_and_start_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    for name in ("gs", "gswin64c"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    path = tmp_path / "x.png"
    Image.new("RGB", (16, 16)).save(path, kind)
    assert all("it is no PNG" in said for said in refusals(path))
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_text_that_grows_when_it_is_unpacked_is_refused(tmp_path: Path, kind: bytes) -> None:
    packed = zlib.compress(bytes(8 << 20), 9)
    body = b"Comment\0\0" + packed if kind == b"zTXt" else b"Comment\0\1\0\0\0" + packed
    path = tmp_path / "x.png"
    path.write_bytes(png(chunk(kind, body)))
    assert all("it holds more than 1 MB of text" in said for said in refusals(path))
    assert mismatch(path, path) == "x.png cannot be read"


@pytest.mark.parametrize("size", [(30000, 30000), (2**31 - 1, 1), (1, 2**31 - 1)])
def test_an_image_that_says_to_be_huge_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png(size=size))
    assert all("more than 178,956,970 pixels" in said for said in refusals(path))


def test_a_side_of_more_than_a_million_pixels_is_read(tmp_path: Path) -> None:
    line = np.arange(1_100_000, dtype=np.uint32).astype(np.uint8)[None]  # OpenCV takes at most 2**20
    Image.fromarray(line).save(tmp_path / "x.png", compress_level=1)
    assert np.array_equal(read_image(tmp_path / "x.png")[..., 0], line)


def test_polygons_of_a_scene_without_bounds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    scene = {"imgWidth": 10**6, "imgHeight": 10**6, "objects": []}
    for content in (json.dumps(scene), '{"imgWidth": 1e999}', "[" * 100_000, '{"a":' * 100_000, "[]", "3", "\ud800"):
        path.write_text(content, errors="surrogatepass")
        with pytest.raises(DataError, match="x.json"):
            read_stored(path, MAP, "polygons")


def odd(path: Path, kind: str) -> None:
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a link to nothing":
        path.symlink_to("nowhere.png")
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    elif kind == "a link to an endless device":
        path.symlink_to("/dev/zero")
    elif kind == "a socket":
        here = os.open(path.parent, os.O_RDONLY)
        try:
            socket.socket(socket.AF_UNIX).bind(f"/proc/self/fd/{here}/{path.name}")  # paths of sockets are short
        finally:
            os.close(here)
    else:
        with path.open("wb") as file:
            file.truncate(3 << 30)


ODD = {
    "a pipe": "is a pipe, a socket or a device, ",
    "a folder": "is a folder, ",
    "a link to nothing": "is a link to nowhere.png, which does not exist",
    "a link to itself": "cannot be opened: Too many levels of symbolic links",
    "a link to an endless device": "is a pipe, a socket or a device, ",
    "a socket": "cannot be opened: No such device or address",
    "3 GiB": "has 3,221,225,472 bytes, at most 2,147,483,648 are read",
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.png"
    odd(path, kind)
    assert all(ODD[kind] in said for said in refusals(path))


def cityscape(root: Path, names: list[str]) -> Path:
    folder = root / "bdd100k"
    for name in names:
        for place, pixels in (("images/10k/val", (8, 16, 3)), ("labels/sem_seg/masks/val", (8, 16))):
            (folder / place).mkdir(parents=True, exist_ok=True)
            file = folder / place / (name if len(pixels) == 2 else name.replace(".png", ".jpg"))
            buffer = io.BytesIO()
            Image.fromarray(np.full(pixels, len(names), np.uint8)).save(buffer, "JPEG" if len(pixels) == 3 else "PNG")
            file.write_bytes(buffer.getvalue())
    return folder


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, list(map(str, arguments)), prog_name="dgbench")


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("part", ["images/10k/val/a.jpg", "labels/sem_seg/masks/val/a.png"])
def test_verify_names_what_is_no_file(tmp_path: Path, kind: str, part: str) -> None:
    path = cityscape(tmp_path, ["a.png", "b.png"]) / part
    path.unlink()
    odd(path, kind)
    done = run("data", "verify", "bdd100k", "--split", "val", "--root", tmp_path, "--json")
    assert done.exit_code == 1
    assert ODD[kind].split(",")[0] in done.stdout
    assert "Traceback" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)


@pytest.mark.parametrize("command", ["verify", "stats", "show"])
def test_a_file_name_that_is_no_text_is_told_in_a_line(tmp_path: Path, command: str) -> None:
    cityscape(tmp_path, ["a.png", os.fsdecode(b"caf\xe9.png")])
    done = run("data", command, "bdd100k", *(("--split", "val") if command != "stats" else ()), "--root", tmp_path)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert "caf\\udce9" in done.stderr
    assert "is no name in UTF-8" in done.stderr

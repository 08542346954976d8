"""Cache of rendered images and labels: PNG files that a later run reads instead of rendering.

Each file names its content in a text chunk. Decoders ignore this and the checksums of pixel data; both are
checked here, and an image whose file is damaged or another image's is rendered again.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dgbench import temporaries
from dgbench.data.places import cache_root
from dgbench.data.processes import spread
from dgbench.progress import Progress
from dgbench.resources import usable_cores

_FEW = 16  # number of images that are rendered faster than a pool of processes starts
_CHUNK = 8  # images that a process is given at a time
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_IMAGE, _LABEL = 0, 1

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Rendered:
    """One split of a rendered domain at one size; `revision` is the renderer's and identifies every byte."""

    domain: str
    split: str
    size: tuple[int, int]  # (H, W)
    revision: str

    def pair(self, index: int) -> tuple[Pixels, Pixels]:
        """Return (H, W, 3) RGB and (H, W) train ids, from the cache or rendered and kept there."""
        image, label = self._kept(index, _IMAGE), self._kept(index, _LABEL)
        return self._render(index) if image is None or label is None else (image, label)

    def image(self, index: int) -> Pixels:
        """Return the image alone, which is cheaper than the pair."""
        image = self._kept(index, _IMAGE)
        return self._render(index)[_IMAGE] if image is None else image

    def label(self, index: int) -> Pixels:
        """Return the label alone, which is cheaper than the pair."""
        label = self._kept(index, _LABEL)
        return self._render(index)[_LABEL] if label is None else label

    def prepare(self, count: int, progress: Progress, workers: int | None = None) -> None:
        """Render which of the first `count` images are not in the cache, in parallel, and remove what killed processes left."""
        temporaries.clear(self._folder())
        missing = [index for index in range(count) if not self._begins_right(index)]
        if not missing:
            return
        workers = workers or min(usable_cores(), 32)
        progress.start(f"rendering {self.domain} {self.split}", len(missing), "images")
        try:
            if workers == 1 or len(missing) <= _FEW:
                for index in missing:
                    progress.advance(self._render_all([index]))
            else:
                self._render_in_parallel(missing, workers, progress)
        finally:
            progress.stop()

    def _render_in_parallel(self, missing: Sequence[int], workers: int, progress: Progress) -> None:
        chunks = [missing[i : i + _CHUNK] for i in range(0, len(missing), _CHUNK)]
        hint = "run the same command again: what is rendered is kept"
        try:
            with closing(spread(self._render_all, chunks, workers, f"rendered {self.domain}", hint)) as counts:
                for count in counts:
                    progress.advance(count)
        finally:
            temporaries.clear(self._folder())

    def _folder(self) -> Path:
        return cache_root() / self.revision / self.domain / f"{self.size[1]}x{self.size[0]}" / self.split

    def _path(self, index: int, which: int) -> Path:
        return self._folder() / f"{index:06d}{('', '_labelTrainIds')[which]}.png"

    def _head(self, index: int, which: int) -> bytes:
        """Return the bytes with which the file begins: size and kind of its pixels, and the image that they belong to."""
        height, width = self.size
        kind = ("image", "label")[which]
        name = f"{self.revision} {self.domain} {self.split} {index:06d} {width}x{height} {kind}"
        shape = struct.pack(">IIBBBBB", width, height, 8, (2, 0)[which], 0, 0, 0)  # 8 bits of RGB or of grey
        return _SIGNATURE + _chunk(b"IHDR", shape) + _chunk(b"tEXt", b"dgbench\0" + name.encode("latin-1"))

    def _begins_right(self, index: int) -> bool:
        """Return whether both files exist and are this pair's, by their first bytes; other damage is found when they are read."""
        for which in (_IMAGE, _LABEL):
            head = self._head(index, which)
            try:
                with self._path(index, which).open("rb", buffering=0) as file:
                    if file.read(len(head)) != head:
                        return False
            except OSError:
                return False
        return True

    def _kept(self, index: int, which: int) -> Pixels | None:
        """Return the cached pixels, None if there are none or they are damaged or of something else."""
        try:
            data = self._path(index, which).read_bytes()
        except OSError:
            return None
        head = self._head(index, which)
        if not data.startswith(head) or not _whole(data, len(head)):
            return None
        with Image.open(io.BytesIO(data), formats=("PNG",)) as file:
            return np.asarray(file)

    def _render_all(self, indices: Sequence[int]) -> int:
        for index in indices:
            self._render(index)
        return len(indices)

    def _render(self, index: int) -> tuple[Pixels, Pixels]:
        from dgbench import streets

        image, label = streets.render(self.domain, self.split, index, self.size)
        self._folder().mkdir(parents=True, exist_ok=True)
        self._write(index, _LABEL, label)
        self._write(index, _IMAGE, image)
        return image, label

    def _write(self, index: int, which: int, pixels: Pixels) -> None:
        encoded, head = io.BytesIO(), self._head(index, which)
        Image.fromarray(pixels).save(encoded, "PNG", compress_level=1)
        path = self._path(index, which)
        temporary = temporaries.beside(path)
        try:
            # the text chunk follows the first chunk; a crash of the machine may cut the file, which reading detects
            temporary.write_bytes(head + encoded.getvalue()[len(_SIGNATURE) + _IHDR :])
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            # a full disk raises without a file name
            raise OSError(error.errno, error.strerror, str(path)) from error
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


_IHDR = 25  # bytes of the first chunk: length, type, 13 bytes, checksum


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _whole(data: bytes, start: int) -> bool:
    """Return whether all chunks from byte `start` have correct checksums up to the end marker, and nothing follows it."""
    view = memoryview(data)
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(view[start : start + 4], "big")
        if end > len(data) or zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            return False
        if data[start + 4 : start + 8] == b"IEND":
            return end == len(data)
        start = end
    return False

"""Opening of image and label files, only if they are regular files, and error texts for damaged content.

A data folder may come from anywhere. A pipe in it would make a reader hang and a link to an endless device fill its memory; a
library that goes by the suffix, or tries all its formats, may start another program (Pillow: Ghostscript for EPS).
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from dgbench.errors import DataError

MOST = 2 << 30  # bytes: enough for Pillow's limit of pixels at 16 bits per channel

# exceptions that Pillow raises for damaged or malicious images
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
)

# for images that Pillow still reads; it refuses those with twice as many pixels
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def opened(path: Path | str, what: str) -> BinaryIO:
    """Open a regular file, or one that a link leads to, for reading. `what` is expected: "image", "label".

    Raises: DataError naming the path if there is none, it may not be read, is larger than `MOST`, or no file.
    """
    try:
        # not blocking: opening a pipe would wait for its writer
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        if os.path.islink(path):
            raise DataError(f"{path} is a link to {os.readlink(path)}, which does not exist") from None
        raise DataError(f"no such {what}: {path}") from None
    except PermissionError:
        raise DataError(f"no permission to read {path}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, {_a(what)} file was expected") from None
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # not a problem of this file
            raise
        raise DataError(f"{path} cannot be opened: {error.strerror}", f"{_a(what)} file was expected") from None
    state = os.fstat(descriptor)
    if stat.S_ISREG(state.st_mode) and state.st_size <= MOST:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISREG(state.st_mode):
        raise DataError(f"{path} has {state.st_size:,} bytes, at most {MOST:,} are read", f"{_a(what)} file was expected")
    kind = "a folder" if stat.S_ISDIR(state.st_mode) else "a pipe, a socket or a device"
    raise DataError(f"{path} is {kind}, {_a(what)} file was expected")


def content(path: Path | str, what: str) -> bytes:
    """Return the bytes of a regular file.

    Raises: DataError as `opened`, and if reading fails.
    """
    with opened(path, what) as file:
        try:
            return file.read()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}", "the disk or the network folder may be failing") from None


def damage(error: BaseException) -> tuple[str, str | None]:
    """Return what one of `DAMAGED` says about an image in a line, and what to do, if that is not the usual advice for damage."""
    said = (str(error).splitlines() or [""])[0]
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"its header states more than {most:,} pixels, the limit", "save it smaller, or cut it into parts"
    if "MAX_TEXT" in said:
        return "it holds more than 1 MB of text", "save it without metadata (exiftool -all= FILE)"
    plain = isinstance(error, OSError | SyntaxError) and said
    return (said if plain else f"{type(error).__name__} {said}".strip()), None


def _a(what: str) -> str:
    return f"an {what}" if what[0] in "aeiou" else f"a {what}"

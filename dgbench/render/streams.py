"""Setup of the process's three streams, so that each exists and can write any character, and handling of failed writes."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
import warnings
from typing import TYPE_CHECKING, TextIO

from dgbench.render.outside import visible_lines

if TYPE_CHECKING:
    from typing_extensions import Buffer

# replacements in ASCII for streams that cannot write our marks, of the same width
_STAND_INS = {
    "–": "-",
    "—": "-",
    "±": "+-",
    "…": "...",
    "†": "+",
    "²": "2",
    "×": "x",
    "·": ".",
    "•": "*",
    "’": "'",
    "∞": "inf",
    "─": "-",
    "━": "-",
    "╸": "-",
    "╺": "-",
    "│": "|",
    "┃": "|",
}
_HANDLER = "dgbench-stand-in"


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    backslashed = (letter.encode("ascii", "backslashreplace").decode() for letter in letters)
    return "".join(_STAND_INS.get(letter, code) for letter, code in zip(letters, backslashed, strict=True)), error.end


codecs.register_error(_HANDLER, _stand_in)


def writable(text: str, stream: TextIO | None) -> str:
    r"""Return the text as a stream can show it: with `-` for `–` or `\u2713` for `✓` if it has no such character."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, _HANDLER).decode(encoding)


def prepare() -> None:
    """Make the three streams usable, however the program was started; called once, before any file is opened.

    A closed descriptor (`>&-`) would be reused for the next file that is opened, and printed text would be written to it:
    it is opened as the null device instead, for standard output such that writing fails, since a result would be lost.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # the lowest number that is free
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = _stream(1, sys.stdout)
    sys.stderr = _stream(2, sys.stderr)
    # warnings of other libraries contain names of files
    said = warnings.formatwarning
    warnings.formatwarning = lambda *what, **where: visible_lines(said(*what, **where))


class _Named(io.FileIO):
    """A stream's descriptor whose write errors name the stream, as those of a file name the file."""

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = {1: "standard output", 2: "standard error"}[self.fileno()]
            raise


def _stream(number: int, present: TextIO | None) -> TextIO:
    if present is not None and (os.name != "posix" or not isinstance(present, io.TextIOWrapper)):
        if isinstance(present, io.TextIOWrapper):  # a console of Windows
            present.reconfigure(errors=_HANDLER)
        return present
    lines = number == 2 or (present is not None and (present.line_buffering or present.write_through))
    encoding = present.encoding if present is not None else "utf-8"
    raw = _Named(number, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors=_HANDLER, line_buffering=lines)


def settle() -> None:
    """Discard text that cannot be written; otherwise the interpreter tries again at exit and prints an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

"""The process's own three streams: each there, each able to write any character, and what is done when one cannot write."""

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

# for streams that cannot write our own marks: in ASCII, of one width where the mark is one
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
    r"""Return the text as a stream will show it: with `-` for `–` or `\u2713` for `✓` where it has no such character."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, _HANDLER).decode(encoding)


def prepare() -> None:
    """Make the three streams usable, whatever the program was started with; called once, before anything is opened.

    A descriptor that was closed (`>&-`) would be given to the next file that is opened, and what is printed would end in it:
    it is led to the null device, standard output so that writing fails, as a lost result must.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # the lowest number that is free
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = _stream(1, sys.stdout)
    sys.stderr = _stream(2, sys.stderr)
    # those of other libraries name files
    said = warnings.formatwarning
    warnings.formatwarning = lambda *what, **where: visible_lines(said(*what, **where))


class _Named(io.FileIO):
    """A stream's descriptor whose failures to write name the stream, as those of a file name the file."""

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
    """Give up what cannot be written: else the interpreter tries again when it ends, and speaks of it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

"""The two streams: results go to stdout, everything else to stderr, in colour on a terminal only."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from dgbench.render.outside import visible_lines
from dgbench.render.table import WIDTH

if TYPE_CHECKING:
    from rich.console import Console


def open_console(*, stderr: bool = False) -> Console:
    """Return Rich's console for stdout or stderr, no wider than our tables."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if console.is_terminal:
        console.width = min(console.width, WIDTH)
    return console


def may_draw() -> bool:
    """Return whether Rich may treat stdout as a terminal; if not, its import, a fifth of a short command, is saved."""
    return sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR") or os.environ.get("TTY_COMPATIBLE"))


def write(text: str) -> None:
    """Print a piece of the result on stdout; text from outside has been escaped in it."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """Print one line on stderr."""
    _say(visible_lines(text))


def _say(text: str) -> None:
    # long work does not end because its messages cannot be written
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def failure(message: str, hint: str | None = None) -> None:
    """Print `error: …`, an empty line and `hint: …` on stderr."""
    _labelled("error", "31", message)
    if hint:
        note("")
        _labelled("hint", "36", hint)


def warning(message: str) -> None:
    """Print `warning: …` on stderr."""
    _labelled("warning", "33", message)


def _labelled(label: str, colour: str, text: str) -> None:
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    shown = "\n".join(_short(line) for line in visible_lines(text).split("\n"))
    _say(f"\x1b[1;{colour}m{label}:\x1b[0m {shown}" if coloured else f"{label}: {shown}")


def _short(line: str) -> str:
    # arguments and values in files may have megabytes
    return line if len(line) <= _LONGEST else f"{line[:400]} ... {line[-100:]} ({len(line):,} characters)"


_LONGEST = 2000

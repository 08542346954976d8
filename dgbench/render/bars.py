"""Progress and transfers on stderr: bars on a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from dgbench.progress import Bars, Progress, Silent
from dgbench.render.numbers import byte_size, counted, duration
from dgbench.render.outside import visible, visible_lines
from dgbench.render.terminal import note, open_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


def progress(*, quiet: bool = False) -> Progress:
    """Return a display of progress on stderr: a bar on a terminal, plain lines elsewhere."""
    if quiet:
        return Silent()
    console = open_console(stderr=True)
    return _Bar(console) if console.is_terminal and not console.is_dumb_terminal else _Lines()


@contextlib.contextmanager
def transfers(*, quiet: bool = False) -> Iterator[Bars]:
    """Show downloads on stderr: a bar each on a terminal, else lines; --quiet silences other libraries, too."""
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    if not quiet:
        console = open_console(stderr=True)
        bars = _Bars(console) if console.is_terminal and not console.is_dumb_terminal else _TransferLines()
        try:
            yield bars
        finally:
            bars.close()
        return
    disable_progress_bars()
    try:
        yield Silent()
    finally:
        enable_progress_bars()


class _Bars:
    """Transfers on a terminal, drawn while there are any."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        self._drawn: RichProgress | None = None

    def begin(self, name: str, total: int | None, done: int = 0) -> None:
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        with self._lock:
            if self._drawn is None:
                self._drawn = RichProgress(
                    TextColumn("{task.description}", markup=False),
                    BarColumn(bar_width=16),
                    DownloadColumn(),
                    TransferSpeedColumn(),
                    TimeRemainingColumn(compact=True),
                    console=self._console,
                    transient=True,
                )
                self._drawn.start()
            self._tasks[name] = self._drawn.add_task(visible(name), total=total, completed=done)

    def advance(self, name: str, n: int) -> None:
        if self._drawn is not None and name in self._tasks:
            self._drawn.advance(self._tasks[name], n)

    def end(self, name: str) -> None:
        with self._lock:
            if self._drawn is not None and name in self._tasks:
                self._drawn.remove_task(self._tasks.pop(name))
            if not self._tasks:
                self._stop()

    def note(self, text: str) -> None:
        if self._drawn is not None:
            self._drawn.console.print(visible_lines(text), markup=False, emoji=False)
        else:
            note(text)

    def close(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._drawn is not None:
            self._drawn.stop()
        self._drawn = None


class _TransferLines:
    """Transfers in a log: a line when one begins and ends, and how far all are every half minute."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}
        self._totals: dict[str, int | None] = {}
        self._begun: dict[str, float] = {}
        self._told_at = time.monotonic()

    def begin(self, name: str, total: int | None, done: int = 0) -> None:
        with self._lock:
            self._done[name], self._totals[name], self._begun[name] = done, total, time.monotonic()
            kept = f", {byte_size(done)} of it are here" if done else ""
            note(f"{name}{f': {byte_size(total)}' if total is not None else ''}{kept}")

    def advance(self, name: str, n: int) -> None:
        with self._lock:
            self._done[name] = self._done.get(name, 0) + n
            if time.monotonic() - self._told_at >= 30:
                self._told_at = time.monotonic()
                for each, done in self._done.items():
                    total = self._totals.get(each)
                    note(f"{each}: {byte_size(done)}{f' of {byte_size(total)}' if total is not None else ''}")

    def end(self, name: str) -> None:
        with self._lock:
            done = self._done.pop(name, 0)
            note(f"{name}: {byte_size(done)} in {duration(time.monotonic() - self._begun.pop(name, 0.0))}")

    def note(self, text: str) -> None:
        note(text)

    def close(self) -> None:
        """Do nothing: no bar is drawn."""


def _fields(values: Mapping[str, float | str]) -> str:
    texts = []
    for name, value in values.items():
        if name == "images_per_second":
            texts.append(f"{value:.1f} images/s")
        elif name == "lr":
            texts.append(f"lr {value:.1e}")
        else:
            texts.append(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(texts)


class _Bar:
    """Progress on a terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        turning = "line" if console.options.ascii_only else "dots"

        def make() -> RichProgress:
            return RichProgress(
                SpinnerColumn(turning),
                BarColumn(bar_width=16),
                TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}", markup=False),
                TextColumn("{task.fields[told]}", markup=False),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=console,
            )

        self._make = make
        self._bar: RichProgress | None = None
        self._fields: dict[str, float | str] = {}

    def start(self, what: str, total: int, unit: str) -> None:
        self.stop()
        self._fields = {}
        self._bar = self._make()
        # on its own line: an 80-column terminal is too narrow for it beside the numbers
        note(what)
        self._bar.add_task("", total=total, unit=unit, told="")
        self._bar.start()

    def advance(self, n: int = 1, **fields: float | str) -> None:
        self._fields.update(fields)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=n, told=_fields(self._fields))

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(visible_lines(text), markup=False, emoji=False)
        else:
            note(text)


class _Lines:
    """Progress in a log: a line at the start, at every tenth of the work or every half minute, and at the end."""

    def __init__(self) -> None:
        self._what, self._unit = "", ""
        self._done = self._total = 0
        self._fields: dict[str, float | str] = {}
        self._begun = self._told_at = 0.0
        self._told_done = 0

    def start(self, what: str, total: int, unit: str) -> None:
        self._what, self._unit, self._total, self._done, self._told_done = what, unit, total, 0, 0
        self._fields = {}
        self._begun = self._told_at = time.monotonic()
        note(f"{what}: {counted(total, unit)}")

    def advance(self, n: int = 1, **fields: float | str) -> None:
        self._fields.update(fields)
        self._done += n
        now = time.monotonic()
        tenth = self._done - self._told_done >= max(1, self._total / 10) and now - self._told_at >= 1
        if n and (tenth or now - self._told_at >= 30):
            self._tell(now)

    def stop(self) -> None:
        if self._what and self._done > self._told_done:
            self._tell(time.monotonic())
        self._what = ""

    def note(self, text: str) -> None:
        note(text)

    def _tell(self, now: float) -> None:
        elapsed = now - self._begun
        left = self._total - self._done
        parts = [f"{self._done}/{counted(self._total, self._unit)}"]
        if self._fields:
            parts.append(_fields(self._fields))
        parts.append(f"{duration(elapsed * left / self._done)} left" if left and self._done else f"{duration(elapsed)} in all")
        note(f"{self._what}: {', '.join(parts)}")
        self._told_at, self._told_done = now, self._done

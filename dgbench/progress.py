"""Interface by which the engine reports progress; `dgbench.render` implements what is drawn."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """One bar at a time: `start`, any number of `advance`, `stop`; `note` may come at any moment."""

    def start(self, what: str, total: int, unit: str) -> None:
        """Begin `total` units of `what`, e.g. ("train streets/mfuser", 400, "steps"). Ends a bar that is still open."""

    def advance(self, n: int = 1, **fields: float | str) -> None:
        """Count `n` more units as done. Training gives the fields `loss`, `images_per_second` and `lr`."""

    def stop(self) -> None:
        """End the bar, complete or not."""

    def note(self, text: str) -> None:
        """Say one line that stays on the screen."""


class Bars(Protocol):
    """Several transfers at once, each by its name; every method may be called from any thread."""

    def begin(self, name: str, total: int | None, done: int = 0) -> None:
        """Begin a transfer of `total` bytes (None: unknown), of which `done` are there from an earlier try."""

    def advance(self, name: str, n: int) -> None:
        """Count `n` more bytes as received; a negative number if a transfer started again."""

    def end(self, name: str) -> None:
        """End the display of a transfer, complete or not."""

    def note(self, text: str) -> None:
        """Say one line that stays on the screen."""


class Silent:
    """A `Progress` and `Bars` that say nothing: the default of library calls, and `--quiet`."""

    def start(self, what: str, total: int, unit: str) -> None:
        """Say nothing."""

    def advance(self, *_: object, **__: object) -> None:
        """Say nothing."""

    def begin(self, name: str, total: int | None, done: int = 0) -> None:
        """Say nothing."""

    def end(self, name: str) -> None:
        """Say nothing."""

    def stop(self) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

"""How long work tells where it is. The engine speaks to this face; what is drawn is up to `dgbench.render`."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """One bar at a time: `start`, any number of `advance`, `stop`; `note` may come at any moment."""

    def start(self, what: str, total: int, unit: str) -> None:
        """Begin `total` units of `what`, e.g. ("train streets/mfuser", 400, "steps"). Ends a bar that is still open."""

    def advance(self, n: int = 1, **fields: float | str) -> None:
        """`n` more units are done. Training gives the fields `loss`, `images_per_second` and `lr`."""

    def stop(self) -> None:
        """End the bar, complete or not."""

    def note(self, text: str) -> None:
        """Say one line that stays on the screen."""


class Silent:
    """A `Progress` that says nothing: the default of library calls, and `--quiet`."""

    def start(self, what: str, total: int, unit: str) -> None:
        """Say nothing."""

    def advance(self, n: int = 1, **fields: float | str) -> None:
        """Say nothing."""

    def stop(self) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

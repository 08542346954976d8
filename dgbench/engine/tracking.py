"""Experiment trackers, by accelerate: the numbers of a training go to those that `--track` names.

A tracker gets numbers and names alone. Pictures of domains that may not be redistributed never reach one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dgbench.errors import DgbenchError, unknown
from dgbench.recipe import Recipe, recipe_hash
from dgbench.results import Record

if TYPE_CHECKING:
    from accelerate import Accelerator

FOLDER = "tracking"  # in a run's folder: what trackers write that keep files
_PROJECT = "dgbench"
_log = logging.getLogger(__name__)


class Trackers:
    """The trackers of one training. One that fails is told once, and the training goes on without it.

    Args:
        names: as accelerate knows them; `all` stands for those that are installed.

    Raises: DgbenchError for a tracker that accelerate does not know, or that is not installed.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(dict.fromkeys(names))
        self._running: list[Any] = []
        if self.names:
            check_trackers(self.names)

    def __enter__(self) -> Trackers:
        """Finish the trackers at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Finish the trackers."""
        self._each(lambda tracker: tracker.finish())
        self._running = []

    def begin(self, accelerator: Accelerator, recipe: Recipe, start: int) -> None:
        """Start them; what they were told of steps after `start` will be repeated.

        Raises: DgbenchError if one cannot be started.
        """
        if not self.names:
            return
        # of a training that was killed, steps after its last checkpoint: TensorBoard's readers leave the first ones out
        options = {"tensorboard": {"purge_step": start + 1}} if start else {}
        try:
            accelerator.init_trackers(_PROJECT, config=_settings(recipe), init_kwargs=options)
        except Exception as error:  # each has its own
            raise DgbenchError(
                f"a tracker of {', '.join(self.names)} cannot be started: {error}", "mend that, or train without it in --track"
            ) from error
        self._running = list(accelerator.trackers)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Tell them numbers by name."""
        self._each(lambda tracker: tracker.log(dict(values), step=step))

    def scores(self, records: Iterable[Record], step: int) -> None:
        """Tell them the mIoU of each record, by domain."""
        self.log({f"miou/{record.target}": record.miou for record in records if record.miou is not None}, step)

    def _each(self, do: Callable[[Any], None]) -> None:
        for tracker in list(self._running):
            try:
                do(tracker)
            except Exception as error:
                self._running.remove(tracker)
                _log.warning("tracker %s failed: %s; it is told nothing more, the training goes on", tracker.name, error)


def check_trackers(names: Sequence[str]) -> None:
    """Raises: DgbenchError for a tracker that accelerate does not know, or that is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    # a class that was registered with accelerate needs no package
    installed = sorted({*map(str, get_available_trackers()), *(set(known) - set(LoggerType.list()))})
    here = f"installed: {', '.join(installed) or 'none'}"
    for name in names:
        if name not in (*known, "all"):
            message, hint = unknown("tracker", name, [*known, "all"])
            raise DgbenchError(message, f"{hint}; {here}" if hint.startswith("choose") else f"{hint} {here}; {_all(known)}")
        if name not in installed and not (name == "all" and installed):
            what = "no tracker is installed" if name == "all" else f"tracker `{name}` is not installed"
            raise DgbenchError(what, f"pip install {_PACKAGES.get(name, name)}; {here}; {_all(known)}")


# where accelerate's name is not that of the package
_PACKAGES = {"all": "tensorboard", "comet_ml": "comet-ml"}


def _all(known: Iterable[str]) -> str:
    return f"accelerate knows {', '.join(known)}"


def _settings(recipe: Recipe) -> dict[str, int | float | str | bool]:
    """What a training is known by, and its settings as far as they are numbers: no paths, which are nobody else's."""
    named = {"recipe": recipe.name, "recipe_hash": recipe_hash(recipe), "method": recipe.method.name}
    sections = recipe.model_dump(mode="json", include={"train", "optim"})
    numbers = {
        f"{section}.{key}": value
        for section, content in sections.items()
        for key, value in content.items()
        if isinstance(value, bool | int | float)
    }
    return {**named, "source": recipe.data.source, **numbers}

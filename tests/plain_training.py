"""Small trainings on a CPU of the method `plain`, alone or in two processes, and displays that interrupt them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import processes
from processes import RECIPE, command

from dgbench.engine.train import train
from dgbench.progress import Silent
from dgbench.recipe import load_recipe


def fit(folder: Path, *told: str, device: str = "cpu", progress: Silent | None = None, resume: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "plain.yaml").write_text(RECIPE)
    recipe = load_recipe(folder / "plain.yaml", list(told))
    train(recipe, folder / "run", progress=progress or Silent(), device=device, resume=resume)
    return folder / "run"


def fit_by_two(folder: Path, *told: str) -> Path:
    """Train in two processes, as the command does, and return the run."""
    folder.mkdir(exist_ok=True)
    (folder / "plain.yaml").write_text(RECIPE)
    words = ["--out", str(folder / "run"), "--no-eval", "--quiet", "--device", "cpu"]
    words += [word for item in told for word in ("--set", item)]
    ended = processes.together(lambda: command("train", str(folder / "plain.yaml"), *words), 2, folder)
    assert [one.status for one in ended] == [0, 0], ended
    return folder / "run"


class Shown(Silent):
    """A progress display that keeps the losses it is told, and is interrupted when the step `at` is counted."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.done, self.told = at, 0, []

    def start(self, what: str, total: int, unit: str) -> None:
        self.training = what.startswith("training")

    def advance(self, n: int = 1, **fields: float | str) -> None:
        if self.training:
            self.done += n
            self.told += [fields["loss"]] if "loss" in fields else []
            if n and self.done == self.at:
                self.interrupts()

    def interrupts(self) -> None:
        raise KeyboardInterrupt


class Ended(Shown):
    def interrupts(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

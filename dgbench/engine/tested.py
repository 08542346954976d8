"""Models as they are tested: each with its recipe's image size and the protocol that says how it looks at a domain's images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dgbench import protocol
from dgbench.data.domain import Domain
from dgbench.data.resizing import as_tested
from dgbench.engine import checkpoints
from dgbench.engine.device import pick_device
from dgbench.engine.modes import Ready, mode, ready
from dgbench.engine.scoring import predicted
from dgbench.recipe import load_recipe
from mfuser import methods

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Tested:
    """A model, and what decides how it looks at images."""

    title: str  # told from the other models by it
    run: Path
    model: Ready
    device: torch.device
    rules: protocol.Protocol
    size: protocol.Size | None  # at which its recipe shows every image; None: as the files are, or as the protocol says

    def segment(self, image: Pixels, row: Domain, grid: protocol.Size, *, halved: bool = False) -> Pixels:
        """Train ids (*grid) of a domain's image (H, W, 3), seen as `dgbench eval` shows it and upsampled to `grid` as scores.

        What a protocol cuts off an image (RobustNet's squares) is kept.

        Args:
            halved: the files are halved already, which some protocols would do.
        """
        rules = replace(self.rules, label_grid="original", square={}, halved=() if halved else self.rules.halved)
        size = None if row.procedural else self.size
        views, _ = as_tested(image, np.zeros(image.shape[:2], np.uint8), rules, row.base, size)
        batch = [torch.from_numpy(view.copy())[None] for view in views]
        with torch.inference_mode():
            found = predicted(self.model, batch, grid, rules, self.device)[0]
        return found.to(torch.uint8).cpu().numpy()


def load(
    runs: Sequence[Path],
    *,
    device: str | None = None,
    protocol_name: str | None = None,
    root: Path | None = None,
    titles: Sequence[str] = (),
    mode_name: str | None = None,
    compiles: bool | None = None,
) -> list[Tested]:
    """Load runs, or saved models, for testing.

    Args:
        protocol_name: of all; default: each recipe's, and `unified` for models without one.
        mode_name: `exact` or `fast`, of all; default: each recipe's, and `exact`.    compiles: whether `fast` does.
        titles: one for each; default: the methods' where they differ, else the folders' names.

    Raises: CheckpointError, RecipeError.
    """
    on = pick_device(device)
    found = []
    for run in runs:
        model = checkpoints.load_model(run)
        checkpoints.in_fp32(model)
        model.to(on)
        model.check_backends()
        path = run / "recipe.yaml"
        recipe = load_recipe(str(path), root=root) if path.is_file() else None
        rules = protocol.lookup(protocol_name or (recipe.eval.protocol if recipe else "unified"))
        how = mode(mode_name or (recipe.eval.mode if recipe else "exact"), compiles=compiles)
        found.append(Tested("", run, ready(model, how), on, rules, recipe.data.size if recipe else None))
    return [replace(one, title=title) for one, title in zip(found, titles or _titles(found), strict=True)]


def _titles(models: Sequence[Tested]) -> list[str]:
    by_method = [str(methods.constants(one.model.method)["TITLE"]) for one in models]
    by_folder = [one.run.resolve().name for one in models]
    for names in (by_method, by_folder):
        if len(set(names)) == len(names):
            return names
    return [f"{number}. {name}" for number, name in enumerate(by_folder, 1)]

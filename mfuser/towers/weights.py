"""Location of the towers' published weights, their local state, and advice on missing ones; needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mfuser.towers.files import HubFile, PackagedFile
from mfuser.towers.table import TIMM, TOWERS


def files(tower: str) -> list[HubFile]:
    """Return the files that a tower is loaded from, as `Tower.files`; for a `timm:<model>`, as timm says.

    Raises: ValueError as `hub_file`.
    """
    if tower in TOWERS:
        return TOWERS[tower].files
    row = hub_file(tower)
    return [row] if isinstance(row, HubFile) else []


class WeightsNotFound(ValueError):
    """Pretrained weights are missing or incomplete on this machine."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message}; {hint}")
        self.message, self.hint = message, hint


def require(towers: Sequence[str]) -> dict[str, Path]:
    """Return the paths of the towers' weights in the local Hub cache.

    Raises: WeightsNotFound naming every missing file, its size, and how to get it.
    """
    found: dict[str, Path] = {}
    missing: dict[str, list[HubFile]] = {}
    for tower in dict.fromkeys(towers):
        row = hub_file(tower)
        if row is None:
            continue
        if isinstance(row, PackagedFile):
            found[tower] = _packaged(tower, row)
        elif path := row.where:
            found[tower] = path
        else:
            missing[tower] = [file for file in files(tower) if file.where is None]
    if missing:
        listed = ", ".join(str(file) for rows in missing.values() for file in rows)
        raise WeightsNotFound(f"pretrained weights are not on this machine: {listed}", how_to_get(missing))
    return found


def _packaged(tower: str, row: PackagedFile) -> Path:
    """Return the path of weights that come with this package, and are what they were when it was made."""
    path, digest = row.where, row.sha256()
    if path is None or digest != row.digest:
        state = "is not there" if path is None else f"is damaged: its SHA-256 is {digest}, not {row.digest}"
        raise WeightsNotFound(f"the file of `{tower}`, {row.file}, {state}", "install dgbench again")
    return path


def hub_file(tower: str) -> HubFile | PackagedFile | None:
    """Return the file of a tower's weights, None if it has none; for a `timm:<model>`, that on the Hub, as timm says.

    Raises: ValueError for an unknown tower, and for a model that timm has no weights of.
    """
    if tower in TOWERS:
        return TOWERS[tower].weights
    if not tower.startswith(TIMM):
        raise ValueError(f"unknown tower `{tower}`; choose from {', '.join(sorted(TOWERS))}, or {TIMM}<model>")
    import timm

    from mfuser.towers.meta import unfilled

    model = tower.removeprefix(TIMM)
    described = timm.get_pretrained_cfg(model)
    if not described or not described.hf_hub_id:
        raise ValueError(f'timm has no weights of `{model}` on the Hub; build it with weights="random"')
    with unfilled():
        size = sum(4 * p.numel() for p in timm.create_model(model).parameters()) / 1e9
    return HubFile(described.hf_hub_id, "model.safetensors", float(f"{size:.2g}"), described.license or "see its page")


def how_to_get(towers: Iterable[str]) -> str:
    """Return how to get the missing files of towers, with and without a network."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return (
        f"where there is a network, run: dgbench download {' '.join(towers)} (the files go to {HF_HUB_CACHE}; copy that "
        "folder to a machine without one, or point HF_HUB_CACHE at it)"
    )

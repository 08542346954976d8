"""Where the towers' published weights are, what is on this disk, and what to say about the rest; needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mfuser.towers.table import LANGUAGE


@dataclass(frozen=True)
class HubFile:
    """One file on the Hugging Face Hub."""

    repo: str
    file: str
    gigabytes: float  # about: what the Hub states is what a download is held against
    licence: str = "see its page"

    @property
    def size(self) -> str:
        """About how large it is, as `1.7 GB`."""
        return f"{self.gigabytes:g} GB" if self.gigabytes >= 0.1 else f"{1000 * self.gigabytes:.2g} MB"

    @property
    def where(self) -> Path | None:
        """The file in the local Hub cache, or None."""
        # as huggingface_hub documents its cache; its own function imports an HTTP client, which takes longer than all the rest
        from huggingface_hub.constants import HF_HUB_CACHE

        folder = Path(HF_HUB_CACHE, f"models--{self.repo.replace('/', '--')}")
        try:
            commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        path = folder / "snapshots" / commit / self.file
        return path if path.exists() else None

    def sha256(self) -> str | None:
        """64 hex digits of the file in the local Hub cache, read as a whole; None if it is not there."""
        if (path := self.where) is None:
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __str__(self) -> str:
        return f"{self.repo}/{self.file} ({self.size})"


WEIGHTS: dict[str, HubFile | None] = {
    "dinov2_l": HubFile("timm/vit_large_patch14_dinov2.lvd142m", "model.safetensors", 1.2, "Apache-2.0"),
    "dinov2_l_reg4": HubFile("timm/vit_large_patch14_reg4_dinov2.lvd142m", "model.safetensors", 1.2, "Apache-2.0"),
    "dinov3_l": HubFile("timm/vit_large_patch16_dinov3.lvd1689m", "model.safetensors", 1.2, "DINOv3"),
    "eva02": HubFile("timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k", "open_clip_model.safetensors", 1.7, "MIT"),
    "clip": HubFile("timm/vit_large_patch14_clip_336.openai", "open_clip_model.safetensors", 1.7, "MIT"),
    "siglip": HubFile("timm/ViT-L-16-SigLIP-384", "open_clip_model.safetensors", 2.6, "Apache-2.0"),
    "siglip2": HubFile("timm/ViT-L-16-SigLIP2-512", "open_clip_model.safetensors", 3.5, "Apache-2.0"),
    "tiny": None,  # trained from scratch, like the next
    "small": None,
}
# vocabularies that open_clip does not bring along; open_clip's configuration of the tower names the repository
TOKENIZERS: dict[str, HubFile] = {
    "siglip": HubFile("timm/ViT-B-16-SigLIP", "tokenizer.json", 0.0024, "Apache-2.0"),
    "siglip2": HubFile("timm/ViT-L-16-SigLIP2-512", "tokenizer.json", 0.034, "Apache-2.0"),
}


def role(tower: str) -> Literal["vfm", "vlm", "both"]:
    """What a row of WEIGHTS serves as; towers that are trained from scratch serve as either."""
    return "both" if WEIGHTS[tower] is None else "vlm" if tower in LANGUAGE else "vfm"


def files(tower: str) -> list[HubFile]:
    """The files that a tower is loaded from: weights, and the tokenizer's vocabulary where it is a file of its own."""
    return [row for row in (hub_file(tower), TOKENIZERS.get(tower)) if row is not None]


class WeightsNotFound(ValueError):
    """Pretrained weights are not on this machine, or not whole."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message}; {hint}")
        self.message, self.hint = message, hint


def require(towers: Sequence[str]) -> dict[str, Path]:
    """Paths of the towers' weights in the local Hub cache.

    Raises: WeightsNotFound naming every missing file, its size, and how to get it.
    """
    found: dict[str, Path] = {}
    missing: dict[str, list[HubFile]] = {}
    for tower in dict.fromkeys(towers):
        row = hub_file(tower)
        if row is None:
            continue
        if path := row.where:
            found[tower] = path
        else:
            missing[tower] = [file for file in files(tower) if file.where is None]
    if missing:
        listed = ", ".join(str(file) for rows in missing.values() for file in rows)
        raise WeightsNotFound(f"pretrained weights are not on this machine: {listed}", how_to_get(missing))
    return found


def hub_file(tower: str) -> HubFile | None:
    """Where a tower's weights are, None if it has none; of a `timm:<model>`, where timm says.

    Raises: ValueError for an unknown tower, and for a model that timm has no weights of.
    """
    if tower in WEIGHTS:
        return WEIGHTS[tower]
    if not tower.startswith("timm:"):
        raise ValueError(f"unknown tower `{tower}`; choose from {', '.join(sorted(WEIGHTS))}, or timm:<model>")
    import timm

    from mfuser.towers.loading import unfilled

    model = tower.removeprefix("timm:")
    described = timm.get_pretrained_cfg(model)
    if not described or not described.hf_hub_id:
        raise ValueError(f"timm has no weights of `{model}` on the Hub; build it with pretrained=False")
    with unfilled():
        size = sum(4 * p.numel() for p in timm.create_model(model).parameters()) / 1e9
    return HubFile(described.hf_hub_id, "model.safetensors", float(f"{size:.2g}"), described.license or "see its page")


def how_to_get(towers: Iterable[str]) -> str:
    """What to do about towers whose files are not here, with and without a network."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return (
        f"where there is a network, run: dgbench download {' '.join(towers)} (the files go to {HF_HUB_CACHE}; copy that "
        "folder to a machine without one, or point HF_HUB_CACHE at it)"
    )

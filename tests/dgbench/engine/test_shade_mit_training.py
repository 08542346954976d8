"""SHADE on MiT, stopped after a step: its rest, with teacher and basis, is that of a training that went through."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dgbench.engine import checkpoints
from dgbench.engine.train import train
from dgbench.progress import Silent
from dgbench.recipe import load_recipe


class Stopped(Silent):
    """A progress display during whose second step the process is stopped."""

    def start(self, what: str, total: int, unit: str) -> None:
        self.left = 2 if what.startswith("training") else total + 1

    def advance(self, n: int = 1, **fields: float | str) -> None:
        self.left -= n
        if not self.left:
            raise KeyboardInterrupt


def test_teacher_and_basis_are_gone_on_with_exactly(tmp_path: Path) -> None:
    small = ["data.size=[64, 128]", "data.crop=[64, 64]", "data.train_images=8", "train.batch_size=2", "train.steps=3"]
    kept = ["train.checkpoint_every=1", "train.log_every=1", "data.rare_class_sampling=null"]
    recipe = load_recipe("streets/shade-mit", [*small, *kept, "method.retrospection=true", "method.style_steps=2"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(recipe, tmp_path / "whole", progress=Silent(), device="cpu")
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "part", progress=Stopped(), device="cpu")
        train(recipe, tmp_path / "part", progress=Silent(), device="cpu", resume=True)
    finally:
        torch.set_num_threads(threads)
    whole, part = (checkpoints.folder_of(tmp_path / run) for run in ("whole", "part"))
    assert checkpoints.sha256(whole) == checkpoints.sha256(part)
    beside = load_file(whole / "training.safetensors")
    assert {name.split(".")[1] for name in beside} == {"teacher", "styles"}
    assert (whole / "training.safetensors").read_bytes() == (part / "training.safetensors").read_bytes()

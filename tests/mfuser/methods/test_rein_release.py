"""A checkpoint of Rein's adapter and head becomes a run, over the published weights of the tower that it leaves out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import mfuser
from dgbench import cli
from mfuser.authors import to_authors_state_dict
from mfuser.towers.table import TOWERS

SIZE = {"embed_dim": 64, "depth": 4, "num_heads": 2}
# the tower's row is that of DINOv2-S, made smaller
DECODER = {"decoder_dim": 32, "heads": 4, "pixel_layers": 1, "mask_layers": 2, "ffn_dim": 48, "points": 2, "groups": 8}
OPTIONS = {"vfm": "dinov2_s", **DECODER}


@pytest.fixture
def tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The tower's published weights, in the Hub cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(TOWERS, "dinov2_s", replace(TOWERS["dinov2_s"], options=SIZE, width=64, depth=4))
    file = TOWERS["dinov2_s"].weights
    assert file is not None
    state = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=70, **SIZE).state_dict()
    folder, commit = tmp_path / "cache" / f"models--{file.repo.replace('/', '--')}", hashlib.sha1(b"any").hexdigest()
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    save_file(state, folder / "snapshots" / commit / file.file)
    return state


def test_adapter_and_head_become_a_run_over_the_towers_published_weights(tmp_path: Path, tower: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(1)
    trained = mfuser.build("rein", **OPTIONS, image_size=(64, 64))
    for parameter in (*trained.reins.parameters(), *trained.decoder.parameters()):
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    theirs = to_authors_state_dict(trained)
    assert all(key.startswith(("backbone.reins.", "decode_head.")) for key in theirs)
    torch.save({"state_dict": theirs, "meta": {}}, tmp_path / "iter_40000_published.pth")
    recipe = {
        "method": {"name": "rein", **OPTIONS},
        "data": {"source": "streets-game", "targets": ["streets-city"], "size": [64, 128], "crop": [64, 64]},
        "train": {"steps": 20, "batch_size": 2},
        "optim": {"lr": 0.001},
    }
    (tmp_path / "small.yaml").write_text(json.dumps(recipe))
    given = ["convert", tmp_path / "iter_40000_published.pth", tmp_path / "run", "--recipe", tmp_path / "small.yaml", "--json"]
    done = CliRunner().invoke(cli.app, [str(a) for a in given], prog_name="dgbench")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["used"] == len(theirs)
    model, images = mfuser.load(tmp_path / "run"), torch.rand(1, 3, 64, 64)
    assert torch.equal(model.vfm.trunk.blocks[2].mlp.fc1.weight, tower["blocks.2.mlp.fc1.weight"])
    with torch.no_grad():
        assert torch.equal(model(images), trained(images))

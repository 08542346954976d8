"""A method whose authors published its adapters alone: its frozen tower comes from the tower's own published file.

The method, its recipe and the authors' files are made here; the tower is a small model of timm's, saved as the Hub has it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner, Result

import mfuser
from dgbench import cli
from mfuser import methods
from mfuser.authors import load_authors_checkpoint, recognise, to_authors_state_dict
from mfuser.towers.table import TOWERS, HubFile
from mfuser.towers.weights import WeightsNotFound

METHOD = '''
"""A frozen tower, a low-rank adapter behind it, a linear head."""

from dataclasses import dataclass

from torch import nn
from torch.nn import functional as F

from mfuser.keys import Source
from mfuser.releases import Release
from mfuser.segmentor import Segmentor
from mfuser.towers.vit import VisionEncoder

BACKBONES = ({"backbone": "made"},)
TOWERS = {"backbone": {"trunk": "encoder.trunk"}}


@dataclass(frozen=True)
class Options:
    backbone: str = "made"
    image_size: tuple[int, int] = (64, 64)


class Adapted(Segmentor):
    def __init__(self, options):
        super().__init__()
        self.image_size = options.image_size
        self.encoder = VisionEncoder(options.backbone, options.image_size).requires_grad_(False)
        self.adapter = nn.Linear(self.encoder.dim, self.encoder.dim)
        self.head = nn.Conv2d(self.encoder.dim, len(self.classes), 1)

    def forward(self, images):
        tokens, rope = self.encoder.embed(images), self.encoder.rope()
        for i in range(self.encoder.depth):
            tokens = self.encoder.block(i, tokens, rope)
        tokens = self.encoder.finish(tokens)
        scores = self.head(self.encoder.as_map(tokens + self.adapter(tokens)))
        return F.interpolate(scores, self.image_size, mode="bilinear", align_corners=False)


def _source(name):
    for ours, theirs in (("adapter.", "backbone.adapter."), ("head.", "decode_head.cls."), ("encoder.trunk.", "backbone.")):
        if name.startswith(ours):
            return Source((theirs + name.removeprefix(ours),))


MODEL = Adapted
RELEASES = tuple(
    Release({"backbone": tower}, recipe="RECIPE".replace("made", tower), marks=("backbone.adapter.weight", *marks),
            source=_source, dead=(r"^decode_head\\.conv_seg\\.",), absent=absent)
    for tower in ("made", "other")
    for absent, marks in ((("backbone",), ()), ((), ("backbone.cls_token",)))
)
'''

RECIPE = """
method: {{name: adapted, backbone: {tower}}}
data: {{source: streets-game, targets: [streets-city], size: [64, 128], crop: [64, 64]}}
train: {{steps: 20, batch_size: 2}}
optim: {{lr: 0.001}}
"""
SIZE = {"embed_dim": 64, "depth": 2, "num_heads": 2}
FILE = HubFile("made/small", "model.safetensors", 0.001, "MIT")
STATE = dict[str, Tensor]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    from huggingface_hub import constants

    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "adapted.py").write_text(METHOD.replace("RECIPE", str(tmp_path / "made.yaml")))
    for tower in ("made", "other"):
        (tmp_path / f"{tower}.yaml").write_text(RECIPE.format(tower=tower))
        row = replace(TOWERS["dinov2_s"], options=SIZE, width=64, depth=2, weights=replace(FILE, repo=f"{tower}/small"))
        monkeypatch.setitem(TOWERS, tower, row)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    methods.__path__.append(str(tmp_path / "methods"))
    try:
        yield tmp_path
    finally:
        methods.__path__.remove(str(tmp_path / "methods"))


@pytest.fixture
def tower(here: Path) -> STATE:
    """The tower's published weights, in the Hub cache."""
    state = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **SIZE).state_dict()
    commit = hashlib.sha1(b"any").hexdigest()
    place = here / "cache" / "models--made--small"
    (place / "snapshots" / commit).mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    save_file(state, place / "snapshots" / commit / FILE.file)
    return state


def adapters() -> STATE:
    torch.manual_seed(0)
    shapes = {"backbone.adapter.weight": (64, 64), "backbone.adapter.bias": (64,), "decode_head.cls.weight": (19, 64, 1, 1)}
    shapes |= {"decode_head.cls.bias": (19,), "decode_head.conv_seg.weight": (19, 3, 1, 1)}
    return {key: torch.randn(shape) for key, shape in shapes.items()}


def saved(path: Path, state: STATE) -> Path:
    torch.save({"meta": {}, "state_dict": state}, path)
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments], prog_name="dgbench")


def test_an_adapter_only_file_becomes_a_run_with_the_towers_published_weights(here: Path, tower: STATE) -> None:
    theirs = adapters()
    done = run("convert", saved(here / "rein.pth", theirs), here / "run", "--recipe", here / "made.yaml", "--json")
    assert done.exit_code == 0, done.output
    converted = json.loads(done.stdout)
    assert (converted["used"], converted["dead"]) == (4, ["decode_head.conv_seg.weight"])
    model = mfuser.load(here / "run")
    assert torch.equal(model.adapter.weight, theirs["backbone.adapter.weight"])
    assert torch.equal(model.encoder.trunk.blocks[1].attn.qkv.weight, tower["blocks.1.attn.qkv.weight"])
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 19, 64, 64)
    assert to_authors_state_dict(model).keys() == theirs.keys() - {"decode_head.conv_seg.weight"}


def test_without_the_towers_weights_the_missing_file_is_named_and_nothing_written(here: Path) -> None:
    done = run("convert", saved(here / "rein.pth", adapters()), here / "run", "--recipe", here / "made.yaml")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: pretrained weights are not on this machine: made/small/model.safetensors (1 MB)")
    assert "dgbench download made" in done.stderr
    assert not (here / "run").exists()


def test_adapters_that_fit_several_towers_ask_for_the_recipe(here: Path, tower: STATE) -> None:
    done = run("convert", saved(here / "rein.pth", adapters()), here / "run")
    assert done.exit_code == 1
    assert "may be of adapted with made (" in done.stderr
    assert "adapted with other (" in done.stderr
    assert "hint: name it by --recipe" in done.stderr


def test_a_file_that_holds_the_tower_too_needs_no_published_weights(here: Path, tower: STATE) -> None:
    theirs = adapters() | {f"backbone.{key}": value + 1 for key, value in tower.items() if key != "mask_token"}
    theirs["backbone.pos_embed"] = torch.randn(1, 17, 64)  # of the crop's grid, as their trainer keeps it
    assert [release.absent for _, release in recognise(theirs)] == [(), ()]
    model = mfuser.build("adapted", weights="meta")
    assert len(load_authors_checkpoint(model, theirs).used) == len(theirs) - 1
    assert torch.equal(model.encoder.trunk.norm.bias, tower["norm.bias"] + 1)


@pytest.mark.parametrize("weights", ["meta", "random"])
def test_adapters_alone_are_not_loaded_over_a_tower_without_its_weights(here: Path, tower: STATE, weights: str) -> None:
    model = mfuser.build("adapted", weights=weights)
    with pytest.raises(ValueError, match='leaves out .* tensors .*, as of a frozen tower; build the model with weights="publ'):
        load_authors_checkpoint(model, adapters())


def test_adapters_alone_are_loaded_over_a_tower_with_its_weights(here: Path, tower: STATE) -> None:
    model = mfuser.build("adapted")
    load_authors_checkpoint(model, adapters())
    assert torch.equal(model.encoder.trunk.norm.weight, tower["norm.weight"])
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_model_without_the_towers_file_is_not_built(here: Path) -> None:
    with pytest.raises(WeightsNotFound, match="made/small/model.safetensors"):
        mfuser.build("adapted")

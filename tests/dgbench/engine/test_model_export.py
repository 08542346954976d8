"""Runs whose frozen tower is named by its file: trained, resumed, scored; refused without the file; exported with all weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import mfuser
from dgbench import cli, results, share
from dgbench.engine import checkpoints
from dgbench.engine.train import train
from dgbench.progress import Silent
from dgbench.recipe import load_recipe
from mfuser.towers import named
from mfuser.towers.table import TOWERS, HubFile

SIZE = {"embed_dim": 64, "depth": 2, "num_heads": 2}
FILE = HubFile("made/small", "model.safetensors", 0.001, "MIT")
RECIPE = {
    "method": {"name": "linear", "vfm": "made"},
    "data": {
        "source": "streets-game",
        "targets": ["streets-city"],
        "size": [70, 140],
        "crop": [70, 70],
        "train_images": 4,
        "val_images": 2,
    },
    "train": {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "workers": 0, "log_every": 1},
    "optim": {"lr": 0.01},
}


def dgbench(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments], prog_name="dgbench")


def done(*arguments: str | Path) -> Result:
    result = dgbench(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory, patched: pytest.MonkeyPatch) -> Path:
    """The file of a tower `made` in the Hub cache."""
    from huggingface_hub import constants

    here = tmp_path_factory.mktemp("hub")
    patched.setitem(TOWERS, "made", replace(TOWERS["dinov2_s"], options=SIZE, width=64, depth=2, weights=FILE))
    patched.setattr(constants, "HF_HUB_CACHE", str(here))
    patched.setenv("DGBENCH_CACHE", str(here / "cache"))
    torch.manual_seed(0)
    folder, commit = here / "models--made--small", hashlib.sha1(b"any").hexdigest()
    for needed in (folder / "snapshots" / commit, folder / "refs"):
        needed.mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    place = folder / "snapshots" / commit / FILE.file
    save_file(timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=98, **SIZE).state_dict(), place)
    return place


@pytest.fixture
def without(tower: Path) -> Iterator[None]:
    """As on a machine that does not have the tower's file."""
    away = tower.with_suffix(".away")
    tower.rename(away)
    try:
        yield
    finally:
        away.rename(tower)


@pytest.fixture(scope="module")
def run(tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "made.yaml").write_text(json.dumps(RECIPE))
    done("train", folder / "made.yaml", "--out", folder / "run", "--quiet", "--device", "cpu", "--targets", "streets-city")
    return folder / "run"


def step(run: Path) -> Path:
    return checkpoints.folder_of(run)


def scores(run: Path) -> np.ndarray:
    (record,) = [one for one in results.query(run) if one.kind == "eval" and one.target == "streets-city"]
    return results.read_confusion(record)


def test_a_training_writes_what_it_trained_and_the_hash_of_the_tower(run: Path, tower: Path) -> None:
    (one,) = named.in_file(step(run) / "model.safetensors")
    assert one.sha256 == hashlib.sha256(tower.read_bytes()).hexdigest()
    state = load_file(step(run) / "model.safetensors")
    assert not any(".blocks." in name for name in state)
    assert state["head.weight"].dtype == torch.float32
    (record,) = checkpoints.trainings(run)
    assert record.extra["values_m"] == sum(value.numel() for value in mfuser.load(run).state_dict().values()) / 1e6


class _Stopped(Silent):
    """A progress display during whose third step the process is stopped."""

    left = 3

    def advance(self, n: int = 1, **fields: float | str) -> None:
        self.left -= n
        if not self.left:
            raise KeyboardInterrupt


def test_a_stopped_training_goes_on_as_the_whole_one(run: Path, tmp_path: Path) -> None:
    recipe, part = load_recipe(run / "recipe.yaml"), tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        train(recipe, part, progress=_Stopped(), device="cpu")
    assert len(named.in_file(step(part) / "model.safetensors")) == 1
    assert step(part).name == "step-000002"
    train(recipe, part, progress=Silent(), device="cpu", resume=True)
    assert checkpoints.sha256(step(part)) == checkpoints.sha256(step(run))
    moments = [torch.load(step(path) / "optimizer.pt", weights_only=True)["state"] for path in (run, part)]
    assert all(torch.equal(value, moments[1][key][name]) for key, row in moments[0].items() for name, value in row.items())


@pytest.mark.usefixtures("without")
def test_without_the_towers_file_every_command_names_it_its_hash_and_what_to_do(run: Path, tmp_path: Path) -> None:
    (one,) = named.in_file(step(run) / "model.safetensors")
    recipe = run.parent / "made.yaml"
    photo = tmp_path / "photo.png"
    for typed in (
        ("eval", run, "--targets", "streets-world", "--quiet"),
        ("predict", _photo(photo), "--checkpoint", run, "--out", tmp_path / "out.png"),
        ("export", run, tmp_path / "whole"),
        ("train", recipe, "--out", tmp_path / "begun", "--quiet", "--no-eval", "--set", f"train.init={run}"),
    ):
        result = dgbench(*typed)
        assert result.exit_code == 1, typed
        assert f"made/small/model.safetensors with SHA-256 {one.sha256}, which is not on this machine" in result.stderr
        assert "dgbench download made" in result.stderr
        assert "dgbench export RUN OUT" in result.stderr
        assert "train again" not in result.stderr
    assert not (tmp_path / "whole").exists()


def _photo(path: Path) -> Path:
    from PIL import Image

    Image.fromarray(np.zeros((70, 140, 3), np.uint8)).save(path)
    return path


def test_the_card_of_a_run_names_the_towers_it_needs_and_that_of_an_export_none(run: Path, whole: Path) -> None:
    (one,) = named.in_file(step(run) / "model.safetensors")
    cards = []
    for path in (run, whole):
        if not list(path.glob("record-*")):
            done("eval", path, "--quiet", "--device", "cpu", "--targets", "streets-city")
        cards.append(share.card(share.plan(path, "me/it"), results.scan(path)[0]))
    assert f"`made`: made/small/model.safetensors, SHA-256 {one.sha256}" in cards[0]
    assert "dgbench download made" in cards[0]
    assert "frozen towers" not in cards[1]


def test_the_towers_that_a_pulled_run_needs_are_known_without_loading_it(run: Path, without: None) -> None:
    assert share.towers_needed(run) == ["made"]


@pytest.fixture(scope="module")
def whole(run: Path) -> Path:
    told = json.loads(done("export", run, run.parent / "whole", "--json").stdout)
    assert told["dtype"] is None
    assert told["values_m"] == checkpoints.values(step(run)) / 1e6
    return run.parent / "whole"


@pytest.mark.usefixtures("without")
def test_an_exported_run_scores_the_same_without_the_towers_file(run: Path, whole: Path) -> None:
    assert not named.in_file(step(whole) / "model.safetensors")
    if not list(whole.glob("record-*")):
        done("eval", whole, "--quiet", "--device", "cpu", "--targets", "streets-city")
    assert np.array_equal(scores(run), scores(whole))
    (record,) = results.query(whole)
    assert "weights_dtype" not in record.extra
    assert (record.source_images, record.source_available) == (4, 4)


def test_an_exported_run_is_the_same_model_bit_for_bit(run: Path, whole: Path) -> None:
    ours, theirs = (mfuser.load(path).state_dict() for path in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_records_of_an_export_in_bf16_say_so(run: Path, tmp_path: Path) -> None:
    done("export", run, tmp_path / "narrow", "--dtype", "bf16")
    narrow, full = (step(path) / "model.safetensors" for path in (tmp_path / "narrow", run))
    assert load_file(narrow)["head.weight"].dtype == torch.bfloat16
    assert checkpoints.values(narrow.parent) == checkpoints.values(full.parent)
    done("eval", tmp_path / "narrow", "--quiet", "--device", "cpu", "--targets", "streets-city")
    (record,) = results.query(tmp_path / "narrow")
    assert record.extra["weights_dtype"] == "bf16"
    assert record.variant == "made, bf16 weights"
    done("predict", _photo(tmp_path / "photo.png"), "--checkpoint", tmp_path / "narrow", "--out", tmp_path / "out.png")


def test_sixteen_bits_are_scored_in_fp32(run: Path, tmp_path: Path) -> None:
    done("export", run, tmp_path / "narrow", "--dtype", "bf16")
    model = mfuser.load(tmp_path / "narrow")
    images = torch.rand(1, 3, 70, 70)
    assert checkpoints.in_fp32(model) == "bf16"
    expected = mfuser.load(run)
    expected.load_state_dict({name: value.to(torch.bfloat16) for name, value in expected.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(model(images), expected(images))


def test_what_cannot_be_exported_is_said_and_nothing_written(run: Path, tmp_path: Path) -> None:
    refused = dgbench("export", run, tmp_path / "new", "--dtype", "fp8")
    assert refused.exit_code == 1
    assert "unknown dtype `fp8`" in refused.stderr
    refused = dgbench("export", run, run)
    assert refused.exit_code == 1
    assert "is there already and not empty" in refused.stderr
    model = mfuser.load(run)
    with torch.no_grad():
        model.head.weight[0] = 1e6
    mfuser.save(model, tmp_path / "large" / "checkpoint" / "step-000001")
    (tmp_path / "large" / "recipe.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    refused = dgbench("export", tmp_path / "large", tmp_path / "new", "--dtype", "fp16")
    assert refused.exit_code == 1
    assert "head.weight holds" in refused.stderr
    assert "choose --dtype bf16 or fp32" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large"]

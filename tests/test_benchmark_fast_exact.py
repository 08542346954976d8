"""`benchmarks/fast_exact.py`: its numbers are those of two models' scores, pixels and logits."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dgbench import results
from dgbench.engine import checkpoints
from dgbench.engine.evaluate import evaluate
from dgbench.engine.targets import chosen_targets
from dgbench.engine.tested import load
from dgbench.engine.train import train
from dgbench.metrics import miou
from dgbench.progress import Silent
from dgbench.protocol import lookup
from dgbench.recipe import Recipe, load_recipe

FOLDER = Path(__file__).parents[1] / "benchmarks"
SETTINGS = (
    *("method.vfm=tiny", "method.vlm=tiny", "data.size=[64, 128]", "data.crop=[64, 64]", "data.targets=[streets-city]"),
    *(
        "data.train_images=8",
        "data.val_images=3",
        "train.steps=30",
        "train.batch_size=4",
        "optim.warmup_steps=2",
        "optim.lr=3e-3",
    ),
    *("train.checkpoint_every=30", "train.log_every=30", "eval.batch_size=1"),
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("fast_exact")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """A run of a few steps, in which road and sky are learned."""
    recipe = load_recipe("streets/mfuser", SETTINGS)
    run = tmp_path_factory.mktemp("trained") / "run"
    train(recipe, run, progress=Silent(), device="cpu")
    return run, recipe


def changed(run: Path, to: Path) -> Path:
    """Write a run with weights that are a little other ones."""
    to.mkdir()
    shutil.copy(run / "recipe.yaml", to)
    model = checkpoints.load_model(run)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data *= 1 + 0.02 * torch.randn_like(parameter)
    checkpoints.save(model, torch.optim.SGD(model.parameters(), 0.0), to, 1)
    return to


def test_scores_pixels_and_logits_of_two_models(script: ModuleType, trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    (run, recipe), beside = trained, changed(trained[0], tmp_path / "beside")
    one, other = (evaluate(folder, progress=Silent(), device="cpu")[0] for folder in (run, beside))
    found = script.scores(one, other)
    assert found["exact"] == one.miou
    assert found["fast"] == other.miou
    assert found["difference"] == pytest.approx(other.miou - one.miou)
    assert found["low"] <= found["difference"] <= found["high"]

    exact, fast = (load([folder], device="cpu")[0] for folder in (run, beside))
    [row] = recipe.data.rows(recipe.data.targets, None)
    [target] = chosen_targets(recipe, exact.rules, [(row, None)], None, None)
    target.dataset.prepare(Silent())
    found = script.pixels(exact, fast, target, 50)
    assert found["images"] == 3
    assert 0 < found["agree"] < 1
    assert script.pixels(exact, exact, target, 2) == {"images": 2, "agree": 1.0, "agree_labelled": 1.0}
    # the predictions are those that were scored: their matrices give the recorded score
    classes = len(one.iou)
    counts = np.zeros((classes, classes), np.int64)
    for i in range(3):
        sample = target.dataset[i]
        seen, known = exact.segment(sample.image, row, sample.label.shape), sample.label != 255
        np.add.at(counts, (sample.label[known], seen[known]), 1)
    assert miou(counts) == pytest.approx(one.miou)

    windows = script.first_windows(target, (64, 64), 2)
    assert windows.shape == (2, 3, 64, 64)
    assert 0 <= float(windows.min()) < float(windows.max()) <= 1
    errors = script.logits(exact.model, fast.model, windows, exact.device)
    assert list(errors) == ["scores", "class logits", "mask logits"]
    with torch.no_grad():
        known, new = (model.masks(windows)[1] for model in (exact.model, fast.model))
    assert errors["mask logits"]["largest"] == pytest.approx(float((new - known).abs().max()), rel=1e-3)
    assert errors["mask logits"]["relative"] == pytest.approx(float((new - known).norm() / known.norm()), rel=1e-3)
    same = script.logits(exact.model, copy.deepcopy(exact.model), windows, exact.device)
    assert {error["largest"] for error in same.values()} == {0.0}

    each = {"streets-city": {"scores": script.scores(one, other), "pixels": found, "logits": errors}}
    text = "\n".join(script.report(run, each, "cpu"))
    assert f"| streets-city | {100 * one.miou:.2f} | {100 * other.miou:.2f} |" in text
    worst = abs(other.miou - one.miou)
    assert ("is within" if worst <= 0.001 else "misses") + " the bar, 0.1." in text


def test_images_smaller_than_the_window_are_padded(script: ModuleType) -> None:
    recipe = load_recipe("streets/mfuser", SETTINGS)
    [row] = recipe.data.rows(recipe.data.targets, None)
    [target] = chosen_targets(recipe, lookup("unified"), [(row, None)], None, None)
    target.dataset.prepare(Silent())
    [window] = script.first_windows(target, (96, 96), 1)
    assert float(window[:, 64:].abs().max()) == 0
    assert torch.equal(window[:, :64], torch.from_numpy(target.dataset[0].image[:, 16:112].copy()).permute(2, 0, 1) / 255)


def test_a_report_has_what_there_is(script: ModuleType) -> None:
    pixels = {"images": 2, "agree": 0.5, "agree_labelled": None}
    text = "\n".join(script.report(Path("run"), {"one": {}, "other": {"pixels": pixels}}, "cpu"))
    assert "| one | – | – | – | – | – | – |" in text
    assert "| other | – | – | – | – | 50.0000% | – |" in text
    assert "There is no difference of mIoU: a mode was not scored." in text


def test_a_run_in_both_modes(
    script: ModuleType, trained: tuple[Path, Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(trained[0], tmp_path / "run", ignore=shutil.ignore_patterns("record-*", "confusion-*")))
    inputs, out = tmp_path / "windows.safetensors", tmp_path / "out.json"
    save_file({"images": torch.rand(1, 3, 64, 64)}, inputs)
    options = ["--device", "cpu", "--no-compile", "--images", "2", "--inputs", str(inputs), "--json", str(out)]
    assert script.main([str(run), *options]) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text(encoding="utf-8"))["targets"]["streets-city"]
    assert "# Fast against exact mode: run" in text
    assert found["pixels"]["agree"] > 0.9
    assert found["logits"]["mask logits"]["relative"] < 0.05
    assert len([record for record in results.query(run) if record.kind == "eval"]) == 2

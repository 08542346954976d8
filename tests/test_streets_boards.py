"""`benchmarks/streets_boards.py`: what is trained, what is kept, and the board of made-up runs."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

from dgbench import metrics, results
from dgbench.recipe import dump, load_recipe, recipe_hash, recipe_names
from dgbench.runs import seed_run

sys.path.insert(0, str(Path(__file__).parent / "dgbench"))
from records import record

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "streets_boards.py"
K = 19


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("streets_boards_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


def counts(right: float, image_seed: int) -> NDArray[np.int64]:
    """Matrices of 30 images of which a share of pixels is right; equal seeds have equal images."""
    rng = np.random.default_rng(image_seed)
    pixels = rng.integers(200, 2000, (30, K))
    hits = (pixels * np.clip(right + rng.normal(0, 0.05, (30, K)), 0, 1)).astype(np.int64)
    found = np.zeros((30, K, K), np.int64)
    found[:, range(K), range(K)] = hits
    found[:, range(K), (np.arange(K) + 1) % K] = pixels - hits
    return found


def trained(runs: Path, name: str, recipe_name: str, right: float, seeds: tuple[int, ...]) -> None:
    """Write complete runs of a row, as a training and its scoring leave them."""
    for seed in seeds:
        recipe = load_recipe(recipe_name, [f"train.seed={seed}"])
        folder = seed_run(runs / name, seed)
        folder.mkdir(parents=True)
        dump(recipe, folder / "recipe.yaml")
        same = {
            "method": recipe.method.name,
            "variant": recipe.method.variant,
            "recipe": recipe_name,
            "recipe_hash": recipe_hash(recipe),
            "checkpoint": f"{name}-{seed}",
            "seed": seed,
            "protocol_digest": "",
            "environment": {"device": "cpu", "torch": "2"},
        }
        results.write(record("streets-game", None, kind="train", split="train", steps=recipe.train.steps, **same), folder)
        for place, target in enumerate((recipe.data.source, *recipe.data.targets)):
            matrices = counts(right + 0.01 * seed, place)
            score = metrics.miou(matrices.sum(axis=0))
            made = record(target, score, n_images=30, n_available=30, **same)
            results.write(made, folder, matrices, [f"{target}-{i}" for i in range(30)])


def test_complete_runs_are_kept_and_make_a_board_with_paired_tests(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path / "runs", "streets-erm", "streets/erm", 0.5, (0, 1, 2))
    trained(tmp_path / "runs", "styles", "streets/shade", 0.7, (0, 1, 2))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("a complete run was trained again"))
    asked = ["--recipes", "streets/erm", "--row", "styles", "streets/shade", "--missing", "styles", "ImageNet | weights"]
    assert script.main([str(tmp_path), *asked, "--seeds", "0", "1", "2"]) == 0
    found = json.loads((tmp_path / "board.json").read_text())
    row = found["rows"]["styles"]
    assert row["seeds"] == [0, 1, 2]
    expected = [metrics.miou(counts(0.7 + 0.01 * seed, 1).sum(axis=0)) for seed in (0, 1, 2)]
    assert row["scores"]["streets-city"]["miou"] == pytest.approx(statistics.fmean(expected))
    assert row["scores"]["streets-city"]["deviation"] == pytest.approx(statistics.stdev(expected))
    assert (row["rank"], found["rows"]["streets-erm"]["rank"]) == (1, 2)
    mean = found["differences"]["styles"]["mean of targets"]
    assert mean["significant"]
    assert mean["low"] < row["mean"]["miou"] - found["rows"]["streets-erm"]["mean"]["miou"] < mean["high"]
    text = (tmp_path / "board.md").read_text()
    assert "ImageNet \\| weights" in text
    assert text.strip() in capsys.readouterr().out


def test_what_the_recipes_do_not_ask_for_is_in_no_table_and_no_mean(script: ModuleType, tmp_path: Path) -> None:
    asked = ["--recipes", "streets/erm", "--row", "styles", "streets/shade", "--seeds", "0", "1", "--table"]
    boards = []
    for further in (False, True):
        folder = tmp_path / f"{further}"
        for name, recipe, right in (("streets-erm", "streets/erm", 0.5), ("styles", "streets/shade", 0.7)):
            trained(folder / "runs", name, recipe, right, (0, 1))
            scored = results.query(folder / "runs" / name)
            for one in scored if further else []:
                if one.target == "streets-city":
                    matrices = counts(0.9 - right, 7)
                    score = metrics.miou(matrices.sum(axis=0))
                    again = replace(one, id=results.new_id(), target="photographs", miou=score, iou=())
                    results.write(again, one.run, matrices, [f"p-{i}" for i in range(30)])
        assert script.main([str(folder), *asked]) == 0
        boards.append(json.loads((folder / "board.json").read_text()))
    assert boards[0]["rows"].keys() == boards[1]["rows"].keys()
    assert boards[1]["targets"] == boards[0]["targets"]
    assert boards[1]["differences"] == boards[0]["differences"]


def test_a_run_with_other_settings_is_not_taken_for_a_rows(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "runs", "streets-erm", "streets/erm", 0.5, (0,))
    asked = [str(tmp_path), "--recipes", "streets/erm", "--seeds", "0", "--set", "train.steps=7"]
    assert script.main(asked) == 1
    assert "seed-0 was begun with other settings" in capsys.readouterr().err


def test_rows_are_named_apart_and_have_the_settings_of_all_and_their_own(script: ModuleType) -> None:
    given = [
        "out",
        "--recipes",
        "streets/erm",
        "--row",
        "wide",
        "streets/erm",
        "method.decoder_dim=128",
        "--set",
        "train.steps=7",
    ]
    rows = script.rows_of(script.parser().parse_args(given))
    assert [(row.name, row.settings) for row in rows] == [
        ("streets-erm", ("train.steps=7",)),
        ("wide", ("train.steps=7", "method.decoder_dim=128")),
    ]
    with pytest.raises(Exception, match="two rows are named streets-erm"):
        script.rows_of(script.parser().parse_args(["out", "--recipes", "streets/erm", "streets/erm"]))


@pytest.mark.parametrize("file", sorted((SCRIPT.parent / "boards").glob("*.txt")), ids=lambda path: path.stem)
def test_files_of_arguments_give_rows_of_recipes_that_there_are(script: ModuleType, file: Path) -> None:
    rows = script.rows_of(script.parser().parse_args(["out", f"@{file}"]))
    assert len(rows) > 1
    assert {row.recipe for row in rows} <= {*recipe_names()}


def test_after_the_given_minutes_no_training_begins(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path / "runs", "streets-erm", "streets/erm", 0.5, (0,))
    monkeypatch.setattr(script, "render_once", lambda cells: None)
    asked = [str(tmp_path), "--recipes", "streets/erm", "--seeds", "0", "1", "--minutes", "0"]
    assert script.main(asked) == 0
    assert "streets-erm, seed 1: left for another call" in capsys.readouterr().err


@pytest.mark.full
def test_a_board_is_trained_and_a_failing_row_is_told(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["data.train_images=6", "data.val_images=3", "data.size=[64,128]", "data.crop=[64,64]", "train.steps=2"]
    rows = ["--recipes", "streets/erm", "streets/shade", "--row", "endless", "streets/erm", "optim.lr=1.0e+30"]
    asked = [str(tmp_path), "--seeds", "0", *rows, "--device", "cpu", "--set", *tiny, "train.batch_size=2"]
    assert script.main(asked) == 1
    said = capsys.readouterr()
    assert "failed: endless, seed 0: ended with 1" in said.err
    assert "| streets-shade | tiny_resnet | 1 | 2 |" in said.out

"""`benchmarks/ablation.py`: what is trained, what is kept, and the table at its end."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dgbench import results
from dgbench.recipe import dump, load_recipe
from dgbench.runs import claim_run

sys.path.insert(0, str(Path(__file__).parent / "dgbench"))
from records import model

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "ablation.py"


def state(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_a_run_that_was_scored_on_all_its_targets_is_kept(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("ablation_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    recipe = load_recipe("streets/smoke")
    folder = claim_run(tmp_path / "mvfuser-seed0")
    dump(recipe, folder / "recipe.yaml")
    for record in model(0.5, 0.4, 0.4, 0.4, targets=tuple(recipe.data.targets)):
        results.write(record, folder)
    before = state(tmp_path)
    script.train("streets/smoke", "mvfuser", 0, tmp_path, [])
    assert state(tmp_path) == before


@pytest.mark.full
def test_every_fuser_is_trained_once_and_what_is_finished_is_kept(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        settings = ["--recipe", "streets/smoke", "--seeds", "3", "--runs", "runs", "--set", "train.steps=2"]
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *settings, "--fusers", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    runs = tmp_path / "runs"
    text = run("mvfuser", "selfattn_separate")
    assert {path.name for path in runs.iterdir()} == {"mvfuser-seed3", "selfattn_separate-seed3"}
    recipe = load_recipe(runs / "selfattn_separate-seed3" / "recipe.yaml")
    assert recipe.method.options["fuser"] == "selfattn_separate"
    assert (recipe.train.seed, recipe.train.steps) == (3, 2)
    found = results.query(runs)
    for name in ("mvfuser-seed3", "selfattn_separate-seed3"):
        scored = {record.target for record in found if record.run == runs / name and record.kind == "eval"}
        assert scored == {recipe.data.source, *recipe.data.targets}
    rows = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| mvfuser ")]
    assert [cell.strip() for cell in rows[0]] == ["mvfuser", "1.67", "17.21"]

    # a run that was stopped while it was scored goes on, the other is left alone
    (lost,) = (runs / "mvfuser-seed3").glob("record-*streets-world*")
    lost.unlink()
    kept = state(runs / "selfattn_separate-seed3")
    run("mvfuser", "selfattn_separate")
    assert state(runs / "selfattn_separate-seed3") == kept
    assert "streets-world" in {record.target for record in results.query(runs / "mvfuser-seed3")}

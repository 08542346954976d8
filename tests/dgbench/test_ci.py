"""The benchmark of continuous integration: its life from a first baseline to a regression, and the files that it writes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import xmlschema
import yaml
from test_compare import run
from typer.testing import CliRunner

from dgbench import ci, ci_files, cli
from dgbench.errors import DgbenchError, ResultError
from dgbench.render.ci import as_markdown, trimmed
from dgbench.render.junit import junit
from dgbench.report.compare import compare
from dgbench.report.sides import read

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "tests" / "goldens" / "JUnit.xsd"  # github.com/windyroad/JUnit-Schema, Apache-2.0


def called(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["ci", *arguments, "--quiet"])


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a recipe of two steps on three images of each domain; the working folder is an empty one."""
    recipe = {
        "extends": "_streets.yaml",
        "method": {"name": "mfuser", "vfm": "tiny", "vlm": "tiny"},
        "data": {"size": [64, 128], "crop": [64, 64], "train_images": 4, "val_images": 3},
        "train": {"steps": 2, "batch_size": 2, "log_every": 1, "checkpoint_every": 2},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    return "small.yaml"


def test_the_life_of_a_pull_request(small: str, tmp_path: Path) -> None:
    without = called(small)
    assert without.exit_code == 3
    assert "there is no baseline" in without.stderr

    assert called(small, "--update-baseline", "--seeds", "0").exit_code == 0
    baseline = tmp_path / "dgbench-baseline"
    assert ci.is_baseline(baseline)
    assert not list(baseline.rglob("*.safetensors"))

    again = called(small, "--json")
    assert again.exit_code == 0
    scores = json.loads(again.stdout)["scores"]
    assert scores
    # the same machine, threads, versions and seed: to the last digit
    assert all(score["base"] == score["head"] for score in scores)

    summary = tmp_path / "dgbench-ci" / "summary.md"
    assert summary.read_text().startswith("## Pass")
    assert (tmp_path / "dgbench-ci" / "comment.md").is_file()
    assert json.loads((tmp_path / "dgbench-ci" / "comparison.json").read_text())["verdict"] == "pass"
    xmlschema.validate(tmp_path / "dgbench-ci" / "junit.xml", SCHEMA)


def test_a_regression_fails_its_case_and_the_command(tmp_path: Path) -> None:
    base = run(tmp_path / "base" / "run")
    head = run(tmp_path / "head" / "run", {"streets-city": 0.7, "streets-night": 0.5})
    found = ci.hold_against(base.parent, head.parent, max_drop=1.0)
    assert found.exit_code == 1
    text = junit(found).decode()
    (tmp_path / "junit.xml").write_text(text)
    xmlschema.validate(tmp_path / "junit.xml", SCHEMA)
    assert text.count("<failure") == 2  # night, and the mean
    assert 'name="mIoU on streets-night"' in text
    assert as_markdown(found, 65_536).startswith("## Regression")


def test_a_baseline_that_cannot_be_read_is_an_error_of_its_case(tmp_path: Path) -> None:
    base, head = run(tmp_path / "base" / "run"), run(tmp_path / "head" / "run")
    next(base.glob("record-*night*")).write_text("{")
    found = ci.hold_against(base.parent, head.parent, max_drop=1.0)
    assert found.exit_code == 3
    (tmp_path / "junit.xml").write_bytes(junit(found))
    xmlschema.validate(tmp_path / "junit.xml", SCHEMA)
    assert "<error" in junit(found).decode()


def test_a_slower_model_fails_only_where_speed_decides(tmp_path: Path) -> None:
    base, head = run(tmp_path / "base" / "run"), run(tmp_path / "head" / "run", images_per_second=8.0)
    assert "<failure" not in junit(ci.hold_against(base.parent, head.parent, max_drop=1.0)).decode()
    slower = ci.hold_against(base.parent, head.parent, max_drop=1.0, max_slowdown=10)
    assert slower.exit_code == 1
    assert "<failure" in junit(slower).decode()


def test_on_another_machine_the_spread_between_seeds_widens_the_intervals(tmp_path: Path) -> None:
    here = {"device": "cpu", "cpu": "one", "threads": "2"}
    for seed, share in enumerate((0.70, 0.73, 0.67)):
        both = dict.fromkeys(("streets-city", "streets-night"), share)
        trained(run(tmp_path / "base" / str(seed), both, seed=seed, recipe_hash=f"{seed}" * 12, environment=here), seed, here)
    worse = dict.fromkeys(("streets-city", "streets-night"), 0.68)
    same = trained(run(tmp_path / "same" / "0", worse, environment=here), 0, here)
    there = here | {"cpu": "another"}
    other = trained(run(tmp_path / "other" / "0", worse, environment=there), 0, there)
    assert ci.hold_against(tmp_path / "base", same.parent, max_drop=1.0).exit_code == 1
    widened = ci.hold_against(tmp_path / "base", other.parent, max_drop=1.0)
    assert widened.exit_code == 0
    assert any("widened by a deviation of 3" in note or "widened by a deviation of 4" in note for note in widened.notes)


def trained(folder: Path, seed: int, environment: dict[str, str]) -> Path:
    """Add the record of a training."""
    from records import record

    from dgbench import results

    made = record("streets-game", None, kind="train", split="train", seed=seed, checkpoint=f"{folder}", environment=environment)
    results.write(made, folder)
    return folder


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ResultError, match="not a baseline"):
        ci.keep(run(tmp_path / "runs" / "a").parent, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").is_file()


def test_a_new_baseline_replaces_the_old_one_whole(tmp_path: Path) -> None:
    first = run(tmp_path / "first" / "a")
    (first / "recipe.yaml").write_text("name: a")
    second = run(tmp_path / "second" / "b")
    (second / "recipe.yaml").write_text("name: b")
    ci.keep(first.parent, tmp_path / "base")
    ci.keep(second.parent, tmp_path / "base")
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["b"]
    assert compare(read(tmp_path / "base"), read(second.parent)).exit_code == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("limit", [200, 1000, 5000, 65_536])
def test_markdown_is_cut_at_a_line_and_says_so(tmp_path: Path, limit: int) -> None:
    base, head = run(tmp_path / "base"), run(tmp_path / "head", recipe="grüße " * 3)
    whole = as_markdown(compare(read(base), read(head)), 10**9)
    cut = as_markdown(compare(read(base), read(head)), limit)
    assert len(cut.encode()) <= limit
    if len(whole.encode()) > limit:
        assert cut.endswith("more lines are in the report's other files._\n")
        assert cut.count("<details>") == cut.count("</details>")
        assert set(cut.split("\n")[:-4]) <= set(whole.split("\n"))
    else:
        assert cut == whole


def test_what_has_no_room_at_all_is_left_out() -> None:
    assert trimmed("line\n" * 10, 5) == ""
    assert trimmed("line\n" * 10, -5) == ""


def test_the_step_summary_gets_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = run(tmp_path / "base")
    (tmp_path / "summary").write_text("of another step\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    ci.write_reports(compare(read(base), read(base)), tmp_path / "out")
    assert (tmp_path / "summary").read_text().startswith("of another step\n## Pass")


def test_init_writes_a_workflow_and_a_script_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert called("--init").exit_code == 0
    assert called("--init").exit_code == 0  # again, the same
    workflow = yaml.safe_load((tmp_path / ".github" / "workflows" / "dgbench.yml").read_text())
    steps = workflow["jobs"]["benchmark"]["steps"]
    assert any(step.get("run", "").startswith("sh dgbench-ci.sh") for step in steps)
    assert subprocess.run(["sh", "-n", "dgbench-ci.sh"], check=False).returncode == 0
    (tmp_path / "dgbench-ci.sh").write_text("mine")
    with pytest.raises(DgbenchError, match="another content"):
        ci_files.write(tmp_path)


def test_the_script_passes_the_exit_status_on(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in {"python": "exit 0", "dgbench": 'echo "$@" > called; exit 3'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    script = tmp_path / "dgbench-ci.sh"
    script.write_text(ci_files.SCRIPT)
    sh = shutil.which("sh")
    assert sh is not None
    done = subprocess.run(
        [sh, str(script), "--seeds", "1"], cwd=tmp_path, env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}, check=False
    )
    assert done.returncode == 3
    assert (tmp_path / "called").read_text() == "ci --max-drop 1.0 --seeds 1\n"

"""Two sides of runs: what is matched, what is told, what decides, and what is never a pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from records import record
from typer.testing import CliRunner

from dgbench import cli, metrics, results
from dgbench.report import sides
from dgbench.report.compare import MEAN, Comparison, compare

K = 19
TARGETS = ("streets-city", "streets-night")
MACHINE = {"device": "cpu", "platform": "here", "threads": "2", "torch": "2.14"}


def counts(n: int, seed: int, right: float = 0.7) -> NDArray[np.int64]:
    """Matrices of n images of which a share of pixels is right; equal seeds have equal images."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(200, 2000, (n, K))
    share = np.clip(right + rng.normal(0, 0.05, (n, K)), 0, 1)
    hits = (pixels * share).astype(np.int64)
    found = np.zeros((n, K, K), np.int64)
    found[:, range(K), range(K)] = hits
    found[:, range(K), (np.arange(K) + 1) % K] = pixels - hits
    return found


def run(folder: Path, right: dict[str, float] | None = None, *, seed: int = 0, n: int = 40, **fields: Any) -> Path:
    """Write a run: a record and matrices for each target."""
    folder.mkdir(parents=True)
    right = right or dict.fromkeys(TARGETS, 0.7)
    speed = fields.pop("images_per_second", 10.0)
    fields = {"checkpoint": f"{folder}", "environment": MACHINE, "seed": seed, "protocol_digest": ""} | fields
    for place, (target, share) in enumerate(right.items()):
        matrices = counts(n, 100 + place, share)
        score = metrics.miou(matrices.sum(axis=0))
        made = record(target, score, n_images=n, n_available=n, seconds={"model": n / speed}, **fields)
        results.write(made, folder, matrices, [f"{target}-{i}" for i in range(n)])
    return folder


def compared(base: Path, head: Path, **options: Any) -> Comparison:
    return compare(sides.read(base), sides.read(head), **options)


def verdicts(found: Comparison) -> dict[str, str]:
    return {score.target: score.verdict for score in found.scores}


def test_night_alone_worse_is_a_regression_that_names_night(tmp_path: Path) -> None:
    base = run(tmp_path / "base")
    head = run(tmp_path / "head", {"streets-city": 0.7, "streets-night": 0.65})
    found = compared(base, head)
    assert verdicts(found) == {"streets-city": "same", "streets-night": "worse", MEAN: "worse"}
    assert found.verdict == "regression"
    assert found.regressions[0] == "streets/mfuser (tiny + tiny): mIoU on streets-night"


def test_a_drop_within_the_allowed_one_passes(tmp_path: Path) -> None:
    base = run(tmp_path / "base")
    head = run(tmp_path / "head", {"streets-city": 0.7, "streets-night": 0.695})
    assert compared(base, head).verdict == "regression"
    found = compared(base, head, max_drop=1.0)
    assert found.verdict == "pass"
    assert verdicts(found)["streets-night"] == "same"


def test_what_is_better_passes_and_says_so(tmp_path: Path) -> None:
    found = compared(run(tmp_path / "base"), run(tmp_path / "head", dict.fromkeys(TARGETS, 0.8)))
    assert set(verdicts(found).values()) == {"better"}
    assert found.exit_code == 0


def test_a_difference_no_larger_than_chance_is_none(tmp_path: Path) -> None:
    base, head = run(tmp_path / "base"), run(tmp_path / "head", {"streets-city": 0.7, "streets-night": 0.7})
    matrices = counts(40, 7)  # other errors on the same images
    for target in TARGETS:
        old = next(head.glob(f"record-*{target}*.json"))
        old.unlink()
        score = metrics.miou(matrices.sum(axis=0))
        made = record(target, score, n_images=40, n_available=40, checkpoint="x", sequence=5)
        results.write(made, head, matrices, [f"{target}-{i}" for i in range(40)])
    found = compared(base, head)
    assert found.verdict == "pass"
    assert all(score.detectable and score.detectable > 0 for score in found.scores)


def test_seeds_are_one_model_whose_spread_counts(tmp_path: Path) -> None:
    for side, shift in (("base", 0.0), ("head", -0.03)):
        for seed, extra in enumerate((0.0, 0.04, -0.04)):
            run(tmp_path / side / str(seed), dict.fromkeys(TARGETS, 0.7 + shift + extra), seed=seed, recipe_hash=f"{seed}" * 12)
    found = compared(tmp_path / "base", tmp_path / "head")
    assert found.scores[0].difference is not None
    assert found.scores[0].difference.seeds == (3, 3)
    assert found.verdict == "pass"  # three points are nothing where seeds lie eight apart
    one = compared(tmp_path / "base" / "0", tmp_path / "head" / "0")
    assert one.verdict == "regression"
    assert any("not other training runs" in note for note in one.notes)
    assert compared(tmp_path / "base" / "0", tmp_path / "head" / "0", noise=4.0).verdict == "pass"


def test_a_target_that_the_head_lacks_is_missing_and_no_pass(tmp_path: Path) -> None:
    base, head = run(tmp_path / "base"), run(tmp_path / "head", {"streets-city": 0.7})
    found = compared(base, head)
    assert verdicts(found) == {"streets-city": "same", "streets-night": "missing"}
    assert found.exit_code == 3
    turned = compared(head, base)
    assert verdicts(turned)["streets-night"] == "new"
    assert turned.exit_code == 0


@pytest.mark.parametrize(
    "fields",
    [{"protocol_hash": "another"}, {"n": 39}, {"rendered": True}, {"protocol": "of-tomorrow"}],
    ids=["protocol", "images", "rendered", "unknown protocol"],
)
def test_what_was_measured_otherwise_cannot_be_compared(tmp_path: Path, fields: dict[str, Any]) -> None:
    base = run(tmp_path / "base", protocol_hash="one")
    head = run(tmp_path / "head", dict.fromkeys(TARGETS, 0.2), **({"protocol_hash": "one"} | fields))
    found = compared(base, head)
    assert found.exit_code == 3
    assert set(verdicts(found).values()) <= {"not comparable", "missing", "new"}


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("pattern", ["record-*night*.json", "confusion-*night*.npz"])
@pytest.mark.parametrize("harm", [damaged, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:99])])
def test_a_damaged_baseline_is_neither_a_pass_nor_a_regression(tmp_path: Path, pattern: str, harm: Any) -> None:
    base, head = run(tmp_path / "base"), run(tmp_path / "head")
    harm(next(base.glob(pattern)))
    found = compared(base, head)
    if harm is Path.unlink and pattern.startswith("record"):
        assert verdicts(found)["streets-night"] == "new"  # nobody knows that it was there
        return
    assert found.exit_code == 3


def test_a_record_whose_matrices_give_another_score_is_not_believed(tmp_path: Path) -> None:
    base = run(tmp_path / "base")
    head = tmp_path / "head"
    head.mkdir()
    for place, target in enumerate(TARGETS):
        matrices = counts(40, 100 + place)
        results.write(record(target, 0.9, n_images=40, n_available=40), head, matrices, [f"{target}-{i}" for i in range(40)])
    found = compared(base, head)
    assert found.exit_code == 3
    assert [score.note.partition(": ")[2] for score in found.scores] == ["its matrices give another mIoU than it says"] * 2


def test_a_fifth_slower_is_a_regression_only_where_asked(tmp_path: Path) -> None:
    base, head = run(tmp_path / "base"), run(tmp_path / "head", images_per_second=8.0)
    found = compared(base, head)
    assert found.exit_code == 0
    assert {cost.name: cost.verdict for cost in found.costs} == {"scoring, images/s": "worse"}
    assert compared(base, head, max_slowdown=10).regressions == ("streets/mfuser (tiny + tiny): scoring, images/s",)
    assert compared(base, head, max_slowdown=25).exit_code == 0


def test_times_of_two_machines_are_not_compared(tmp_path: Path) -> None:
    base = run(tmp_path / "base")
    head = run(tmp_path / "head", images_per_second=2.0, environment=MACHINE | {"threads": "8"})
    found = compared(base, head, max_slowdown=10)
    assert found.exit_code == 0
    assert found.costs[0].verdict == "not comparable"


def test_two_methods_are_compared_where_each_side_has_one(tmp_path: Path) -> None:
    base = run(tmp_path / "base", method="source-only", recipe="streets/source-only")
    head = run(tmp_path / "head", dict.fromkeys(TARGETS, 0.8))
    found = compared(base, head)
    assert found.scores[0].model == "streets/source-only (tiny + tiny) → streets/mfuser (tiny + tiny)"
    assert found.verdict == "pass"


def test_a_model_of_a_baseline_that_is_gone_is_no_pass(tmp_path: Path) -> None:
    run(tmp_path / "base" / "a")
    run(tmp_path / "base" / "b", method="source-only", recipe="streets/source-only")
    run(tmp_path / "head" / "a")
    found = compared(tmp_path / "base", tmp_path / "head")
    assert found.exit_code == 3
    assert {score.model for score in found.scores if score.verdict == "missing"} == {"streets/source-only (tiny + tiny)"}


def test_equal_loss_curves_are_the_same_and_others_are_told_apart_by_seeds(tmp_path: Path) -> None:
    def logged(folder: Path, factor: float) -> Path:
        lines = [json.dumps({"step": step, "loss": factor * 5 / step}) for step in range(1, 6)]
        (folder / "log.jsonl").write_text("\n".join([*lines, '{"step": 6, "lo']))
        return folder

    for side, factors in (("base", (1.0, 1.1)), ("head", (1.0, 1.1)), ("far", (1.5, 1.6))):
        for seed, factor in enumerate(factors):
            logged(run(tmp_path / side / str(seed), seed=seed, recipe_hash=f"{seed}" * 12), factor)
    same = {cost.name: cost for cost in compared(tmp_path / "base", tmp_path / "head").costs}["loss curve, distance"]
    assert (same.verdict, same.change) == ("same", 0.0)
    far = {cost.name: cost for cost in compared(tmp_path / "base", tmp_path / "far").costs}["loss curve, distance"]
    assert far.change == pytest.approx(0.477, abs=1e-3)
    assert "10.0 % apart" in far.note or "9.1 % apart" in far.note


def called(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["compare", *arguments])


def test_the_exit_code_tells_pass_regression_usage_and_not_comparable(tmp_path: Path) -> None:
    base = run(tmp_path / "base")
    worse = run(tmp_path / "worse", dict.fromkeys(TARGETS, 0.5))
    assert called(str(base), str(base)).exit_code == 0
    done = called(str(base), str(worse))
    assert done.exit_code == 1
    assert done.stdout.startswith("Regression: ")
    assert called(str(base), str(worse), "--max-drop", "many").exit_code == 2
    assert called(str(base)).exit_code == 3  # no latest run
    gone = called(str(tmp_path / "gone"), str(worse))
    assert gone.exit_code == 3
    assert "there is no" in gone.stderr
    (tmp_path / "empty").mkdir()
    assert called(str(tmp_path / "empty"), str(worse)).exit_code == 3


def test_json_has_every_number_and_the_verdict(tmp_path: Path) -> None:
    base, head = run(tmp_path / "base"), run(tmp_path / "head", dict.fromkeys(TARGETS, 0.5))
    found = json.loads(called(str(base), str(head), "--json").stdout)
    assert found["verdict"] == "regression"
    assert found["scores"][0]["difference"]["high"] < 0
    assert set(found["scores"][0]["classes"]) >= {"road", "bicycle"}


def test_hostile_names_are_shown_harmless(tmp_path: Path) -> None:
    base = run(tmp_path / "base", recipe="\x1b[2J<b>|x|")
    text = called(str(base), str(base), "--format", "markdown").stdout
    assert "\x1b" not in text
    assert "<b>" not in text

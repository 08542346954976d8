"""The accuracy of each fuser from run folders: which runs count, and their mean and spread by numpy."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgbench import results
from dgbench.recipe import dump, load_recipe
from dgbench.report.ablation import AVERAGE, Ablation, ablation, published
from dgbench.report.leaderboard import load_published
from dgbench.runs import claim_run

sys.path.insert(0, str(Path(__file__).parent))
from records import record

TARGETS = ("streets-city", "streets-fog")


class Runs:
    """Run folders as `dgbench train` and `dgbench eval` leave them: a resolved recipe, and records."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.numbers = itertools.count(1)

    def add(
        self,
        fuser: str,
        seed: int,
        *scores: float,
        recipe: str = "streets/mfuser-scratch",
        settings: tuple[str, ...] = (),
        targets: tuple[str, ...] = TARGETS,
        **fields: Any,
    ) -> Path:
        """Add a run that was scored on targets, after all runs before."""
        number = next(self.numbers)
        folder = claim_run(self.root / f"run{number}")
        own = [f"method.fuser={fuser}", f"train.seed={seed}", f"data.targets=[{','.join(TARGETS)}]", *settings]
        dump(load_recipe(recipe, own), folder / "recipe.yaml")
        # its source's own validation split is no unseen domain
        self.score(folder, 0.9, "streets-game")
        for score, target in zip(scores, targets, strict=False):
            self.score(folder, score, target, **fields)
        return folder

    def score(self, folder: Path, miou: float | None, target: str, **fields: Any) -> None:
        results.write(record(target, miou, sequence=next(self.numbers), **fields), folder)

    def found(self) -> Ablation:
        return ablation(results.query(self.root))


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_mean_and_sample_deviation_over_seeds_are_numpys(runs: Runs) -> None:
    scores = np.random.default_rng(0).uniform(0.2, 0.6, size=(3, 4, 2))
    fusers = ("mvfuser", "selfattn_concat", "bi_deform_attn")
    for (i, fuser), seed in itertools.product(enumerate(fusers), range(4)):
        runs.add(fuser, seed, *scores[i, seed])
    found = runs.found()
    assert set(found.accuracy) == set(fusers)
    for i, fuser in enumerate(fusers):
        means = scores[i].mean(1)
        assert found.accuracy[fuser].mean == pytest.approx(means.mean())
        assert found.accuracy[fuser].spread == pytest.approx(means.std(ddof=1))
        assert found.accuracy[fuser].seeds == 4


def test_it_says_what_the_numbers_are_of(runs: Runs) -> None:
    runs.add("mvfuser", 0, 0.4, 0.5, settings=("train.steps=77",))
    text = runs.found().described
    for part in ("streets/mfuser-scratch", "77 steps", "streets-game", "streets-city, streets-fog", "protocol unified"):
        assert part in text


def test_a_single_run_has_no_spread(runs: Runs) -> None:
    runs.add("mvfuser", 5, 0.4, 0.5)
    (found,) = runs.found().accuracy.values()
    assert (found.mean, found.spread, found.seeds) == (pytest.approx(0.45), 0, 1)


def test_runs_with_other_towers_are_named_and_not_counted(runs: Runs) -> None:
    runs.add("mvfuser", 0, 0.4, 0.5)
    found = ablation(results.query(runs.root), lambda vfm, vlm: (vfm, vlm) != ("tiny", "tiny"))
    assert found == Ablation({}, "", ("tiny + tiny",))


def test_published_averages_are_those_of_their_columns_and_of_the_table_of_methods() -> None:
    from mfuser.fusion import FUSERS

    found = published()
    assert found.scores.keys() <= FUSERS.keys()
    for scores in found.scores.values():
        # printed to two decimals
        assert scores[AVERAGE] == pytest.approx(np.mean([scores[name] for name in found.targets]), abs=5.1e-5)
    tables = [group for group in load_published() if group.source == "gta5" and group.targets == found.targets]
    (row,) = (row for table in tables for row in table.rows if row.recipe == "mfuser/eva02-gta")
    assert {name: row.scores[name].miou for name in found.targets} == {n: found.scores["mvfuser"][n] for n in found.targets}


def test_nothing_is_found_in_no_runs(runs: Runs) -> None:
    assert runs.found() == Ablation({}, "")


def test_of_runs_with_one_seed_the_newest_counts(runs: Runs) -> None:
    runs.add("mvfuser", 0, 0.9, 0.9)
    runs.add("mvfuser", 1, 0.2, 0.2)
    runs.add("mvfuser", 0, 0.4, 0.4)
    found = runs.found().accuracy["mvfuser"]
    assert (found.mean, found.seeds) == (pytest.approx(0.3), 2)


def test_of_scores_of_one_run_the_newest_complete_counts(runs: Runs) -> None:
    folder = runs.add("mvfuser", 0, 0.1, 0.5)
    runs.score(folder, 0.3, "streets-city")
    runs.score(folder, 0.8, "streets-city", n_images=5)  # of 100
    assert runs.found().accuracy["mvfuser"].mean == pytest.approx((0.3 + 0.5) / 2)


@pytest.mark.parametrize(
    ("scores", "fields"),
    [
        ((0.9, 0.9), {"n_images": 99}),  # of 100
        ((0.9, 0.9), {"protocol": "other"}),
        ((0.9, 0.9), {"split": "test"}),
        ((0.9, 0.9), {"kind": "train"}),
        ((0.9,), {}),  # one target is missing
        ((0.9, 0.9), {"targets": ("streets-city", "streets-world")}),
        ((0.9, None), {}),  # undefined
    ],
)
def test_runs_that_were_not_scored_in_full_do_not_count(runs: Runs, scores: tuple[float, ...], fields: dict[str, Any]) -> None:
    runs.add("mvfuser", 0, 0.4, 0.5)
    runs.add("mvfuser", 1, *scores, **fields)
    runs.add("selfattn_concat", 0, *scores, **fields)
    found = runs.found().accuracy
    assert set(found) == {"mvfuser"}
    assert (found["mvfuser"].mean, found["mvfuser"].seeds) == (pytest.approx(0.45), 1)


@pytest.mark.parametrize(
    "other",
    [
        {"settings": ("train.steps=7",)},
        {"settings": ("method.state=2",)},
        {"recipe": "streets/smoke"},
        {"protocol_hash": "of other pixels"},
    ],
)
def test_different_experiments_are_not_mixed(runs: Runs, other: dict[str, Any]) -> None:
    for seed in range(3):
        runs.add("selfattn_separate", seed, 0.9, 0.9, **other)
    runs.add("mvfuser", 7, 0.9, 0.9, **other)
    # the set with more fusers counts, also if it has fewer runs
    for fuser, score in (("mvfuser", 0.4), ("selfattn_concat", 0.3), ("bi_deform_attn", 0.2)):
        runs.add(fuser, 0, score, score)
    found = {fuser: (accuracy.mean, accuracy.seeds) for fuser, accuracy in runs.found().accuracy.items()}
    assert found == {"mvfuser": (0.4, 1), "selfattn_concat": (0.3, 1), "bi_deform_attn": (0.2, 1)}


def test_a_recipe_of_another_name_is_the_same_experiment(runs: Runs) -> None:
    first = runs.add("mvfuser", 0, 0.4, 0.4)
    runs.add("mvfuser", 1, 0.6, 0.6)
    text = (first / "recipe.yaml").read_text().partition("\n")[2]  # the first line holds the digest of the rest
    (first / "recipe.yaml").write_text(text.replace("name: streets/mfuser-scratch", "name: of/mine"))
    assert runs.found().accuracy["mvfuser"].seeds == 2


def test_runs_without_a_fuser_or_a_readable_recipe_are_passed_over(runs: Runs) -> None:
    runs.add("mvfuser", 0, 0.4, 0.5)
    broken = runs.add("mvfuser", 1, 0.9, 0.9)
    (broken / "recipe.yaml").write_text("method: [")
    gone = runs.add("mvfuser", 2, 0.9, 0.9)
    (gone / "recipe.yaml").unlink()
    floor = claim_run(runs.root / "floor")
    dump(load_recipe("streets/source-only", [f"data.targets=[{','.join(TARGETS)}]"]), floor / "recipe.yaml")
    for target in TARGETS:
        runs.score(floor, 0.9, target, method="source-only")
    assert runs.found().accuracy["mvfuser"].seeds == 1
    assert set(runs.found().accuracy) == {"mvfuser"}

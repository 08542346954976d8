"""Which targets make a table, when runs were scored on more than their recipes name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from calls import calls
from records import model, record

from dgbench.recipe import dump, load_recipe, recipe_hash
from dgbench.render.leaderboard import leaderboard_tables
from dgbench.report.expected import Reference
from dgbench.report.leaderboard import leaderboard
from dgbench.report.rows import Group
from dgbench.results import Record

OWN = ("streets-city", "streets-world")
FOG = tuple(f"streets-fog@0.{n}" for n in range(1, 6))


def trained(
    folder: Path,
    name: str,
    *settings: str,
    scores: Sequence[str] = OWN,
    sequence: int = 0,
    targets: Sequence[str] = OWN,
    miou: float = 0.4,
) -> list[Record]:
    """Records of a run in a folder of its own, which holds the recipe that names `targets`."""
    recipe = load_recipe("streets/mfuser", [f"data.targets=[{', '.join(targets)}]", *settings], check_method=False)
    (folder / name).mkdir()
    dump(recipe, folder / name / "recipe.yaml")
    fields = {"recipe_hash": recipe_hash(recipe), "checkpoint": name, "sequence": sequence}
    made = model(0.5, *([miou] * len(scores)), targets=tuple(scores), **fields)
    return [dataclasses.replace(r, path=folder / name / f"record-{r.target}.json") for r in made]


def drawn(groups: Sequence[Group]) -> list[tuple[tuple[str, ...], list[tuple[str, int | None]]]]:
    return [(g.targets, [(Path(row.origin).name, row.rank) for row in g.rows]) for g in groups]


def test_a_sweep_of_severities_takes_no_finished_run_its_rank(tmp_path: Path) -> None:
    swept = trained(tmp_path, "swept", scores=(*OWN, *FOG), miou=0.3)
    groups = leaderboard([*swept, *trained(tmp_path, "plain", "train.steps=40")]).groups
    assert drawn(groups) == [(OWN, [("plain", 1), ("swept", 2)]), (FOG, [("swept", 1)])]


def test_the_same_holds_for_runs_whose_recipe_is_gone() -> None:
    swept = model(0.5, *[0.3] * 7, targets=(*OWN, *FOG), checkpoint="1", method="swept")
    groups = leaderboard([*swept, *model(0.5, 0.4, 0.4, method="plain", checkpoint="2")]).groups
    assert [(g.targets, [(row.method, row.rank) for row in g.rows]) for g in groups] == [
        (OWN, [("plain", 1), ("swept", 2)]),
        (FOG, [("swept", 1)]),
    ]


def test_runs_that_share_some_severities_are_all_ranked_on_these(tmp_path: Path) -> None:
    long = trained(tmp_path, "long", scores=(*OWN, *FOG, "streets-night"))
    short = trained(tmp_path, "short", "train.steps=40", scores=(*OWN, FOG[1]), miou=0.3)
    assert drawn(leaderboard([*long, *short]).groups) == [
        (OWN, [("long", 1), ("short", 2)]),
        (("streets-night",), [("long", 1)]),
        ((FOG[0], *FOG[2:]), [("long", 1)]),
        ((FOG[1],), [("long", 1), ("short", 2)]),
    ]


def test_a_recipe_with_other_targets_has_a_table_and_whoever_has_these_scores_is_in_it(tmp_path: Path) -> None:
    usual = trained(tmp_path, "usual", scores=(*OWN, "streets-night"))
    second = trained(tmp_path, "second", "train.steps=40", miou=0.3)
    night = trained(tmp_path, "night", targets=("streets-night",), scores=("streets-night",), miou=0.2)
    assert drawn(leaderboard([*usual, *second, *night]).groups) == [
        (OWN, [("usual", 1), ("second", 2)]),
        (("streets-night",), [("usual", 1), ("night", 2)]),
    ]


def test_a_target_of_the_recipe_that_nobody_was_scored_on_is_no_column(tmp_path: Path) -> None:
    [group] = leaderboard(trained(tmp_path, "run", scores=OWN[:1])).groups
    assert drawn([group]) == [(OWN[:1], [("run", 1)])]


def test_a_run_that_lacks_a_target_which_others_have_is_a_row_without_rank(tmp_path: Path) -> None:
    whole, cut = trained(tmp_path, "whole"), trained(tmp_path, "cut", "train.steps=40", scores=OWN[:1], miou=0.9)
    assert drawn(leaderboard([*whole, *cut]).groups) == [(OWN, [("whole", 1), ("cut", None)])]


def test_every_score_has_a_place_in_some_table(tmp_path: Path) -> None:
    runs = [
        trained(tmp_path, "a", scores=(*OWN, "streets-night", *FOG[:2])),
        trained(tmp_path, "b", "train.steps=40", scores=(OWN[0], "streets-rain")),
        trained(tmp_path, "c", targets=("streets-rain", "streets-snow"), scores=("streets-snow", OWN[0])),
    ]
    groups = leaderboard([r for run in runs for r in run]).groups
    placed = {(Path(row.origin).name, t) for g in groups for row in g.rows for t, score in row.scores.items() if score}
    assert placed == {(r.checkpoint, r.target) for run in runs for r in run if r.target != r.source}


def test_columns_that_are_asked_for_are_those_of_the_only_table(tmp_path: Path) -> None:
    swept = trained(tmp_path, "swept", scores=(*OWN, *FOG))
    [group] = leaderboard(swept, targets=[FOG[0], FOG[0]]).groups
    assert group.targets == (FOG[0],)
    assert group.other_targets == (OWN[0], *FOG[1:], OWN[1])


def test_a_replaced_run_stays_only_in_the_tables_that_the_newer_is_not_in(tmp_path: Path) -> None:
    old = trained(tmp_path, "old", scores=(*OWN, *FOG[:1]))
    new = [dataclasses.replace(r, path=None, checkpoint="new", created=f"2026-12-{r.created[8:]}") for r in old[:3]]
    groups = leaderboard([*old, *new]).groups
    assert drawn(groups) == [(OWN, [("", 1)]), (FOG[:1], [("old", 1)])]


def test_references_stand_in_the_table_of_their_targets(tmp_path: Path) -> None:
    reference = Reference("x/y", "mfuser", "big", "streets-game", "unified", dict.fromkeys(("streets-game", *OWN), 0.6), "a GPU")
    groups = leaderboard(trained(tmp_path, "swept", scores=(*OWN, *FOG)), [reference]).groups
    assert [[row.kind for row in group.rows] for group in groups] == [["run", "reference"], ["run"]]


def test_the_work_grows_as_the_number_of_records() -> None:
    """Four times the models take about four times the calls, 16 times where each is held against each."""

    def work(n: int) -> int:
        records = [
            r
            for i in range(n)
            for r in model(0.5, i / n, 0.3, checkpoint=f"{i}", recipe_hash=f"{i:012x}", sequence=i, method=f"m{i % 3}")
        ]

        def arrange() -> None:
            [table] = leaderboard_tables(leaderboard(records, published=False))
            assert len(table.rows) == n

        return calls(arrange)

    work(10)  # what is done once
    assert work(400) < 6 * work(100)


def test_a_record_of_another_split_is_a_column_of_its_own() -> None:
    groups = leaderboard([*model(0.5, 0.4, 0.3), record("streets-city", 0.4, split="train")]).groups
    assert "streets-city (train)" in {column for group in groups for column in group.targets}

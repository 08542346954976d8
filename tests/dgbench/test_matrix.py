"""Source by target: which scores share a matrix and a row, and what is said of several seeds."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from records import model, record

from dgbench import results
from dgbench.recipe import dump, load_recipe
from dgbench.render.matrix import matrix_rows, matrix_tables
from dgbench.report.matrix import Matrix, matrices
from dgbench.results import Record


def run_of(folder: Path, *scores: float, settings: tuple[str, ...] = (), seed: int = 0, **fields: Any) -> list[Record]:
    """Return the records of a run in a folder that holds its recipe."""
    recipe = load_recipe("streets/mfuser", [*settings, f"train.seed={seed}"])
    folder.mkdir(parents=True)
    dump(recipe, folder / "recipe.yaml")
    own = {"recipe_hash": folder.name, "checkpoint": folder.name, "seed": seed, **fields}
    return [results.write(one, folder) for one in model(*scores, **own)]


def rows(found: Matrix) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(row.kind, row.source, row.seeds) for row in found.rows]


def test_models_are_rows_and_domains_are_columns_in_the_order_of_the_table_of_domains() -> None:
    game = model(0.6, 0.4, 0.2)
    city = [
        record(target, miou, source="streets-city", checkpoint="c2", recipe_hash="bbbbbbbbbbbb")
        for target, miou in (("streets-world", 0.3), ("streets-city", 0.7), ("streets-game", 0.5))
    ]
    (found,) = matrices([*game, *city])
    assert found.targets == ("streets-game", "streets-city", "streets-world")
    assert rows(found) == [("run", "streets-city", (0,)), ("run", "streets-game", (0,))]
    assert [[value and value.miou for value in row.values.values()] for row in found.rows] == [[0.5, 0.7, 0.3], [0.6, 0.4, 0.2]]
    assert [[value and value.seen for value in row.values.values()] for row in found.rows] == [
        [False, True, False],
        [True, False, False],
    ]


def test_scores_of_two_protocols_are_never_in_one_matrix() -> None:
    half = model(0.6, 0.5, 0.4, protocol="paper-half")
    other_digest = model(0.6, 0.5, 0.4, protocol_digest="12345678")
    assert [found.protocol for found in matrices([*model(0.6, 0.4, 0.2), *half])] == ["unified", "paper-half"]
    assert len(matrices([*model(0.6, 0.4, 0.2), *other_digest])) == 2


def test_scores_at_two_image_sizes_are_never_in_one_matrix() -> None:
    other_size = [
        record("streets-city", 0.5, checkpoint="c2", recipe_hash="bbbbbbbbbbbb", protocol_hash="at another size", sequence=1)
    ]
    found = matrices([*model(0.6, 0.4, 0.2), *other_size])
    assert sorted(one.hashes["streets-city"] for one in found) == ["at another size", "hash-streets-city"]
    titles = [table.title for table in matrix_tables(found)]
    assert titles[1] == f"{titles[0]}; at another image size or label map than the table above"


def test_exports_and_published_sets_are_never_in_one_matrix_and_the_source_stands_beside_both() -> None:
    export = record("streets-world", 0.9, rendered=True)
    found = {one.rendered: one for one in matrices([*model(0.6, 0.4, targets=("streets-city",)), export])}
    assert found[False].targets == ("streets-game", "streets-city")
    assert found[True].targets == ("streets-game", "streets-world")


def test_runs_that_differ_in_their_seeds_alone_are_one_row_of_mean_and_standard_deviation(tmp_path: Path) -> None:
    scores = {0: (0.6, 0.40, 0.20), 1: (0.7, 0.44, 0.21), 2: (0.5, 0.42, 0.25)}
    records = [r for seed, values in scores.items() for r in run_of(tmp_path / f"s{seed}", *values, seed=seed)]
    (found,) = matrices(records)
    (row,) = found.rows
    assert (row.kind, row.seeds) == ("seeds", (0, 1, 2))
    city, world = row.values["streets-city"], row.values["streets-world"]
    assert (city.miou, city.deviation) == pytest.approx((0.42, statistics.stdev([0.40, 0.44, 0.42])))
    assert world.seeds == 3
    # of the mean over unseen domains the deviation is that of the seeds' means
    means = [0.30, 0.325, 0.335]
    assert (row.mean.miou, row.mean.deviation) == pytest.approx((statistics.fmean(means), statistics.stdev(means)))


def test_each_run_is_shown_above_the_mean_if_it_is_asked_for(tmp_path: Path) -> None:
    records = [r for seed in (2, 0) for r in run_of(tmp_path / f"s{seed}", 0.6, 0.4, 0.2, seed=seed)]
    (found,) = matrices(records, each=True)
    assert [(row.kind, row.seeds) for row in found.rows] == [("run", (0,)), ("run", (2,)), ("seeds", (0, 2))]
    (table,) = matrix_tables([found])
    assert [row[2].text for row in table.rows] == ["s0", "s2", "2 seeds"]
    assert table.rows[2][-1].text == "30.0 ±0.0"


def test_runs_with_other_settings_are_rows_of_their_own_and_named_by_them(tmp_path: Path) -> None:
    short = run_of(tmp_path / "short", 0.6, 0.4, 0.2, settings=("train.steps=40",), seed=1)
    whole = run_of(tmp_path / "whole", 0.7, 0.5, 0.3)
    (found,) = matrices([*short, *whole])
    (table,) = matrix_tables([found])
    assert sorted(row[0].text for row in table.rows) == ["streets/mfuser, train.steps=40", "streets/mfuser, train.steps=560"]


def test_of_two_runs_of_one_seed_the_newer_counts(tmp_path: Path) -> None:
    older = run_of(tmp_path / "older", 0.6, 0.4, 0.2, sequence=1)
    newer = run_of(tmp_path / "newer", 0.7, 0.5, 0.3, sequence=2)
    (found,) = matrices([*newer, *older])
    (row,) = found.rows
    assert (row.kind, row.values["streets-city"].miou) == ("run", 0.5)


def test_partial_scores_are_marked_and_do_not_enter_a_mean(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "s0", 0.6, 0.4, 0.2, seed=0)
    part = run_of(tmp_path / "s1", 0.6, 0.9, 0.9, seed=1, n_images=10)
    (found,) = matrices([*whole, *part], each=True)
    first, second, both = found.rows
    assert [row.values["streets-city"].partial for row in (first, second, both)] == [False, True, False]
    assert (both.values["streets-city"].miou, both.values["streets-city"].seeds) == (0.4, 1)
    assert second.mean is None
    assert both.mean is None
    (table,) = matrix_tables([found])
    assert table.rows[1][3].text == "(60.0~)"


def test_a_mean_over_targets_is_not_shown_of_models_with_other_sources() -> None:
    city = [record("streets-world", 0.3, source="streets-city", checkpoint="c2", recipe_hash="bbbbbbbbbbbb")]
    (one,) = matrix_tables(matrices(model(0.6, 0.4, 0.2)))
    assert one.header[-1] == "mean"
    (two,) = matrix_tables(matrices([*model(0.6, 0.4, 0.2), *city]))
    assert "mean" not in two.header


def test_columns_and_source_can_be_chosen() -> None:
    other = [record("streets-world", 0.3, source="gta5", checkpoint="c2", recipe_hash="bbbbbbbbbbbb")]
    (found,) = matrices([*model(0.6, 0.4, 0.2), *other], targets=["streets-world"], source="gta5")
    assert (found.targets, rows(found)) == (("streets-world",), [("run", "gta5", (0,))])


def test_a_flat_row_says_of_each_score_whether_the_domain_was_trained_on() -> None:
    (row,) = matrix_rows(matrices(model(0.6, 0.4, 0.2, seed=3)))
    assert (row["seeds"], row["streets-game_seen"], row["streets-city_seen"]) == ("3", True, False)
    assert row["mean_unseen_miou"] == pytest.approx(0.3)


def test_training_records_and_undefined_scores_are_no_values() -> None:
    found = matrices([record("streets-city", 0.4), record("streets-world", None), record("streets-fog", 0.9, kind="train")])
    assert [value and value.miou for value in found[0].rows[0].values.values()] == [0.4, None]

"""What may be ranked together, what may be averaged, and what is only shown."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from records import model, record

from dgbench.report.expected import Reference, references
from dgbench.report.leaderboard import leaderboard, of_run

REFERENCE = Reference(
    "streets/mfuser-gpu",
    "mfuser",
    "tiny + tiny",
    "streets-game",
    "unified",
    {"streets-game": 0.7, "streets-city": 0.6, "streets-world": 0.5},
    "one H200",
)


def test_models_are_ranked_by_their_mean_over_targets() -> None:
    board = leaderboard([*model(0.9, 0.3, 0.3), *model(0.4, 0.5, 0.4, method="source-only", checkpoint="c2")])
    [group] = board.groups
    assert group.targets == ("streets-city", "streets-world")
    assert [(row.rank, row.method, row.mean and row.mean.miou) for row in group.rows] == [
        (1, "source-only", pytest.approx(0.45)),
        (2, "mfuser", pytest.approx(0.3)),
    ]
    assert group.rows[1].source_score is not None
    assert group.rows[1].source_score.miou == 0.9


def test_the_interval_of_a_mean_is_narrower_than_its_parts() -> None:
    [group] = leaderboard(model(0.5, 0.4, 0.6, half=0.02)).groups
    mean = group.rows[0].mean
    assert mean is not None
    assert mean.half == pytest.approx(0.02 / math.sqrt(2))
    assert mean.n_images == 200


def test_equal_means_share_a_rank() -> None:
    records = [
        *model(0.5, 0.40001, 0.4, method="a", checkpoint="1"),
        *model(0.5, 0.4, 0.40001, method="b", checkpoint="2"),
        *model(0.5, 0.3, 0.3, method="c", checkpoint="3"),
    ]
    assert [row.rank for row in leaderboard(records).groups[0].rows] == [1, 1, 3]


def test_an_incomplete_row_has_no_mean_and_no_rank() -> None:
    partial = model(0.5, 0.9, 0.9, method="partial", checkpoint="2", n_images=10)
    missing = [record("streets-city", 0.95, method="missing", checkpoint="3")]
    rows = leaderboard([*model(0.5, 0.4, 0.4), *partial, *missing]).groups[0].rows
    assert [(row.method, row.rank, row.mean is None) for row in rows] == [
        ("mfuser", 1, False),
        ("missing", None, True),
        ("partial", None, True),
    ]
    assert (city := rows[2].scores["streets-city"]) is not None
    assert city.partial


def test_two_protocol_hashes_are_never_in_one_table() -> None:
    other = [dataclasses.replace(r, protocol_hash="v2") for r in model(0.5, 0.6, 0.6, checkpoint="2")]
    groups = leaderboard([*model(0.5, 0.4, 0.4), *other]).groups
    assert len(groups) == 2
    assert all(row.rank == 1 for group in groups for row in group.rows)
    assert not set(groups[0].protocol_hashes) & set(groups[1].protocol_hashes)


def test_two_protocols_of_one_name_are_never_in_one_table_nor_in_one_mean() -> None:
    """Another version of a protocol, even where it was scored on other targets, and by the same checkpoint."""
    city, world = model(0.5, 0.4, 0.4)[1:]
    later = dataclasses.replace(world, protocol_digest="22222222")
    groups = leaderboard([dataclasses.replace(city, protocol_digest="11111111"), later]).groups
    assert sorted(group.protocol_digest for group in groups) == ["11111111", "22222222"]
    assert all(len(group.rows) == 1 and len(group.targets) == 1 for group in groups)
    [group] = leaderboard([dataclasses.replace(r, protocol_digest="11111111") for r in (city, world)]).groups
    assert group.targets == ("streets-city", "streets-world")
    reference = dataclasses.replace(REFERENCE, protocol_digest="22222222")
    groups = leaderboard([dataclasses.replace(r, protocol_digest="11111111") for r in (city, world)], [reference]).groups
    assert [[row.kind for row in group.rows] for group in groups] == [["run"], ["reference"]]


def test_sources_and_protocols_have_tables_of_their_own() -> None:
    records = [
        *model(0.5, 0.4, 0.4),
        *[dataclasses.replace(r, protocol="paper-half", checkpoint="2") for r in model(0.5, 0.4, 0.4)],
        record("streets-city", source="streets-world", checkpoint="3"),
    ]
    board = leaderboard(records)
    assert sorted((g.source, g.protocol) for g in board.groups) == [
        ("streets-game", "paper-half"),
        ("streets-game", "unified"),
        ("streets-world", "unified"),
    ]
    assert [g.source for g in leaderboard(records, source="streets-world").groups] == ["streets-world"]


def test_one_extra_target_does_not_take_the_others_their_rank() -> None:
    records = [
        *model(0.5, 0.4, 0.4),
        record("streets-fog", 0.3),
        *model(0.5, 0.3, 0.3, method="source-only", checkpoint="2"),
    ]
    group, fog = leaderboard(records).groups
    assert group.targets == ("streets-city", "streets-world")
    assert [row.rank for row in group.rows] == [1, 2]
    assert fog.targets == ("streets-fog",)
    assert [(row.method, row.rank) for row in fog.rows] == [("mfuser", 1)]
    [group] = leaderboard(records, targets=["streets-fog"]).groups
    assert [(row.method, row.rank) for row in group.rows] == [("mfuser", 1), ("source-only", None)]


def test_a_newer_run_of_the_same_recipe_replaces_the_older() -> None:
    old, new = model(0.5, 0.4, 0.4, sequence=1), model(0.5, 0.3, 0.3, sequence=2, checkpoint="c2")
    [row] = leaderboard([*new, *old]).groups[0].rows
    assert row.mean is not None
    assert row.mean.miou == pytest.approx(0.3)
    assert [r.rank for r in leaderboard([*old, *new], every=True).groups[0].rows] == [1, 2]


def test_a_newer_run_that_was_scored_on_less_replaces_nothing() -> None:
    old, new = model(0.5, 0.4, 0.4, sequence=1), [record("streets-city", 0.3, sequence=2, checkpoint="c2")]
    rows = leaderboard([*old, *new]).groups[0].rows
    assert [row.rank for row in rows] == [1, None]


def test_the_newest_score_of_a_checkpoint_counts() -> None:
    again = record("streets-city", 0.8, sequence=5)
    [row] = leaderboard([*model(0.5, 0.4, 0.4, sequence=1), again]).groups[0].rows
    assert (city := row.scores["streets-city"]) is not None
    assert city.miou == 0.8


def test_columns_follow_the_table_of_domains() -> None:
    names = ("streets-world", "streets-fog@0.9", "streets-fog", "streets-city")
    [group] = leaderboard(model(0.5, 0.1, 0.2, 0.3, 0.4, targets=names)).groups
    assert group.targets == ("streets-city", "streets-fog", "streets-fog@0.9", "streets-world")


def test_training_records_are_no_rows() -> None:
    assert leaderboard([record(kind="train")]).groups == ()


def test_reference_rows_stand_in_without_a_rank() -> None:
    [group] = leaderboard(model(0.5, 0.4, 0.4), [REFERENCE]).groups
    assert [(row.kind, row.rank) for row in group.rows] == [("run", 1), ("reference", None)]
    assert group.rows[1].mean is not None
    assert group.rows[1].mean.miou == pytest.approx(0.55)
    assert group.rows[1].origin == "one H200"


def test_a_run_of_ones_own_takes_the_reference_rows_place() -> None:
    [group] = leaderboard(model(0.5, 0.4, 0.4, recipe="streets/mfuser-gpu"), [REFERENCE]).groups
    assert [row.kind for row in group.rows] == ["run"]


def test_a_reference_scored_otherwise_gets_a_group_of_its_own() -> None:
    records = model(0.5, 0.4, 0.4)
    hashes = {"streets-city": records[1].protocol_hash}
    [group] = leaderboard(records, [dataclasses.replace(REFERENCE, hashes=hashes)]).groups
    assert [row.kind for row in group.rows] == ["run", "reference"]
    groups = leaderboard(records, [dataclasses.replace(REFERENCE, hashes={"streets-city": "another"})]).groups
    assert [[row.kind for row in group.rows] for group in groups] == [["run"], ["reference"]]


def test_shipped_references_hold_the_hashes_that_their_recipes_score_under(tmp_path: Path) -> None:
    """A run of the recipe and its reference belong together: both hash the same rules and rendered size."""
    from dgbench import protocol
    from dgbench.data.catalog import lookup
    from dgbench.data.dataset import SegDataset

    shipped = {reference.recipe: reference for reference in references()}
    tiny, gpu = shipped["streets/mfuser-scratch"], shipped["streets/mfuser-gpu"]
    dataset = SegDataset(lookup("streets-city"), "val", size=(128, 256))
    row = protocol.domain_row(dataset.domain, "val", dataset.label_map.name, dataset.size)
    assert tiny.hashes["streets-city"] == protocol.protocol_hash(protocol.lookup("unified"), row)
    assert tiny.protocol_digest == protocol.lookup("unified").digest
    assert not set(tiny.hashes.values()) & set(gpu.hashes.values())


def test_references_are_shown_before_anything_was_run() -> None:
    [group] = leaderboard([], [REFERENCE]).groups
    assert group.targets == ("streets-city", "streets-world")
    assert [row.kind for row in group.rows] == ["reference"]


def test_only_the_groups_of_a_run(tmp_path: Path) -> None:
    mine = [dataclasses.replace(r, path=tmp_path / "run" / "record-x.json") for r in model(0.5, 0.4, 0.4)]
    other = [record("streets-city", source="streets-world", checkpoint="3")]
    assert [g.source for g in of_run(leaderboard([*mine, *other]), tmp_path / "run").groups] == ["streets-game"]


def test_own_and_published_results_never_share_a_group() -> None:
    board = leaderboard([record("cityscapes", 0.7, source="gta5")])
    assert {row.kind for group in board.groups for row in group.rows} == {"run"}
    assert {row.kind for group in board.published for row in group.rows} == {"published"}
    assert leaderboard([], published=False).published == ()

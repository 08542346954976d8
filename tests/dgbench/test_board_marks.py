"""What a board says about rows that stand for less than they seem to: exports, parts of a set, parts of a source."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from records import model, record

from dgbench import render, results
from dgbench.recipe import dump, load_recipe, recipe_hash
from dgbench.render.leaderboard import leaderboard_tables
from dgbench.render.outside import visible
from dgbench.render.table import Cell, Table, draw_rich
from dgbench.report.expected import Reference
from dgbench.report.leaderboard import leaderboard
from dgbench.results import Record

REAL = ("cityscapes", "bdd100k")


def gta(*scores: float, **fields: object) -> list[Record]:
    return [record(t, s, source="gta5", recipe="mfuser/eva02-gta", **fields) for t, s in zip(REAL, scores, strict=True)]


def shown(result: object, capsys: pytest.CaptureFixture[str]) -> str:
    render.show(result)
    return capsys.readouterr().out


def test_rendered_exports_are_ranked_apart_from_the_real_sets(capsys: pytest.CaptureFixture[str]) -> None:
    real = gta(0.5, 0.4)
    exported = gta(0.9, 0.9, rendered=True, checkpoint="c2", recipe_hash="b" * 12)
    board = leaderboard([*real, *exported], published=False)
    assert [(g.rendered, len(g.rows), g.rows[0].rank) for g in board.groups] == [(False, 1, 1), (True, 1, 1)]
    titles = [line for line in shown(board, capsys).splitlines() if line.startswith("Trained")]
    assert titles == [
        "Trained on gta5, protocol unified: mIoU in %",
        "Trained on gta5, scored on rendered exports, not the published sets, protocol unified: mIoU in %",
    ]


def test_one_models_real_and_exported_targets_are_in_no_common_mean() -> None:
    city, bdd = gta(0.5, 0.4)
    source = record("gta5", 0.6, source="gta5", recipe="mfuser/eva02-gta")
    board = leaderboard([source, dataclasses.replace(city, rendered=True), bdd], published=False)
    assert [(g.rendered, g.targets) for g in board.groups] == [(True, ("cityscapes",)), (False, ("bdd100k",))]
    assert all(row.source_score is not None for g in board.groups for row in g.rows)


def test_a_model_of_a_rendered_source_is_ranked_apart(capsys: pytest.CaptureFixture[str]) -> None:
    board = leaderboard([*gta(0.5, 0.4), *gta(0.9, 0.9, source_rendered=True, checkpoint="c2")], published=False)
    assert [(g.source_rendered, [row.rank for row in g.rows]) for g in board.groups] == [(False, [1]), (True, [1])]
    assert "Trained on gta5 (rendered), protocol" in shown(board, capsys)


def test_more_images_than_were_published_are_a_partial_score() -> None:
    [group] = leaderboard([*gta(0.5, 0.4), *gta(0.9, 0.9, n_extra=3, checkpoint="c2", method="more")], published=False).groups
    assert [(row.method, row.rank) for row in group.rows] == [("mfuser", 1), ("more", None)]
    assert all(score is not None and score.partial for score in group.rows[1].scores.values())


def test_a_part_of_the_source_is_marked_with_its_count_and_not_ranked(capsys: pytest.CaptureFixture[str]) -> None:
    part = gta(0.9, 0.9, source_images=6, source_available=24966, checkpoint="c2", method="little")
    whole = gta(0.5, 0.4, source_images=24966, source_available=24966)
    board = leaderboard([*part, *whole], published=False)
    assert [(row.method, row.rank) for row in board.groups[0].rows] == [("mfuser", 1), ("little", None)]
    text = shown(board, capsys)
    assert re.search(r"^–  little \(tiny \+ tiny\)~ +– +90\.0 ±1\.0 +90\.0 ±1\.0 +90\.0 ±0\.7\b", text, re.MULTILINE)
    assert "little (tiny + tiny)~: trained on 6 of 24966 source images: not ranked." in text
    assert "*" not in next(line for line in text.splitlines() if line.startswith("–"))


def test_a_part_of_the_source_does_not_replace_an_older_run_of_all_of_it() -> None:
    part = gta(0.9, 0.9, source_images=6, source_available=24966, checkpoint="c2", sequence=60)
    rows = leaderboard([*part, *gta(0.5, 0.4, source_images=24966, source_available=24966)], published=False).groups[0].rows
    assert [row.rank for row in rows] == [1, None]


def test_lists_of_scores_say_what_is_rendered_and_partial(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(gta(0.5, 0.4, rendered=True, source_images=6, source_available=24966), capsys)
    assert re.search(r"^cityscapes \(rendered\) +50\.0 ", text, re.MULTILINE)
    assert "6 of 24966" in text


# ---- rows that differ by settings


def ran(folder: Path, name: str, *overrides: str, score: float = 0.4, sequence: int = 0, keep: bool = True) -> list[Record]:
    recipe = load_recipe("streets/mfuser", overrides, check_method=False)
    (folder / name).mkdir()
    if keep:
        dump(recipe, folder / name / "recipe.yaml")
    targets = recipe.data.targets
    made = model(
        0.5, *[score] * len(targets), targets=targets, recipe_hash=recipe_hash(recipe), checkpoint=name, sequence=sequence
    )
    return [dataclasses.replace(r, path=folder / name / f"record-{r.target}.json") for r in made]


def names(records: list[Record], *, every: bool = False) -> list[str]:
    tables = leaderboard_tables(leaderboard(records, published=False, every=every))
    return [row[1].text for table in tables for row in table.rows]


def test_rows_that_differ_by_settings_show_these(tmp_path: Path) -> None:
    records = [
        *ran(tmp_path, "a", score=0.5),
        *ran(tmp_path, "b", "train.steps=40", score=0.4),
        *ran(tmp_path, "c", "train.seed=1", score=0.3),
        *ran(tmp_path, "d", "data.crop=[64, 64]", "train.seed=1", "train.workers=2", score=0.2),
    ]
    assert names(records, every=True) == [
        "streets/mfuser, train.steps=560, seed 0",
        "streets/mfuser, train.steps=40",
        "streets/mfuser, data.crop=[128, 128], seed 1",
        "streets/mfuser, data.crop=[64, 64]",
    ]
    assert names(records) == [
        "streets/mfuser, data.crop=[128, 128], train.steps=560",
        "streets/mfuser, train.steps=40",
        "streets/mfuser, data.crop=[64, 64]",
    ]


def test_two_seeds_are_told_apart_by_their_seeds_where_each_has_a_row(tmp_path: Path) -> None:
    records = [*ran(tmp_path, "a", score=0.5), *ran(tmp_path, "b", "train.seed=1")]
    assert names(records, every=True) == ["streets/mfuser, seed 0", "streets/mfuser, seed 1"]


def test_two_runs_of_equal_settings_have_their_time_behind(tmp_path: Path) -> None:
    records = [
        *ran(tmp_path, "a", score=0.5),
        *ran(tmp_path, "b", score=0.4, sequence=61),
        *ran(tmp_path, "c", "train.steps=40", score=0.3),
    ]
    assert names(records, every=True) == [
        "streets/mfuser, train.steps=560 11-24 00:00",
        "streets/mfuser, train.steps=560 11-24 01:01",
        "streets/mfuser, train.steps=40",
    ]


def test_without_its_recipe_a_run_is_named_by_the_hash(tmp_path: Path) -> None:
    records = [*ran(tmp_path, "a", score=0.5), *ran(tmp_path, "b", "train.steps=40", keep=False)]
    assert [re.sub("#[0-9a-f]{4}$", "#hash", name) for name in names(records)] == ["streets/mfuser#hash"] * 2


@pytest.mark.parametrize("text", ["", "- 1", "{", "a: &a [*a]", "[" * 90_000, "data: 3", "train: {steps: 1}\n" * 3, "\x00"])
def test_a_recipe_that_is_none_takes_no_row_away(text: str, tmp_path: Path) -> None:
    records = [*ran(tmp_path, "a", score=0.5), *ran(tmp_path, "b", "train.steps=40")]
    (tmp_path / "b" / "recipe.yaml").write_text(text)
    assert len(names(records)) == 2


def test_recipes_without_a_seed_are_rows_of_their_own(tmp_path: Path) -> None:
    records = [*ran(tmp_path, "a", score=0.5), *ran(tmp_path, "b", "train.steps=40")]
    for name in "ab":
        (tmp_path / name / "recipe.yaml").write_text("train: {steps: 1}\n")
    assert len(names(records)) == 2


def test_a_run_has_one_name_in_all_tables(tmp_path: Path) -> None:
    a, b = ran(tmp_path, "a", score=0.5), ran(tmp_path, "b", "train.steps=40")
    night = dataclasses.replace(record("streets-night", 0.2), checkpoint="b", recipe_hash=b[0].recipe_hash, path=b[0].path)
    assert names([*a, *b, night]) == ["streets/mfuser, train.steps=560", *["streets/mfuser, train.steps=40"] * 2]


def test_a_row_of_seeds_and_one_of_them_alone_have_two_names(tmp_path: Path) -> None:
    a, b = ran(tmp_path, "a", score=0.5), ran(tmp_path, "b", "train.seed=1")
    night = dataclasses.replace(record("streets-night", 0.2), checkpoint="b", recipe_hash=b[0].recipe_hash, path=b[0].path)
    assert names([*a, *b, night]) == ["streets/mfuser, 2 seeds", "streets/mfuser, seed 1"]


def test_a_reference_beside_its_own_run_takes_nothing_from_the_runs_name(capsys: pytest.CaptureFixture[str]) -> None:
    reference = Reference(
        "streets/mfuser",
        "mfuser",
        "tiny + tiny",
        "streets-game",
        "unified",
        {"streets-city": 0.3, "streets-world": 0.3},
        "two cores",
    )
    text = shown(leaderboard(model(0.5, 0.4, 0.4), [reference], published=False, beside=True), capsys)
    assert re.search(r"^1    mfuser \(tiny \+ tiny\) ", text, re.MULTILINE)
    assert re.search(r"^ref  streets/mfuser ", text, re.MULTILINE)
    assert "ref: expected of recipe streets/mfuser. From: two cores." in text


# ---- JSON


def test_scores_are_keyed_by_target_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    render.show(leaderboard(model(0.5, 0.4, 0.3)), "json")
    board = json.loads(capsys.readouterr().out)
    scores = board["groups"][0]["rows"][0]["scores"]
    assert {target: score["miou"] for target, score in scores.items()} == {"streets-city": 0.4, "streets-world": 0.3}
    assert list(board["published"][0]["rows"][0]["scores"]) == ["cityscapes", "bdd100k", "mapillary"]


# ---- text from outside


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb", r"a\x0ab"),
        ("\u202eabc", r"\u202eabc"),
        ("\x9b1m", r"\x9b1m"),
        ("\ud800", r"\ud800"),
        ("é – ±", "é – ±"),
        ("plain", "plain"),
    ],
)
def test_control_characters_are_written_out(raw: str, said: str) -> None:
    assert visible(raw) == said
    table = Table(raw, (raw,), ((Cell(raw),),), legend=(raw,))
    assert render.plain(table).splitlines() == [said] * 4


def test_names_in_records_neither_move_the_cursor_nor_are_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    import io

    from rich.console import Console

    bad = "[link=http://x]\x1b[31m[/bold]"
    records = model(0.5, 0.4, 0.3, recipe=bad, method=bad, source=bad, targets=("streets-city", bad))
    records = [dataclasses.replace(r, target=bad if r.target == "streets-game" else r.target) for r in records]
    board = leaderboard(records, published=False)
    assert "\x1b" not in shown(board, capsys)
    stream = io.StringIO()
    for table in leaderboard_tables(board):
        draw_rich(table, Console(file=stream, width=100))
    assert "[/bold]" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_new_fields_of_a_record_come_back(tmp_path: Path) -> None:
    given = record(rendered=True, source_images=6, source_available=9, source_rendered=True, n_extra=2)
    path = results.write(given, tmp_path).path
    assert path is not None
    assert dataclasses.replace(results.read(path), confusion=None, digest="") == given
    assert (given.source_complete, record().source_complete) == (False, None)

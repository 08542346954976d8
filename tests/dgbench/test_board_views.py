"""What a board says beside its scores: what is lost to the targets, classes, conditions, and one protocol alone."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
from records import model, record

from dgbench import metrics, protocol, render, results, streets
from dgbench.data.catalog import lookup
from dgbench.data.domains import RENDER_SIZE
from dgbench.data.labels import NAMES
from dgbench.errors import ResultError
from dgbench.report.entries import Detail
from dgbench.report.leaderboard import leaderboard
from dgbench.report.rows import Shift


def test_what_is_lost_to_the_targets_stands_beside_the_mean() -> None:
    [row] = leaderboard(model(0.5, 0.4, 0.2), published=False).groups[0].rows
    assert row.shift == Shift(pytest.approx(0.2), pytest.approx(0.6), pytest.approx(0.2), "streets-world")


def test_without_a_full_source_score_or_a_mean_nothing_is_said_to_be_lost() -> None:
    whole = [*model(0.5, 0.4, 0.2)[1:], record("streets-game", 0.5, n_images=3)]
    [row] = leaderboard(whole, published=False).groups[0].rows
    assert (row.shift.gap, row.shift.retention, row.shift.worst) == (None, None, "streets-world")
    cut = [*model(0.5, 0.4, 0.2)[:2], record("streets-world", 0.2, n_images=3)]
    [row] = leaderboard(cut, targets=["streets-city", "streets-world"], published=False).groups[0].rows
    assert row.shift == Shift()


def test_the_second_best_of_three_is_marked_and_of_two_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    records = [r for i in range(3) for r in model(0.5, 0.4 - i / 10, 0.3, method=f"m{i}", checkpoint=f"{i}")]
    render.show(leaderboard(records, published=False))
    text = capsys.readouterr().out
    assert re.search(r"^1  m0 .* 40\.0\* ", text, re.MULTILINE)
    assert re.search(r"^2  m1 .* 30\.0\+ ", text, re.MULTILINE)
    assert "Higher is better; * best, + second." in text
    render.show(leaderboard(records[:6], published=False))
    assert "+ second" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("form", "best", "second"),
    [
        ("markdown", r"\*\*40\.0\*\* ±", r"<ins>30\.0</ins> ±"),
        ("latex", r"\\textbf\{40\.0\} \$\\pm\$", r"\\underline\{30\.0\} \$\\pm\$"),
        ("html", r"<b>40\.0</b> ±", r"<u>30\.0</u> ±"),
    ],
)
def test_other_formats_print_best_bold_and_second_underlined(
    form: str, best: str, second: str, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [r for i in range(3) for r in model(0.5, 0.4 - i / 10, 0.3, method=f"m{i}", checkpoint=f"{i}")]
    render.show(leaderboard(records, published=False), form)
    text = capsys.readouterr().out
    assert re.search(best, text)
    assert re.search(second, text)
    assert "bold: best, underlined: second" in text


def test_classes_are_shown_by_target_and_in_columns_of_csv(capsys: pytest.CaptureFixture[str]) -> None:
    iou = (*(0.1 * (k % 9) for k in range(18)), None)
    records = [record(t, 0.4, iou=iou) for t in ("streets-city", "streets-world")]
    board = leaderboard(records, published=False, detail=Detail(per_class=True))
    render.show(board)
    text = capsys.readouterr().out
    assert [line.rpartition("class")[2] for line in text.splitlines() if "IoU in % by class" in line] == [
        " on streets-city",
        " on streets-world",
        ", mean over the targets",
    ]
    assert all(name in text for name in NAMES)
    render.show(board, "csv")
    [row] = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert float(row["streets-city_iou_sidewalk"]) == 0.1
    assert row["streets-city_iou_bicycle"] == ""
    render.show(leaderboard(records, published=False), "csv")
    assert "iou_" not in capsys.readouterr().out.splitlines()[0].replace("miou_", "")


def test_tables_of_classes_mark_partial_scores_and_repeat_no_title(capsys: pytest.CaptureFixture[str]) -> None:
    records = [record("streets-city", 0.4), record("streets-city", 0.3, n_images=3, checkpoint="2", method="cut")]
    render.show(leaderboard(records, published=False, detail=Detail(per_class=True)))
    text = capsys.readouterr().out
    [title] = [line for line in text.splitlines() if "by class" in line]
    assert title == "Trained on streets-game, scored on streets-*, protocol unified: IoU in % by class on streets-city"
    assert re.search(r"^–  cut \(tiny \+ tiny\)~ +30\.0 ", text, re.MULTILINE)
    assert "~ other images than the published split's" in text


def write_matrices(folder: Path, target: str, ids: list[str], **fields: str) -> tuple[results.Record, np.ndarray]:
    counts = np.random.default_rng(0).integers(0, 50, (len(ids), 19, 19))
    counts[:, range(19), range(19)] += 300
    n = len(ids)
    one = record(target, metrics.miou(counts.sum(0)), n_images=n, n_available=n, **fields)
    return results.write(one, folder, counts, ids), counts


def test_the_conditions_of_acdc_are_told_by_its_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [f"rgb_anon/{c}/val/GOPR0475/{i}" for i, c in enumerate(("fog", "night", "night", "rain", "snow"))]
    one, counts = write_matrices(tmp_path, "acdc", ids)
    board = leaderboard([one], published=False, detail=Detail(per_condition=True))
    score = board.groups[0].rows[0].scores["acdc"]
    assert score is not None
    assert list(score.conditions) == ["fog", "night", "rain", "snow"]
    assert score.conditions["night"] == pytest.approx(metrics.miou(counts[1:3].sum(0)))
    render.show(board)
    assert "mIoU in % by condition of acdc" in capsys.readouterr().out


def test_the_conditions_of_streets_are_those_that_were_rendered(tmp_path: Path) -> None:
    """In the same weather by name the image has the same bytes."""
    images = protocol.domain_row(lookup("streets-adverse"), "val", "train-ids", RENDER_SIZE)
    hashed = protocol.protocol_hash(protocol.lookup("unified"), images)
    ids = [f"{i:06d}" for i in range(12)]
    one, counts = write_matrices(tmp_path, "streets-adverse", ids, protocol_hash=hashed)
    weather = [streets.weather("streets-adverse", "val", i) for i in range(12)]
    image, _ = streets.render("streets-adverse", "val", 3, (32, 64))
    named, _ = streets.render(f"streets-{weather[3]}", "val", 3, (32, 64))
    assert (image == named).all()
    score = leaderboard([one], published=False, detail=Detail(per_condition=True)).groups[0].rows[0].scores["streets-adverse"]
    assert score is not None
    chosen = [i for i, name in enumerate(weather) if name == weather[0]]
    assert score.conditions[weather[0]] == pytest.approx(metrics.miou(counts[chosen].sum(0)))
    # of another version of the renderer, whose weathers are not known
    for other in (dataclasses.replace(one, protocol_hash="x"), dataclasses.replace(one, target="streets-adverse@9")):
        row = leaderboard([other], published=False, detail=Detail(per_condition=True)).groups[0].rows[0]
        assert [score and score.conditions for score in row.scores.values()] == [{}]


def test_a_target_without_conditions_or_matrices_has_no_table_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    render.show(leaderboard([record("acdc", 0.4), record("streets-city", 0.4)], detail=Detail(per_condition=True)))
    assert "by condition" not in capsys.readouterr().out


def test_one_protocol_alone_is_shown_without_published_rows() -> None:
    other = [record("streets-city", 0.5, protocol="paper-half", checkpoint="2")]
    board = leaderboard([*model(0.5, 0.4, 0.4), *other], protocol="Paper-Half")
    assert [group.protocol for group in board.groups] == ["paper-half"]
    assert board.published == ()


def test_an_unknown_protocol_is_an_error_that_names_a_near_one() -> None:
    with pytest.raises(ResultError, match="unknown protocol `unifed`\n\nhint: did you mean `unified`"):
        leaderboard(model(0.5, 0.4, 0.4), protocol="unifed")

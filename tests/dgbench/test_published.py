"""The published numbers: digit for digit as printed, cited, and never ranked."""

from __future__ import annotations

import csv
import re
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from dgbench import render
from dgbench.data.catalog import lookup
from dgbench.render.published import published_table
from dgbench.report.published import PUBLISHED, load_published
from dgbench.report.rows import Leaderboard

COPY = Path(__file__).with_name("published_tables.csv")  # tables 1 and 2 of arXiv:2504.03193, as printed
TABLES: list[dict[str, Any]] = yaml.safe_load(PUBLISHED.read_text())["tables"]


def printed(places: slice) -> dict[tuple[str, str], list[str]]:
    """The copy of MFuser's tables: by method and backbone, the digits of some columns, where the paper has them."""
    _, *rows = csv.reader(COPY.read_text().splitlines())
    return {(method, backbone): found[places] for method, backbone, *found in rows if all(found[places])}


@pytest.mark.parametrize(("place", "columns", "has_mean"), [(0, slice(0, 4), True), (1, slice(4, 6), False)])
def test_mfusers_tables_are_shown_digit_for_digit(place: int, columns: slice, has_mean: bool) -> None:
    table = published_table(load_published()[place])
    end = 3 + (columns.stop - columns.start)
    shown = {(row[1].text.rstrip("†"), row[2].text): [cell.text for cell in row[3:end]] for row in table.rows}
    assert shown == printed(columns)
    assert ("mean" in table.header[:end]) == has_mean


def test_computed_means_stand_in_brackets_and_mfusers_is_that_of_its_abstract() -> None:
    rows = published_table(load_published()[1]).rows
    assert [row[5].text for row in rows if (row[1].text, row[2].text) == ("MFuser", "EVA02-L")] == ["(71.87)"]
    assert all(re.fullmatch(r"\(\d\d\.\d\d\)", row[5].text) for row in rows)


def test_printed_means_follow_from_their_columns_with_named_exceptions() -> None:
    """CLOUDS and Rein with EVA02-L in MFuser's table, and SBGen in its own paper, print means that are not."""
    wrong = set()
    for table in TABLES:
        for row in table["rows"]:
            if row.get("mean") is None or None in row["miou"]:
                continue
            digits = Decimal(1).scaleb(-row.get("digits", 2))
            exact = sum(Decimal(str(value)) for value in row["miou"]) / len(row["miou"])
            # papers average before they round: the last digit may differ by one
            if abs(exact.quantize(digits, ROUND_HALF_UP) - Decimal(str(row["mean"]))) > digits:
                wrong.add((row["method"], row["backbone"], row["mean"]))
        named = {(one["method"], one["backbone"]) for one in table.get("exceptions", ())}
        assert named == {(m, b) for m, b, mean in wrong if any(r["method"] == m and r.get("mean") == mean for r in table["rows"])}
    assert wrong == {("CLOUDS", "ConvNeXt-L", 61.5), ("Rein", "EVA02-L", 63.6), ("SBGen", "EVA02-L", 68.74)}


def test_each_row_says_where_it_was_read_who_reported_it_and_at_which_size() -> None:
    for group in load_published():
        assert group.protocol == "as published"
        assert not group.protocol_hashes
        for name in (group.source, *group.targets):
            assert lookup(name).name == name
        for row in group.rows:
            assert (row.kind, row.rank) == ("published", None)
            assert re.search(r"\(read 2026-\d\d-\d\d\)$", row.origin)
            assert row.reported_by in ("own", "other")
            assert row.test_size in group.test_sizes
            assert tuple(row.scores) == group.targets
            assert all(score is None or 0.2 < score.miou < 0.9 for score in row.scores.values())
            assert row.mean is not None or any(score is not None for score in row.scores.values())


def test_what_mfuser_quotes_of_others_is_reported_by_another_work() -> None:
    first, second, *_ = load_published()
    assert {(row.method == "MFuser", row.reported_by) for group in (first, second) for row in group.rows} == {
        (True, "own"),
        (False, "other"),
    }


def test_numbers_keep_the_digits_they_were_printed_with(capsys: pytest.CaptureFixture[str]) -> None:
    render.show(Leaderboard((), load_published()))
    text = capsys.readouterr().out
    assert re.search(r"^pub  GKD† +ViT-B +58\.3 +54\.2 +61\.3 +57\.9 +half +own +\[\d+\]$", text, re.MULTILINE)
    assert re.search(r"^pub  VFMNet \+ MGRNet +DINOv2-L +– +– +– +70\.3 +fit-2048 +own", text, re.MULTILINE)
    assert re.search(r"^pub  Vireo +DINOv2-L +70\.69 +62\.91 +69\.63 +\(67\.74\) +half +own", text, re.MULTILINE)


def test_rows_name_recipes_of_their_own_method_and_source() -> None:
    named = [(table, row) for table in TABLES for row in table["rows"] if "recipe" in row]
    assert {row["method"] for _, row in named} >= {"MFuser", "VLTSeg"}
    for table, row in named:
        recipe = yaml.safe_load(Path(__file__).parents[2].joinpath("recipes", f"{row['recipe']}.yaml").read_text())
        assert (recipe["method"]["name"], recipe["data"]["source"]) == (row["method"].lower(), table["source"])


def test_rows_name_recipes_that_are_there() -> None:
    recipes = {row["recipe"] for table in TABLES for row in table["rows"] if "recipe" in row}
    folder = Path(__file__).parents[2] / "recipes"
    assert len([name for name in recipes if name.startswith("mfuser/")]) == 6
    assert all((folder / f"{name}.yaml").is_file() for name in recipes)

"""`dgbench profile --table` as it is typed: its formats, its picture, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from dgbench import cli


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["profile", "--count-only", "--quiet", *arguments], prog_name="dgbench")


def test_csv_has_printed_and_counted_columns_apart() -> None:
    result = run("--table", "ade20k", "--format", "csv")
    assert result.exit_code == 0, result.output
    rows = {row["backbone"]: row for row in csv.DictReader(io.StringIO(result.stdout))}
    assert len(rows) == 18
    assert rows["ResNet-50"]["parameters"] == "66516108"
    assert rows["ResNet-50"]["printed parameters M"] == "67"
    assert rows["ResNet-50"]["printed mIoU SS"] == "42.1"
    assert rows["Vim-S"]["printed G"] == ""


def test_text_says_the_convention_the_calibration_and_every_cause() -> None:
    text = " ".join(run("--table", "maskrcnn").stdout.split())
    assert "multiply-accumulates" in text
    assert "1,000 boxes in the box head and 100 in the mask head" in text
    assert "Swin-S: windows of 7 x 7 pad" in text
    assert "two digits are swapped" in text


def test_json_has_the_sweep_and_the_versions() -> None:
    found = json.loads(run("--table", "maskrcnn", "--format", "json").stdout)
    assert [point["side"] for point in found["sweep"][0]["points"]] == [512, 768, 1024, 1536, 2048]
    assert "torch" in found["environment"]


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    result = run("--table", "maskrcnn", "--plot", str(tmp_path / "plot.png"))
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 2 * picture.height


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("mfuser", "--table", "ade20k"), "give it without NAME"),
        (("--table", "ade20k", "--size", "512"), "give it without --size"),
        (("--table", "ade20k", "--fusion"), "give it without --fusion"),
        (("--table", "ade20k", "--convention", "flop"), "give it without --convention"),
        (("--table", "coco"), "'coco' is not one of"),
        (("--anew",), "is for --table alone"),
    ],
)
def test_what_does_not_go_with_a_table_is_refused(arguments: tuple[str, ...], told: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    words = " ".join(result.stderr.replace("│", " ").split())
    assert told in words

"""`dgbench severity` from the command line, on a run of a small model."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import mfuser
from dgbench import cli, results
from dgbench.recipe import dump, load_recipe


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "small"
    recipe = load_recipe("streets/source-only", ["data.size=[64, 128]", "data.crop=[64, 64]", "data.val_images=2"])
    mfuser.save(mfuser.build(recipe.method.name, **recipe.method.options), path / "checkpoint" / "step-000001")
    dump(recipe, path / "recipe.yaml")
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "severity-cache"))


def severity(run: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["severity", str(run), "--device", "cpu", *arguments], prog_name="dgbench")


def test_a_curve_is_a_table_and_a_picture(small: Path, tmp_path: Path) -> None:
    done = severity(small, "--targets", "streets-fog", "--steps", "0", "1", "--plot", str(tmp_path / "fog.svg"))
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("mIoU over the severity of weather: source-only (tiny), recipe streets/source-only")
    assert f"plot: {tmp_path / 'fog.svg'}" in done.stderr
    assert (tmp_path / "fog.svg").read_bytes().startswith(b"<?xml")
    assert {one.target for one in results.query(small)} >= {"streets-fog@0", "streets-fog@1"}


def test_csv_and_json_are_in_full(small: Path) -> None:
    options = ("--targets", "streets-city", "--corruptions", "contrast,fog", "--levels", "5", "--limit", "1", "-q")
    rows = list(csv.DictReader(io.StringIO(severity(small, *options, "--format", "csv").stdout)))
    assert [(row["corruption"], float(row["severity"])) for row in rows] == [
        (name, place) for name in ("contrast", "fog", "mean") for place in (0.0, 1.0)
    ]
    found = json.loads(severity(small, *options, "--json").stdout)
    assert [curve["corruption"] for curve in found["curves"]] == ["contrast", "fog", "mean"]
    assert found["curves"][0]["area"] == float(rows[0]["area"])


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ("--targets streets-fog@1", "`streets-fog@1` is of one severity", "--steps"),
        ("--targets streets-city --corruptions frost", "unknown corruption `frost`", "choose from brightness"),
        ("--targets cityscapes", "not on this disk: target `cityscapes`", "dgbench download cityscapes"),
        ("--targets streets-fogg", "unknown domain `streets-fogg`", "did you mean `streets-fog`?"),
    ],
)
def test_a_mistake_is_one_message_and_a_hint(options: str, message: str, hint: str, small: Path) -> None:
    done = severity(small, *options.split())
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {message}")
    assert hint in done.stderr

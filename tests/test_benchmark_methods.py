"""`benchmarks/methods.py`: which models it measures, and its table of stored rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dgbench.recipe import recipe_names

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "methods.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_methods", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def row(method: str, total: float) -> dict[str, Any]:
    timing = {"ms": {"median": 40.0}, "gib": 2.5}
    return {
        "method": method,
        "variant": "mit_b5",
        "total": total,
        "parameters": 85_155_283,
        "trainable": 85_155_283,
        "timings": [timing | {"batch": 1}, timing | {"batch": 8}],
        "step": timing | {"batch": 2},
        "problem": "",
        "hardware": {"name": "A", "driver": "1"},
        "environment": {"torch": "2"},
        "dtype": "bf16",
        "commit": "c",
        "dirty": False,
    }


def test_models_are_those_of_published_rows_with_the_published_means(script: ModuleType) -> None:
    found = script.published()
    assert found["shade/mit_b5-gta"] == pytest.approx(52.15)
    assert found["ibaformer/mit_b5-gta"] == pytest.approx(54.79)
    assert {*found, *script.BASELINES} <= {*recipe_names()}


def test_the_table_is_ordered_by_operations_and_tells_what_could_not_be_measured(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = {"shade/mit_b5-gta": row("shade", 90.0), "erm/resnet101-gta": row("erm", 80.0), "x/y": {"problem": "no | room"}}
    (tmp_path / "methods.json").write_text(json.dumps(stored))
    assert script.main([str(tmp_path), "--recipes"]) == 0
    lines = (tmp_path / "methods.md").read_text().splitlines()
    assert lines[2:5] == [
        "| `erm` | mit_b5 | 85.16 | 85.2 | 80 | 40.0 | 200 | 40 | 2.5 | – |",
        "| `shade` | mit_b5 | 85.16 | 85.2 | 90 | 40.0 | 200 | 40 | 2.5 | 52.15 |",
        "| `x/y` | no \\| room |" + " – |" * 8,
    ]
    assert "Measured on A, driver 1, torch 2, bf16, 512x512, commit c." in lines
    assert json.loads((tmp_path / "methods.json").read_text()) == stored
    assert lines[0] in capsys.readouterr().out

"""`benchmarks/model.py` with tiny towers on a CPU: every path, and a report that says what it is asked for."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dgbench.cost.timing import Times

FOLDER = Path(__file__).parents[1] / "benchmarks"
ROWS = ["one crop", "sliding window", "step of 2", "8 crops, exact"]
TINY = ["--towers", "tiny", "--size", "64", "--device", "cpu", "--seconds", "0.01", "--rounds", "1"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("model")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("model_table")


def cells(text: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in text.partition("Lower bounds")[0].splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.mark.full
def test_a_run_measures_its_rows(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.json"
    assert script.main([*TINY, "--no-compile", "--stages", "--rows", *ROWS, "--json", str(out)]) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text(encoding="utf-8"))
    rows = cells(text)
    assert [name.removesuffix(", 18 windows") for name in rows] == ROWS
    for name, row in found["rows"].items():
        assert all(times["median"] > 0 for times in row["times"].values())
        assert "products" in row["times"] or name.endswith("exact")
        ours = next(column for column in ("fast", "exact", "eager") if column in row["times"])
        if "products" in row["times"]:
            assert row["multiple"] == pytest.approx(row["times"][ours]["median"] / row["times"]["products"]["median"])
            assert row["flop"] > 0
    # bars in ms are one pair's on one GPU
    assert "75 ms" not in text
    assert found["rows"]["sliding window"]["crops"] == 18
    assert found["rows"]["sliding window"]["flop"] == 18 * found["rows"]["one crop"]["flop"]
    stages = found["rows"]["step of 2"]["stages"]["eager"]
    assert {
        "towers",
        "fusers",
        "neck",
        "pixel decoder",
        "mask decoder",
        "loss",
        "backward of towers",
        "optimizer",
    } <= stages.keys()
    assert "upsampling" in found["rows"]["one crop"]["stages"]["eager"]
    assert {"fast", "eager", "products"} <= found["rows"]["one crop"]["times"].keys()
    assert {"fast", "eager", "products"} <= found["rows"]["step of 2"]["times"].keys()
    assert "fast, no graph" in found["rows"]["one crop"]["stages"]
    assert re.search(r"^Stages, ms:$", text, re.M)
    assert script.main([*TINY, "--no-compile", "--rows", "one crop", "--against", str(out)]) == 0
    text = capsys.readouterr().out
    assert list(cells(text)) == ["one crop"]
    assert re.search(r"^\d+ of \d+ medians are within the other run's central 90 %\.$", text, re.M)


def test_what_fails_is_named_and_costs_no_other_row(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    calls = importlib.import_module("model_calls")
    subject = script.Subject(script.load_method("mfuser", {"vfm": "tiny", "vlm": "tiny"}, ()), (64, 64))
    kept: list[str] = []
    bench = calls.Bench(subject, torch.device("cpu"), torch.bfloat16, 0.01, 1, compiled=False)
    rows = [row for row in script.ROWS if row.name in ("one crop", "8 crops")]
    bench.measured = {row.name: script.Measured(1, absolute=False) for row in rows}
    bench.keep = lambda: kept.append(json.dumps(script.model_table.as_json(bench.measured)))

    def fails() -> None:
        raise RuntimeError("out of memory\nof which")

    script.timed(bench, rows, {"one crop": {"eager": lambda: None, "fast": fails}, "8 crops": {"fast": lambda: None}})
    first, second = (bench.measured[row.name] for row in rows)
    assert first.errors["fast"] == "RuntimeError: out of memory"
    assert set(first.times) == {"eager", "products"}
    assert set(second.times) == {"fast", "products"}
    assert not second.errors
    assert bench.failed
    assert "one crop, fast: RuntimeError: out of memory" in bench.notes
    assert [set(json.loads(text)["8 crops"]["times"]) for text in kept] == [set(), {"fast", "products"}]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("| ")]
    assert len(lines) == len(rows)
    assert lines[0].split(" | ")[2] == "failed"


def test_a_row_of_which_all_failed_is_a_row(table: Any) -> None:
    row = next(row for row in table.ROWS if row.name == "8 crops")
    found = table.Measured(8, True, errors={"eager": "RuntimeError: no", "fast": "RuntimeError: no"})
    assert found.missed(row) == []
    assert table.line(row, found) == "| 8 crops | failed | failed | – | – | 1.8× | 1.5× | failed | – | – |"
    assert table.as_json({"8 crops": found})["8 crops"]["errors"] == found.errors


def measured(table: Any, ours: float, products: float, **other: Any) -> Any:
    def times(ms: float) -> Times:
        return Times(ms, 0.9 * ms, 1.1 * ms, 10)

    found = table.Measured(8, True, **other)
    found.times = {"eager": times(2 * ours), "fast": times(ours), "products": times(products)}
    return found


def test_bars_are_of_the_fast_column_and_each_that_is_missed_is_named(table: Any) -> None:
    row = next(row for row in table.ROWS if row.name == "step of 8")
    within = measured(table, 160, 45, gib={"eager": 37.0, "fast": 27.0})
    assert within.multiple == pytest.approx(160 / 45)
    assert within.missed(row) == []
    beyond = measured(table, 180, 45, gib={"eager": 37.0, "fast": 29.0})
    assert beyond.missed(row) == ["multiple", "ms", "GiB"]
    elsewhere = measured(table, 180, 60, gib={"fast": 29.0})
    elsewhere.absolute = False
    assert elsewhere.missed(row) == []
    text = "\n".join(table.table([row], {row.name: beyond}))
    assert "| 360 ± 36 | 180 ± 18 | 45 ± 4.5 | 4.00× (fast) | 3.8×, 170 ms, 28 GiB | 2.9× | no: multiple, ms, GiB |" in text


def test_two_runs_are_compared_by_their_spread(table: Any) -> None:
    one, other = measured(table, 100, 50), measured(table, 130, 50)
    earlier = {"rows": table.as_json({"8 crops": one})}
    assert table.agreement({"8 crops": one}, earlier) == ["3 of 3 medians are within the other run's central 90 %."]
    first, *lines = table.agreement({"8 crops": other}, earlier)
    assert first.startswith("1 of 3 ")
    assert lines == [
        "- 8 crops, eager: 260 ± 26 ms, before 200 ± 20, +30.0%",
        "- 8 crops, fast: 130 ± 13 ms, before 100 ± 10, +30.0%",
    ]


def test_a_pair_that_there_is_not_is_refused(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--towers", "tiny", "--vlm", "clip"])
    assert "--towers tiny has no pair with clip; choose from eva02" in capsys.readouterr().err

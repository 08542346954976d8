"""Counts that ship and counts that were kept: the same as counting now, and none after an edit of what decides them."""

from __future__ import annotations

import functools
import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mfuser
from dgbench import cli
from dgbench.cost import counted
from dgbench.cost.counted import SHIPPED, Subject, keep, key, known, made_now, ship, sources
from dgbench.cost.profile import profile, subjects
from dgbench.progress import Silent
from mfuser import methods

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from counts import rows as rows_now

ANEW = "python benchmarks/counts.py"
rows = functools.cache(rows_now)  # a second to list


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DGBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def floor(size: tuple[int, int] = (64, 64)) -> Subject:
    (found,) = subjects(["source-only"], settings=["method.backbone=tiny"], size=size)[:1]
    return found


# ---- what ships


def test_the_shipped_counts_are_of_the_sources_as_they_are_now() -> None:
    content = json.loads(gzip.decompress(SHIPPED.read_bytes()))
    assert content["sources"] == {name: sources(name) for name in mfuser.method_names()}, (
        f"a source that decides counts was edited: run {ANEW}"
    )
    assert SHIPPED.stat().st_size < 200_000


def test_every_row_of_profile_and_every_recipe_is_known_without_counting(cache: Path) -> None:
    assert not [key(subject) for subject in rows() if known(subject) is None], f"run {ANEW}"
    assert not cache.exists()


@pytest.mark.parametrize("name", [*methods.names(), *(pytest.param(f"all-{part}", marks=pytest.mark.full) for part in range(3))])
def test_what_ships_is_what_counting_finds(name: str) -> None:
    tiny = [row for row in rows() if row.method.variant.startswith("tiny") and row.method.name == name and row.size == (512, 512)]
    chosen = list({key(row): row for row in rows()}.values())[int(name[4:]) :: 3] if name.startswith("all") else tiny[:1]
    assert chosen
    for subject in chosen:
        found = known(subject)
        assert found is not None
        now = made_now(subject)
        assert found.held == now.held
        assert found.counted == now.counted
        assert list(found.counted.by_module) == list(now.counted.by_module)


@pytest.mark.parametrize(
    ("edited", "methods"),
    [
        ("models/fusion.py", "all"),
        ("models/decoder/pixel_decoder.py", "all"),
        ("models/ops/selective_scan/__init__.py", "all"),
        ("models/methods/__init__.py", "all"),
        ("models/new.py", "all"),
        *((f"rules/{name}.py", "all") for name in ("count", "conventions", "operators", "shapes", "counted")),
        *((f"models/methods/{methods.file(name).name}", name) for name in methods.names()),
        ("models/methods/new.py", "none"),
        ("models/ops/selective_scan/triton_backend.py", "none"),
    ],
)
def test_an_edit_leaves_no_count_known_of_the_methods_that_it_can_change(edited: str, methods: str, tmp_path: Path) -> None:
    for name, folder in (("models", Path(mfuser.__file__).parent), ("rules", SHIPPED.parent)):
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.gz", "cuda"))

    def found() -> dict[str, str]:
        sources.cache_clear()
        return {name: sources(name, tmp_path / "models", tmp_path / "rules") for name in mfuser.method_names()}

    before = found()
    assert before == {name: sources(name) for name in before}
    with (tmp_path / edited).open("a") as file:
        file.write("# more\n")
    now = found()
    assert {name for name in now if now[name] != before[name]} == {name for name in now if methods in ("all", name)}


def test_counts_of_other_sources_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ship([floor()], tmp_path / "own.gz")
    monkeypatch.setattr(counted, "SHIPPED", own)
    assert known(floor()) is not None
    content = json.loads(gzip.decompress(own.read_bytes())) | {"sources": {"source-only": "0" * 64}}
    old = tmp_path / "old.gz"
    old.write_bytes(gzip.compress(json.dumps(content).encode()))
    monkeypatch.setattr(counted, "SHIPPED", old)
    assert known(floor()) is None
    monkeypatch.setattr(counted, "SHIPPED", tmp_path / "none.gz")
    assert known(floor()) is None


def test_shipping_writes_the_same_bytes_again(tmp_path: Path) -> None:
    first, second = (ship([floor()], tmp_path / name).read_bytes() for name in ("a.gz", "b.gz"))
    assert first == second


def test_other_versions_of_what_towers_are_built_of_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dgbench import render

    own = ship([floor()], tmp_path / "own.gz")
    content = json.loads(gzip.decompress(own.read_bytes()))
    content["made with"]["timm"] = "0.0.1"
    own.write_bytes(gzip.compress(json.dumps(content).encode()))
    monkeypatch.setattr(counted, "SHIPPED", own)
    render.show(profile([floor()], Silent(), timed=False))
    assert "Counted with timm 0.0.1, open_clip_torch" in capsys.readouterr().out


# ---- what is kept here


def test_a_count_is_kept_and_found_again(cache: Path) -> None:
    subject = floor((64, 96))
    assert known(subject) is None
    first = keep(subject, made_now(subject))
    assert known(subject) == first
    assert known(floor((96, 64))) is None
    assert known(Subject(subject.method, subject.size, "another/name")) == first


def test_a_damaged_file_is_counted_anew(cache: Path) -> None:
    subject = floor((64, 96))
    right = keep(subject, made_now(subject))
    (path,) = (cache / "counts").iterdir()
    whole = path.read_bytes()
    digit = whole.index(b"[", whole.index(b"total")) + 1
    other = whole[:digit] + (b"1" if whole[digit : digit + 1] != b"1" else b"2") + whole[digit + 1 :]
    for content in (b"", b"{", b"\xff\x00", whole[:-9], whole.partition(b"\n")[2], other):
        path.write_bytes(content)
        assert known(subject) is None
    assert profile([subject], Silent(), timed=False).rows[0].cost == right.counted.total
    assert known(subject) == right


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(cache: Path) -> None:
    cache.write_text("a file where the folder would be")
    assert profile([floor((64, 96))], Silent(), timed=False).rows[0].total > 0


def test_models_that_must_be_counted_are_told_as_they_come() -> None:
    arguments = ["profile", "source-only", "--set", "method.backbone=tiny", "--size", "64", "96", "--count-only"]
    first, again = (CliRunner().invoke(cli.app, arguments, prog_name="dgbench") for _ in range(2))
    assert first.exit_code == again.exit_code == 0
    assert "counted source-only (tiny) at 64x96: 0." in first.stderr
    assert "counted source-only" not in again.stderr
    assert first.stdout == again.stdout

"""Records that are damaged, of another time, or made to deceive: one line says so, and all others are shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from calls import calls
from records import model
from typer.testing import CliRunner

from dgbench import cli, render, results
from dgbench.render.leaderboard import leaderboard_tables
from dgbench.report.leaderboard import leaderboard

FORMATS = ("text", "csv", "markdown", "latex", "html", "json")
NASTY = "</td><script>alert(1)</script>\x1b[2J\u202e|`*_#{{7*7}}\\input{x}&amp;=1+1"


def changed(**values: Any) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **values})


DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "truncated": (lambda text: text[: len(text) // 2], "is not valid JSON"),
    "empty": (lambda text: "", "is not valid JSON"),
    "newer": (changed(schema=99), "has record schema 99, this dgbench reads schemas 1 and 2"),
    "nan": (lambda text: text.replace('"miou": 0.4', '"miou": NaN'), "miou: nan is not a finite number"),
    "infinite": (lambda text: text.replace('"miou": 0.4', '"miou": 1e999'), "miou"),
    "out of range": (changed(miou=1.5, digest=""), "miou"),
    "another type": (changed(miou="0.4", digest=""), "miou"),
    "a list": (lambda text: "[1]", "is not a record of dgbench"),
    "changed": (changed(method="better"), "digest"),
    "deep": (lambda text: "[" * 100_000, "JSON"),
}


def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    for one in model(0.5, 0.4, 0.4):
        results.write(one, Path("runs") / "good")
    bad = results.write(model(0.5, 0.4, 0.4, method="bad", checkpoint="bad")[1], Path("runs") / "bad").path
    assert bad is not None
    return bad


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_bad_record_is_one_line_and_the_rest_is_shown(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = here(tmp_path, monkeypatch)
    damage, said = DAMAGE[kind]
    bad.write_text(damage(bad.read_text()))
    done = CliRunner().invoke(cli.app, ["leaderboard", "--no-published"], prog_name="dgbench")
    assert done.exit_code == 0
    [line] = done.stderr.splitlines()
    assert line.startswith(f"warning: {bad.as_posix()}")
    assert said in line
    assert line.endswith("it is left out")
    assert "1  mfuser (tiny + tiny)" in done.stdout
    assert "bad (tiny" not in done.stdout


def test_records_of_schema_1_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no digests, no ids of images, and neither counts of source images nor of extra ones."""
    bad = here(tmp_path, monkeypatch)
    newer = ("protocol_digest", "source_images", "source_available", "source_rendered", "rendered", "n_extra", "digest")
    old = {key: value for key, value in json.loads(bad.read_text()).items() if key not in (*newer, "confusion_sha256")}
    bad.write_text(json.dumps(old | {"schema": 1}))
    done = CliRunner().invoke(cli.app, ["leaderboard", "--no-published"], prog_name="dgbench")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "bad (tiny + tiny)" in done.stdout


@pytest.mark.parametrize("form", FORMATS)
def test_markup_and_escapes_in_names_are_text_in_every_format(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    records = model(0.5, 0.4, 0.4, method=NASTY, variant=NASTY, recipe=NASTY, protocol=NASTY, commit=NASTY, source="streets-game")
    render.show(leaderboard(records, published=False), form)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "{{7*7}}" in text.replace("\\", "").replace("&#42;", "*")
    if form in ("markdown", "html"):
        assert "<script" not in text
    if form == "html":
        seen: list[str] = []

        class Page(HTMLParser):
            def handle_starttag(self, tag: str, _attrs: object) -> None:
                assert tag != "script"

            def handle_data(self, data: str) -> None:
                seen.append(data)

        Page().feed(text)
        assert "<script>alert(1)</script>" in "".join(seen)
    if form == "latex":
        assert r"\input" not in text


def test_very_many_records_are_listed_in_a_time_that_grows_with_their_number() -> None:
    def work(n: int) -> int:
        records = [
            r for i in range(n) for r in model(0.5, 0.4, i / n, method=f"m{i}", checkpoint=f"{i}", recipe_hash=f"{i:012x}")
        ]
        return calls(lambda: leaderboard_tables(leaderboard(records, published=False)))

    work(10)  # what is done once
    assert work(400) < 6 * work(100)

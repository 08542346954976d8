"""Every result in every format: made up by its type, and read back with the libraries that read such text."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import io
import json
import re
import types
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pandas as pd
import pytest
from markdown_it import MarkdownIt
from records import model, record
from typer.main import get_command
from typer.testing import CliRunner

from dgbench import cli, render, results
from dgbench.cli.options import ENDINGS
from dgbench.render.results import RENDERERS
from dgbench.report.expected import Reference
from dgbench.report.leaderboard import leaderboard

NASTY = "=1+1 | 50% of_$x #1 {a} \\b ~c^d <e> & --f `g`\x1b[2J"
NUMBER = 0.1234567890123456
FORMATS = ("text", "csv", "markdown", "latex", "html", "json")
REFERENCE = Reference("streets/mfuser-gpu", "mfuser", "tiny + tiny", "streets-game", "unified", {"streets-city": 0.6}, "one H200")


def made_up(hint: Any) -> Any:
    """A value of a type: lists have one item, texts are nasty, and what may be None is there."""
    origin, of = get_origin(hint), get_args(hint)
    if origin is Literal:
        return of[0]
    if origin in (Union, types.UnionType):
        return made_up(next(one for one in of if one is not type(None)))
    if origin is tuple:
        return tuple(made_up(one) for one in of if one is not ...)
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return {made_up(of[0]): made_up(of[1])}
    if origin in (list, Sequence):
        return [made_up(of[0])]
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        known = {"convention": "mac", "reason": ""}  # of which the text depends
        return hint(**{f.name: known.get(f.name) or made_up(hints[f.name]) for f in dataclasses.fields(hint) if f.init})
    simple: dict[Any, Any] = {str: NASTY, int: 7, float: NUMBER, bool: True, Path: Path(NASTY), Any: NASTY}
    return simple[hint]


def printed(name: str, form: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed of a result of this class, or of a list of two, if that is what its renderer takes."""
    module, _, class_name = name.rpartition(".")
    one = made_up(getattr(importlib.import_module(module), class_name))
    (annotation, *_) = RENDERERS[name].tables.__annotations__.values()
    render.show([one, one] if annotation.startswith("Sequence") else one, form)
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


every_result = pytest.mark.parametrize("name", RENDERERS)


@every_result
def test_csv_has_full_numbers_no_formulas_and_rows_of_one_length(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    header, *rows = csv.reader(io.StringIO(printed(name, "csv", capsys)))
    assert rows
    assert {len(row) for row in rows} == {len(header)}
    assert len(set(header)) == len(header)
    texts = [text for row in (header, *rows) for text in row]
    assert not [text for text in texts if text.startswith("=") or not text.isprintable()]
    numbers = [float(text) for text in texts if re.fullmatch(r"0\.1\d+", text)]
    assert set(numbers) <= {NUMBER}
    assert "'=1+1" in "".join(texts) or numbers


@every_result
def test_json_is_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(name, "json", capsys)
    assert "=1+1" in str(json.loads(text, parse_constant=pytest.fail))
    assert "\x1b" not in text


@every_result
def test_markdown_is_tables_whose_cells_are_as_many_as_their_titles(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(printed(name, "markdown", capsys))
    for table in html.split("<table>")[1:]:
        head, _, body = table.partition("</table>")[0].partition("<tbody>")
        rows = body.split("<tr>")[1:]
        assert rows
        assert {row.count("<td") for row in rows} == {head.count("<th>") + head.count("<th ")}
    tags = set(re.findall(r"</?([a-z0-9]+)", html))
    assert tags <= {"table", "thead", "tbody", "tr", "th", "td", "p", "strong", "ul", "li"}


class Page(HTMLParser):
    """What a browser makes of a page: elements opened and closed, and the text between."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[int] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert {name for name, _ in attrs} <= {"class", "lang", "charset", "name", "content"}
        self.rows += [0] if tag == "tr" else []
        if tag in ("td", "th"):
            self.rows[-1] += 1
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@every_result
def test_html_is_one_document_in_which_names_are_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(name, "html", capsys)
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert text.count("<html") == 1
    assert page.open == []
    kinds = {"html", "head", "meta", "title", "style", "body", "section", "h2", "table", "thead", "tbody", "tr", "th", "td"}
    assert page.tags <= {*kinds, "ul", "li", "b", "u"}
    assert "\x1b" not in text
    assert "<e>" in page.text or "=1+1" not in page.text
    for part in text.split("<table>")[1:]:
        assert len(set(Page(part.partition("</table>")[0]).rows)) == 1


COMMAND = re.compile(
    r"\\(begin|end)\{(table|tabular)\}|\\(caption|toprule|midrule|bottomrule|text[a-z]+|underline|ldots)\b"
    r"|\\[&%$#_{}]|\\\\(?=\n)|\$(\\pm|\\times|\\infty|\^2)\$"
)


@every_result
def test_latex_has_known_commands_closed_braces_and_full_rows(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(name, "latex", capsys)
    for columns, table in re.findall(r"\\begin\{tabular\}\{([lr]+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL):
        rows = [line for line in table.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(columns)}
    outside = re.sub(r"\\begin\{tabular\}.*?\\end\{tabular\}", "", text, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)&", outside)
    rest = re.sub(r"(?<!\\)&", "", COMMAND.sub("", text))
    assert not set("\\$#%_^~`<>|\x1b") & set(rest.replace("[t]", "")), rest
    depth = 0
    for brace in re.findall(r"[{}]", rest):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    assert "--f" not in text


PARTIAL = record("streets-city", 0.5, n_images=10, checkpoint="c3", recipe_hash="cccccccccccc")
EXPORT = record("cityscapes", 0.5, rendered=True)


@pytest.mark.parametrize("form", FORMATS)
def test_partial_reference_published_and_rendered_scores_are_marked_in_every_format(
    form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    render.show(leaderboard([*model(0.481, 0.43, 0.35), PARTIAL], [REFERENCE]), form)
    board = capsys.readouterr().out
    render.show([PARTIAL, EXPORT], form)
    scores = capsys.readouterr().out
    if form == "json":
        groups = json.loads(board)
        rows = [row for part in ("groups", "published") for group in groups[part] for row in group["rows"]]
        assert {row["kind"] for row in rows} == {"run", "reference", "published"}
        assert [row["scores"]["streets-city"]["partial"] for row in rows if row["recipe_hash"] == "c" * 12] == [True]
        assert [(row["n_images"], row["rendered"]) for row in json.loads(scores)] == [(10, False), (100, True)]
    elif form == "csv":
        frame = pd.read_csv(io.StringIO(board))
        assert set(frame["kind"]) == {"run", "reference", "published"}
        assert frame[frame["kind"] != "run"]["rank"].isna().all()
        assert frame.set_index("recipe_hash").loc["c" * 12, "streets-city_partial"] in (True, "True")
        rows = pd.read_csv(io.StringIO(scores))
        assert rows["complete"].tolist() == [False, True]
        assert rows["rendered"].tolist() == [False, True]
        assert rows["miou"].tolist() == rows["iou_road"].tolist() == [0.5, 0.5]
        assert frame.groupby("table")[["trained_on", "protocol"]].nunique().max().tolist() == [1, 1]
    else:
        assert "50.0~" in board.replace(r"\textasciitilde{}", "~")
        start = r"<tr><td[^>]*>" if form == "html" else r"(\| )?"
        assert all(re.search(rf"^{start}{mark}\b", board, re.MULTILINE) for mark in ("ref", "pub"))
        assert "cityscapes (rendered)" in scores
        assert "10 of 100" in scores


# ---- on the command line


def commands() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        found |= (
            {f"{name} {sub}": one for sub, one in command.commands.items()} if hasattr(command, "commands") else {name: command}
        )
    return found


@pytest.mark.parametrize("name", commands())
def test_every_command_offers_every_format(name: str) -> None:
    assert {"--format", "--json"} <= {flag for param in commands()[name].params for flag in param.opts}


# what a result looks like in each format is seen above
COMMANDS = [("leaderboard", form) for form in FORMATS]
COMMANDS += [(command, form) for command in ("models", "methods mfuser", "protocols", "data list") for form in ("csv", "json")]


@pytest.mark.parametrize(("command", "form"), COMMANDS)
def test_what_goes_to_stdout_is_the_result_alone(
    command: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    results.write(PARTIAL, Path("runs") / "x")
    (Path("runs") / "x" / "record-broken.json").write_text("{")  # a warning
    done = CliRunner().invoke(cli.app, [*command.split(), "--format", form], prog_name="dgbench")
    assert done.exit_code == 0
    assert ("warning: " in done.stderr) == (command == "leaderboard")
    if form == "csv":
        assert len(pd.read_csv(io.StringIO(done.stdout))) > 2
    elif form == "json":
        assert done.stdout == CliRunner().invoke(cli.app, [*command.split(), "--json"], prog_name="dgbench").stdout
    assert "warning" not in done.stdout


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments), prog_name="dgbench")


@pytest.mark.parametrize(("ending", "form"), ENDINGS.items())
def test_a_results_file_has_the_format_of_its_ending(
    ending: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    results.write(PARTIAL, Path("runs") / "x")
    command = "leaderboard" if form == "markdown" else "protocols"  # which is quick
    done = run(command, "--out", f"board{ending.upper()}")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", f"written: board{ending.upper()}\n")
    assert Path(f"board{ending.upper()}").read_text() == run(command, "--format", form).stdout


def test_a_named_format_goes_before_the_files_ending(tmp_path: Path) -> None:
    assert run("protocols", "--out", str(tmp_path / "a.md"), "--json").exit_code == 0
    assert run("protocols", "--out", str(tmp_path / "b"), "--format", "text").exit_code == 0
    assert json.loads((tmp_path / "a.md").read_text())
    assert (tmp_path / "b").read_text() == run("protocols").stdout


@pytest.mark.parametrize(("name", "said"), [("board.pdf", "must end in .txt, .csv, .md"), ("", "is a folder")])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(name: str, said: str, tmp_path: Path) -> None:
    done = run("protocols", "--format" if not name else "--out", *(["html", "--out"] if not name else []), str(tmp_path / name))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--out" in done.stderr
    assert said in " ".join(done.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_every_command_with_a_table_for_a_result_writes_it_to_a_file() -> None:
    """The others' `out` is what they make: a run, a picture, a folder; `push` makes nothing here."""
    without = {name for name, one in commands().items() if not {"table", "out"} & {param.name for param in one.params}}
    assert without == {"push"}


def test_json_and_another_format_are_a_usage_error() -> None:
    done = CliRunner().invoke(cli.app, ["models", "--json", "--format", "csv"], prog_name="dgbench")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--json" in done.stderr


def test_csv_of_nothing_is_empty_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    render.show([], "csv")
    assert capsys.readouterr() == ("", "nothing to show\n")

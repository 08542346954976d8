"""Text from outside (file names, records, servers) as it is shown: on terminals, in Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import logging
import sys
import unicodedata
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from records import record

from dgbench import render
from dgbench.cli.program import _warn_on_stderr
from dgbench.cost.tradeoff import Panel, Point, Tradeoff
from dgbench.render import pictures, texts
from dgbench.render.outside import visible, visible_json, visible_lines
from dgbench.render.streams import writable
from dgbench.render.table import Cell, Table, draw_rich

# what Unicode calls controls, formats, surrogates and separators of lines; marks that only shape letters are none of them
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
SCRIPTS_OWN = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}  # signs that are seen
ALL_HIDDEN = "".join(
    chr(code) for code in range(0x20000) if unicodedata.category(chr(code)) in _HIDDEN and code not in SCRIPTS_OWN
)
TAGS = "".join(map(chr, range(0xE0020, 0xE0080)))
NASTY = [
    "<script>alert(1)</script>",
    "![x](http://e/x.png)",
    "[link](http://e)",
    "a|b",
    "a\\|b",
    "\\",
    "`code`",
    "*a* _b_ __c__ **d**",
    "~~gone~~",
    "&lt;b&gt; &#124;",
    "a & b",
    "</b> <!-- c",
    "x* y*",
    "snake_case_name",
    "a~, b~",
    "<http://e>",
    "*",
    "||",
    "\\`",
    "[a]: b",
]


def test_every_hidden_character_of_unicode_is_written_out() -> None:
    # musical and shorthand formats show something
    shown = {c for c in ALL_HIDDEN if visible(c) == c}
    assert {hex(ord(c)) for c in shown if not 0x13430 <= ord(c) <= 0x1D17A} == set()
    assert visible(TAGS).startswith(r"\U000e0020\U000e0021")


def test_letters_of_any_script_stay() -> None:
    text = "straße_München 東京 العربية עברית e\u0301 👍 ± – †"
    assert visible(text) == text


def test_messages_keep_their_lines_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert visible_lines("two:\n  a\x1b[2J\r\n\tb\x9b") == "two:\n  a\\x1b[2J\\x0d\n\tb\\x9b"
    render.failure("in `\x1b]0;title\x07`", "see \u202eexe.txt")
    render.warning("\x1b[1A")
    render.note("\x9b2J \udcff")
    said = capsys.readouterr().err
    assert said == "error: in `\\x1b]0;title\\x07`\n\nhint: see \\u202eexe.txt\nwarning: \\x1b[1A\n\\x9b2J \\udcff\n"


def test_warnings_of_the_library_are_visible(capsys: pytest.CaptureFixture[str]) -> None:
    _warn_on_stderr()
    logging.getLogger("dgbench.results").warning("left out: %s", "a\x1b[2Jb")
    assert capsys.readouterr().err == "warning: left out: a\\x1b[2Jb\n"


def test_a_message_is_not_as_long_as_what_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    render.failure("unknown `" + "9" * 100_000 + "`")
    said = capsys.readouterr().err
    assert len(said) < 600
    assert said.endswith("9` (100,010 characters)\n")


def test_progress_in_a_log_is_visible(capsys: pytest.CaptureFixture[str]) -> None:
    progress = render.progress()
    progress.start("train \x1b[2J", 1, "steps")
    progress.note("\x9b1A")
    progress.stop()
    with render.transfers() as bars:
        bars.begin("a\x1b]8;;http://e\x07.zip", 10)
        bars.note("retry: \u202e")
        bars.end("a\x1b]8;;http://e\x07.zip")
    said = capsys.readouterr().err
    assert all(character.isprintable() or character == "\n" for character in said)
    assert said.startswith("train \\x1b[2J: 1 step\n\\x9b1A\na\\x1b]8;;http://e\\x07.zip: 10 B\nretry: \\u202e\n")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_bars_on_a_terminal_take_names_for_names(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    from rich.console import Console

    raw = io.BytesIO()
    monkeypatch.setenv("NO_COLOR", "1")
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    console = Console(file=stream, force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr("dgbench.render.bars.open_console", lambda **_: console)
    with render.transfers() as bars:
        bars.begin("[/bold][link=http://e]x\x07", 10)
        bars.note("[/red] \x07")
    progress = render.progress()
    progress.start("x", 2, "steps")
    progress.advance(1, loss=0.5, images_per_second=3.0)
    progress.note("[/red]")
    progress.stop()
    drawn = raw.getvalue().decode(encoding)
    assert "[/bold][link=http://e]x\\x07" in drawn
    assert "[/red] \\x07" in drawn
    assert "\x07" not in drawn


class _Seen(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag in ("td", "th", "strong", "li"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data.rstrip("\n")


@pytest.mark.parametrize("text", NASTY)
def test_markdown_shows_what_was_given(text: str) -> None:
    rows = ((Cell(text), Cell("43.1* ±1.2")), (Cell("b"), Cell("~")))
    table = Table(text, ("name", text), rows, left=True, legend=(text, "- x", "1. y"))
    seen = _Seen()
    seen.feed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(texts.markdown(table)))
    assert seen.cells == [text, "name", text, text, "43.1* ±1.2", "b", "~", text, "- x", "1. y"]
    assert set(seen.tags) == {"p", "strong", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}


def test_latex_has_no_command_and_no_row_option_of_a_cell() -> None:
    table = Table(
        "a", ("[2cm]", "b"), ((Cell("[3pt]"), Cell("\\input{/etc/passwd} x_1 <b> 50 % $ ^ ~ #\x1b")), (Cell("*"), Cell("|")))
    )
    rows = [line for line in texts.latex(table).splitlines() if line.endswith("\\\\")]
    assert rows == [
        r"{[}2cm] & b \\",
        r"{[}3pt] & \textbackslash{}input\{/etc/passwd\} x\_1 \textless{}b\textgreater{} 50 \% \$ \textasciicircum{} "
        r"\textasciitilde{} \#\textbackslash{}x1b \\",
        r"{*} & \textbar{} \\",
    ]


@pytest.mark.parametrize("formula", ["=1+1", "+cmd|'/c calc'!A0", "-2+3", "@SUM(A1)", "\t=1", " =1", "＝1"])
def test_csv_has_no_formulas(formula: str) -> None:
    [row] = csv.DictReader(io.StringIO(texts.csv([{"name": formula, "n": -1.5, "text": "-1.5", "small": -1e-9, "none": None}])))
    assert row["name"] == "'" + visible(formula) or not row["name"].lstrip().startswith(("=", "+", "-", "@", "＝"))
    assert (row["n"], row["text"], row["small"], row["none"]) == ("-1.5", "-1.5", "-1e-09", "")


def test_json_is_the_same_json_without_controls(capsys: pytest.CaptureFixture[str]) -> None:
    text = "a\x7f\x9b2J\u202e\u2028\ud800\U000e0041é"
    render.show([record(method=text)], "json")
    printed = capsys.readouterr().out
    assert json.loads(printed)[0]["method"] == text
    assert all(character.isprintable() or character == "\n" for character in printed)
    assert "é" in printed
    assert visible_json('{"a": "\U000e0041"}') == '{"a": "\\udb40\\udc41"}'


def test_json_for_a_stream_of_ascii_is_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    render.show([record(method="é – ±")], "json")
    assert json.loads(raw.getvalue())[0]["method"] == "é – ±"


def test_tables_for_a_stream_of_ascii_stay_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    from dgbench.doctor import Check

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    render.show([Check("a ±1", "ok", "x–y"), Check("b", "ok", "東")])
    assert raw.getvalue().decode() == "state  check  found\nok     a +-1  x-y\nok     b      \\u6771\n"


def test_stand_ins_are_used_only_where_a_stream_lacks_the_character() -> None:
    def stream(encoding: str) -> io.TextIOWrapper:
        return io.TextIOWrapper(io.BytesIO(), encoding=encoding)

    assert writable("– ± … é ━", stream("latin-1")) == "- ± ... é -"
    assert writable("– ± é ━", stream("cp1252")) == "– ± é -"
    assert writable("– ± é", io.StringIO()) == "– ± é"


def test_cells_headers_and_legends_are_no_markup_in_rich() -> None:
    from rich.console import Console

    stream = io.StringIO()
    text = "[/bold] [link=http://e]:smile:"
    draw_rich(Table(text, (text,), ((Cell(text),),), legend=(text,)), Console(file=stream, width=100, color_system=None))
    assert stream.getvalue().count(text) == 4


def test_dollars_in_names_are_no_formulas_in_pictures(tmp_path: Path) -> None:
    point = Point("a $\\frac{$ \x1b", "run", 1.0, 0.5)
    drawn = pictures.draw_tradeoff(Tradeoff((Panel("$\\bad{ to x$", (point,), ()),), "GMAC", "mac"), tmp_path / "x.svg")
    assert drawn.stat().st_size > 1000

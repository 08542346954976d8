"""Tables as a page of HTML: one document that needs no other file. What came from outside is text in it, never markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dgbench.render.outside import visible
from dgbench.render.table import MARKS, Cell, Table

if TYPE_CHECKING:
    from jinja2 import Environment


class _Parts(NamedTuple):
    element: str  # around the number, "" for none
    number: str
    rest: str


def html(tables: Sequence[Table], marks: Mapping[str, str]) -> str:
    """Return a whole document with a section for each table.

    Args:
        marks: how the legend calls the marks of the best and second values, by style.
    """
    title = next((table.title for table in tables if table.title), "dgbench")
    return page("tables.html", tables=tables, title=title, marks=marks)


def page(template: str, **content: Any) -> str:
    """Return a whole document. Every value is escaped, and control characters in it are written out."""
    return _environment().get_template(template).render(content)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_inert,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {"left": _attribute, "parts": _parts}
    return made


def _inert(value: object) -> object:
    # what is markup already was made of values that passed here
    return visible(value) if type(value) is str else value


def _attribute(column: int, table: Table, style: str = "") -> object:
    from markupsafe import Markup

    kinds = ["left"] if column < table.keys or table.left else []
    kinds += [style] if style else []
    return Markup(' class="{}"').format(" ".join(kinds)) if kinds else ""


def _parts(cell: Cell, table: Table) -> _Parts:
    number, mark, rest = cell.text.partition(MARKS.get(cell.style, "\0")) if table.marked else (cell.text, "", "")
    element = {"best": "b", "second": "u"}.get(cell.style, "") if mark else ""
    return _Parts(element, number, rest)

"""Tables as a page of HTML: one document that needs no other file. What came from outside is text in it, never markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from dgbench.render.table import MARKS, Cell, Table

if TYPE_CHECKING:
    from jinja2 import Template

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
section { margin-bottom: 2.5em; overflow-x: auto }
h2 { font-size: 1.1em }
table { border-collapse: collapse; border-top: 2px solid; border-bottom: 2px solid; font-variant-numeric: tabular-nums }
th { border-bottom: 1px solid }
th, td { padding: .2em .7em; text-align: right; white-space: nowrap }
.left { text-align: left }
.dim { color: #666 }
.good { color: #176117 }
.bad { color: #a40000; font-weight: bold }
.warn { color: #7a4b00 }
ul { color: #555; padding-left: 1.2em }
</style>
</head>
<body>
{% for table in tables %}
<section>
{% if table.title %}
<h2>{{ table.title }}</h2>
{% endif %}
{% if table.rows %}
<table>
<thead><tr>{% for name in table.header %}<th{{ left(loop.index0, table) }}>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}{% set shown = parts(cell, table) %}<td{{ left(loop.index0, table, cell.style) }}>
{%- if shown.element == "b" %}<b>{{ shown.number }}</b>
{%- elif shown.element == "u" %}<u>{{ shown.number }}</u>
{%- else %}{{ shown.number }}{% endif %}{{ shown.rest }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
{% endif %}
{% if table.legend_with(marks) %}
<ul>
{% for line in table.legend_with(marks) %}
<li>{{ line }}</li>
{% endfor %}
</ul>
{% endif %}
</section>
{% endfor %}
</body>
</html>"""


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
    return _template().render(tables=tables, title=title, marks=marks, left=_attribute, parts=_parts)


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)


def _attribute(column: int, table: Table, style: str = "") -> object:
    from markupsafe import Markup

    kinds = ["left"] if column < table.keys or table.left else []
    kinds += [style] if style else []
    return Markup(' class="{}"').format(" ".join(kinds)) if kinds else ""


def _parts(cell: Cell, table: Table) -> _Parts:
    number, mark, rest = cell.text.partition(MARKS.get(cell.style, "\0")) if table.marked else (cell.text, "", "")
    element = {"best": "b", "second": "u"}.get(cell.style, "") if mark else ""
    return _Parts(element, number, rest)

"""Tables as text for other programs: Markdown, LaTeX, CSV.

Markdown and LaTeX show the same as text, with marks and rounding; CSV has the unrounded values.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from dgbench.render.outside import as_item, in_csv, in_latex, in_markdown
from dgbench.render.table import Table


def markdown(table: Table) -> str:
    """Return a table of GitHub's Markdown between its title and legend."""
    body = []
    if table.rows:
        from tabulate import tabulate

        header, *rows = _shown(table, in_markdown)
        aligned = ["left" if left else "right" for left in _left(table)]
        # numbers keep their rounding
        body = [tabulate(rows, header, tablefmt="pipe", disable_numparse=True, colalign=aligned)]
    title = [f"**{in_markdown(table.title, inside_stars=True)}**"] if table.title else []
    legend = ["\n".join(f"- {as_item(in_markdown(line))}" for line in table.legend)] if table.legend else []
    return "\n\n".join([*title, *body, *legend])


def latex(table: Table) -> str:
    """Return a LaTeX table of the package booktabs, title and legend in its caption; a paragraph if there are no rows."""
    caption = in_latex(" ".join([*([f"{table.title}."] if table.title else []), *table.legend]))
    if not table.rows:
        return caption
    columns = "".join("l" if left else "r" for left in _left(table))
    header, *rows = (" & ".join(row) + r" \\" for row in _shown(table, in_latex))
    lines = [r"\begin{table}[t]", *([rf"\caption{{{caption}}}"] if caption else []), rf"\begin{{tabular}}{{{columns}}}"]
    return "\n".join([*lines, r"\toprule", header, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows of plain values under one header of all their columns; missing values are empty."""
    from csv import DictWriter

    text = io.StringIO()
    names = dict.fromkeys(str(in_csv(name)) for row in rows for name in row)
    writer = DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows({str(in_csv(name)): in_csv(value) for name, value in row.items()} for row in rows)
    return text.getvalue().rstrip("\n")


TEXTS: dict[str, Callable[[Table], str]] = {"markdown": markdown, "latex": latex}


def _left(table: Table) -> list[bool]:
    return [i < table.keys or table.left for i in range(len(table.header))]


def _shown(table: Table, written: Callable[[str], str]) -> list[list[str]]:
    return [list(map(written, table.header)), *([written(cell.text) for cell in row] for row in table.rows)]

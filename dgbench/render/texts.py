"""Tables as other programs read them: Markdown, LaTeX, HTML, CSV.

The first three show what the text shows, rounding included, the best value bold and the second underlined where the text has
marks; CSV has the plain values in full.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dgbench.render.outside import as_item, in_csv, in_latex, in_markdown
from dgbench.render.pages import html
from dgbench.render.table import MARKS, Cell, Table

_IN_WORDS = {"best": "bold:", "second": "underlined:"}


def markdown(table: Table) -> str:
    """Return a table of GitHub's Markdown between its title and legend."""
    body = []
    if table.rows:
        from tabulate import tabulate

        header, *rows = _shown(table, in_markdown, {"best": ("**", "**"), "second": ("<ins>", "</ins>")})
        aligned = ["left" if left else "right" for left in _left(table)]
        # numbers keep their rounding
        body = [tabulate(rows, header, tablefmt="pipe", disable_numparse=True, colalign=aligned)]
    title = [f"**{in_markdown(table.title, inside_stars=True)}**"] if table.title else []
    legend = (
        ["\n".join(f"- {as_item(in_markdown(line))}" for line in table.legend_with(_IN_WORDS))]
        if table.legend_with(_IN_WORDS)
        else []
    )
    return "\n\n".join([*title, *body, *legend])


def latex(table: Table) -> str:
    """Return a LaTeX table of the package booktabs, title and legend in its caption; a paragraph if there are no rows."""
    caption = in_latex(" ".join([*([f"{table.title}."] if table.title else []), *table.legend_with(_IN_WORDS)]))
    if not table.rows:
        return caption
    columns = "".join("l" if left else "r" for left in _left(table))
    header, *rows = (" & ".join(row) + r" \\" for row in _shown(table, in_latex, _LATEX))
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


def _one_after_another(write: Callable[[Table], str]) -> Callable[[Sequence[Table]], str]:
    return lambda tables: "\n\n".join(map(write, tables))


TEXTS: dict[str, Callable[[Sequence[Table]], str]] = {
    "markdown": _one_after_another(markdown),
    "latex": _one_after_another(latex),
    "html": lambda tables: html(tables, _IN_WORDS),
}
_LATEX = {"best": (r"\textbf{", "}"), "second": (r"\underline{", "}")}


def _left(table: Table) -> list[bool]:
    return [i < table.keys or table.left for i in range(len(table.header))]


def _shown(table: Table, written: Callable[[str], str], around: Mapping[str, tuple[str, str]]) -> list[list[str]]:
    def cell_text(cell: Cell) -> str:
        number, mark, rest = cell.text.partition(MARKS.get(cell.style, "\0")) if table.marked else (cell.text, "", "")
        if not mark:
            return written(cell.text)
        before, after = around[cell.style]
        return f"{before}{written(number)}{after}{written(rest)}"

    return [list(map(written, table.header)), *([cell_text(cell) for cell in row] for row in table.rows)]

"""Tables as other programs read them: Markdown, LaTeX, CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dgbench.render.table import Table

if TYPE_CHECKING:
    import pandas as pd


def markdown(table: Table) -> str:
    """Return a table of GitHub's Markdown between its title and legend."""
    aligned = ["left" if i < table.keys or table.left else "right" for i in range(len(table.header))]
    # numbers stay as they were rounded
    body = [_frame(table).to_markdown(index=False, disable_numparse=True, colalign=aligned)] if table.rows else []
    title = [f"**{table.title}**"] if table.title else []
    return "\n\n".join([*title, *body, *(["\n".join(f"- {line}" for line in table.legend)] if table.legend else [])])


def latex(table: Table) -> str:
    """Return a LaTeX table of the package booktabs, title and legend in its caption."""
    columns = "".join("l" if i < table.keys or table.left else "r" for i in range(len(table.header)))
    escaped = _frame(table).map(_escaped)
    escaped.columns = [_escaped(title) for title in table.header]
    caption = _escaped(" ".join([f"{table.title}.", *table.legend]))
    text: str = escaped.to_latex(index=False, column_format=columns, caption=caption, position="t")
    return text.rstrip()


def csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows of plain values; what a row does not have is empty."""
    import pandas as pd

    text: str = pd.DataFrame(list(rows)).to_csv(index=False)
    return text.rstrip()


TEXTS: dict[str, Callable[[Table], str]] = {"markdown": markdown, "latex": latex}

_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
          "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--"}  # fmt: skip


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _frame(table: Table) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame([[cell.text for cell in row] for row in table.rows])
    frame.columns = pd.Index(table.header)  # titles may repeat
    return frame

"""Tables as other programs read them: Markdown, LaTeX, CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dgbench.render.outside import as_item, in_csv, in_latex, in_markdown
from dgbench.render.table import Table

if TYPE_CHECKING:
    import pandas as pd


def markdown(table: Table) -> str:
    """Return a table of GitHub's Markdown between its title and legend."""
    aligned = ["left" if i < table.keys or table.left else "right" for i in range(len(table.header))]
    # numbers stay as they were rounded
    frame = _frame(table, in_markdown)
    body = [frame.to_markdown(index=False, disable_numparse=True, colalign=aligned)] if table.rows else []
    title = [f"**{in_markdown(table.title, inside_stars=True)}**"] if table.title else []
    legend = ["\n".join(f"- {as_item(in_markdown(line))}" for line in table.legend)] if table.legend else []
    return "\n\n".join([*title, *body, *legend])


def latex(table: Table) -> str:
    """Return a LaTeX table of the package booktabs, title and legend in its caption."""
    columns = "".join("l" if i < table.keys or table.left else "r" for i in range(len(table.header)))
    caption = in_latex(" ".join([f"{table.title}.", *table.legend]))
    text: str = _frame(table, in_latex).to_latex(index=False, column_format=columns, caption=caption, position="t")
    return text.rstrip()


def csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows of plain values; what a row does not have is empty."""
    import pandas as pd

    text: str = pd.DataFrame([{in_csv(key): in_csv(value) for key, value in row.items()} for row in rows]).to_csv(index=False)
    return text.rstrip()


TEXTS: dict[str, Callable[[Table], str]] = {"markdown": markdown, "latex": latex}


def _frame(table: Table, shown: Callable[[str], str]) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame([[shown(cell.text) for cell in row] for row in table.rows])
    frame.columns = pd.Index([shown(title) for title in table.header])  # titles may repeat
    return frame

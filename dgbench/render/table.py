"""A table as a value, its layout in a given width, and its two forms: aligned text, and Rich's on a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dgbench.render.outside import visible

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 100
ABSENT = "–"
_GAP = "  "


MARKS = {"best": "*", "second": "+"}  # behind the number of such a cell, in tables that say so
PARTIAL = "~"  # behind a score: of other images than the published split's; behind a name: trained on a part of the source
_MARKED = "Higher is better; "
Style = Literal["", "best", "second", "dim", "good", "bad", "warn"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell's text; `style` only underlines what the text already says."""

    text: str
    style: Style = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table as a value. The first `keys` columns name a row; they are left-aligned and repeated when columns wrap."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    keys: int = 1
    left: bool = False  # the other columns hold text, not numbers
    legend: tuple[str, ...] = ()
    compact: Table | None = None  # says less in less width
    together: int = 0  # so many columns, which must fit side by side or the compact form is drawn; 0: all
    marked: bool = False  # cells of the styles best and second carry `MARKS`

    def __post_init__(self) -> None:
        """Write control characters out, since text may be from files."""
        set_ = object.__setattr__
        set_(self, "title", visible(self.title))
        set_(self, "header", tuple(map(visible, self.header)))
        set_(self, "legend", tuple(map(visible, self.legend)))
        set_(self, "rows", tuple(tuple(_rewritten(cell, visible) for cell in row) for row in self.rows))

    def legend_with(self, marks: Mapping[str, str]) -> tuple[str, ...]:
        """Return the legend, which says how the best and second values are marked, `marks` by style, if there are such."""
        styles = {cell.style for row in self.rows for cell in row} if self.marked else set()
        told = [f"{sign} {style}" for style, sign in marks.items() if style in styles]
        return (f"{_MARKED}{', '.join(told)}.", *self.legend) if told else self.legend

    def rewritten(self, change: Callable[[str], str]) -> Table:
        """Return the table with a function applied to every text."""
        return dataclasses.replace(
            self,
            title=change(self.title),
            header=tuple(map(change, self.header)),
            rows=tuple(tuple(_rewritten(cell, change) for cell in row) for row in self.rows),
            legend=tuple(map(change, self.legend)),
            compact=self.compact and self.compact.rewritten(change),
        )


def _rewritten(cell: Cell, change: Callable[[str], str]) -> Cell:
    text = change(cell.text)
    return cell if text == cell.text else Cell(text, cell.style)


_STYLES = {"": "", "best": "bold", "second": "underline", "dim": "dim", "good": "green", "bad": "bold red", "warn": "yellow"}


def plain(table: Table, width: int = WIDTH) -> str:
    """Return the table as aligned text without glyphs, for pipes and files."""
    lines = [table.title] if table.title else []
    for part in _blocks(table, width):
        widths = [max(len(row[i].text) for row in part) for i in range(len(part[0]))]
        for row in part:
            cells = (_aligned(cell.text, widths[i], left=i < table.keys or table.left) for i, cell in enumerate(row))
            lines.append(_GAP.join(cells).rstrip())
    return "\n".join([*lines, *table.legend_with(MARKS)])


def _aligned(text: str, width: int, *, left: bool) -> str:
    return text.ljust(width) if left else text.rjust(width)


def _widths(table: Table) -> list[int]:
    return [max(map(len, (title, *(row[i].text for row in table.rows)))) for i, title in enumerate(table.header)]


def _fitting(table: Table, width: int) -> Table:
    """Return the compact form if only that fits."""
    widths = _widths(table)[: table.together or None]
    needed = sum(widths) + len(_GAP) * (len(widths) - 1)
    return table.compact if needed > width and table.compact is not None else table


def _blocks(table: Table, width: int) -> list[list[tuple[Cell, ...]]]:
    """Return header and rows, cut into several blocks of columns if they do not fit side by side."""
    if not table.rows:
        return []
    everything = [tuple(Cell(text) for text in table.header), *table.rows]
    widths = _widths(table)
    key_width = sum(w + len(_GAP) for w in widths[: table.keys])
    blocks: list[list[int]] = [[]]
    used = key_width
    for column in range(table.keys, len(widths)):
        if used + widths[column] > width and blocks[-1]:
            blocks.append([])
            used = key_width
        blocks[-1].append(column)
        used += widths[column] + len(_GAP)
    chosen = [[*range(table.keys), *block] for block in blocks]
    return [[tuple(row[i] for i in columns) for row in everything] for columns in chosen]


def draw_rich(table: Table, console: Console) -> None:
    """Draw the table on a terminal, in its compact form if only that fits."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    # one space of padding and one divider make the same gap as in plain text; the box frames each side by one
    width = console.width - 3
    table = _fitting(table, width)
    if table.title:
        console.print(Text(table.title, style="bold"))
    for part in _blocks(table, width):
        drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for i, cell in enumerate(part[0]):
            drawn.add_column(Text(cell.text), justify="left" if i < table.keys or table.left else "right", overflow="fold")
        for row in part[1:]:
            drawn.add_row(*(Text(cell.text, style=_STYLES[cell.style]) for cell in row))
        console.print(drawn)
    for line in table.legend_with(MARKS):
        console.print(Text(line, style="dim"), soft_wrap=False)

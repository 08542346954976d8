"""The report of `kernels.py` as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Row:
    """One contender on one case; milliseconds, None where it was not measured."""

    part: str
    shape: str
    dtype: str
    contender: str
    forward_ms: float | None = None
    both_ms: float | None = None
    forward_graph_ms: float | None = None
    both_graph_ms: float | None = None
    floor_ms: tuple[float, float] = (0.0, 0.0)
    floor_by: tuple[str, str] = ("", "")
    error: float | None = None  # of the result, relative to fp64's, on the small case
    gradient_error: float | None = None  # the largest
    note: str = ""
    peer: bool = False  # third-party: the first of a case is what the others are compared with


@dataclass
class Report:
    """All that a run found."""

    about: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    failed: bool = False  # one of ours broke


def markdown(report: Report, *, cuda: bool) -> str:
    """Return the report as Markdown tables."""
    lines = [
        "# Times of the operators' backends",
        "",
        f"By `python benchmarks/kernels.py`. {_METHOD['cuda' if cuda else 'cpu']}",
        "",
    ]
    lines += [f"- {key}: {value}" for key, value in report.about.items()]
    titles = {
        "scan": "Selective scan",
        "deform": "Multi-scale deformable attention",
        "block": "MVFuser's block",
        "loops": "Selective scan against plain loops under autograd",
    }
    for part in dict.fromkeys(row.part for row in report.rows):
        rows = [row for row in report.rows if row.part == part]
        lines += ["", f"## {titles[part]}", "", *_table(rows, cuda=cuda)]
        notes = dict.fromkeys(f"{row.contender}: {row.note}" for row in rows if row.note)
        lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join([*lines, ""])


_METHOD = {
    "cuda": "Median milliseconds. graph: replays of a CUDA graph of calls on rotating inputs. eager: events around one call, the "
    "cache emptied before it, Python's time included where it is longer. speed: times as fast as the first of the other people's "
    "kernels, forward / forward and backward / backward alone, by graphs where both have them. floor: the longest of bytes over "
    "the measured copy bandwidth, exponentials over their units at the highest clock, and products over the measured rate. "
    "error: ||x - x64|| / ||x64|| on a small case, of the result and of the worst gradient.",
    "cpu": "Median milliseconds. speed: times as fast as the first loop, forward / forward and backward / backward alone. "
    "floor: bytes over the measured copy bandwidth. error: ||x - x64|| / ||x64|| on a small case, of the result and of the worst "
    "gradient.",
}


def _table(rows: Sequence[Row], *, cuda: bool) -> list[str]:
    header = ["shape", "dtype", "", "forward", "+ backward", "speed", "floor", "error", "gradients"]
    if cuda:
        header[3:5] = ["forward, graph", "+ backward, graph", "forward, eager", "+ backward, eager"]
    texts = [header]
    above = ""
    peers = {_case(row): row for row in reversed(rows) if row.peer and row.both_ms is not None}
    for row in rows:
        eager = [_ms(row.forward_ms), _ms(row.both_ms)]
        graph = [_ms(row.forward_graph_ms), _ms(row.both_graph_ms)] if cuda else []
        floor = " / ".join(f"{_ms(ms)} {by}" for ms, by in zip(row.floor_ms, row.floor_by, strict=True))
        errors = ["" if e is None else f"{e:.1e}" for e in (row.error, row.gradient_error)]
        case = _case(row)
        names = [row.shape, row.dtype] if case != above else ["", ""]
        speed = _speed(row, peers.get(case))
        texts.append([*names, row.contender, *graph, *eager, speed, floor if case != above else "", *errors])
        above = case
    widths = [max(len(line[i]) for line in texts) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in texts]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def _case(row: Row) -> str:
    return f"{row.shape} {row.dtype}"


def _speed(row: Row, peer: Row | None) -> str:
    """Return the speed-up over the peer: forward / forward and backward / backward alone; by graphs if both have them."""
    if peer is None or row.both_ms is None or row is peer:
        return "1" if row is peer else ""
    pairs = ((row.forward_graph_ms, row.both_graph_ms), (peer.forward_graph_ms, peer.both_graph_ms))
    if None in (*pairs[0], *pairs[1]):
        pairs = ((row.forward_ms, row.both_ms), (peer.forward_ms, peer.both_ms))
    (forward, both), (peer_forward, peer_both) = pairs
    assert forward is not None
    assert both is not None
    assert peer_forward is not None
    assert peer_both is not None
    ratios = (peer_forward / forward, peer_both / both, (peer_both - peer_forward) / max(both - forward, 1e-9))
    return " / ".join(f"{ratio:.2f}" for ratio in ratios)


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 100 else f"{value:.0f}"

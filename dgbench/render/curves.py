"""A picture of one training: its losses and learning rate by step, and the mIoU of each domain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgbench.render.pictures import _COLOURS, _as_it_is, _figure, _plain_numbers, _whole_steps, _written

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dgbench.report.curves import Curves

_MOST = 40  # points that are drawn as such
_DASHES = ("-", "--", ":", "-.")
_SEEN, _UNSEEN = _COLOURS[1], _COLOURS[0]


def draw_curves(found: Curves, path: Path) -> Path:
    """Draw losses and learning rate, and the scores where there are some; return the path.

    Raises: OSError if it cannot be written.
    """
    figure, axes = _figure(3 if found.scores else 2, columns=3)
    draw_losses(found, axes[0])
    draw_rate(found, axes[1])
    if found.scores:
        _draw_scores(found, axes[2])
        axes[2].grid(alpha=0.3)
    return _written(figure, path)


def draw_losses(found: Curves, axis: Axes) -> None:
    """Draw the loss, and its terms where there are several."""
    for number, (name, values) in enumerate(found.losses.items()):
        axis.plot(found.steps, values, label=_as_it_is(name), **_points(found), **_line(number))
    if all(value > 0 for values in found.losses.values() for value in values):
        axis.set_yscale("log")
        _plain_numbers(axis)
    if len(found.losses) > 1:
        axis.legend(fontsize=6, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15), handlelength=3)
    axis.set(title="losses", xlabel="step")
    _whole_steps(axis)
    axis.grid(alpha=0.3)


def draw_rate(found: Curves, axis: Axes) -> None:
    """Draw the learning rate."""
    axis.plot(found.steps, found.rate, color=_COLOURS[0], **_points(found))
    axis.set(title="learning rate", xlabel="step")
    _whole_steps(axis)
    axis.ticklabel_format(axis="y", scilimits=(-2, 2))
    axis.grid(alpha=0.3)


def _points(found: Curves) -> dict[str, Any]:
    return {"marker": "." if len(found.steps) <= _MOST else "", "linewidth": 1.2}


def _line(number: int) -> dict[str, Any]:
    """Return the style of a line: the sum is black, and no two of its terms look alike, as far as colours and dashes go."""
    if number == 0:
        return {"color": "black", "zorder": 3}
    dashes, colour = divmod(number - 1, len(_COLOURS))
    return {"color": _COLOURS[colour], "linestyle": _DASHES[dashes % len(_DASHES)]}


def _draw_scores(found: Curves, axis: Axes) -> None:
    # the first domain on top, as in the tables
    scores = found.scores[::-1]
    places = range(len(scores))
    colours = [_SEEN if score.seen else _UNSEEN for score in scores]
    axis.barh(places, [100 * score.miou for score in scores], color=colours, height=0.6)
    for place, score in zip(places, scores, strict=True):
        if score.low is not None and score.high is not None:
            axis.plot([100 * score.low, 100 * score.high], [place, place], color="black", linewidth=1)
        end = 100 * max(score.miou, score.high or 0)
        axis.text(end, place, f" {100 * score.miou:.1f}", va="center", fontsize=8)
    axis.set_yticks(list(places), [_as_it_is(score.domain) + (" (source)" if score.seen else "") for score in scores], fontsize=8)
    axis.set_xlim(0, max(1.0, *(115 * max(score.miou, score.high or 0) for score in scores)))
    axis.set(title="mIoU in %, 95 % interval over images")

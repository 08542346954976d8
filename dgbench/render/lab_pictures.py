"""Pictures of the state-space lab."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgbench.render.lab import WRITTEN, speed_conditions
from dgbench.render.pictures import _COLOURS, _MARKERS, _as_it_is, _figure, _plain_rates, _whole_steps, _written

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dgbench.lab.copying import Copying
    from dgbench.lab.matrices import Convolved, Discretized, Hippo
    from dgbench.lab.scanning import Scans
    from dgbench.lab.speeds import Speeds

_WRITTEN_OUT = 8  # states of which the matrix has its numbers in the picture
_FEW = 60  # steps that are drawn one by one
_MEMORIES = ((_COLOURS[0], "--"), (_COLOURS[4], "-."), (_COLOURS[2], "-"))
_LAYERS: dict[str, dict[str, Any]] = {
    "s4": {"color": _COLOURS[0], "linestyle": "--"},
    "hyena": {"color": _COLOURS[4], "linestyle": ":"},
    "s6": {"color": _COLOURS[2], "linestyle": "-"},
}
_RULES = {"zoh": "zero-order hold", "bilinear": "bilinear", "euler": "Euler", "mamba": "Mamba: A zero-order hold, B Euler"}
# Mamba and attention look the same in both panels
_SPEEDS = {"GRU": 5, "attention": 0, "convolution (S4D)": 4, "selective scan (Mamba)": 2, "Mamba": 2, "Transformer": 0}


def draw_memory(found: Hippo, path: Path) -> Path:
    """Draw the matrix, and a signal with its reconstructions; return the path.

    Raises: OSError if it cannot be written.
    """
    figure, (matrix, memory) = _figure(2)
    drawn = matrix.imshow(found.matrix, cmap="Blues", vmin=0)
    matrix.set(title=f"HiPPO-LegS, N = {found.states}: A in x' = -A x + B u", xlabel="k", ylabel="n")
    if found.states <= _WRITTEN_OUT:
        matrix.set(xticks=range(found.states), yticks=range(found.states))
        dark = 0.6 * max(map(max, found.matrix))
        for n, row in enumerate(found.matrix):
            for k, value in enumerate(row[: n + 1]):
                colour = "white" if value > dark else "black"
                matrix.text(k, n, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=14 - found.states)
    else:
        figure.colorbar(drawn, ax=matrix, shrink=0.8)
    time = [(t + 0.5) / len(found.signal) for t in range(len(found.signal))]
    memory.plot(time, found.signal, color="black", linewidth=2.5, alpha=0.4, label="signal")
    for number, one in enumerate(found.memories):
        label = f"N = {one.states}, error {100 * one.error:.3g} %"
        colour, line = _MEMORIES[number % len(_MEMORIES)]
        memory.plot(time, one.values, color=colour, linestyle=line, label=label)
    memory.set(title="a signal, reconstructed from N numbers", xlabel="time")
    low, high = min(found.signal), max(found.signal)
    memory.set_ylim(low - 0.3 * (high - low), high + 0.6 * (high - low))  # ends may swing far out; the legend is above
    _finish(memory)
    return _written(figure, path)


def draw_step_errors(found: Discretized, path: Path) -> Path:
    """Draw the error of each rule over the step; return the path.

    Raises: OSError if it cannot be written.
    """
    figure, (axis,) = _figure(1)
    for number, name in enumerate(found.errors[0].errors):
        errors = [one.errors[name] for one in found.errors]
        label = _as_it_is(_RULES.get(name, name))
        axis.plot([one.step for one in found.errors], errors, label=label, **_style(number))
    axis.set(xscale="log", yscale="log", xlabel="step", ylabel="relative error of the state at time 1")
    axis.set_title(f"HiPPO-LegS, N = {found.states}, a constant input")
    _ticks_at(axis, sorted(one.step for one in found.errors))
    _finish(axis)
    return _written(figure, path)


def draw_convolution(found: Convolved, path: Path) -> Path:
    """Draw kernel, input and both outputs; return the path.

    Raises: OSError if it cannot be written.
    """
    figure, (kernel, outputs) = _figure(2)
    places = range(len(found.kernel))
    few = len(places) <= _FEW
    kernel.axhline(0, color="0.6", linewidth=1)
    kernel.vlines(places, 0, found.kernel, color=_COLOURS[0], linewidth=1.5 if few else 0.8)
    if few:
        kernel.plot(places, found.kernel, "o", color=_COLOURS[0], markersize=4)
    kernel.set(title="kernel K: C B, C A B, C A A B, ...", xlabel="t")
    outputs.plot(places, found.u, color="0.7", label="input u", linewidth=1.5 if few else 0.8)
    broad: dict[str, Any] = {"color": _COLOURS[1], "linewidth": 4 if few else 2, "solid_capstyle": "round"}
    outputs.plot(places, found.by_recurrence, label="y by recurrence", **broad)
    thin: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.2 if few else 0.8}
    outputs.plot(places, found.by_convolution, label="y by convolution", marker="." if len(places) == 1 else "", **thin)
    outputs.set(title=f"output; largest difference {found.error:.0e} (fp64)", xlabel="t")
    for axis in (kernel, outputs):
        if len(places) > 1:
            _whole_steps(axis)
        else:
            axis.set_xticks([0])
    kernel.grid(alpha=0.3)
    _finish(outputs)
    return _written(figure, path)


def draw_scans(found: Scans, path: Path) -> Path:
    """Draw work, depth and time over the length; return the path.

    Raises: OSError if it cannot be written.
    """
    figure, axes = _figure(3, columns=3, width=4.5)
    names = list(dict.fromkeys(one.scan for one in found.timed))
    for axis, field, title in zip(
        axes,
        ("work", "depth", "milliseconds"),
        ("work: combinations", "depth: of these in a row", f"ms on {found.device}"),
        strict=True,
    ):
        for number, name in enumerate(names):
            mine = [one for one in found.timed if one.scan == name]
            axis.plot(
                [one.length for one in mine], [getattr(one, field) for one in mine], label=_as_it_is(name), **_style(number)
            )
        axis.set(xscale="log", yscale="log", xlabel="length", title=_as_it_is(title))
        _ticks_at(axis, sorted({one.length for one in found.timed}))
        _finish(axis)
    return _written(figure, path)


def draw_copying(found: Copying, path: Path) -> Path:
    """Draw the learning curves of all trainings, a panel for each block; return the path.

    Raises: OSError if it cannot be written.
    """
    blocks = list(dict.fromkeys(one.architecture for one in found.trained)) or ["no training"]
    figure, axes = _figure(len(blocks), columns=3, width=4.5)
    for block, axis in zip(blocks, axes, strict=False):
        named = set()
        for one in found.trained:
            if one.architecture != block:
                continue
            style = _LAYERS.get(one.layer, {"color": "black"})
            label = None if one.layer in named else _as_it_is(WRITTEN.get(one.layer, one.layer))
            named.add(one.layer)
            # a training that ended before its first line has a point: the accuracy on held-out sequences
            points = [(point.step, point.token_accuracy) for point in one.curve] or [(one.steps, one.token_accuracy)]
            dot: dict[str, Any] = {"marker": "o", "markersize": 4} if len(points) == 1 else {}
            axis.plot([step for step, _ in points], [100 * share for _, share in points], label=label, **style, **dot)
        axis.axhline(100 * found.chance, color="0.6", linewidth=1)
        axis.set(
            title=_as_it_is(WRITTEN.get(block, block)), xlabel="step", ylabel="right tokens in %, fresh sequences", ylim=(0, 102)
        )
        axis.set_xlim(left=0)
        _finish(axis)
    settings = found.settings
    about = f"length {settings.length}, vocabulary {settings.vocab}, {settings.memorize} tokens; grey: guessing"
    figure.suptitle(f"Selective copying, {about}", fontsize=10)
    return _written(figure, path)


def draw_speeds(found: Speeds, path: Path) -> Path:
    """Draw training and generation over the length; return the path.

    Raises: OSError if it cannot be written.
    """
    figure, (training, generation) = _figure(2)
    for number, name in enumerate(dict.fromkeys(one.layer for one in found.training)):
        mine = [one for one in found.training if one.layer == name and one.tokens_per_second is not None]
        training.plot(
            [one.length for one in mine],
            [one.tokens_per_second or 0.0 for one in mine],
            label=_as_it_is(f"{name}, cuDNN" if name == "GRU" and found.graph else name),
            **_style(_SPEEDS.get(name, number)),
        )
    for number, name in enumerate(found.parameters):
        made = [one for one in found.generation if one.model == name and one.tokens_per_second is not None]
        label = f"{name}, {found.parameters[name] / 1e6:.1f} M parameters"
        generation.plot(
            [one.length for one in made],
            [one.tokens_per_second or 0.0 for one in made],
            label=_as_it_is(label),
            **_style(_SPEEDS.get(name, number)),
        )
    training.set(title="training, one layer, forward and backward", xlabel="length", ylabel="tokens a second")
    batch = found.generation[0].batch if found.generation else 0
    generation.set(title=f"generation, {batch} sequences side by side", xlabel="tokens so far", ylabel="tokens a second")
    for axis, timings in ((training, found.training), (generation, found.generation)):
        axis.set(xscale="log", yscale="log")
        _ticks_at(axis, sorted({one.length for one in timings}))
        _plain_rates(axis)
        _finish(axis)
    figure.suptitle(_as_it_is(speed_conditions(found)), fontsize=10)
    return _written(figure, path)


def _style(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % 6], "marker": _MARKERS[number % 6], "markersize": 5}


def _ticks_at(axis: Axes, places: Sequence[float]) -> None:
    """Label the places of measurements on a logarithmic axis, and nothing between them."""
    if len(places) <= 8:
        axis.set_xticks(places, [f"{place:,}" if place >= 1 else f"{place:g}" for place in places])
        axis.minorticks_off()


def _finish(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)

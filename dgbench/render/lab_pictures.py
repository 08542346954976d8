"""Pictures of the state-space lab."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgbench.render.pictures import _COLOURS, _MARKERS, _as_it_is, _figure, _written

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dgbench.lab.copying import Copying
    from dgbench.lab.matrices import Convolved, Discretized, Hippo
    from dgbench.lab.scanning import Scans
    from dgbench.lab.speeds import Speeds

_LAYERS: dict[str, dict[str, Any]] = {
    "s4": {"color": _COLOURS[0], "linestyle": "--"},
    "hyena": {"color": _COLOURS[4], "linestyle": ":"},
    "s6": {"color": _COLOURS[2], "linestyle": "-"},
}
_WRITTEN = {"s4": "S4", "hyena": "Hyena", "s6": "S6", "h3": "H3", "mamba": "Mamba"}  # as their papers do


def draw_memory(found: Hippo, path: Path) -> Path:
    """Draw the matrix, and a signal with its reconstructions; return the path.

    Raises: OSError if it cannot be written.
    """
    figure, (matrix, memory) = _figure(2)
    drawn = matrix.imshow(found.matrix, cmap="Blues")
    figure.colorbar(drawn, ax=matrix, shrink=0.8)
    matrix.set(title=f"HiPPO-LegS, N = {found.states} (positive form)", xlabel="k", ylabel="n")
    time = [(t + 0.5) / len(found.signal) for t in range(len(found.signal))]
    memory.plot(time, found.signal, color="black", linewidth=2.5, alpha=0.4, label="signal")
    for number, one in enumerate(found.memories):
        label = f"N = {one.states}, error {100 * one.error:.1f} %"
        memory.plot(time, one.values, color=_COLOURS[number % 6], linestyle=("--", "-.", "-")[number % 3], label=label)
    memory.set(title="the signal, reconstructed from the last state", xlabel="time")
    memory.set_ylim(min(found.signal) - 1, max(found.signal) + 1)
    _finish(memory)
    return _written(figure, path)


def draw_step_errors(found: Discretized, path: Path) -> Path:
    """Draw the error of each rule over the step; return the path.

    Raises: OSError if it cannot be written.
    """
    figure, (axis,) = _figure(1)
    for number, name in enumerate(found.errors[0].errors):
        errors = [one.errors[name] for one in found.errors]
        axis.plot([one.step for one in found.errors], errors, label=_as_it_is(name), **_style(number))
    axis.set(xscale="log", yscale="log", xlabel="step", title=f"relative error at time 1, HiPPO-LegS, N = {found.states}")
    _finish(axis)
    return _written(figure, path)


def draw_convolution(found: Convolved, path: Path) -> Path:
    """Draw kernel, input and both outputs; return the path.

    Raises: OSError if it cannot be written.
    """
    figure, (kernel, outputs) = _figure(2)
    places = range(len(found.kernel))
    kernel.vlines(places, 0, found.kernel, color=_COLOURS[0])
    kernel.plot(places, found.kernel, "o", color=_COLOURS[0], markersize=4)
    kernel.set(title="kernel: C B, C A B, C A A B, ...", xlabel="t")
    outputs.plot(places, found.u, color="0.7", label="input")
    outputs.plot(places, found.by_recurrence, label="recurrence", **_style(2))
    outputs.plot(places, found.by_convolution, label="convolution", color=_COLOURS[0], linestyle="--")
    outputs.set(title=f"largest difference {found.error:.0e} (fp64)", xlabel="t")
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
            label = None if one.layer in named else _as_it_is(_WRITTEN.get(one.layer, one.layer))
            named.add(one.layer)
            steps, shares = [point.step for point in one.curve], [100 * point.token_accuracy for point in one.curve]
            axis.plot(steps, shares, label=label, **style)
        axis.axhline(100 * found.chance, color="0.6", linewidth=1)
        axis.set(
            title=_as_it_is(_WRITTEN.get(block, block)), xlabel="step", ylabel="right tokens in %, fresh sequences", ylim=(0, 102)
        )
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
            [one.length for one in mine], [one.tokens_per_second or 0.0 for one in mine], label=_as_it_is(name), **_style(number)
        )
    for number, name in enumerate(found.parameters):
        made = [one for one in found.generation if one.model == name and one.tokens_per_second is not None]
        label = f"{name}, {found.parameters[name] / 1e6:.1f} M parameters"
        generation.plot(
            [one.length for one in made], [one.tokens_per_second or 0.0 for one in made], label=_as_it_is(label), **_style(number)
        )
    training.set(title="training, one layer, forward and backward", xlabel="length", ylabel="tokens a second")
    batch = found.generation[0].batch if found.generation else 0
    generation.set(title=f"generation, {batch} sequences side by side", xlabel="tokens so far", ylabel="tokens a second")
    for axis in (training, generation):
        axis.set(xscale="log", yscale="log")
        _finish(axis)
    figure.suptitle(_as_it_is(f"{found.hardware.name}, {found.dtype}, torch {found.environment.get('torch', '')}"), fontsize=10)
    return _written(figure, path)


def _style(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % 6], "marker": _MARKERS[number % 6], "markersize": 5}


def _finish(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)

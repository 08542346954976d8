"""Tables of the state-space lab, each fit for a slide."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dgbench.render.flat import FlatRow, flat_row
from dgbench.render.numbers import byte_size, duration
from dgbench.render.table import ABSENT, Cell, Table

if TYPE_CHECKING:
    from dgbench.lab.copying import Copying
    from dgbench.lab.fusing import Fused
    from dgbench.lab.matrices import Convolved, Discretized, Hippo
    from dgbench.lab.scanning import Scans
    from dgbench.lab.settings import Row
    from dgbench.lab.speeds import Speeds
    from dgbench.lab.training import Trained

_MOST = 12  # states of which a matrix is shown


def hippo_tables(found: Hippo) -> list[Table]:
    shown = min(_MOST, len(found.matrix))
    header = ("A", *(f"k = {k}" for k in range(shown)), "B")
    rows = [
        (Cell(f"n = {n}"), *(_number(value) for value in row[:shown]), _number(b))
        for n, (row, b) in enumerate(zip(found.matrix[:shown], found.B, strict=False))
    ]
    legend = [
        f"{found.signs[:1].upper()}{found.signs[1:]}.",
        "x' = -A x + B u: all eigenvalues of -A are negative, so that the state forgets and does not explode.",
    ]
    if shown < found.states:
        legend.insert(0, f"The first {shown} of {found.states} states.")
    spectrum = [
        (Cell(f"{number}"), _number(value), _number(imaginary))
        for number, (value, imaginary) in enumerate(zip(found.eigenvalues[:shown], found.normal[-shown:][::-1], strict=False), 1)
    ]
    memory = [(Cell(str(one.states)), Cell(f"{100 * one.error:.2f} %")) for one in found.memories]
    return [
        Table(f"HiPPO-LegS, N = {found.states}", header, tuple(rows), legend=tuple(legend)),
        Table(
            "Eigenvalues",
            ("", "of -A", "imaginary part of -A + P P^T"),
            tuple(spectrum),
            legend=(
                *(
                    (f"{shown} of {found.states}: those next to 0, and the largest imaginary parts.",)
                    if shown < found.states
                    else ()
                ),
                *(("-A is not normal: no unitary matrix makes it diagonal.",) if found.states > 1 else ()),
                "-A + P P^T with P[n] = sqrt(n + 1/2) is normal, and the real part of each of its eigenvalues is -1/2.",
            ),
        ),
        Table(
            "What N numbers remember of a signal of 2000 samples",
            ("N", "relative error"),
            tuple(memory),
            legend=("Root mean square of what is reconstructed from the last state minus the signal, over that of the signal.",),
        ),
    ]


def discretized_tables(found: Discretized) -> list[Table]:
    shown = min(_MOST, len(found.rules[0].A))
    tables = []
    for rule in found.rules:
        rows = [
            (Cell(f"n = {n}"), *(_number(value, 4) for value in row[:shown]), _number(b, 4))
            for n, (row, b) in enumerate(zip(rule.A[:shown], rule.B, strict=False))
        ]
        size = f"the largest eigenvalue of A_bar is {rule.radius:.4f} in absolute value"
        title = f"{rule.name}, step {found.step:g}: {size}{', it explodes' if rule.radius > 1 else ''}"
        tables.append(Table(title, ("A_bar", *(f"k = {k}" for k in range(shown)), "B_bar"), tuple(rows)))
    names = list(found.errors[0].errors)
    errors = [(Cell(f"{one.step:g}"), *(Cell(f"{one.errors[name]:.1e}") for name in names)) for one in found.errors]
    legend = (
        "Relative error of the state at time 1 for an input of 1. zoh: zero-order hold, exact for such an input.",
        "With small steps, bilinear's error falls by the square of the step, those of euler and mamba by the step.",
        "mamba: A_bar of zoh, B_bar = step B.",
    )
    return [*tables, Table("Error over the step", ("step", *names), tuple(errors), legend=legend)]


def convolved_tables(found: Convolved) -> list[Table]:
    rows = []
    columns = zip(found.kernel, found.u, found.by_recurrence, found.by_convolution, strict=True)
    for t, (k, u, first, second) in enumerate(columns):
        name = "C B" if t == 0 else f"C A^{t} B" if t > 1 else "C A B"
        rows.append((Cell(str(t)), Cell(name), *(_number(value, 4) for value in (k, u, first, second))))
    legend = (
        "A, B: discrete (zero-order hold). Recurrence: x[t] = A x[t-1] + B u[t], y[t] = C x[t].",
        "Convolution: y[t] = sum of K[s] u[t-s].",
        f"Largest difference of the two: {found.error:.1e} in fp64, {found.error_fp32:.1e} in fp32.",
    )
    title = f"One system, N = {found.states}, step {found.step:g}, as a recurrence and as a convolution"
    header = ("t", "K[t] is", "K[t]", "u[t]", "y by recurrence", "y by convolution")
    return [Table(title, header, tuple(rows), keys=2, legend=legend)]


def scan_tables(found: Scans) -> list[Table]:
    count = len(found.rounds[0].holds)
    rounds = [(Cell(one.scan), Cell(one.phase), Cell(one.combined), *(Cell(text) for text in one.holds)) for one in found.rounds]
    steps = Table(
        "Steps of h[t] = a[t] h[t-1] + b[t], combined side by side in each round",
        ("scan", "phase", "combined", *(f"[{t}]" for t in range(count))),
        tuple(rounds),
        keys=2,
        left=True,
        legend=(
            "(a1, b1) then (a2, b2) = (a2 a1, a2 b1 + b2). i..j: the element stands for steps i to j.",
            "down: each half of a node learns what came before it: the left one what came before the node, the right one also "
            "the left half.",
        ),
    )
    rows = [
        (Cell(str(one.length)), Cell(one.scan), Cell(str(one.work)), Cell(str(one.depth)), Cell(f"{one.milliseconds:.3f}"))
        for one in found.timed
    ]
    measured = Table(
        f"Work, depth and time of {found.channels} channels on {found.device}",
        ("length", "scan", "work", "depth", "ms"),
        tuple(rows),
        keys=2,
        legend=(
            f"work: combinations for a channel; depth: of these in a row; chunks of {found.chunk}.",
            "Each is written in PyTorch, so that a round is at least one kernel.",
        ),
    )
    return [steps, measured]


def fused_tables(found: Fused) -> list[Table]:
    batch, length, dim, states = found.shape
    rows = [
        (
            Cell(one.name),
            Cell(byte_size(one.bytes)),
            Cell(f"{one.milliseconds:.3f}"),
            Cell(ABSENT if one.peak_mib is None else f"{one.peak_mib:,.0f} MiB"),
            Cell(f"{one.error:.0e}"),
        )
        for one in found.forms
    ]
    title = f"Selective scan, B {batch}, L {length}, D {dim}, N {states}, fp32, forward, on {found.device}"
    legend = (
        f"bytes: read and written at least. The states (B, L, D, N) are {byte_size(4 * batch * length * dim * states)}.",
        "Materialised, they go to memory and back several times.",
        "A fused kernel keeps them in registers and shared memory (SRAM) and writes y alone.",
        *(
            ("In blocks: plain PyTorch, whose blocks of states stay in the CPU's cache.",)
            if any(one.name == "in blocks, torch" and one.peak_mib is None for one in found.forms)
            else ()
        ),
        "peak: memory above the inputs, on a GPU. error: largest difference from the first row over the largest output.",
    )
    return [Table(title, ("form", "bytes", "ms", "peak", "error"), tuple(rows), legend=legend)]


def copying_tables(found: Copying) -> list[Table]:
    settings = found.settings
    told = (
        f"length {settings.length}{' in all' if settings.total else ''}, vocabulary {settings.vocab}, "
        f"{settings.memorize} tokens, {settings.depth} block{'s' * (settings.depth > 1)}, batch {settings.batch}, "
        f"lr {settings.lr:g}"
    )
    rows = []
    for row in found.published:
        mine = [one for one in found.trained if (one.architecture, one.layer) == (row.architecture, row.layer)]
        if mine:
            beside = (Cell(_published(row)),) if found.as_published else ()
            rows.append((*_named(row), *_accuracies(mine), *beside))
    header = ["block", "layer", "tokens %", "sequences %", "steps", "seeds", "time", "tokens/s"]
    legend = [
        f"Accuracy on {settings.sequences} sequences that were not trained on; several seeds: mean ± standard deviation. "
        f"Guessing: {100 * found.chance:.1f} % of the tokens.",
        f"S4 is {'diagonal (S4D-LegS)' if settings.s4 == 's4d' else 'diagonal plus low rank'}, with 64 states.",
    ]
    if any(not one.complete for one in found.trained):
        legend.append(f"Of {settings.steps} steps, as many as the time allowed: dgbench lab copying --resume {found.run}")
    tables = [
        Table(
            f"Selective copying: {told}",
            (*header, *(("published",) if found.as_published else ())),
            tuple(rows),
            keys=2,
            legend=(*legend, *((_MARK,) if found.as_published else (f"Run: {found.run}",))),
        )
    ]
    if not found.as_published:
        tables.append(
            Table(
                "Published for length 4096, vocabulary 16, 16 tokens, 2 blocks, 400,000 steps: not comparable with ours",
                ("block", "layer", "accuracy %"),
                tuple((*_named(row), Cell(_published(row))) for row in found.published),
                keys=2,
                legend=("Gu & Dao 2023 (arXiv 2312.00752), table 1.", _MARK),
            )
        )
    return tables


WRITTEN = {"s4": "S4", "hyena": "Hyena", "s6": "S6", "h3": "H3", "mamba": "Mamba"}  # as their papers do
_MARK = "?: not confirmed, the figure was not read in the paper's table itself."


def _named(row: Row) -> tuple[Cell, Cell]:
    return Cell(WRITTEN.get(row.architecture, row.architecture)), Cell(WRITTEN.get(row.layer, row.layer))


def _published(row: Row) -> str:
    return f"{row.published:.1f}{'' if row.confirmed else '?'}"


def _accuracies(mine: Sequence[Trained]) -> tuple[Cell, ...]:
    steps = sorted({one.steps for one in mine})
    rates = [one.tokens_per_second for one in mine if one.tokens_per_second]  # none of a part that took no step
    return (
        Cell(_mean([100 * one.token_accuracy for one in mine])),
        Cell(_mean([100 * one.sequence_accuracy for one in mine])),
        Cell(str(steps[0]) if len(steps) == 1 else f"{steps[0]}..{steps[-1]}"),
        Cell(", ".join(str(one.seed) for one in mine)),
        Cell(duration(sum(one.seconds for one in mine))),
        Cell(f"{statistics.mean(rates):,.0f}" if rates else ABSENT),
    )


def _mean(values: Sequence[float]) -> str:
    spread = f" ±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def speed_tables(found: Speeds) -> list[Table]:
    layers = list(dict.fromkeys(one.layer for one in found.training))
    lengths = list(dict.fromkeys(one.length for one in found.training))
    taken = {(one.layer, one.length): one.tokens_per_second for one in found.training}
    rows = [(Cell(layer), *(_rate(taken.get((layer, length))) for length in lengths)) for layer in layers]
    about = speed_conditions(found)
    training = Table(
        f"Training, thousands of tokens a second: one layer, forward and backward; {about}",
        ("layer", *(f"L {length}" for length in lengths)),
        tuple(rows),
        legend=(f"As many tokens a step at every length. {ABSENT}: did not fit into the memory.",),
    )
    generated = [
        (
            Cell(one.model),
            Cell(str(one.length)),
            Cell(ABSENT if one.milliseconds is None else f"{one.milliseconds:.3f}"),
            Cell(ABSENT if one.tokens_per_second is None else f"{one.tokens_per_second:,.0f}"),
            Cell(f"{one.memory_mib:,.1f} MiB"),
        )
        for one in found.generation
    ]
    sizes = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in found.parameters.items())
    batch = found.generation[0].batch if found.generation else 0
    generation = Table(
        f"Generation of one token for each of {batch} sequences; {about}",
        ("model", "behind", "ms", "tokens/s", "memory"),
        tuple(generated),
        keys=2,
        legend=(
            f"Parameters: {sizes}. memory: what is remembered of all sequences: states, or keys and values.",
            *(("Each step is one CUDA graph, so that launches do not count.",) if found.graph else ()),
        ),
    )
    return [training, generation]


def speed_conditions(found: Speeds) -> str:
    """Return what the times depend on: device, type, width and versions."""
    versions = ", ".join(f"{name} {found.environment[name]}" for name in ("torch", "cuda", "cudnn") if name in found.environment)
    return f"{found.hardware.name}, {found.dtype}, width {found.dim}, {versions}"


def _rate(tokens: float | None) -> Cell:
    return Cell(ABSENT) if tokens is None else Cell(f"{tokens / 1e3:,.0f}")


def _number(value: float, digits: int = 3) -> Cell:
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        return Cell("0" if value == 0 else text.removeprefix("-"))
    return Cell(text)


# ---- rows for other programs


def hippo_rows(found: Hippo) -> list[FlatRow]:
    """Return an element of the matrix in each row."""
    return [{"n": n, "k": k, "A": value, "B": found.B[n]} for n, row in enumerate(found.matrix) for k, value in enumerate(row)]


def discretized_rows(found: Discretized) -> list[FlatRow]:
    """Return the error of each rule at each step."""
    return [{"step": one.step, "rule": name, "error": error} for one in found.errors for name, error in one.errors.items()]


def convolved_rows(found: Convolved) -> list[FlatRow]:
    """Return kernel, input and both outputs at each time."""
    columns = zip(found.kernel, found.u, found.by_recurrence, found.by_convolution, strict=True)
    return [
        {"t": t, "kernel": k, "u": u, "by_recurrence": first, "by_convolution": second}
        for t, (k, u, first, second) in enumerate(columns)
    ]


def scan_rows(found: Scans) -> list[FlatRow]:
    """Return each scan at each length."""
    return [flat_row(one, device=found.device) for one in found.timed]


def fused_rows(found: Fused) -> list[FlatRow]:
    """Return each form."""
    return [flat_row(one, device=found.device, shape=found.shape) for one in found.forms]


def copying_rows(found: Copying) -> list[FlatRow]:
    """Return each training, without its curve."""
    return [flat_row(one, without=("curve",)) for one in found.trained]


def speed_rows(found: Speeds) -> list[FlatRow]:
    """Return each timing of both measurements."""
    return [
        *(flat_row(one, what="training") for one in found.training),
        *(flat_row(one, what="generation") for one in found.generation),
    ]

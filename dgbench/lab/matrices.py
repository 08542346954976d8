"""What `lab hippo`, `lab discretize` and `lab conv` show: small systems in fp64, computed and compared with themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mfuser.ssm import discretize, hippo
from mfuser.ssm.convolution import convolve, kernel, recurrence

_SAMPLES, _POINTS = 2000, 400  # of the signal that is remembered, and of its pictures
_SIGNS = "positive form, as on slides: c'(t) = -(1/t) A c(t) + (1/t) B f(t); the equation of state-space models takes -A"


@dataclass(frozen=True, slots=True)
class Memory:
    """A signal, reconstructed from so many coefficients of HiPPO-LegS."""

    states: int
    values: tuple[float, ...]
    error: float  # root of the mean squared distance over that of the signal from zero


@dataclass(frozen=True, slots=True)
class Hippo:
    """HiPPO-LegS with N states. The matrix is the positive one of slides; the equation uses its negative."""

    signs: str  # in which equation the matrix stands
    states: int
    matrix: tuple[tuple[float, ...], ...]
    B: tuple[float, ...]
    P: tuple[float, ...]
    eigenvalues: tuple[float, ...]  # of the negative matrix
    normal: tuple[float, ...]  # imaginary parts of those of -matrix + P P^T, whose real parts are all -1/2
    signal: tuple[float, ...]
    memories: tuple[Memory, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of discretisation at one step."""

    name: str
    A: tuple[tuple[float, ...], ...]
    B: tuple[float, ...]
    radius: float  # the largest absolute eigenvalue of A: above 1 the recurrence explodes


@dataclass(frozen=True, slots=True)
class StepError:
    """Relative errors of the state that a constant input of 1 leads to at time 1, by rule."""

    step: float
    errors: dict[str, float]


@dataclass(frozen=True, slots=True)
class Discretized:
    """HiPPO-LegS with N states, discretised by every rule."""

    states: int
    step: float
    rules: tuple[Rule, ...]
    errors: tuple[StepError, ...]


@dataclass(frozen=True, slots=True)
class Convolved:
    """A discrete system in its two forms: the kernel, the input, and the output of both."""

    rule: str  # of discretisation
    states: int
    step: float
    kernel: tuple[float, ...]
    u: tuple[float, ...]
    by_recurrence: tuple[float, ...]
    by_convolution: tuple[float, ...]
    error: float  # the largest difference of the outputs
    error_fp32: float  # the same in single precision
    C: tuple[float, ...]


def hippo_view(states: int, remembering: tuple[int, ...] = (4, 12, 32)) -> Hippo:
    """Return HiPPO-LegS with so many states, and how it remembers a signal with these numbers of them."""
    A, B = hippo.legs(states)
    P = hippo.low_rank(states)
    normal = torch.linalg.eigvals(A + P[:, None] * P).imag.sort().values
    time = (torch.arange(_SAMPLES, dtype=torch.float64) + 0.5) / _SAMPLES
    signal = torch.sin(6 * torch.pi * time**2) * torch.exp(-time) + 0.5 * time
    places = torch.linspace(0, _SAMPLES - 1, _POINTS).long()
    memories = []
    for count in remembering:
        back = hippo.reconstructed(hippo.remembered(signal, count)[-1], _SAMPLES)
        error = float((back - signal).norm() / signal.norm())
        memories.append(Memory(count, _numbers(back[places]), error))
    eigenvalues = torch.linalg.eigvals(A).real.sort(descending=True).values
    return Hippo(
        _SIGNS,
        states,
        _rows(-A),
        _numbers(B),
        _numbers(P),
        _numbers(eigenvalues),
        _numbers(normal),
        _numbers(signal[places]),
        tuple(memories),
    )


def discretized_view(states: int, step: float) -> Discretized:
    """Return HiPPO-LegS with so many states, discretised with a step, and how the error falls with the step."""
    A, B = hippo.legs(states)
    rules = []
    for name in discretize.RULES:
        A_bar, B_bar = discretize.discretized(A, B, step, name)
        rules.append(Rule(name, _rows(A_bar), _numbers(B_bar), float(torch.linalg.eigvals(A_bar).abs().max())))
    exact = torch.linalg.solve(A, torch.linalg.matrix_exp(A) @ B - B)
    errors = []
    for count in (5, 10, 20, 40, 80):
        each = {}
        for name in discretize.RULES:
            A_bar, B_bar = discretize.discretized(A, B, 1 / count, name)
            state = torch.zeros_like(B)
            for _ in range(count):
                state = A_bar @ state + B_bar
            each[name] = float((state - exact).norm() / exact.norm())
        errors.append(StepError(1 / count, each))
    return Discretized(states, step, tuple(rules), tuple(errors))


def convolved_view(states: int, length: int, step: float) -> Convolved:
    """Return a system of LegS with random C (seed 0), as a recurrence and as a convolution of the same input."""
    generator = torch.Generator().manual_seed(0)
    C, u = (torch.randn(count, generator=generator, dtype=torch.float64) for count in (states, length))
    A, B = discretize.discretized(*hippo.legs(states), step)
    found = []
    for dtype in (torch.float64, torch.float32):
        a, b, c, x = (tensor.to(dtype) for tensor in (A, B, C, u))
        k = kernel(a, b, c, length)
        found.append((k, recurrence(a, b, c, x), convolve(x[None, :, None], k[None])[0, :, 0]))
    (k, first, second), (_, first32, second32) = found
    return Convolved(
        rule="zoh",
        states=states,
        step=step,
        kernel=_numbers(k),
        u=_numbers(u),
        by_recurrence=_numbers(first),
        by_convolution=_numbers(second),
        error=float((first - second).abs().max()),
        error_fp32=float((first32 - second32).abs().max()),
        C=_numbers(C),
    )


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())


def _rows(values: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(map(_numbers, values))

"""Discretisation: from x'(t) = A x(t) + B u(t) to x[k] = A_bar x[k-1] + B_bar u[k] with a time step.

Zero-order hold assumes that u is constant within a step, and is exact then. The bilinear rule (Tustin's, trapezoidal) needs no
exponential of a matrix; it maps the left half of the plane into the unit circle, so that a stable system stays stable. Mamba's
code takes A_bar of the zero-order hold and B_bar of Euler's rule, step * B.
"""

from __future__ import annotations

import torch
from torch import Tensor

RULES = ("zoh", "bilinear", "euler", "mamba")


def discretized(A: Tensor, B: Tensor, step: float, rule: str = "zoh") -> tuple[Tensor, Tensor]:
    """Return A_bar (N, N) and B_bar (N,) of a dense system.

    Raises: ValueError for an unknown rule.
    """
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    if rule == "zoh":
        # the exponential of a larger matrix has both, and A need not be invertible
        both = torch.zeros(len(A) + 1, len(A) + 1, dtype=A.dtype, device=A.device)
        both[:-1, :-1], both[:-1, -1] = A * step, B * step
        both = torch.linalg.matrix_exp(both)
        return both[:-1, :-1], both[:-1, -1]
    if rule == "bilinear":
        half = A * (step / 2)
        return torch.linalg.solve(eye - half, eye + half), torch.linalg.solve(eye - half, B * step)
    if rule == "euler":
        return eye + A * step, B * step
    if rule == "mamba":
        return torch.linalg.matrix_exp(A * step), B * step
    raise ValueError(f"unknown rule `{rule}`; there are: {', '.join(RULES)}")


def diagonal(eigenvalues: Tensor, step: Tensor, rule: str = "zoh") -> tuple[Tensor, Tensor]:
    """Return A_bar and the factor of B of a diagonal system, elementwise; both broadcast.

    Raises: ValueError for an unknown rule.
    """
    if rule == "zoh":
        decay = torch.exp(eigenvalues * step)
        return decay, (decay - 1) / eigenvalues
    if rule == "bilinear":
        half = eigenvalues * step / 2
        return (1 + half) / (1 - half), step / (1 - half)
    if rule == "euler":
        return 1 + eigenvalues * step, step * torch.ones_like(eigenvalues)
    if rule == "mamba":
        return torch.exp(eigenvalues * step), step * torch.ones_like(eigenvalues)
    raise ValueError(f"unknown rule `{rule}`; there are: {', '.join(RULES)}")

"""HiPPO-LegS: the state that holds the Legendre coefficients of all that was heard so far (Gu et al., NeurIPS 2020).

Two signs are in use. The paper on HiPPO, and slides after it, write

    c'(t) = -(1/t) A c(t) + (1/t) B f(t),    A[n, k] = sqrt(2n + 1) sqrt(2k + 1) if n > k,  n + 1 if n = k,  0 if n < k

with a positive A. State-space models write x'(t) = A x(t) + B u(t) and put the minus into A, which then has eigenvalues with
negative real parts: a stable system. `legs` returns this one, `-A` of the slides; B[n] = sqrt(2n + 1) is the same in both.

A is no normal matrix, so that no unitary matrix diagonalises it, and any other is too ill-conditioned to be used. A + P P^T with
P[n] = sqrt(n + 1/2) is normal: it is -1/2 of the identity plus a skew-symmetric matrix (Gu et al., ICLR 2022, theorem 1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Diagonalized(NamedTuple):
    """A = V (diag(eigenvalues) - P P^*) V^* for the whole spectrum, of which half is kept, with positive imaginary parts.

    The other half is its complex conjugate. The input is V^* B.
    """

    eigenvalues: Tensor  # (N/2,) complex128, sorted by imaginary part
    P: Tensor  # (N/2,)
    B: Tensor  # (N/2,)
    V: Tensor  # (N, N/2)


def legs(states: int) -> tuple[Tensor, Tensor]:
    """Return A (N, N) and B (N,) of x' = A x + B u in fp64; A is the negative of the matrix in HiPPO's paper."""
    n = torch.arange(states, dtype=torch.float64)
    B = torch.sqrt(2 * n + 1)
    A = -torch.tril(B[:, None] * B, -1) - torch.diag(n + 1)
    return A, B


def low_rank(states: int) -> Tensor:
    """Return P (N,) in fp64, by which A + P P^T is normal."""
    return torch.sqrt(torch.arange(states, dtype=torch.float64) + 0.5)


def diagonalized(states: int) -> Diagonalized:
    """Return the diagonal-plus-low-rank form of `legs`.

    Raises: ValueError for an odd number of states, whose spectrum does not consist of pairs.
    """
    if states % 2:
        raise ValueError(f"{states} states: the diagonal form needs an even number")
    A, B = legs(states)
    P = low_rank(states)
    normal = A + P[:, None] * P
    # normal + 1/2 is skew-symmetric: i times it is Hermitian, whose eigenvalues are computed accurately
    imaginary, V = torch.linalg.eigh(-1j * (normal + 0.5 * torch.eye(states)).to(torch.complex128))
    V, imaginary = V[:, states // 2 :], imaginary[states // 2 :]
    into = V.mH
    return Diagonalized(torch.complex(torch.full_like(imaginary, -0.5), imaginary), into @ P.to(V), into @ B.to(V), V)


def remembered(signal: Tensor, states: int) -> Tensor:
    """Return the coefficients (L, N) that LegS holds after each sample of a signal (L,), by the bilinear rule.

    The time step of sample t is 1/t of all that was heard: the measure stretches, so that no time scale is chosen.
    """
    A, B = legs(states)
    eye = torch.eye(states, dtype=A.dtype)
    state, found = torch.zeros(states, dtype=A.dtype), []
    for t, value in enumerate(signal.to(A.dtype), 1):
        half = A / (2 * t)
        state = torch.linalg.solve(eye - half, (eye + half) @ state + B * value / t)
        found.append(state)
    return torch.stack(found)


def reconstructed(coefficients: Tensor, points: int) -> Tensor:
    """Return the signal (points,) on all that was heard, of LegS's coefficients (N,): a sum of Legendre polynomials."""
    places = torch.linspace(-1, 1, points, dtype=coefficients.dtype)
    before, now = torch.zeros_like(places), torch.ones_like(places)
    total = torch.zeros_like(places)
    for n, value in enumerate(coefficients):
        total += value * (2 * n + 1) ** 0.5 * now
        before, now = now, ((2 * n + 1) * places * now - n * before) / (n + 1)
    return total

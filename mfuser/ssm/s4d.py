"""S4D: a diagonal state space for each channel (Gu et al., NeurIPS 2022), discretised by zero-order hold.

    x' = A x + u,  y = Re(C x) + D u

Complex states come in conjugate pairs, of which one is kept and its real part doubled. B is 1, since C takes its part.
Initialisations of A (n from 0, N states, half of them kept):

    lin      -1/2 + i pi n                              frequencies of a Fourier series
    legs     eigenvalues of HiPPO-LegS without its low-rank part (`hippo.diagonalized`)
    inv      -1/2 + i (N / pi) (N / (2n + 1) - 1)       close to those of legs, as a formula
    real     -(n + 1)                                   N real states without conjugates: Mamba's
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mfuser.ssm.convolution import convolve
from mfuser.ssm.discretize import diagonal
from mfuser.ssm.hippo import diagonalized
from mfuser.ssm.steps import log_steps

INITS = ("lin", "legs", "inv", "real")


def spectrum(init: str, states: int) -> Tensor:
    """Return the eigenvalues that a layer of so many states starts with: (N/2,) complex, or (N,) real ones of `real`.

    Raises: ValueError for an unknown name or an odd number of states.
    """
    if init == "real":
        return -torch.arange(1, states + 1, dtype=torch.float64)
    if states % 2:
        raise ValueError(f"{states} states: conjugate pairs need an even number")
    n = torch.arange(states // 2, dtype=torch.float64)
    if init == "lin":
        imaginary = math.pi * n
    elif init == "inv":
        imaginary = states / math.pi * (states / (2 * n + 1) - 1)
    elif init == "legs":
        return diagonalized(states).eigenvalues
    else:
        raise ValueError(f"unknown initialisation `{init}`; there are: {', '.join(INITS)}")
    return torch.complex(torch.full_like(n, -0.5), imaginary)


class S4D(nn.Module):
    """One diagonal state space for each channel, with a skip connection.

    Args:
        channels: D.    states: N, complex ones counted with their conjugates.    init: one of `INITS`.
    """

    def __init__(self, channels: int, states: int = 64, init: str = "legs") -> None:
        super().__init__()
        start = spectrum(init, states)
        self.pairs = start.is_complex()
        self.log_dt = nn.Parameter(log_steps(channels))
        self.log_A_real = nn.Parameter(torch.log(-start.real).float().repeat(channels, 1))
        if self.pairs:
            self.A_imag = nn.Parameter(start.imag.float().repeat(channels, 1))
            # of variance 1 with its imaginary part
            self.C = nn.Parameter(torch.randn(channels, len(start), 2) * 0.5**0.5)
        else:
            self.C = nn.Parameter(torch.randn(channels, len(start)))
        self.D = nn.Parameter(torch.randn(channels))

    def discrete(self) -> tuple[Tensor, Tensor]:
        """Return A_bar (D, N') and C B_bar (D, N'), doubled where conjugates are left out."""
        real = -torch.exp(self.log_A_real)
        A = torch.complex(real, self.A_imag) if self.pairs else real
        C = 2 * torch.view_as_complex(self.C) if self.pairs else self.C
        decay, factor = diagonal(A, torch.exp(self.log_dt)[:, None])
        return decay, C * factor

    def kernel(self, length: int) -> Tensor:
        """Return the convolution's kernel (D, L)."""
        real = -torch.exp(self.log_A_real)
        A = torch.complex(real, self.A_imag) if self.pairs else real
        exponent = (A * torch.exp(self.log_dt)[:, None])[..., None] * torch.arange(length, device=A.device)
        _, weights = self.discrete()
        found = torch.einsum("dn,dnl->dl", weights, torch.exp(exponent))
        return found.real if found.is_complex() else found

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), as a convolution."""
        return convolve(u, self.kernel(u.shape[1])) + self.D * u

    def first_state(self, batch: int) -> Tensor:
        """Return the state before the first token, (B, D, N')."""
        decay, _ = self.discrete()
        return decay.new_zeros(batch, *decay.shape)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Take one token (B, D) and the state before it; return its output and the state after it."""
        decay, weights = self.discrete()
        state = decay * state + u[..., None]
        out = (weights * state).sum(-1)
        return (out.real if out.is_complex() else out) + self.D * u, state

    def recurrent(self, u: Tensor) -> Tensor:
        """Return what `forward` does, token by token."""
        state, found = self.first_state(len(u)), []
        for token in u.unbind(1):
            out, state = self.step(token, state)
            found.append(out)
        return torch.stack(found, 1)

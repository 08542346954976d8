"""S4: a diagonal-plus-low-rank state space for each channel (Gu et al., ICLR 2022), discretised by the bilinear rule.

    x' = (diag(eigenvalues) - P P^*) x + B u,  y = Re(C x) + D u

Its kernel is not computed by powers of a matrix, but at the roots of unity z = exp(-2 pi i k / L), where the generating function
sum_l K[l] z^l is C_L (I - A_bar z)^-1 B_bar with C_L = C (I - A_bar^L). With g = (2 / step) (1 - z) / (1 + z) that is a
resolvent of A, which Woodbury's identity reduces to four Cauchy products k(x, y) = sum_n x[n] y[n] / (g - eigenvalue[n]):

    2 / (1 + z) (k(C_L, B) - k(C_L, P) k(P^*, B) / (1 + k(P^*, P)))

An inverse transform gives K. C_L is computed by squaring A_bar, instead of being learned in the place of C as the authors' code
does, so that the layer takes any length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfuser.ssm.convolution import convolve
from mfuser.ssm.hippo import diagonalized
from mfuser.ssm.steps import log_steps


class S4(nn.Module):
    """One state space for each channel that starts as HiPPO-LegS, with a skip connection.

    Args:
        channels: D.    states: N, an even number.
    """

    def __init__(self, channels: int, states: int = 64) -> None:
        super().__init__()
        start = diagonalized(states)

        def learned(values: Tensor) -> nn.Parameter:
            return nn.Parameter(torch.view_as_real(values.to(torch.complex64).repeat(channels, 1)).clone())

        self.log_dt = nn.Parameter(log_steps(channels))
        self.log_A_real = nn.Parameter(torch.log(-start.eigenvalues.real).float().repeat(channels, 1))
        self.A_imag = nn.Parameter(start.eigenvalues.imag.float().repeat(channels, 1))
        self.P, self.B = learned(start.P), learned(start.B)
        self.C = nn.Parameter(torch.randn(channels, states // 2, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(channels))

    def continuous(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return eigenvalues, P, B and C (D, N), conjugates included: half of the states and then the other half."""
        half = torch.complex(-torch.exp(self.log_A_real), self.A_imag)
        parts = (half, *(torch.view_as_complex(values) for values in (self.P, self.B, self.C)))
        eigenvalues, P, B, C = (torch.cat([part, part.conj()], -1) for part in parts)
        return eigenvalues, P, B, C

    def discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return A_bar (D, N, N), B_bar (D, N) and C (D, N)."""
        eigenvalues, P, B, C = self.continuous()
        step = torch.exp(self.log_dt)[:, None]
        A = torch.diag_embed(eigenvalues) - P[:, :, None] * P.conj()[:, None]
        half, eye = A * (step / 2)[..., None], torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        found = torch.linalg.solve(eye - half, torch.cat([eye + half, (B * step)[..., None]], -1))
        return found[..., :-1], found[..., -1], C

    def kernel(self, length: int) -> Tensor:
        """Return the convolution's kernel (D, L)."""
        eigenvalues, P, B, C = self.continuous()
        A_bar, _, _ = self.discrete()
        C = C - (torch.linalg.matrix_power(A_bar, length).mT @ C[..., None])[..., 0]
        angles = torch.arange(length // 2 + 1, device=C.device, dtype=self.log_dt.dtype) * (-2 * torch.pi / length)
        z = torch.polar(torch.ones_like(angles), angles)
        # times (1 + z) above and below, which is zero at z = -1
        below = (2 * torch.exp(-self.log_dt))[:, None, None] * (1 - z) - eigenvalues[..., None] * (1 + z)  # (D, N, L/2 + 1)

        def cauchy(x: Tensor, y: Tensor) -> Tensor:
            return torch.einsum("dn,dnk->dk", x * y, below.reciprocal())

        inner = cauchy(P.conj(), B) * (1 + z) / (1 + cauchy(P.conj(), P) * (1 + z))
        return torch.fft.irfft(2 * (cauchy(C, B) - cauchy(C, P) * inner), n=length)

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), as a convolution."""
        return convolve(u, self.kernel(u.shape[1])) + self.D * u

    def recurrent(self, u: Tensor) -> Tensor:
        """Return what `forward` does, token by token."""
        A, B, C = self.discrete()
        state, found = B.new_zeros(len(u), *B.shape), []
        for token in u.unbind(1):
            state = torch.einsum("dnm,bdm->bdn", A, state) + B * token[..., None]
            found.append((C * state).sum(-1).real + self.D * token)
        return torch.stack(found, 1)

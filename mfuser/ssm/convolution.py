"""A linear time-invariant system in its two forms: a recurrence of constant memory, and a convolution of all tokens at once.

x[k] = A_bar x[k-1] + B_bar u[k],  y[k] = C x[k]    <=>    y = K * u,  K = (C B_bar, C A_bar B_bar, C A_bar^2 B_bar, ...)
"""

from __future__ import annotations

import torch
from scipy.fft import next_fast_len
from torch import Tensor, nn
from torch.nn import functional as F


def kernel(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """Return K (L,) of a discrete system A (N, N), B (N,), C (N,)."""
    state, found = B, []
    for _ in range(length):
        found.append(C @ state)
        state = A @ state
    return torch.stack(found)


def recurrence(A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
    """Return y (L,) of the same system for u (L,), step by step from a state of zeros."""
    state, found = torch.zeros_like(B), []
    for value in u:
        state = A @ state + B * value
        found.append(C @ state)
    return torch.stack(found)


def convolve(u: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each channel of u (B, L, D) with its kernel (D, L), causally: output t reads inputs up to t.

    Computed in fp32 (fp64 for fp64) by a Fourier transform of twice the length, else the end would wrap around to the beginning.
    """
    length = u.shape[1]
    wide = torch.promote_types(u.dtype, torch.float32)
    size = next_fast_len(2 * length - 1, real=True)
    product = torch.fft.rfft(u.mT.to(wide), n=size) * torch.fft.rfft(kernels.to(wide), n=size)
    return torch.fft.irfft(product, n=size)[..., :length].mT.to(u.dtype)


def short_convolution(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """Convolve (B, L, D) with a causal kernel of a few taps for each channel."""
    taps = conv.kernel_size[0]
    return F.conv1d(F.pad(x.mT, (taps - 1, 0)), conv.weight, conv.bias, groups=conv.groups).mT

"""Hyena (Poli et al., ICML 2023): a convolution as long as the sequence, whose kernel is a function of the position.

The function is a small network with sine activations on positional features, times a decay of its own for each channel. It has no
state: no recurrence of constant memory computes it. `LongConvolution` is the layer for blocks that have gates of their own,
`HyenaOperator` the whole operator of order 2. Parameters have the names of the authors' code (HazyResearch/safari).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mfuser.ssm.convolution import convolve, short_convolution


class Sine(nn.Module):
    """sin(frequency x), with a frequency for each channel."""

    def __init__(self, channels: int, frequency: float = 1.0) -> None:
        super().__init__()
        self.freq = nn.Parameter(torch.full((1, channels), frequency))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return torch.sin(self.freq * x)


class LongConvolution(nn.Module):
    """A convolution as long as the sequence, whose kernel is a function of the position, and a skip connection.

    Args:
        channels: D.    length: L, the longest sequence.    width: of the network.    frequency: of its sines at first.
    """

    z: Tensor
    t: Tensor
    decays: Tensor

    def __init__(self, channels: int, length: int, width: int = 64, frequency: float = 1.0) -> None:
        super().__init__()
        self.length = length
        t = torch.linspace(0, 1, length)
        # one wave, of a frequency that is nearly zero: the authors' positional features with one band
        phase = 1e-4 * 2 * math.pi * torch.arange(length, dtype=torch.float32) / length
        self.register_buffer("z", torch.stack([t, torch.cos(phase), -torch.sin(phase)], -1), persistent=False)
        self.register_buffer("t", t, persistent=False)
        slow, fast = math.log(100) / 1.5, math.log(100) / 0.3
        self.register_buffer("decays", torch.linspace(slow, fast, channels), persistent=False)
        sine = Sine(width, frequency)  # one for all layers
        hidden = [layer for _ in range(2) for layer in (nn.Linear(width, width), sine)]
        self.implicit_filter = nn.Sequential(nn.Linear(3, width), sine, *hidden, nn.Linear(width, channels, bias=False))
        self.bias = nn.Parameter(torch.randn(channels))

    def kernel(self, length: int) -> Tensor:
        """Return the kernel (D, L).

        Raises: ValueError for a sequence that is longer than the filter.
        """
        if length > self.length:
            raise ValueError(f"a sequence of {length} tokens, but the filter was made for {self.length}")
        found: Tensor = self.implicit_filter(self.z[:length])
        return (found * torch.exp(-self.t[:length, None] * self.decays)).mT

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), plus the input times a bias."""
        return convolve(u, self.kernel(u.shape[1])) + self.bias * u


class HyenaOperator(nn.Module):
    """The operator of order 2: two gates around one long convolution.

    Args:
        channels: D.    length: L, the longest sequence.    width: of the filter's network.
    """

    def __init__(self, channels: int, length: int, width: int = 64) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.short_filter = nn.Conv1d(3 * channels, 3 * channels, 3, groups=3 * channels)
        self.filter_fn = LongConvolution(channels, length, width)

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        first, second, v = short_convolution(self.in_proj(u), self.short_filter).chunk(3, -1)
        out: Tensor = self.out_proj(self.filter_fn(v * second) * first)
        return out

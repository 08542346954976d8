"""Learned tokens that refine a frozen tower block by block: Rein's, and SET's, which see the tokens by phase and amplitude.

Parameters have the names of the authors' checkpoints. A block's patch tokens go in, class and registers do not.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Reins(nn.Module):
    """A sequence of tokens for every block, and layers that all blocks share (Rein; Wei et al., CVPR 2024).

    Args:
        layers: L blocks.    dim: C, the tower's width.    tokens: m, the number of object queries, too.
        rank: r of the tokens' low-rank factors; None: full tokens.    query_dim: D, the decoder's width.
        patch: pixels of a token's side, which the first draw depends on.
    """

    def __init__(
        self, layers: int, dim: int, *, tokens: int = 100, rank: int | None = 16, query_dim: int = 256, patch: int = 16
    ) -> None:
        super().__init__()
        self.layers, self.dim, self.rank = layers, dim, rank
        if rank is None:
            self.learnable_tokens = _drawn((layers, tokens, dim), patch, dim)
        else:
            fan = math.sqrt(dim * rank)
            self.learnable_tokens_a = _drawn((layers, tokens, rank), patch, fan)
            self.learnable_tokens_b = _drawn((layers, rank, dim), patch, fan)
        self.scale = nn.Parameter(torch.tensor(0.001))
        self.mlp_token2feat = nn.Linear(dim, dim)
        self.mlp_delta_f = nn.Linear(dim, dim)
        self.transform = nn.Linear(dim, query_dim)
        self.merge = nn.Linear(3 * query_dim, query_dim)

    def tokens(self, layer: int) -> Tensor:
        """Return the tokens (m, C) of a block."""
        if self.rank is None:
            return self.learnable_tokens[layer]
        return self.learnable_tokens_a[layer] @ self.learnable_tokens_b[layer]

    def forward(self, layer: int, patches: Tensor) -> Tensor:
        """Refine the patch tokens (B, N, C) that leave a block."""
        return patches + self.scale * self.delta(layer, patches)

    def delta(self, layer: int, patches: Tensor) -> Tensor:
        """Return what a block's tokens add to the patches (B, N, C), before the scale."""
        tokens = self.tokens(layer)
        return _attended(patches, tokens, patches @ tokens.T, self.mlp_token2feat, self.mlp_delta_f)

    def queries(self) -> Tensor:
        """Return positions (m, D) of the object queries: maximum, mean and last of the blocks' tokens."""
        tokens = torch.stack([self.tokens(i) for i in range(self.layers)])
        by_block = self.transform(tokens).permute(1, 2, 0)  # (m, D, L)
        # the three values of a channel stand side by side
        three = torch.stack([by_block.amax(-1), by_block.mean(-1), by_block[..., -1]], -1)
        out: Tensor = self.merge(three.flatten(1))
        return out


class SpectralReins(Reins):
    """Tokens for phase and tokens for amplitude of the patches' Fourier transform (SET; Yi et al., ACM MM 2024).

    Args:
        grid: (rows, columns) of the patches.
        spatial: transform each channel over the image plane, as the paper describes it, normalised so that untouched phase
            and amplitude give the patches back. Otherwise as released: over the axes batch and channel of each patch, so that
            the images of a batch depend on each other, and with a forward and a backward norm that do not cancel.
        others: as Reins'.
    """

    def __init__(
        self,
        layers: int,
        dim: int,
        *,
        grid: tuple[int, int],
        spatial: bool = False,
        tokens: int = 100,
        rank: int | None = 16,
        query_dim: int = 256,
        patch: int = 16,
    ) -> None:
        super().__init__(layers, dim, tokens=tokens, rank=rank, query_dim=query_dim, patch=patch)
        self.grid, self.spatial = grid, spatial
        self.learnable_tokens2 = _drawn((layers, tokens, dim), patch, dim)
        self.mlp_token2feat2 = nn.Linear(dim, dim)
        self.mlp_delta_f2 = nn.Linear(dim, dim)

    def delta(self, layer: int, patches: Tensor) -> Tensor:
        """Return what a block's tokens add to the patches (B, N, C), before the scale; computed in fp32 for the transforms."""
        kind = patches.device.type
        # on shapes alone there is no autocast
        with torch.autocast(kind, enabled=False) if kind != "meta" else contextlib.nullcontext():
            # of a model in 16 bits, too
            phase, amplitude = self.spectrum(patches.to(torch.promote_types(patches.dtype, torch.float32)))
            return self.inverse(*self.changed(layer, phase, amplitude)).to(patches.dtype)

    def changed(self, layer: int, phase: Tensor, amplitude: Tensor) -> tuple[Tensor, Tensor]:
        """Return phase and amplitude after a block's tokens, of the same shape."""
        tokens, tokens2 = self.tokens(layer).to(phase.dtype), self.learnable_tokens2[layer].to(phase.dtype)
        phase = _attended(phase, tokens, phase @ tokens.T, self.mlp_token2feat, self.mlp_delta_f)
        # standardised over the tokens: the paper's "attention optimization", as coded
        scores = F.instance_norm(amplitude @ tokens2.T)
        return phase, _attended(amplitude, tokens2, scores, self.mlp_token2feat2, self.mlp_delta_f2)

    def spectrum(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return phase and amplitude of patches (B, N, C): (N, B, C) as released, (B, N, C) over the image plane."""
        if self.spatial:
            planes = patches.transpose(1, 2).unflatten(2, self.grid)
            frequencies = torch.fft.fft2(planes, norm="ortho").flatten(2).transpose(1, 2)
        else:
            frequencies = torch.fft.fft2(patches.transpose(0, 1))
        real, imaginary = frequencies.real, frequencies.imag
        return torch.atan2(imaginary, _without_zero(real)), _without_zero(real.square() + imaginary.square()).sqrt()

    def inverse(self, phase: Tensor, amplitude: Tensor) -> Tensor:
        """Return patches (B, N, C) from phase and amplitude as `spectrum` returns them."""
        if self.spatial:
            frequencies = torch.complex(phase.cos() * amplitude, phase.sin() * amplitude)
            planes = torch.fft.ifft2(frequencies.transpose(1, 2).unflatten(2, self.grid), norm="ortho")
            return planes.real.flatten(2).transpose(1, 2)
        # of the channels' two-sided spectrum, the inverse of a real signal reads the first half
        batch, half = phase.shape[1], self.dim // 2 + 1
        phase, amplitude = phase[..., :half], amplitude[..., :half] / math.sqrt(2 * self.dim)
        frequencies = torch.complex(phase.cos() * amplitude, phase.sin() * amplitude)
        return torch.fft.irfft2(frequencies, s=(batch, self.dim), norm="ortho").transpose(0, 1)


def _drawn(shape: tuple[int, int, int], patch: int, fan: float) -> nn.Parameter:
    bound = math.sqrt(6 / (3 * patch**2 + fan))
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def _attended(values: Tensor, tokens: Tensor, scores: Tensor, to_values: nn.Linear, to_delta: nn.Linear) -> Tensor:
    """Return values (..., C) after attention to tokens (m, C) by scores (..., m).

    The first token is part of the softmax but contributes nothing, so that the weights of the others need not sum to 1.
    """
    weights = (scores * tokens.shape[1] ** -0.5).softmax(-1)
    return _linear(to_delta, weights[..., 1:] @ _linear(to_values, tokens[1:]) + values)


def _linear(layer: nn.Linear, values: Tensor) -> Tensor:
    """Apply a layer in the precision of its input."""
    return F.linear(values, layer.weight.to(values.dtype), layer.bias.to(values.dtype))


def _without_zero(value: Tensor) -> Tensor:
    """Replace values between -1e-5 and 1e-5 by 1e-5, as in the release."""
    return torch.where(value.abs() < 1e-5, 1e-5, value)

"""Sequences of selective copying: tokens hidden at random places among noise, to be given back in their order.

Symbol 0 is noise, the last symbol of the vocabulary a marker, those between are tokens. A sequence has
`noise + memorize` symbols, of which a random subset holds the tokens, and then as many markers as tokens, where the answer is
read. This is the generator of state-spaces/s4 with variable places, the only one that was published.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgbench.lab.settings import Settings

_BLOCK = 25  # batches that are drawn together


def drawn(settings: Settings, count: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return sequences (count, L) and the tokens hidden in them (count, M)."""
    generator = torch.Generator(device).manual_seed(seed)
    symbols, hidden = settings.noise + settings.memorize, settings.memorize
    targets = torch.randint(1, settings.vocab - 1, (count, hidden), generator=generator, device=device)
    places = torch.rand(count, symbols, generator=generator, device=device).topk(hidden, 1).indices.sort(1).values
    sequences = torch.zeros(count, symbols, dtype=torch.long, device=device).scatter_(1, places, targets)
    markers = sequences.new_full((count, hidden), settings.vocab - 1)
    return torch.cat([sequences, markers], 1), targets


class Batches:
    """Batches of a training, each a function of (seed, step): none is seen twice, and a resumed training sees the same ones."""

    def __init__(self, settings: Settings, seed: int, device: torch.device) -> None:
        self.settings, self.seed, self.device = settings, seed, device
        self._block, self._drawn = -1, (torch.empty(0), torch.empty(0))

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Return sequences (B, L) and targets (B, M) of a step."""
        block, place = divmod(step, _BLOCK)
        if block != self._block:
            self._drawn = drawn(self.settings, _BLOCK * self.settings.batch, mixed(self.seed, 1 + block), self.device)
            self._block = block
        part = slice(place * self.settings.batch, (place + 1) * self.settings.batch)
        return self._drawn[0][part], self._drawn[1][part]


def held_out(settings: Settings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the fixed sequences and targets on which accuracy is measured, the same for every row and seed of a device."""
    return drawn(settings, settings.sequences, mixed(-1, 0), device)


def mixed(seed: int, number: int) -> int:
    """Return one seed of two numbers."""
    return hash((seed, number)) & (2**63 - 1)  # of integers: the same in every process

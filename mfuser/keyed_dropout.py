"""Dropout that any number of processes and parts of a batch draw alike, and that a compiler fuses with what is around it.

torch's dropout takes number after number from a generator: a process with a part of a batch has to draw the whole of it. Here one
number is drawn for a call, alike by all, and each element's own follows from it and from the element's place in the whole batch,
by a hash: the same on every device, compiled or not. A compiled backward pass computes it again in place of keeping what was
dropped, but for a second one of the same shape in a block, of which it keeps a byte for each element, as of torch's dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mfuser.processes import Rows
from mfuser.replaced import replace, replacement

_32 = 0xFFFFFFFF


class Place:
    """Which of the equal parts of a batch a model is given; at first it is the whole.

    part: its number, () of int64, on the model's device: neither parts nor processes make other graphs of compiled code, and CUDA
    graphs read it when they are replayed. None: the whole.    images: of a part.
    """

    def __init__(self) -> None:
        self.part: Tensor | None = None
        self.images = 1

    @contextmanager
    def of(self, images: Rows, device: torch.device) -> Iterator[None]:
        """Let the model be given these images of a batch within the block, which holds the backward pass, too."""
        if self.part is None or self.part.device != device:
            self.part = torch.zeros((), dtype=torch.int64, device=device)
        self.images = images.count
        self.part.fill_(images.first // images.count)
        try:
            yield
        finally:
            self.part.fill_(0)


def key(module: nn.Module, place: Place) -> int:
    """Have the dropouts and drop paths in a module draw so, in place; a copy of the module is without. Returns: how many."""
    found = 0
    for drop in module.modules():
        dims = _drawn_dims(drop)
        if dims is not None and not is_keyed(drop):
            replace(drop, _forward, place, dims)
            found += 1
    return found


def is_keyed(module: nn.Module) -> bool:
    """Return whether a module is a dropout that draws so."""
    return replacement(module, _forward) is not None


def place_of(model: nn.Module) -> Place | None:
    """Return the place that a model's dropouts share; None: they draw as torch does."""
    for module in model.modules():
        if (found := replacement(module, _forward)) is not None:
            place: Place = found.given[0]
            return place
    return None


def factors(shape: torch.Size, seed: Tensor, keep: float, part: Tensor | None = None) -> Tensor:
    """Return 1 for what is kept and 0 for the rest: fp32 of a shape, on the seed's device.

    Each of the batch's elements has 24 bits of its own, a permutation of its number that the seed chooses, and is kept if they
    are below `keep` of their range. Elements whose numbers are 2**32 apart share theirs.

    Args:
        shape: of this part; the first dimension has rows.    seed: () of int64, not negative.    keep: the chance to be kept.
        part: () of int64; rows of so many other parts, of the same shape, are before these. None: none are.
    """
    count = shape.numel()
    x = torch.arange(count, device=seed.device).view(shape)
    if part is not None:
        x = x + part * count
    # "triple32" of Wellons' hash prospector, with half of the seed before its first product and half behind; two factors are
    # less by 2**32, which changes nothing below 32 bits, and no product overflows 64
    x = (x ^ seed) & _32
    x = x ^ (x >> 17)
    x = x * (0xED5AD4BB - 2**32) & _32
    x = x ^ (seed >> 32)
    x = x ^ (x >> 11)
    x = x * (0xAC4C1B51 - 2**32) & _32
    x = x ^ (x >> 15)
    x = x * 0x31848BAB & _32
    x = x ^ (x >> 14)
    # in fp32, which has 24 bits exactly: of 64 bits, a compiler would keep the comparison, as much smaller than what it follows
    # from, and not compute it again
    kept = (x >> 8).float() < round(keep * 2**24)
    return kept.float()


# torch.randint in compiled code draws other numbers than outside of it; a call of one's own is left as it is. It is given an
# empty tensor of its own: of calls that are given the same, torch 2.11 makes one
@torch.library.custom_op("mfuser::drawn_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _drawn_seed(own: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=own.device).random_()


@_drawn_seed.register_fake
def _(own: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=own.device)


def _drawn_dims(module: nn.Module) -> int | None:
    """Return how many of its input's dimensions a dropout draws for, -1 for all; None for another module."""
    from timm.layers import DropPath

    kinds = {nn.Dropout: -1, nn.Dropout1d: 2, nn.Dropout2d: 2, nn.Dropout3d: 2, DropPath: 1}
    return kinds.get(type(module))


def _forward(drop: Any, place: Place, dims: int, x: Tensor) -> Tensor:
    """(B, ...) -> (B, ...)."""
    path = dims == 1
    p = drop.drop_prob if path else drop.p
    if not p or not drop.training:
        return x
    keep = 1 - p
    scale = 1 / keep if keep and not (path and not drop.scale_by_keep) else 1.0
    drawn = x.shape if dims < 0 else torch.Size((*x.shape[:dims], *(1 for _ in x.shape[dims:])))
    # what has no rows of images is dropped alike by all
    part = place.part if len(x) % place.images == 0 else None
    # one rounding: in the wide type, wherever it is computed
    wide = torch.promote_types(x.dtype, torch.float32)
    seed = _drawn_seed(torch.empty(0, device=x.device))
    scaled = factors(drawn, seed, keep, part).to(wide) * scale
    return (x * scaled).to(x.dtype)

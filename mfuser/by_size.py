"""Tensors that depend on sizes alone, such as position encodings: made once for each size and device, then kept.

A model that makes them in every pass launches a dozen small kernels for each, and copies numbers from the host, which a CUDA
graph cannot hold.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mfuser.ops.dispatch import watched

_MOST = 64  # of each kind: sizes of one model are few, and every image of another size has its own
_listening: list[list[Tensor]] = []


@contextmanager
def handed_out() -> Iterator[list[Tensor]]:
    """Collect the kept tensors that are asked for in the block.

    A CUDA graph reads them at every replay, when the sizes that have come since may have had them forgotten here.
    """
    found: list[Tensor] = []
    _listening.append(found)
    try:
        yield found
    finally:
        _listening[:] = [each for each in _listening if each is not found]


def by_size(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep what a function of hashable sizes and a keyword `device` returns; nobody may change it in place.

    Under a compiler, a mode that counts or fakes operators, and on the meta device it is made anew.
    """
    kept: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

    @functools.wraps(make)
    def given(*sizes: Any, device: torch.device | None = None) -> Tensor:
        if device is None or device.type == "meta" or watched():
            return make(*sizes, device=device)
        key = (*sizes, device)
        found = kept.get(key)
        if found is not None:
            kept.move_to_end(key)
        else:
            # an ordinary tensor, whoever asks first: one of inference mode could not be part of a training's graph
            with torch.inference_mode(False), torch.no_grad():
                found = make(*sizes, device=device)
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return found  # its memory is the graph's
            kept[key] = found
            while len(kept) > _MOST:
                kept.popitem(last=False)
        for each in _listening:
            each.append(found)
        return found

    return given

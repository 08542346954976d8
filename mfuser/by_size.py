"""Tensors that depend on sizes alone, such as position encodings: made once for each size and device, then kept.

A model that makes them in every pass launches a dozen small kernels for each, and copies numbers from the host, which a CUDA
graph cannot hold.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mfuser.ops.dispatch import watched

_MOST = 64  # of each kind: sizes of one model are few, and every image of another size has its own


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
        if found is None:
            # an ordinary tensor, whoever asks first: one of inference mode could not be part of a training's graph
            with torch.inference_mode(False), torch.no_grad():
                found = make(*sizes, device=device)
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return found  # its memory is the graph's
            kept[key] = found
            while len(kept) > _MOST:
                kept.popitem(last=False)
        return found

    return given

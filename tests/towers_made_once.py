"""What makes towers slow to build without weights: their vocabularies, and draws of numbers for tensors that hold none."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import open_clip
import pytest
from timm.layers import weight_init
from torch import Tensor


@pytest.fixture(autouse=True, scope="session")
def _towers_are_built_fast() -> Iterator[None]:
    draw = weight_init._trunc_normal_

    def drawn(tensor: Tensor, *args: float, **kwargs: float) -> Tensor:
        # on the meta device Python runs all the steps of the draw for nothing
        return tensor if tensor.is_meta else draw(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_init, "_trunc_normal_", drawn)
        # a third of a second each, which every model with a text tower asks for
        patch.setattr(open_clip, "get_tokenizer", functools.cache(open_clip.get_tokenizer))
        yield

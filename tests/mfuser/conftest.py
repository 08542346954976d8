from __future__ import annotations

import functools
from collections.abc import Iterator

import open_clip
import pytest


@pytest.fixture(autouse=True, scope="session")
def _vocabularies_are_read_once() -> Iterator[None]:
    """Reading one takes a third of a second, and every model with a text tower asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "get_tokenizer", functools.cache(open_clip.get_tokenizer))
        yield

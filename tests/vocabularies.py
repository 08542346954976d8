"""The vocabularies of text towers, read once: it takes a third of a second, and every model with such a tower asks for one."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import open_clip
import pytest


@pytest.fixture(autouse=True, scope="session")
def _vocabularies_are_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "get_tokenizer", functools.cache(open_clip.get_tokenizer))
        yield

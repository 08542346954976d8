"""Sentences for mini_vlm: two crops of each scene, whole and in parts, with what the scene's captions say of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgbench.streets.captions import captions
from dgbench.streets.wording import NAMES

CROPS, PARTS = 2, 6  # of a scene, and of a crop
SENTENCES = 5  # of each crop and part
TOKENS = 26  # of a sentence at most
KINDS = tuple(NAMES)
Box = tuple[float, float, float, float]  # top, left, height, width, as fractions


@dataclass(frozen=True)
class Told:
    """What is told of N scenes; R = 1 + PARTS regions of each crop, the first is all of it."""

    crops: Tensor  # (N, CROPS, 4) as fractions of the scene
    parts: Tensor  # (N, CROPS, R, 4) as fractions of the crop
    ids: Tensor  # (N, CROPS, R, SENTENCES, TOKENS) token ids
    named: Tensor  # (N, CROPS, R, SENTENCES) bits of the kinds that a sentence names
    shown: Tensor  # (N, CROPS, R) bits of the kinds that a region shows


def told(domain: str, index: int) -> tuple[NDArray[np.float32], ...]:
    """Return the arrays of one scene, in the order of `Told`; the same arguments give the same ones."""
    draw = np.random.default_rng([index, 7])
    crops = np.zeros((CROPS, 4), np.float32)
    parts = np.zeros((CROPS, 1 + PARTS, 4), np.float32)
    ids = np.zeros((CROPS, 1 + PARTS, SENTENCES, TOKENS), np.int32)
    named = np.zeros((CROPS, 1 + PARTS, SENTENCES), np.int64)
    for c in range(CROPS):
        height = draw.uniform(0.5, 1.0)
        crops[c] = (draw.uniform(0, 1 - height), draw.uniform(0, 1 - height / 2), height, height / 2)
        for r in range(1 + PARTS):
            size = (1.0, 1.0) if r == 0 else tuple(draw.uniform(0.125, 0.6, 2))
            parts[c, r] = (draw.uniform(0, 1 - size[0]), draw.uniform(0, 1 - size[1]), *size)
            sentences = captions(domain, "train", index, _inside(crops[c], parts[c, r]))
            for s in range(SENTENCES):
                sentence = sentences[s % len(sentences)]
                ids[c, r, s], named[c, r, s] = _tokens(sentence), kinds(sentence)
    return crops, parts, ids, named, np.bitwise_or.reduce(named, -1)


def stacked(rows: list[tuple[NDArray[np.float32], ...]]) -> Told:
    """Put scenes together."""
    return Told(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


def _inside(crop: NDArray[np.float32], part: NDArray[np.float32]) -> Box:
    top, left = crop[:2] + crop[2:] * part[:2]
    height, width = np.minimum(crop[2:] * part[2:], 1 - np.array([top, left]))
    return float(top), float(left), float(height), float(width)


def _tokens(sentence: str) -> NDArray[np.int32]:
    ids = _tokenizer()(sentence)[0].numpy()
    if ids[TOKENS:].any():  # cut, with the end token in the last place
        ids[TOKENS - 1] = ids.max()
    found: NDArray[np.int32] = ids[:TOKENS].astype(np.int32)
    return found


@cache
def _tokenizer():  # type: ignore[no-untyped-def]
    from open_clip import get_tokenizer

    return get_tokenizer("ViT-B-16")


@cache
def _words() -> list[tuple[int, re.Pattern[str]]]:
    """Return a bit and a pattern for each kind; all kinds of riders share a bit, because "a rider" is any of them."""
    found = []
    for kind, names in NAMES.items():
        words = {name.removeprefix("a ").removeprefix("the ") for pair in names for name in pair}
        bit = 1 << KINDS.index("cyclist" if kind in ("rider", "motorcyclist") else kind)
        found.append((bit, re.compile(rf"\b(?:{'|'.join(sorted(words, key=len, reverse=True))})\b")))
    return found


def kinds(sentence: str) -> int:
    """Return bits of the kinds that a sentence names."""
    bits = 0
    for bit, pattern in _words():
        if pattern.search(sentence):
            bits |= bit
    return bits

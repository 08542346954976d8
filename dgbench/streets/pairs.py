"""Images of pretraining scenes with captions of the whole and of random parts, from one composition each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dgbench.streets.camera import View
from dgbench.streets.captions import CAPTIONS, check_pretraining, describe
from dgbench.streets.compose import VERSION, compose
from dgbench.streets.dice import Dice
from dgbench.streets.places import fingerprint
from dgbench.streets.render import check_size, painted, picture
from dgbench.streets.sight import SIZE, Box, sight


@dataclass(frozen=True, slots=True)
class Pair:
    """One image with sentences on it, and on parts of it."""

    image: NDArray[np.uint8]  # (H, W, 3) RGB
    captions: list[str]
    boxes: list[Box]
    crops: list[list[str]]  # sentences on each box


def pair(domain: str, split: str, index: int, size: tuple[int, int] = SIZE, boxes: int = 0) -> Pair:
    """Render one image and write captions of it and of `boxes` random parts; the same arguments give the same result.

    Raises: ValueError for a domain that is not for pretraining, and as `dgbench.streets.render`.
    """
    check_pretraining(domain)
    check_size(size)
    drawn = compose(domain, split, index)
    view = View(drawn.pose, SIZE)
    scene = painted(drawn.scene, view)
    seen = sight(scene)
    if (wanted := (int(size[0]), int(size[1]))) != SIZE:
        view = View(drawn.pose, wanted)
        scene = painted(drawn.scene, view)
    image, _ = picture(drawn, view, scene)
    parts = _boxes(Dice(*drawn.key, "boxes"), boxes)
    return Pair(image, describe(drawn, seen), parts, [describe(drawn, seen, box) for box in parts])


def name(domain: str) -> str:
    """Return what records of a pretrained tower say: `streets-pretrain@HASH`, of its styles, renderer and captions.

    Raises: ValueError for a domain that is not for pretraining.
    """
    check_pretraining(domain)
    return f"{domain}@{fingerprint(domain, f'{VERSION} captions {CAPTIONS}')}"


def _boxes(dice: Dice, count: int) -> list[Box]:
    """Draw parts of 1/64 to 1/2 of the area, from twice as wide as high (in pixels) to half; edges lie on pixels of `SIZE`."""
    rows, columns = SIZE
    found: list[Box] = []
    for _ in range(count):
        # small parts are as frequent as large ones: areas are spread over octaves
        area, aspect = rows * columns / (2 << dice.index(6)) * dice.between(0.7, 1.0), dice.between(0.5, 2.0)
        height = min(max(int((area / aspect) ** 0.5), 8), rows)
        width = min(max(int(height * aspect), 8), columns)
        top, left = dice.index(rows - height + 1), dice.index(columns - width + 1)
        found.append((top / rows, left / columns, height / rows, width / columns))
    return found

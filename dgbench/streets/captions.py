"""Captions of pretraining scenes: sentences on what is seen in an image or a part of it, how much and where, and in what light.

They are written from the scene, not from labels, for `streets-pretrain` alone: those of a source or a target would tell what
is in its images.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from dgbench.streets.camera import View
from dgbench.streets.compose import Composition, compose
from dgbench.streets.dice import Dice
from dgbench.streets.look import Look
from dgbench.streets.places import PRETRAIN
from dgbench.streets.plan import Plan
from dgbench.streets.render import painted
from dgbench.streets.sight import SIZE, WHOLE, Box, Seen, Sight, sight
from dgbench.streets.wording import STUFF, classes, joined, named, one_of, placed

# how much more often a kind is named than its share of the image suggests
_RARE = {
    "wall": 3.0,
    "fence": 3.0,
    "pole": 2.0,
    "traffic light": 3.0,
    "traffic sign": 2.0,
    "terrain": 3.0,
    "rider": 4.0,
    "cyclist": 4.0,
    "motorcyclist": 4.0,
    "truck": 4.0,
    "bus": 4.0,
    "train": 4.0,
    "motorcycle": 4.0,
    "bicycle": 4.0,
}


def captions(domain: str, split: str, index: int, box: Box | None = None) -> list[str]:
    """Return several sentences on one image of a pretraining domain; the same arguments give the same sentences.

    Args:
        domain: `streets-pretrain`.
        box: (top, left, height, width) in fractions of the image: sentences on this part only.
    Raises: ValueError for another domain, an unknown split, a negative index or a box that is not within the image.
    """
    check_pretraining(domain)
    drawn, seen = _sighted(domain, split, index)
    return describe(drawn, seen, box)


def check_pretraining(domain: str) -> None:
    """Raise ValueError for a domain that has no captions."""
    if domain != PRETRAIN:
        raise ValueError(f"captions are written for `{PRETRAIN}` only, got `{domain}`: others are sources or targets")


@functools.lru_cache(maxsize=4)
def _sighted(domain: str, split: str, index: int) -> tuple[Composition, Sight]:
    drawn = compose(domain, split, index)
    return drawn, sight(painted(drawn.scene, View(drawn.pose, SIZE)))


def describe(drawn: Composition, seen: Sight, box: Box | None = None) -> list[str]:
    """Return the sentences of a composition that is seen so."""
    found = seen.within(WHOLE if box is None else box)
    if box is None:
        return _on_all(Dice(*drawn.key, "captions"), found, drawn.plan, drawn.look)
    return _on_part(Dice(*drawn.key, "captions", *(f"{edge:.4f}" for edge in box)), found)


def _on_all(dice: Dice, found: Sequence[Seen], plan: Plan, look: Look) -> list[str]:
    kinds = {one.kind: one for one in found}
    things = [one for one in found if one.kind not in STUFF]
    chosen = _choose(dice, found, 3 + dice.index(4), without=("road",))
    overview = joined([placed(dice, one) if dice.chance(0.4) else named(dice, one) for one in chosen])
    road = _road(dice, plan) if "road" in kinds else ""
    sentences = [f"{overview} on {road}" if road and dice.chance(0.7) else f"{dice.pick(_SHOWN)} {overview}"]
    sentences.append(joined([placed(dice, one) for one in _choose(dice, found, 4)]))
    sentences.append(f"{_light(dice, look)}: {joined([named(dice, one) for one in _choose(dice, found, 3)])}")
    sentences.append(_list(dice, found))
    if things:
        sentences.append(f"{dice.pick(_LISTED)} {joined([named(dice, one) for one in _choose(dice, things, 4)])}")
    sentences.append(f"{dice.pick(_SINGLE)} {one_of(dice, _choose(dice, found, 1)[0])}")
    return sentences


def _on_part(dice: Dice, found: Sequence[Seen]) -> list[str]:
    largest = found[0]
    most = "mostly " if largest.share > 0.5 else ""
    sentences = [f"{dice.pick(_SINGLE)} {one_of(dice, largest)}" if dice.chance(0.5) else f"{most}{named(dice, largest)}"]
    sentences.append(joined([named(dice, one) for one in found[: 2 + dice.index(2)]]))
    sentences.append(_list(dice, found))
    sentences.append(joined([placed(dice, one) for one in _choose(dice, found, 3)]))
    sentences.append(f"{dice.pick(_SINGLE)} {one_of(dice, _choose(dice, found, 1)[0])}")
    return sentences


_SHOWN = ("a picture of", "a photo of", "a town with", "a view of", "a scene with")
_LISTED = ("this picture shows", "one can see", "in view:", "it contains", "a scene with")
_SINGLE = ("a photo of", "a picture of", "a scene with", "a view of", "this is")


def _choose(dice: Dice, found: Sequence[Seen], count: int, without: tuple[str, ...] = ()) -> list[Seen]:
    """Draw kinds without repetition: large ones and rare ones more often."""
    weights = {one: (0.02 + one.share) ** 0.5 * _RARE.get(one.kind, 1.0) for one in found if one.kind not in without}
    left, chosen = weights or dict.fromkeys(found, 1.0), list[Seen]()
    while left and len(chosen) < count:
        one = dice.weighted(left)
        del left[one]
        chosen.append(one)
    return chosen


def _list(dice: Dice, found: Sequence[Seen]) -> str:
    """Return a list of what is seen in any order, in the names of the classes or in words that vary."""
    kinds = [one for _, one in sorted(((dice.draw(), one) for one in found), key=lambda pair: pair[0])][:8]
    if dice.chance(0.5):
        return ", ".join(classes(kinds))
    return f"{dice.pick(_LISTED)} {joined([named(dice, one, counted=False) for one in kinds])}"


def _road(dice: Dice, plan: Plan) -> str:
    """Return words for the road by its plan: width, bend, tram rails, side roads."""
    width = {1: ("a narrow road", "a road"), 2: ("a wide road", "a road"), 3: ("a very wide road", "a wide road")}[plan.lanes]
    words = dice.pick(width)
    extras = []
    if abs(plan.bend) > 0.0005:
        extras.append(f"that bends to the {'right' if plan.bend > 0 else 'left'}")
    if plan.tram:
        extras.append("with rails")
    if plan.crossings and plan.crossings[0][0] < 35.0:
        extras.append("before a crossing")
    return f"{words} {dice.pick(extras)}" if extras and dice.chance(0.5) else words


def _light(dice: Dice, look: Look) -> str:
    """Return words for the light and the picture's colours."""
    sun = look.lighting.sun[1]
    if look.sharp_sun:
        day = "in low sun" if sun < 0.4 else dice.pick(("on a sunny day", "in bright sun", "in sunshine"))
    else:
        day = dice.pick(("on a dull day", "on a cloudy day", "in soft light"))
    red, _, blue = look.balance
    words = []
    for low, value, high in (
        ("dark", look.exposure / 1.04, "bright"),
        ("flat", look.contrast, "hard"),
        ("pale", look.saturation, "vivid"),
        ("cool", 1.0 + red - blue, "warm"),
    ):
        if value < 0.85 or value > 1.15:
            words.append(low if value < 1.0 else high)
    if look.noise > 0.017:
        words.append("grainy")
    if look.blur > 0.7:
        words.append("blurred")
    return f"a {dice.pick(words)} picture {day}" if words and dice.chance(0.7) else f"a picture {day}"

"""Words for what a scene shows: names of kinds, numbers, and places."""

from __future__ import annotations

from collections.abc import Sequence

from dgbench.streets.dice import Dice
from dgbench.streets.sight import Seen

# kind -> (one, several) in the usual words first
NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "road": (("a road", "a road"), ("the road", "the road"), ("a street", "a street")),
    "sidewalk": (("a sidewalk", "a sidewalk"), ("the sidewalk", "the sidewalk"), ("a footpath", "a footpath")),
    "building": (("a building", "buildings"), ("a house", "houses")),
    "wall": (("a wall", "walls"),),
    "fence": (("a fence", "fences"), ("a railing", "railings")),
    "pole": (("a pole", "poles"), ("a post", "posts")),
    "traffic light": (("a traffic light", "traffic lights"), ("a signal", "signals")),
    "traffic sign": (("a traffic sign", "traffic signs"), ("a sign", "signs")),
    "vegetation": (
        ("vegetation", "vegetation"),
        ("trees", "trees"),
        ("a tree", "a tree"),
        ("bushes and trees", "bushes and trees"),
    ),
    "terrain": (("grass", "grass"), ("terrain", "terrain"), ("a strip of grass", "a strip of grass")),
    "sky": (("sky", "sky"), ("the sky", "the sky")),
    "person": (("a person", "people"), ("a pedestrian", "pedestrians"), ("a person", "persons")),
    "rider": (("a rider", "riders"),),
    "cyclist": (("a rider", "riders"), ("a cyclist", "cyclists"), ("a rider on a bicycle", "riders on bicycles")),
    "motorcyclist": (
        ("a rider", "riders"),
        ("a motorcyclist", "motorcyclists"),
        ("a rider on a motorcycle", "riders on motorcycles"),
    ),
    "car": (("a car", "cars"),),
    "truck": (("a truck", "trucks"), ("a lorry", "lorries")),
    "bus": (("a bus", "buses"),),
    "train": (("a train", "trains"), ("a tram", "trams")),
    "motorcycle": (("a motorcycle", "motorcycles"), ("a motorbike", "motorbikes")),
    "bicycle": (("a bicycle", "bicycles"), ("a bike", "bikes")),
}
STUFF = ("road", "sidewalk", "vegetation", "terrain", "sky")
NEAR, FAR = 12.0, 40.0  # metres


def classes(found: Sequence[Seen]) -> list[str]:
    """Return the names of the classes of some kinds, without repetition."""
    return list(dict.fromkeys("rider" if one.kind in ("cyclist", "motorcyclist") else one.kind for one in found))


def one_of(dice: Dice, one: Seen) -> str:
    """Return words for one of a kind, however many there are: "a car"."""
    return (NAMES[one.kind][0] if dice.chance(0.5) else dice.pick(NAMES[one.kind]))[0]


def named(dice: Dice, one: Seen, *, counted: bool = True) -> str:
    """Return words for a kind with its rough number: "a car", "two cars", "several cars", "many cars"."""
    names = NAMES[one.kind]
    # the usual words in half of the cases
    single, several = names[0] if dice.chance(0.5) else dice.pick(names)
    if one.kind in STUFF:
        return single
    if one.count == 1:
        return single.replace("a ", "one ", 1) if counted and dice.chance(0.15) else single
    if not counted:
        return several
    if one.count == 2:
        return f"two {several}"
    return f"{dice.pick(('several', 'some'))} {several}" if one.count < 6 else f"{dice.pick(('many', 'a lot of'))} {several}"


def placed(dice: Dice, one: Seen) -> str:
    """Return words for a kind with its rough place where it has one: "trees on the left", "a car ahead"."""
    words = named(dice, one)
    if one.left > 0.25 and one.right > 0.25 and one.count != 1:
        return f"{words} on both sides"
    for share, side in ((one.left, "left"), (one.right, "right")):
        if share > 0.6:
            return dice.pick((f"{words} on the {side}", f"{words} {side}", f"{words} to the {side}"))
    if one.kind not in STUFF:
        if one.left + one.right < 0.3:
            words = dice.pick((f"{words} in the middle", f"{words} ahead"))
        if one.depth < NEAR:
            return f"{words} close by"
        if one.depth > FAR:
            return f"{words} far away"
    return words


def joined(parts: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"

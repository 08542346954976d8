"""Composition of one image: scene, pose of the camera and look of (domain, split, index), before anything is rendered."""

from __future__ import annotations

from dataclasses import dataclass

from dgbench.streets.camera import Pose
from dgbench.streets.dice import Dice
from dgbench.streets.layout import street
from dgbench.streets.look import Look, draw_look
from dgbench.streets.mesh import Scene
from dgbench.streets.places import parse
from dgbench.streets.plan import Plan
from dgbench.streets.style import Style

VERSION = 1
SPLITS = ("train", "val")

Key = tuple[int, str, str, int]  # version, place, split, index: what seeds every draw


@dataclass(frozen=True)
class Composition:
    """What one image shows, and how; `key` seeds whatever else is drawn for it."""

    key: Key
    style: Style
    scene: Scene
    plan: Plan
    pose: Pose
    look: Look


def compose(domain: str, split: str, index: int) -> Composition:
    """Draw one image of a procedural domain.

    Raises: ValueError for an unknown domain or split, a severity that is out of range or not applicable, or a negative index.
    """
    place, variants, weather, severity = parse(domain)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got `{split}`")
    if index < 0:
        raise ValueError(f"index must not be negative, got {index}")
    key = (VERSION, place, split, int(index))
    style = variants[0] if len(variants) == 1 else Dice(*key, "style").pick(variants)
    scene = Scene()
    plan = street(scene, Dice(*key, "scene"), style)
    pose = _pose(Dice(*key, "camera"), style, plan)
    return Composition(key, style, scene, plan, pose, draw_look(Dice(*key, "look"), style, weather, severity))


def _pose(dice: Dice, style: Style, plan: Plan) -> Pose:
    # wide streets are driven in any of their own lanes, most often the outer one
    lane = plan.lanes - 1 if dice.chance(0.6) else dice.index(plan.lanes)
    x = plan.hand * (lane + 0.5) * plan.lane_width + dice.between(-0.3, 0.3)
    return Pose(
        x,
        dice.between(*style.height),
        dice.between(*style.yaw),
        dice.between(*style.pitch),
        dice.between(*style.roll),
        dice.between(*style.focal),
    )

"""Rendering of the image and label of (domain, split, index, size)."""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgbench.streets.atmosphere import falling, halos, light_night, paint_sky, veil, wet_road
from dgbench.streets.camera import Pose, View
from dgbench.streets.dice import Dice
from dgbench.streets.layout import street
from dgbench.streets.look import Look, draw_look
from dgbench.streets.mesh import Scene
from dgbench.streets.plan import Plan
from dgbench.streets.raster import paint, shadows
from dgbench.streets.sensor import develop
from dgbench.streets.shade import Pixels, Table, shade, table
from dgbench.streets.style import STYLES, WEATHERS, Style

VERSION = 1
CLASSES = 19
SPLITS = ("train", "val")
BAND = 1 << 14  # pixels shaded at a time


def styles() -> tuple[str, ...]:
    """Return the names of all procedural domains."""
    return tuple(STYLES)


def _parse(domain: str) -> tuple[str, Style, str, float | None]:
    """Return (place, style, weather, severity) of a name such as "streets-fog@0.6"."""
    name, at, text = domain.partition("@")
    if name not in STYLES:
        close = difflib.get_close_matches(name, STYLES, 1)
        raise ValueError(
            f"unknown streets domain `{name}`"
            + (f", did you mean `{close[0]}`?" if close else "")
            + f" Known: {', '.join(STYLES)}"
        )
    place, style, weather = STYLES[name]
    if not at:
        return place, style, weather, None
    if not weather:
        graded = ", ".join(known for known, entry in STYLES.items() if entry[2])
        raise ValueError(f"`{name}` has no severity, got `{domain}`; these take one: {graded}")
    try:
        severity = float(text)
    except ValueError:
        severity = -1.0
    if not 0.0 <= severity <= 1.0:
        raise ValueError(f"severity must be a number from 0 to 1, got `{text}` in `{domain}`")
    return place, style, weather, severity


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


def render(
    domain: str, split: str, index: int, size: tuple[int, int] = (256, 512)
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Render one image of a procedural domain; the same arguments give the same bytes on any machine.

    Args:
        domain: a name from `styles()`; those with weather take a severity 0..1 after "@". Severity and weather change
            the look, never the label.
        size: (H, W) in pixels, at least 32 each. Other sizes show the same scene.
    Returns: image (H, W, 3) uint8 RGB; label (H, W) uint8 Cityscapes train ids.
    Raises: ValueError for an unknown domain or split, a severity that is out of range or not applicable, a negative
        index or a size below 32.
    """
    place, style, weather, severity = _parse(domain)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got `{split}`")
    if index < 0:
        raise ValueError(f"index must not be negative, got {index}")
    if min(size) < 32:
        raise ValueError(f"size must be at least 32 x 32, got {size[0]} x {size[1]}")
    key = (VERSION, place, split, int(index))
    scene = Scene()
    plan = street(scene, Dice(*key, "scene"), style)
    view = View(_pose(Dice(*key, "camera"), style, plan), (int(size[0]), int(size[1])))
    look = draw_look(Dice(*key, "look"), style, weather, severity)
    return _picture(scene, view, look, Dice(*key, "sensor"))


def weather(domain: str, split: str, index: int) -> str:
    """Return the weather of an image of a procedural domain: "" or one of `WEATHERS`.

    Raises: ValueError for an unknown domain.
    """
    place, _, named, _ = _parse(domain)
    # the first draw of a look, see `draw_look`
    return Dice(VERSION, place, split, int(index), "look").pick(WEATHERS) if named == "any" else named


def _picture(scene: Scene, view: View, look: Look, dice: Dice) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    world, attributes, owner = scene.arrays()
    faces = view.faces(world, attributes)
    front, back = paint(faces, world, attributes, owner, view)
    lit = table(faces, attributes, scene.palette, look.lighting)
    cast, contact = shadows(scene.casters, view, look.lighting.sun if look.sharp_sun else None)
    shape = front.shape
    label = np.empty(shape, np.uint8)
    colour = [np.empty(shape, np.float32) for _ in range(3)]
    depth, ground = np.empty(shape, np.float32), np.empty(shape, np.float32)
    # bands keep the hundred temporaries of shading in cache, and out of fresh pages from the system
    step = max(1, BAND // view.columns)
    for top in range(0, view.rows, step):
        band = slice(top, min(top + step, view.rows))
        pixels, kinds = _band(scene, view, look, lit, (front, back, cast, contact), band)
        rows = (band.stop - top, view.columns)
        label[band] = kinds.reshape(rows)
        depth[band] = pixels.depth.reshape(rows)
        ground[band] = pixels.ground.reshape(rows)
        for k in range(3):
            colour[k][band] = pixels.colour[k].reshape(rows)
    if look.wet > 0.0:
        wet_road(colour, ground, view, look)
    halos(colour, depth, scene.lights, view, look)
    falling(colour, dice, view, look)
    return develop(colour, dice, look, step), label


def _band(
    scene: Scene, view: View, look: Look, lit: Table, buffers: tuple[NDArray[Any], ...], band: slice
) -> tuple[Pixels, NDArray[np.uint8]]:
    """Shade some rows from `buffers` (front, back, sun shadow, contact shadow); return flat pixels and labels."""
    front, back, cast, contact = (buffer[band].reshape(-1) for buffer in buffers)
    face = front.astype(np.int64)
    row = np.repeat(np.arange(band.start, band.stop, dtype=np.float32), view.columns)
    column = np.tile(np.arange(view.columns, dtype=np.float32), band.stop - band.start)
    shade_of = np.float32(1 / 255)
    pixels = shade(
        face,
        column,
        row,
        lit,
        look.lighting,
        cast.astype(np.float32) * shade_of if look.sharp_sun else None,
        contact.astype(np.float32) * shade_of,
    )
    seen = np.flatnonzero(pixels.alpha < 250)
    # crowns carry alpha too, but only fences and wheels recorded what lies behind them
    seen = seen[np.take(lit.see_through, np.take(face, seen))]
    colour, depth = pixels.colour, pixels.depth
    if len(seen):
        behind, x, y = np.take(back, seen).astype(np.int64), np.take(column, seen), np.take(row, seen)
        under = shade(behind, x, y, lit, look.lighting, None, None)
        open_sky = np.flatnonzero(behind == 0)
        if len(open_sky):
            paint_sky(under.colour, open_sky, x, y, view, look)
        opaque = np.take(pixels.alpha, seen).astype(np.float32) * shade_of
        for k in range(3):
            colour[k][seen] = under.colour[k] + (np.take(colour[k], seen) - under.colour[k]) * opaque
    sky = np.flatnonzero(face == 0)
    depth[sky] = np.float32(2000.0)
    if look.night > 0.0:
        light_night(colour, depth, column, row, scene.lights, view, look)
    for k in range(3):
        colour[k] += pixels.emission[k]
    if len(sky):
        paint_sky(colour, sky, column, row, view, look)
    veil(colour, depth, sky, look, row, view)
    return pixels, np.take(lit.kind, face)


def frequencies(domain: str, split: str, count: int, size: tuple[int, int] = (256, 512)) -> NDArray[np.float64]:
    """Return the share of labelled pixels per class, (19,), over the first `count` images."""
    total = np.zeros(256, np.int64)
    for index in range(count):
        total += np.bincount(render(domain, split, index, size)[1].reshape(-1), minlength=256)
    return total[:CLASSES] / max(int(total[:CLASSES].sum()), 1)

"""Rendering of the image and label of (domain, split, index, size)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgbench.streets.atmosphere import falling, halos, light_night, paint_sky, veil, wet_road
from dgbench.streets.camera import Faces, View
from dgbench.streets.compose import VERSION, Composition, compose
from dgbench.streets.dice import Dice
from dgbench.streets.look import Look
from dgbench.streets.mesh import Scene
from dgbench.streets.places import parse
from dgbench.streets.raster import paint, shadows
from dgbench.streets.sensor import develop
from dgbench.streets.shade import Pixels, Table, shade, table
from dgbench.streets.style import WEATHERS

CLASSES = 19
BAND = 1 << 14  # pixels shaded at a time


@dataclass(frozen=True)
class Painted:
    """A scene seen by a camera: which face each pixel shows (0 is the sky, else 1 + its row in `faces`), and behind it."""

    faces: Faces
    world: NDArray[np.float64]  # (F, CORNERS, 3)
    attributes: NDArray[np.float64]  # (F, 15)
    owner: NDArray[np.int64]  # (F,) number of the object that a face belongs to
    front: NDArray[np.int32]  # (H, W)
    back: NDArray[np.int32]


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
    check_size(size)
    drawn = compose(domain, split, index)
    view = View(drawn.pose, (int(size[0]), int(size[1])))
    return picture(drawn, view, painted(drawn.scene, view))


def check_size(size: tuple[int, int]) -> None:
    """Raise ValueError for a size (H, W) that is too small to render."""
    if min(size) < 32:
        raise ValueError(f"size must be at least 32 x 32, got {size[0]} x {size[1]}")


def weather(domain: str, split: str, index: int) -> str:
    """Return the weather of an image of a procedural domain: "" or one of `WEATHERS`.

    Raises: ValueError for an unknown domain.
    """
    place, _, named, _ = parse(domain)
    # the first draw of a look, see `draw_look`
    return Dice(VERSION, place, split, int(index), "look").pick(WEATHERS) if named == "any" else named


def painted(scene: Scene, view: View) -> Painted:
    """Project a scene and find the nearest face of every pixel."""
    world, attributes, owner = scene.arrays()
    faces = view.faces(world, attributes)
    front, back = paint(faces, world, attributes, owner, view)
    return Painted(faces, world, attributes, owner, front, back)


def picture(drawn: Composition, view: View, seen: Painted) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return image (H, W, 3) uint8 RGB and label (H, W) uint8 of a composition that was painted from this view."""
    scene, look, dice = drawn.scene, drawn.look, Dice(*drawn.key, "sensor")
    faces, attributes, front, back = seen.faces, seen.attributes, seen.front, seen.back
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

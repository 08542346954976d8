"""Atmosphere and weather: sky, lamps at night, wet roads, fog, halos, rain and snow in the air.

Works on planar linear float32 images (H, W). Fog follows Koschmieder: I = J t + A (1 - t), t = exp(-β d).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgbench.streets.atlas import atlas
from dgbench.streets.camera import View
from dgbench.streets.dice import Dice
from dgbench.streets.look import Look
from dgbench.streets.mesh import Light
from dgbench.streets.strokes import dot, line

Image = NDArray[np.floating[Any]]  # float32; NumPy's stubs lose that in arithmetic
f32 = np.float32

# t = exp(-x) for optical depths 0..8
DECAY = np.array([round(math.exp(-step / 128.0), 6) for step in range(1025)], np.float32)


def transmission(depth: Image, beta: float) -> Image:
    """Return t = exp(-β d) by table, for depths in metres."""
    clear: Image = np.take(DECAY, np.minimum(depth * f32(beta * 128.0), f32(1024.0)).astype(np.int32))
    return clear


def paint_sky(colour: list[Image], where: NDArray[np.int64], column: Image, row: Image, view: View, look: Look) -> None:
    """Write the sky into flat channels at pixels `where`: a gradient and clouds on a plane overhead."""
    x, y = np.take(column, where), np.take(row, where)
    right = (x - f32(view.centre[0] - 0.5)) * f32(1.0 / view.focal)
    up = (f32(view.centre[1] - 0.5) - y) * f32(1.0 / view.focal)
    rays = [right * f32(view.right[k]) + up * f32(view.up[k]) + f32(view.ahead[k]) for k in range(3)]
    rise = np.maximum(rays[1], f32(0.004))
    far = f32(1.0) / (rise + f32(0.06))
    cloud = _smooth(rays[0] * far * f32(22.0) + f32(20000.0), rays[2] * far * f32(22.0) + f32(20000.0)) + f32(0.5)
    cover = np.minimum(np.maximum((cloud - f32(0.78 - 0.5 * look.clouds)) * f32(4.0), f32(0.0)), f32(1.0)) * f32(
        min(1.0, look.clouds * 1.4)
    )
    fade = f32(1.0) - np.minimum(rise * f32(2.2), f32(1.0))
    fade *= fade
    cover *= f32(1.0) - fade * fade * f32(0.7)
    dim = (1.0 - look.night) * (1.0 - look.night)
    for k in range(3):
        glow = (0.035, 0.026, 0.022)[k] * look.night
        base = f32(look.zenith[k] * dim) + fade * f32((look.horizon[k] - look.zenith[k]) * dim + glow) + f32(0.006 * look.night)
        colour[k][where] = base + (f32(look.cloud[k] * dim + glow * 0.6) * (f32(0.8) + f32(0.4) * cloud) - base) * cover


def _smooth(x: Image, y: Image) -> Image:
    """Return the drift map at (x, y) in its texels, bilinear; coordinates are positive."""
    drift = atlas().drift
    i, j = x.astype(np.int32), y.astype(np.int32)
    a, b = x - i.astype(np.float32), y - j.astype(np.float32)
    i0, i1, j0, j1 = i & 255, (i + 1) & 255, (j & 255) << 8, ((j + 1) & 255) << 8
    flat = drift.reshape(-1)
    top = np.take(flat, j0 | i0) * (f32(1.0) - a) + np.take(flat, j0 | i1) * a
    low = np.take(flat, j1 | i0) * (f32(1.0) - a) + np.take(flat, j1 | i1) * a
    smooth: Image = top * (f32(1.0) - b) + low * b
    return smooth


def light_night(
    colour: list[Image], depth: Image, column: Image, row: Image, lights: list[Light], view: View, look: Look
) -> None:
    """Dim reflected light to dusk or night and relight it by street lamps and the camera car's headlights."""
    x = (column - f32(view.centre[0] - 0.5)) * f32(1.0 / view.focal) * depth
    y = (f32(view.centre[1] - 0.5) - row) * f32(1.0 / view.focal) * depth
    near = np.minimum(depth, f32(400.0))
    # a soft cone, below the level of the lens and fading with distance
    slope = y / depth
    beam = f32(1.0) / (f32(1.0) + (x / depth) * (x / depth) * f32(9.0)) * f32(1.0) / (f32(1.0) + near * near * f32(1 / 260.0))
    beam *= np.where(slope < f32(-0.01), f32(0.75), f32(0.16))
    dim = (1.0 - look.night) * (1.0 - look.night)
    light = [
        beam * f32(warm * look.night) + f32(dim + cool * look.night) for warm, cool in ((1.0, 0.022), (0.94, 0.026), (0.8, 0.04))
    ]
    pools = [lamp for lamp in lights if lamp.pool and -2.0 < lamp.position[2] < 75.0]
    for lamp in sorted(pools, key=lambda lamp: lamp.position[2])[:9]:
        px, py, pz = view.to_camera(np.array(lamp.position)).tolist()
        dx, dy, dz = x - f32(px), y - f32(py), depth - f32(pz)
        glow = f32(9.0 * look.night) / (f32(7.0) + dx * dx + dy * dy * f32(0.5) + dz * dz)
        for k in range(3):
            light[k] += glow * f32(lamp.colour[k])
    for k in range(3):
        colour[k] *= light[k]


def wet_road(colour: list[Image], ground: Image, view: View, look: Look) -> None:
    """Darken wet ground and mirror the scene about the horizon in it, more in puddles; images are (H, W)."""
    rows = view.rows
    horizon = view.centre[1] + view.ahead[1] / max(view.up[1], 0.1) * view.focal
    index = np.arange(rows)
    mirror = [np.clip((2.0 * horizon + shift * rows / 256.0 - index).astype(np.int64), 0, rows - 1) for shift in (-9, 0, 10)]
    at = np.arange(view.columns, dtype=np.float32) * f32(160.0 / view.columns) + f32(512.0)
    down = np.maximum(index.astype(np.float32) - f32(horizon), f32(1.0)) * f32(256.0 / rows)
    puddle = _smooth(
        np.broadcast_to(at, ground.shape),
        np.broadcast_to((f32(6000.0) / (down + f32(4.0)))[:, None], ground.shape).astype(np.float32),
    )
    strength = np.minimum(np.maximum(puddle * f32(2.5) + f32(0.42), f32(0.12)), f32(0.75)) * ground * f32(look.wet)
    for k in range(3):
        seen = (colour[k][mirror[0]] + colour[k][mirror[1]] + colour[k][mirror[2]]) * f32(1 / 3)
        colour[k] *= f32(1.0) - f32(0.45 * look.wet) * ground
        colour[k] += (seen * f32(0.8) - colour[k]) * strength


def veil(colour: list[Image], depth: Image, where_sky: NDArray[np.int64], look: Look, row: Image, view: View) -> None:
    """Add fog and haze over flat channels. The sky is veiled like something far away, less towards the zenith."""
    clear = transmission(depth, look.haze)
    if len(where_sky):
        height = np.maximum(f32(view.rows * 0.5) - np.take(row, where_sky), f32(0.0)) * f32(1.0 / view.focal)
        clear[where_sky] = transmission(f32(95.0) / (height + f32(0.16)), look.haze * 0.5)
    dim = (1.0 - look.night) * (1.0 - look.night)
    for k in range(3):
        air = f32(look.air[k] * (dim + 0.03 * look.night))
        colour[k] -= air
        colour[k] *= clear
        colour[k] += air


@functools.cache
def _halo() -> Image:
    """Return (65, 65) radial falloff, 1 in the middle and 0 at the rim."""
    step = (np.arange(65, dtype=np.float32) - f32(32.0)) / f32(32.0)
    square = np.minimum(step[:, None] * step[:, None] + step[None, :] * step[None, :], f32(1.0))
    rim = f32(1.0) - square
    falloff: Image = rim * rim / (f32(1.0) + f32(14.0) * square)
    return falloff


def halos(colour: list[Image], depth: Image, lights: list[Light], view: View, look: Look) -> None:
    """Add the bloom of lamps that nothing hides; images are (H, W)."""
    power = 0.9 * look.night + 0.35 * look.fog + 0.25 * look.rain
    if power <= 0.02:
        return
    for lamp in lights:
        point = view.to_camera(np.array(lamp.position))
        z = float(point[2])
        if not 2.0 < z < 110.0:
            continue
        x, y = view.to_screen(point).tolist()
        if not (0.0 <= x < view.columns and 0.0 <= y < view.rows) or float(depth[int(y), int(x)]) < z - 1.2:
            continue
        reach = int(max(3.0, lamp.halo * (1.0 + look.fog + 0.5 * look.rain) * view.focal / z))
        reach = min(reach, view.rows // 3)
        x0, y0, cx, cy = max(int(x) - reach, 0), max(int(y) - reach, 0), int(x), int(y)
        x1, y1 = min(cx + reach + 1, view.columns), min(cy + reach + 1, view.rows)
        u = (np.arange(x0, x1) - cx + reach) * 64 // (2 * reach)
        v = (np.arange(y0, y1) - cy + reach) * 64 // (2 * reach)
        glow = _halo()[v[:, None], u[None, :]] * f32(power * float(transmission(np.array([z], np.float32), look.haze * 0.5)[0]))
        for k in range(3):
            colour[k][y0:y1, x0:x1] += glow * f32(lamp.colour[k])


def falling(colour: list[Image], dice: Dice, view: View, look: Look) -> None:
    """Add rain streaks and snow flakes in the air; positions scale with the image."""
    rows, columns = view.rows, view.columns
    scale = rows / 256.0
    if look.rain > 0.0:
        overlay = np.zeros((rows, columns), np.uint8)
        slant = dice.between(-0.35, 0.35)
        for _ in range(int(330 * look.rain)):
            x, y, length = dice.draw() * columns, dice.draw() * rows * 1.1 - rows * 0.1, dice.between(5.0, 24.0) * scale
            line(overlay, (x, y), (x + slant * length, y + length), scale * 0.6, int(dice.between(14, 60)))
        _lay(colour, overlay, (0.75 - 0.5 * look.night) * (0.5 + 0.5 * look.rain))
    if look.snow > 0.0:
        overlay = np.zeros((rows, columns), np.uint8)
        for _ in range(int(420 * look.snow)):
            radius = dice.draw() * dice.draw() * 2.1 * scale + 0.35 * scale
            dot(overlay, dice.draw() * columns, dice.draw() * rows, radius, int(dice.between(70, 210)))
        _lay(colour, overlay, 0.85 - 0.55 * look.night)


def _lay(colour: list[Image], overlay: NDArray[np.uint8], white: float) -> None:
    cover = overlay.astype(np.float32) * f32(1 / 255)
    for channel in colour:
        channel += (f32(white) - channel) * cover

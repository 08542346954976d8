"""The camera's response: lens blur, vignette, colour balance and saturation, noise, tone curve, eight bits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgbench.streets.atlas import atlas
from dgbench.streets.dice import Dice, turn
from dgbench.streets.look import Look

Image = NDArray[np.floating[Any]]  # float32; NumPy's stubs lose that in arithmetic
f32 = np.float32


def develop(colour: list[Image], dice: Dice, look: Look, step: int) -> NDArray[np.uint8]:
    """Return (H, W, 3) uint8 from three linear (H, W) channels, `step` rows at a time."""
    rows, columns = colour[0].shape
    table = _curve(look.contrast)
    image = np.empty((rows, columns, 3), np.uint8)
    y = (np.arange(rows, dtype=np.float32) - f32(rows * 0.5)) * f32(2.0 / rows)
    x = (np.arange(columns, dtype=np.float32) - f32(columns * 0.5)) * f32(2.0 / columns)
    across = f32(1.0) - f32(look.vignette * 0.5) * (x * x)
    grain = atlas().grain
    starts = [dice.index(len(grain)) for _ in range(3)]
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        # one row more on either side for the blur
        above, below = max(top - 1, 0), min(bottom + 1, rows)
        channels = [_blur(channel[above:below], look.blur)[top - above : bottom - above] for channel in colour]
        if look.hue:
            channels = _turned(channels, look.hue)
        grey = channels[0] * f32(0.3) + channels[1] * f32(0.59) + channels[2] * f32(0.11)
        gain = f32(look.exposure) * (across[None, :] - f32(look.vignette * 0.5) * (y * y)[top:bottom, None])
        for k, channel in enumerate(channels):
            value = grey + (channel - grey) * f32(look.saturation)
            value *= gain * f32(look.balance[k])
            value = np.sqrt(np.minimum(np.maximum(value, f32(0.0)), f32(1.6)))
            if look.noise > 0.0:
                value += _grain(grain, starts[k] + top * columns, value.size).reshape(value.shape) * f32(look.noise)
            index = np.minimum(np.maximum(value * f32(1023.0 / 1.265), f32(0.0)), f32(1023.0)).astype(np.int32)
            image[top:bottom, :, k] = np.take(table, index)
    return image


def _turned(channels: list[Image], hue: float) -> list[Image]:
    """Return red, green and blue turned about the grey axis."""
    c, s = turn(hue)
    own, side = (1.0 + 2.0 * c) / 3.0, 0.577350 * s
    before, after = f32((1.0 - c) / 3.0 - side), f32((1.0 - c) / 3.0 + side)
    return [channels[k] * f32(own) + channels[k - 2] * before + channels[k - 1] * after for k in range(3)]


def _grain(grain: Image, start: int, count: int) -> Image:
    """Return `count` values of the endless repetition of `grain` from `start`."""
    start %= len(grain)
    piece = grain[start : start + count]
    while len(piece) < count:
        piece = np.concatenate([piece, grain[: count - len(piece)]])
    return piece


def _blur(image: Image, strength: float) -> Image:
    """Blend with a 1-2-1 binomial blur in both directions; sums of slices, so their order is fixed."""
    if strength <= 0.0:
        return image
    wide = image.copy()
    wide[:, 1:-1] += (image[:, :-2] + image[:, 2:] - image[:, 1:-1] - image[:, 1:-1]) * f32(0.25 * strength)
    out = wide.copy()
    out[1:-1] += (wide[:-2] + wide[2:] - wide[1:-1] - wide[1:-1]) * f32(0.25 * strength)
    return out


def _curve(contrast: float) -> NDArray[np.uint8]:
    """Return (1024,) bytes for square roots of linear light in 0..1.265: gamma 2.2, a soft shoulder, contrast."""
    levels = []
    for step in range(1024):
        light = (step / 1023.0 * 1.265) ** 2
        # Reinhard's shoulder with white at 1.6 keeps bright sky from clipping flat
        mapped = light * (1.0 + light / 2.56) / (1.0 + 0.35 * light)
        shown = 0.5 + (math.pow(mapped, 1.0 / 2.2) - 0.5) * contrast
        levels.append(min(255, max(0, math.floor(round(shown, 6) * 255.0 + 0.5))))
    return np.array(levels, np.uint8)

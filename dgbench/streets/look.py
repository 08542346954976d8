"""Appearance of one image: sun, sky, weather with its severity, and the camera's response, drawn from a style."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dgbench.streets.dice import Dice, turn
from dgbench.streets.mesh import Colour
from dgbench.streets.shade import Lighting
from dgbench.streets.style import WEATHERS, Style


@dataclass(frozen=True)
class Look:
    """Severities are 0..1 and 0 when that weather is absent. `haze` is the extinction β in 1/m."""

    lighting: Lighting
    sharp_sun: bool
    zenith: Colour
    horizon: Colour
    cloud: Colour
    clouds: float
    night: float
    rain: float
    fog: float
    snow: float
    haze: float
    air: Colour
    wet: float
    exposure: float
    contrast: float
    saturation: float
    balance: Colour
    noise: float
    blur: float
    vignette: float
    hue: float  # degrees by which all hues are turned


def draw_look(dice: Dice, style: Style, weather: str, severity: float | None) -> Look:
    """Draw a look. `weather` is "", one of `WEATHERS` or "any"; `severity` None draws that too.

    The draws do not depend on weather or severity, so the same image can be seen in each.
    """
    chosen = dice.pick(WEATHERS)
    weather = chosen if weather == "any" else weather
    drawn = dice.between(0.35, 1.0)
    amount = dict.fromkeys(WEATHERS, 0.0)
    if weather:
        amount[weather] = drawn if severity is None else severity
    night, rain, fog, snow = (amount[name] for name in WEATHERS)
    grim = min(1.0, 2.0 * max(rain, fog, snow))

    sunny = dice.chance(style.sunny)
    elevation, azimuth = dice.between(*style.sun_height), dice.between(0.0, 360.0)
    c, s = turn(azimuth)
    flat = math.sqrt(max(1.0 - elevation * elevation, 0.0))
    power = dice.between(0.75, 1.0) * (1.0 if sunny else 0.08) * (1.0 - 0.93 * grim) * (1.0 - night)
    low = max(0.0, 0.6 - elevation)
    sun_colour = (power * 1.0, power * (0.93 - 0.3 * low), power * (0.84 - 0.7 * low))
    ambient = dice.between(0.42, 0.55) if sunny else dice.between(0.72, 0.95)
    ambient = ambient + (0.8 - ambient) * max(grim, night)
    blue = 0.12 * (1.0 - grim) if sunny else 0.02
    sky = (ambient * (1.0 - blue), ambient, ambient * (1.0 + blue))
    bounce = (ambient * 0.52, ambient * 0.5, ambient * 0.47)

    if sunny:
        zenith, horizon = (0.1, 0.25, 0.62), (0.5, 0.66, 0.85)
        if low > 0.2 and dice.chance(0.5):
            horizon = (0.85, 0.6, 0.4)
        clouds, cloud = dice.between(0.0, 0.75), (0.85, 0.86, 0.88)
    else:
        grey = dice.between(0.5, 0.85)
        zenith, horizon = (grey * 0.86, grey * 0.9, grey * 0.96), (grey * 1.02, grey * 1.03, grey * 1.04)
        clouds, cloud = dice.between(0.5, 1.0), (grey * 0.72, grey * 0.74, grey * 0.78)
    grey = dice.between(0.42, 0.7)
    dull = (grey, grey * 1.01, grey * 1.03)
    zenith, horizon, cloud = (_blend(colour, dull, 0.9 * grim) for colour in (zenith, horizon, cloud))
    haze = dice.between(*style.haze)
    balance = (1.0 + style.tint * dice.between(-1.0, 1.0), 1.0, 1.0 + style.tint * dice.between(-1.0, 1.0))
    glow = (0.0, 0.1 + 2.0 * night + 0.4 * grim, 0.15 + 1.1 * night + 0.4 * grim, 0.9 * night, 0.1 + 2.4 * night, 0.85)
    lit = dice.between(0.1, 0.5)
    exposure, contrast, saturation = (
        dice.between(*style.exposure),
        dice.between(*style.contrast),
        dice.between(*style.saturation),
    )
    noise, blur, vignette = dice.between(*style.noise), dice.between(*style.blur), dice.between(*style.vignette)
    wet = dice.between(0.6, 1.0) * rain + (0.5 * night if dice.chance(0.3) else 0.0)
    # visibility (5 % contrast, 3/β) falls from 600 m to 25 m over the severity; rain and snow veil less
    beta = haze + fog * (0.005 + 0.115 * fog * fog) + 0.012 * rain * rain + 0.016 * snow * snow
    return Look(
        Lighting((flat * s, elevation, flat * c), sun_colour, sky, bounce, glow, lit, snow),
        sunny and power > 0.25,
        zenith,
        horizon,
        cloud,
        clouds,
        night,
        rain,
        fog,
        snow,
        beta,
        _blend(horizon, dull, grim),
        min(wet, 1.0),
        exposure,
        contrast,
        saturation * (1.0 - 0.3 * grim),
        balance,
        noise + 0.014 * night,
        blur + 0.25 * rain,
        vignette,
        dice.between(-style.hue, style.hue) if style.hue else 0.0,
    )


def _blend(a: Colour, b: Colour, t: float) -> Colour:
    return (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t)

"""The table of procedural domains: the place that seeds its scenes, its styles and its weather."""

from __future__ import annotations

import difflib

from dgbench.streets.pretraining import PRETRAINING
from dgbench.streets.style import ADVERSE, CITY, GAME, WEATHERS, WORLD, Style

PRETRAIN = "streets-pretrain"

# name -> its place, its styles (of several, each image draws one) and weather; "any" draws one of WEATHERS per image
STYLES: dict[str, tuple[str, tuple[Style, ...], str]] = {
    "streets-game": ("game", (GAME,), ""),
    "streets-city": ("city", (CITY,), ""),
    "streets-adverse": ("adverse", (ADVERSE,), "any"),
    **{f"streets-{weather}": ("adverse", (ADVERSE,), weather) for weather in WEATHERS},
    "streets-world": ("world", (WORLD,), ""),
    PRETRAIN: ("pretrain", PRETRAINING, ""),
}


def styles() -> tuple[str, ...]:
    """Return the names of all procedural domains."""
    return tuple(STYLES)


def parse(domain: str) -> tuple[str, tuple[Style, ...], str, float | None]:
    """Return (place, styles, weather, severity) of a name such as "streets-fog@0.6".

    Raises: ValueError for an unknown domain, or a severity that is out of range or not applicable.
    """
    name, at, text = domain.partition("@")
    if name not in STYLES:
        close = difflib.get_close_matches(name, STYLES, 1)
        raise ValueError(
            f"unknown streets domain `{name}`"
            + (f", did you mean `{close[0]}`?" if close else "")
            + f" Known: {', '.join(STYLES)}"
        )
    place, variants, weather = STYLES[name]
    if not at:
        return place, variants, weather, None
    if not weather:
        graded = ", ".join(known for known, entry in STYLES.items() if entry[2])
        raise ValueError(f"`{name}` has no severity, got `{domain}`; these take one: {graded}")
    try:
        severity = float(text)
    except ValueError:
        severity = -1.0
    if not 0.0 <= severity <= 1.0:
        raise ValueError(f"severity must be a number from 0 to 1, got `{text}` in `{domain}`")
    return place, variants, weather, severity

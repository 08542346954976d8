"""Procedural driving scenes with pixel-exact labels of the 19 Cityscapes classes: domain shift without a download."""

from dgbench.streets.render import VERSION, frequencies, render, styles, weather

__all__ = ["VERSION", "frequencies", "render", "styles", "weather"]

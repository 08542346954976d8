"""Procedural driving scenes with pixel-exact labels of the 19 Cityscapes classes: domain shift without a download."""

from dgbench.streets.compose import VERSION
from dgbench.streets.places import styles
from dgbench.streets.render import frequencies, render, weather

__all__ = ["VERSION", "frequencies", "render", "styles", "weather"]

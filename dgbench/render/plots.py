"""Plots as part of a page of HTML: SVG that takes its text colour from the page, and whose ids no other plot has."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_INK = re.compile(r"#000000\b")  # what matplotlib draws in black is of the page's colour, light or dark
_PAPER = re.compile(r"(?<=fill: )#ffffff\b")


class Plots:
    """The plots of one page."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def plot(self, name: str, draw: Callable[[Axes], None], *, width: float = 6, height: float = 3.8) -> Markup:
        """Return one panel as an element of HTML.

        Args:
            name: what a reader who does not see it is told.
            draw: draws on the panel.
            width, height: in inches.
        """
        from markupsafe import Markup

        from dgbench.render.outside import visible
        from dgbench.render.pictures import svg_of

        root = ElementTree.fromstring(svg_of(draw, width=width, height=height))
        _prefix_ids(root, f"plot-{next(self._numbers)}-")
        for parent in list(root.iter()):
            for child in list(parent):
                # its rules would hold for the whole page; who made it and of what type is said by no plot of a page
                if child.tag in (f"{{{_SVG}}}defs", f"{{{_SVG}}}metadata") and child.find(f"{{{_SVG}}}style") is not None:
                    parent.remove(child)
            if style := parent.get("style"):
                parent.set("style", _PAPER.sub("none", _INK.sub("currentColor", style)))
        for size in ("width", "height"):
            root.attrib.pop(size, None)
        root.set("role", "img")
        root.set("aria-label", visible(name))
        ElementTree.register_namespace("", _SVG)
        return Markup(ElementTree.tostring(root, encoding="unicode"))  # made by a library of escaped texts


def _prefix_ids(root: ElementTree.Element, prefix: str) -> None:
    """Give every id, and every reference to one, a prefix."""
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, prefix + value)
            elif key == f"{{{_XLINK}}}href":
                del element.attrib[key]
                element.set("href", value.replace("#", f"#{prefix}", 1))
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{prefix}"))

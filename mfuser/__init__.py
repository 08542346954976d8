"""MFuser and its baselines: models for domain-generalized semantic segmentation.

    model = mfuser.build("mfuser", vfm="tiny", vlm="tiny", image_size=(256, 256))
    model = mfuser.load("runs/...")  # of a run, or a folder that mfuser.save wrote
    scores = mfuser.slide(model, images, crop=(256, 256), stride=(170, 170))

Both return a model in evaluation mode. Names are resolved on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mfuser.authors import LoadReport, load_authors_checkpoint, to_authors_state_dict
    from mfuser.checkpoints import load, save
    from mfuser.inference import slide
    from mfuser.methods import build, options
    from mfuser.methods import names as method_names
    from mfuser.segmentor import Batch, Segmentor
    from mfuser.towers.weights import WeightsNotFound

_HOMES = {
    "Batch": "mfuser.segmentor:Batch",
    "LoadReport": "mfuser.authors:LoadReport",
    "Segmentor": "mfuser.segmentor:Segmentor",
    "WeightsNotFound": "mfuser.towers.weights:WeightsNotFound",
    "build": "mfuser.methods:build",
    "load": "mfuser.checkpoints:load",
    "load_authors_checkpoint": "mfuser.authors:load_authors_checkpoint",
    "method_names": "mfuser.methods:names",
    "options": "mfuser.methods:options",
    "save": "mfuser.checkpoints:save",
    "slide": "mfuser.inference:slide",
    "to_authors_state_dict": "mfuser.authors:to_authors_state_dict",
}
__all__ = [
    "Batch",
    "LoadReport",
    "Segmentor",
    "WeightsNotFound",
    "build",
    "load",
    "load_authors_checkpoint",
    "method_names",
    "options",
    "save",
    "slide",
    "to_authors_state_dict",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `mfuser` has no attribute `{name}`")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

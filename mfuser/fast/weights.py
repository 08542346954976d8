"""What a prepared copy holds in the run's type, what it keeps in fp32, and what it computes once.

Products run under autocast, as a training in 16 bits does, but their weights are in its type already. Kept wide are weights that
a method reads outside of autocast, those that the operators take in fp32, and layers whose outputs are class logits: in bf16 two
classes of nearly the same score would be equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mfuser.adapters import SpectralReins
from mfuser.fusion import MVFuser
from mfuser.segmentor import Segmentor
from mfuser.towers.prompts import PromptEncoder
from mfuser.towers.text import TextEncoder

_PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


class Wide(nn.Module):
    """A layer outside of autocast, in fp32: (..., in) of any type -> fp32."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.layer(x.float())
        return out


_KEPT = (SpectralReins, TextEncoder, PromptEncoder, Wide)  # the first for its Fourier transforms; texts are computed once


def hold(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights of products, in place."""
    kept = {id(part) for module in model.modules() if isinstance(module, _KEPT) for part in module.modules()}
    for module in model.modules():
        if isinstance(module, MVFuser):
            # the operator takes these in fp32
            kept |= {id(getattr(module, name)) for name in ("conv1d_x", "conv1d_z") if hasattr(module, name)}
    steps = {id(layer) for module in model.modules() if isinstance(module, MVFuser) for layer in (module.dt_proj,)}
    for module in model.modules():
        if not isinstance(module, _PRODUCTS) or id(module) in kept:
            continue
        for name, value in list(module._parameters.items()):
            if value is not None and value.is_floating_point() and not (name == "bias" and id(module) in steps):
                module._parameters[name] = nn.Parameter(value.detach().to(dtype), requires_grad=False)


def widen(model: Segmentor) -> None:
    """Put the layers that return class logits outside of autocast, in place."""
    classes = len(model.classes)
    for parent in list(model.modules()):
        if isinstance(parent, _KEPT):
            continue
        for name, layer in list(parent._modules.items()):
            gives = getattr(layer, "out_channels", None) or getattr(layer, "out_features", None)
            if isinstance(layer, nn.Conv2d | nn.Linear) and gives in (classes, classes + 1):
                parent._modules[name] = Wide(layer)


def hold_texts(model: Segmentor) -> bool:
    """Compute the class texts of a model in evaluation mode once, in place: no image changes them. Returns: whether it has any.

    Its parameters stay as they are, so that the model can still be saved; after a change of them the texts are stale.
    """
    held: Any = getattr(model, "text", None)
    contexts = getattr(model, "contexts", None)
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(held, TextEncoder) and isinstance(contexts, Tensor):
            found = held(contexts)
            vars(held)["forward"] = lambda contexts: found
            return True
        held = getattr(model, "prompts", None)
        if isinstance(held, PromptEncoder):
            embeddings = held()
            vars(held)["forward"] = lambda: embeddings
            return True
    return False

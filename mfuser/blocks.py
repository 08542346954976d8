"""A training's speed and memory, by the blocks of a model: compiled, their activations recomputed, frozen weights in 16 bits.

Blocks are the layers of towers (what a module calls `blocks` or `resblocks`) and of decoders, and fusers; of two towers that are
stepped together, a pair of blocks and the fuser between them are one. Nothing here changes a model's tensors, names or class:
`compile_blocks` or `recompute_blocks` changes how a block is called, and a copy of the model is without that; `FrozenWeights`
gives the whole weights back for saving, and a copy of the model has them in 16 bits, without what was padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mfuser import batch_first, keyed_dropout, patch_product
from mfuser.decoder.context_decoder import ContextDecoderLayer
from mfuser.decoder.mask_decoder import MaskDecoderLayer
from mfuser.decoder.mtenhancer import MTEnhancerLayer
from mfuser.decoder.pixel_decoder import ConvNorm, PixelDecoderLayer
from mfuser.folded_neck import fold
from mfuser.fusion import Fuser
from mfuser.lowrank import LowRankLinear
from mfuser.padded import ALIGN, pad_mlp, paddable
from mfuser.pairs import paired

_LISTS = ("blocks", "resblocks")
_LAYERS = (Fuser, PixelDecoderLayer, MaskDecoderLayer, MTEnhancerLayer, ContextDecoderLayer, ConvNorm)
# whose weights enter nothing but products, which autocast rounds to 16 bits at every call
_PRODUCTS = (
    *(nn.Linear, LowRankLinear, nn.modules.linear.NonDynamicallyQuantizableLinear, nn.MultiheadAttention),
    *(nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d),
)
# graphs of one block's code: one for each kind of block, of input and of gradient
_GRAPHS = 64


def compile_blocks(model: nn.Module) -> int:
    """Have blocks compiled when they are first called, forward and backward; equal blocks share a graph. Returns: how many.

    A neck of transposed convolutions and patch embeddings become matrix products (`mfuser.folded_neck`, `patch_product`): the
    same but for rounding. A block that cannot be compiled as a whole raises an error of `torch._dynamo.exc`. Dropouts in blocks
    draw as `mfuser.keyed_dropout` says: other numbers than without, but as well given by torch's seed, and the same for any
    number of processes and parts of a batch.
    """
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, _GRAPHS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * _GRAPHS)
    pairs = paired(model)
    inside = {id(module) for pair in pairs for module in pair.modules()}
    layers = [block for block in (*tower_blocks(model), *_layers(model)) if id(block) not in inside]
    found = [*pairs, *layers]
    fold(model)
    batch_first.take(model)
    patch_product.take(model)
    place = keyed_dropout.place_of(model) or keyed_dropout.Place()
    for block in found:
        keyed_dropout.key(block, place)
        block.compile(dynamic=False, fullgraph=True)
    return len(found)


def recompute_blocks(model: nn.Module) -> int:
    """Have the blocks of towers keep their inputs alone for the backward pass, which computes them again. Returns: how many.

    Gradients stay the same, bit for bit: generators are set back for the second time. Not for compiled blocks, whose second graph
    may be another than the first. Those of text towers are among them, and a fuser with the two blocks before it.
    """
    pairs = paired(model)
    inside = {id(module) for pair in pairs for module in pair.modules()}
    found = [*pairs, *(block for block in tower_blocks(model) if id(block) not in inside)]
    for block in found:
        call: Callable[..., Any] = block._call_impl
        # what Module.compile sets as well; Module.__call__ asks it first, and a copy of the module is without it
        block._compiled_call_impl = partial(checkpoint, call, use_reentrant=False)
    return len(found)


def tower_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model's towers that gradients pass through in training, those of `training_only` left out."""
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _LISTS and isinstance(module, nn.ModuleList | nn.Sequential) and not _apart(name):
            found |= {id(block): block for block in module}
    return list(found.values())


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS) and not _apart(name) and not name.startswith(inside or ("\0",)):
            inside = (*inside, f"{name}.")
            yield module


def _apart(name: str) -> bool:
    return name.startswith("training_only.")


class FrozenWeights:
    """Frozen weights of products, held in bf16 on the model's device and whole, as they were, on the CPU.

    Under autocast to bf16, results are the same as with the whole weights, bit for bit: it rounds them at every call. Norms,
    scales, embeddings and positions stay as they are, as does what the training alone needs (`training_only`).

    On a GPU, products of some widths are slow. Frozen MLPs of such a width (EVA02-L's) are held with zeros behind their hidden
    channels (`mfuser.padded`): the same but for rounding. The model's state shows them so, unless asked within `whole`.

    Attributes:
        padded: how many MLPs have zeros.
    """

    def __init__(self, model: nn.Module, *, device: torch.device | None = None, align: int | None = None) -> None:
        """Convert a model in place.

        Args:
            device: where it will be trained; None: where it is.
            align: of which hidden widths of MLPs are made a multiple; 0: they stay as they are; None: 64 on a GPU, 0 elsewhere.

        Raises: ValueError for an `align` that is no multiple of 8.
        """
        self._held: list[tuple[nn.Parameter, Tensor]] = []
        for name, module in model.named_modules():
            if type(module) not in _PRODUCTS or _apart(f"{name}."):
                continue
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad and parameter.dtype is torch.float32:
                    self._held.append((parameter, parameter.data.cpu()))
                    parameter.data = parameter.data.to(torch.bfloat16)
        if align is None:
            kind = device.type if device is not None else next((own.device.type for own, _ in self._held), "cpu")
            align = ALIGN if kind == "cuda" else 0
        self.padded = self._pad(model, align) if align else 0

    def _pad(self, model: nn.Module, align: int) -> int:
        converted = {id(parameter) for parameter, _ in self._held}
        found = 0
        for name, module in model.named_modules():
            if _apart(f"{name}.") or not paddable(module):
                continue
            layers = (module.fc1_g, module.fc1_x, module.fc2)
            if all(id(parameter) in converted for layer in layers for parameter in layer.parameters()):
                pad_mlp(module, align)
                found += 1
        return found

    def __len__(self) -> int:
        return len(self._held)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Give the model its whole weights within the block, for saving it."""
        halves = [parameter.data for parameter, _ in self._held]
        for parameter, whole in self._held:
            parameter.data = whole
        try:
            yield
        finally:
            for (parameter, _), half in zip(self._held, halves, strict=True):
                parameter.data = half

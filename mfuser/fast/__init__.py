"""Fast inference: a prepared copy of a model in 16 bits, compiled layer by layer, replayed from CUDA graphs.

    ready = mfuser.fast.prepare(model)
    scores = mfuser.slide(ready, images, crop=ready.image_size, stride=(341, 341))

The model itself stays as it is. What the copy does otherwise equals the model but for rounding (tests hold it to fp32): class
texts are computed once, what makes a transformer's tokens is one layer (`patches`), its blocks have fewer and larger products
(`blocks`), the neck is a matrix product with what follows it (`neck`), a pixel decoder begins and ends with one layer each
(`cells`), and so are MFuser's step of both towers (`mfuser.pairs`), what it makes of their tokens (`fused`), a step of a mask
decoder (`queries`) and what makes scores of its masks (`scored`). On a GPU, attention and norms are kernels of their own
(`attention`, `normed`). `weights` says what is in 16 bits and what is not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfuser import batch_first
from mfuser.fast import activated, attention, blocks, cells, fused, neck, patches, queries, scored, weights
from mfuser.fast.compiled import compile_layers, compiling, keep_in, seconds
from mfuser.fast.graphs import Graphs, windows_that_fit
from mfuser.fast.weights import hold_texts
from mfuser.pairs import paired
from mfuser.segmentor import Segmentor
from mfuser.towers.vit import VisionEncoder

__all__ = ["DTYPES", "Prepared", "hold_texts", "keep_in", "prepare", "seconds"]

DTYPES = (torch.bfloat16, torch.float32)
_USUAL_WINDOWS = 16  # at a time, where no memory is measured
# windows that go through together: each number is compiled and captured, so that they are few; 18 are those of 2048x1024
_TOGETHER = (1, 2, 4, 6, 8, 9, 12, 16, 18, 24, 32)
_MOST_SIZES = 16  # that are compiled


class Prepared:
    """A prepared copy: a function of images with the attributes that inference reads of a Segmentor.

    Attributes:
        method, classes, image_size, any_size, size_step, mixes_batch, ops, backend: the model's.
        dtype: of the products.    compiled, graphs: as asked for; graphs only on a GPU.
        rewritten: which of the model's parts run in another form, for a report; "attention" is the decoders', image by image.
        uncaptured: why there is no CUDA graph of a size, by its name, where it was tried.
    """

    def __init__(self, model: Segmentor, dtype: torch.dtype, *, compile: bool, graphs: bool, stream: torch.dtype) -> None:
        self.method, self.classes, self.image_size = model.method, model.classes, model.image_size
        self.any_size, self.size_step, self.mixes_batch = model.any_size, model.size_step, model.mixes_batch
        self.ops, self.backend = model.ops, model.backend
        self.dtype, self.compiled = dtype, compile
        device = next(model.parameters()).device
        self.graphs = graphs and device.type == "cuda"
        self._device, self._most, self._kept = device, 0, Graphs()
        self._sizes: set[tuple[int, ...]] = set()  # of images, that are compiled
        self._once: set[tuple[int, ...]] = set()  # that are not, as yet
        self.uncaptured = self._kept.refused
        with torch.inference_mode(False), torch.no_grad():
            self._model, self.rewritten = _copied(model, dtype, stream)
        if compile:
            compile_layers(self._model)
        self._has_masks = type(model).masks is not Segmentor.masks
        if self._has_masks:
            # scores are combined of masks outside of autocast, in fp32
            own = self._model.masks
            self._model.masks = lambda images: tuple(t.float() for t in _under(dtype, own, images))  # type: ignore[method-assign]

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return scores (B, K, H, W) in fp32, as the model's `forward` does; the next call leaves them alone.

        Raises: as `Segmentor.check_size`.
        """
        self.check_size(images)
        scores: Tensor = self._run("scores", self._scores, images)
        return scores

    @torch.inference_mode(False)
    @torch.no_grad()
    def masks(self, images: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return class and mask logits in fp32, as the model's `masks` does."""
        if not self._has_masks:
            return None
        self.check_size(images)
        logits, masks = self._run("masks", self._model.masks, images)
        return logits, masks

    def check_size(self, images: Tensor) -> None:
        """Raise as `Segmentor.check_size`."""
        self._model.check_size(images)

    def check_backends(self) -> None:
        """Raise as `Segmentor.check_backends`."""
        self._model.check_backends()

    def at_once(self, windows: int) -> int:
        """Return how many of so many windows go through together: one of a few numbers that fit the GPU's memory.

        What one and two windows take is measured once, without compiling. On a CPU at most 16 go together.
        """
        if not self._most:
            self._most = _USUAL_WINDOWS
            if self._device.type == "cuda":
                with torch.inference_mode(False), torch.no_grad(), self._conditions(eager=True):
                    self._most = windows_that_fit(self._scores, self.image_size, self._device)
        fitting = [size for size in _TOGETHER if size <= self._most]
        # the fewest windows that are shown in vain; a pass more costs about one
        return min(reversed(fitting), key=lambda size: -(-windows // size) * (size + 1))

    def _run(self, name: str, function: Callable[[Tensor], Any], images: Tensor) -> Any:
        with self._conditions(eager=self._uncompiled(images)):
            return self._kept.run(name, function, images) if self.graphs else function(images)

    @contextmanager
    def _conditions(self, *, eager: bool) -> Iterator[None]:
        """Compile or not, whatever autocast the caller has: the copy has its own types."""
        how: Any = nullcontext()
        if self.compiled:
            how = torch.compiler.set_stance("force_eager") if eager else compiling()
        with how, torch.autocast(self._device.type, enabled=False):
            yield

    def _uncompiled(self, images: Tensor) -> bool:
        """Return whether a size is not compiled: another than the model's own that comes for the first time, and a 17th."""
        size = tuple(images.shape)
        if size in self._sizes:
            return False
        own = tuple(images.shape[-2:]) == tuple(self.image_size)
        if len(self._sizes) < _MOST_SIZES and (own or size in self._once):
            self._sizes.add(size)
            return False
        self._once.add(size)
        return True

    def _scores(self, images: Tensor) -> Tensor:
        forward = self._model.forward
        scores: Tensor = forward(images) if self._has_masks else _under(self.dtype, forward, images)
        return scores.float()


def prepare(
    model: Segmentor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    compile: bool = True,
    graphs: bool = True,
    stream: torch.dtype | None = None,
    cache: Path | None = None,
) -> Prepared:
    """Return a fast copy of a model for inference, on the model's device; the model stays as it is.

    Args:
        dtype: of weights and activations of products, of `DTYPES`.
        compile: through torch.compile, layer by layer, when images of `image_size` come first, and those of another size a second
            time; of 16 sizes, with their numbers, at most.
        graphs: on a GPU, replay CUDA graphs for sizes that come again. Where one cannot be captured, there is a warning.
        stream: of the tokens between the blocks of a transformer; None: `dtype`, which moves less memory than fp32, and rounds
            them after every block.
        cache: folder where compiled graphs are kept, see `compiled.keep_in`.

    Raises: ValueError for a method that cannot, by its name and with the reason, and for another dtype.
    """
    names = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
    stream = dtype if stream is None else stream
    for what, given in (("dtype", dtype), ("stream", stream)):
        if given not in DTYPES:
            raise ValueError(f"{what} is {given}; fast inference takes {names}")
    if model.no_fast:
        raise ValueError(f"`{model.method}` has no fast inference: {model.no_fast}; score it in exact mode")
    if compile:
        keep_in(cache)
    return Prepared(model, dtype, compile=compile, graphs=graphs, stream=stream)


def _copied(model: Segmentor, dtype: torch.dtype, stream: torch.dtype) -> tuple[Segmentor, tuple[str, ...]]:
    """Return a rewritten copy in evaluation mode, and what was rewritten."""
    # teachers and banks are not of inference
    left_out = {id(model._modules[name]): nn.ModuleDict() for name in ("training_only",) if name in model._modules}
    copied = copy.deepcopy(model, dict(left_out))
    copied.eval().requires_grad_(False)
    copied.merge()
    done = []
    if hold_texts(copied):
        texts: Any = copied.text if isinstance(copied._modules.get("text"), nn.Module) else copied.prompts
        texts.tower = nn.Identity()  # nothing asks it again
        done.append("texts")
    for name, encoder in copied.named_modules():
        if isinstance(encoder, VisionEncoder):
            done += [f"{name}.blocks"] if blocks.take(encoder, dtype) else []
            done += [f"{name}.patches"] if patches.take(encoder, dtype, stream) else []
    done += ["neck"] if neck.take(copied, dtype) else []
    done += ["pixel decoder"] if cells.take(copied, dtype) else []
    done += ["pairs"] if _paired(copied, dtype) else []
    done += ["maps"] if fused.take(copied, dtype) else []
    done += ["attention"] if batch_first.take(copied, attention.attend) else []
    done += ["queries"] if queries.take(copied, dtype) else []
    done += ["scores"] if scored.take(copied) else []
    done += ["feed-forward"] if activated.take(copied, dtype) else []
    if dtype is not torch.float32:
        weights.widen(copied)
        weights.hold(copied, dtype)
    return copied, tuple(done)


def _paired(model: Segmentor, dtype: torch.dtype) -> bool:
    """Have a model of two towers step their rewritten blocks and the fuser between them as one; False for another model."""
    towers = [tower for tower in (getattr(model, name, None) for name in ("vfm", "vlm")) if isinstance(tower, VisionEncoder)]
    if not all(isinstance(block, blocks.Block) for tower in towers for block in tower.trunk.blocks):
        return False
    vars(model).pop("pair", None)  # those of a training have the blocks as they were
    if pairs := paired(model, dtype):
        model.pairs = nn.ModuleList(pairs)  # the compiler looks among the modules
    return bool(pairs)


def _under(dtype: torch.dtype, function: Callable[[Tensor], Any], images: Tensor) -> Any:
    """Return function(images) under autocast; of fp32 there is none."""
    # its cache would keep what a CUDA graph's memory holds
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not torch.float32, cache_enabled=False):
        return function(images)

"""Compilation of a prepared copy layer by layer: layers of one kind share one graph, and what is between them is not compiled."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from mfuser.decoder.context_decoder import ContextDecoderLayer
from mfuser.decoder.mtenhancer import MTEnhancer
from mfuser.decoder.pixel_decoder import PixelDecoderLayer
from mfuser.fast.blocks import Block
from mfuser.fast.cells import Enter, Leave
from mfuser.fast.fused import Describe, Halve, Tap
from mfuser.fast.neck import Enlarge, EnlargeTwice
from mfuser.fast.patches import Embedding
from mfuser.fast.queries import Advance, Memories
from mfuser.fast.scored import Score
from mfuser.pairs import Pair

LAYERS = (
    Embedding,
    Pair,
    Block,
    PixelDecoderLayer,
    Enter,
    Leave,
    Memories,
    Advance,
    Tap,
    Halve,
    Describe,
    MTEnhancer,
    ContextDecoderLayer,
    Enlarge,
    EnlargeTwice,
    Score,
)
_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # read whenever a graph is compiled; there is no other way to say it
# graphs of one layer's code, beyond which there is an error: one for each kind of it and number of images, of all models
_GRAPHS = 256


def compile_layers(model: nn.Module, kinds: tuple[type[nn.Module], ...] = LAYERS) -> int:
    """Have the layers of these kinds compiled when they are first called, in place. Returns: how many there are."""
    found = list(_outermost(model, kinds))
    for layer in found:
        # another size is another graph: shapes known in advance make the fastest kernels
        layer.compile(dynamic=False, fullgraph=True)
    return len(found)


def _outermost(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, kinds):
            yield child
        else:
            yield from _outermost(child, kinds)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Compile with a cache on the disk, and without torch's low limit of graphs."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    with dynamo.patch(recompile_limit=_GRAPHS, accumulated_recompile_limit=4 * _GRAPHS), inductor.patch(fx_graph_cache=True):
        yield


def keep_in(folder: Path | None = None) -> Path:
    """Have graphs kept in a folder, by default torch's own; where TORCHINDUCTOR_CACHE_DIR is set, it decides. Returns: where.

    Kernels for CPUs are kept apart by the vector instructions that they are made for: torch's cache does not tell them apart, and
    the wrong ones compute NaN or damage the heap (seen with torch 2.14, one of two processes with ATEN_CPU_CAPABILITY=avx2).
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    usual = default_cache_dir()
    if os.environ.get(_VARIABLE, usual) == usual:  # torch sets it, too, when it first asks
        capability = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "-")
        os.environ[_VARIABLE] = str((folder or Path(usual)) / f"torch-{torch.__version__}-{capability}")
    return Path(os.environ[_VARIABLE])


def seconds() -> float:
    """Return the seconds that torch's compiler has taken in this process so far."""
    # importing the compiler takes as long as torch itself, and without it nothing was compiled
    module = sys.modules.get("torch._dynamo.utils")
    return 0.0 if module is None else float(sum(module.compilation_time_metrics.get("_compile.compile_inner", ())))

"""What `lab speed` measures: training throughput of layers over the length, and generation with and without a constant memory.

Training: forward and backward of one layer of equal width, the same number of tokens a step at every length: a GRU (cuDNN's on a
GPU), causal attention (PyTorch's fused kernels), a time-invariant state space as a convolution (S4D), and Mamba's block (S6).
Generation: one token for each sequence, by a stack of Mamba blocks, whose memory is constant, and by a Transformer with as many
parameters and a cache of keys and values, which grows with the length; two Mamba blocks have as many as a Transformer's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgbench.cost.timing import Hardware, hardware, interleaved
from dgbench.environment import describe_environment
from dgbench.errors import DgbenchError
from dgbench.progress import Progress
from mfuser.ssm.mamba import Mamba
from mfuser.ssm.s4d import S4D
from mfuser.ssm.s6 import S6
from mfuser.ssm.ungated import Ungated

_HEAD = 64  # channels of an attention head


@dataclass(frozen=True, slots=True)
class Throughput:
    """A layer at one length, forward and backward; None: it did not fit into the memory."""

    layer: str
    length: int
    batch: int
    milliseconds: float | None
    tokens_per_second: float | None


@dataclass(frozen=True, slots=True)
class Generation:
    """A model that generates the token behind so many; None: it did not fit into the memory."""

    model: str
    length: int
    batch: int
    milliseconds: float | None  # of one token for each sequence
    tokens_per_second: float | None
    memory_mib: float  # what it remembers of all sequences


@dataclass(frozen=True, slots=True)
class Speeds:
    """Both measurements, with what they depend on."""

    hardware: Hardware
    environment: dict[str, str]
    dtype: str
    dim: int
    depth: int  # Mamba blocks of the generating stack
    parameters: dict[str, int]  # of the generating models
    graph: bool  # generation was timed as CUDA graphs
    training: tuple[Throughput, ...]
    generation: tuple[Generation, ...]


class _Recurrent(nn.Module):
    """A GRU; cuDNN's kernels run on a GPU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gru = nn.GRU(dim, dim, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.gru(x)[0]
        return out


class _Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, C) -> three of (B, heads, L, 64)."""
        q, k, v = (part.unflatten(-1, (-1, _HEAD)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(*self.heads(x), is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class _Transformer(nn.Module):
    """Blocks of attention and a feed-forward layer of four times the width, with a cache of keys and values."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2 * depth))
        self.attentions = nn.ModuleList(_Attention(dim) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(dim, 4 * dim, bias=False) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(4 * dim, dim, bias=False) for _ in range(depth))

    def step(self, x: Tensor, cache: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Take a token (B, C); its keys and values go to the last place of the cache, (B, heads, L, 64) each."""
        for number, (keys, values) in enumerate(cache):
            attention = self.attentions[number]
            assert isinstance(attention, _Attention)
            q, k, v = attention.heads(self.norms[2 * number](x)[:, None])
            keys[:, :, -1:], values[:, :, -1:] = k, v
            x = x + attention.out(F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(1))
            x = x + self.down[number](F.gelu(self.up[number](self.norms[2 * number + 1](x))))
        return x


class _MambaStack(nn.Module):
    """Residual Mamba blocks."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(depth))
        self.blocks = nn.ModuleList(_mamba(dim) for _ in range(depth))

    def step(self, x: Tensor, memory: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Take a token (B, C); the memory is updated in place."""
        for norm, block, old in zip(self.norms, self.blocks, memory, strict=True):
            assert isinstance(block, Mamba)
            out, new = block.step(norm(x), old)
            for place, value in zip(old, new, strict=True):
                place.copy_(value)
            x = x + out
        return x


def _mamba(dim: int) -> Mamba:
    return Mamba(dim, S6(2 * dim, rank=-(-dim // 16)))


_LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "GRU": _Recurrent,
    "attention": _Attention,
    "convolution (S4D)": lambda dim: Ungated(dim, S4D(dim, 16), glu=True),
    "selective scan (Mamba)": _mamba,
}


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What is timed."""

    lengths: Sequence[int] = (512, 2048, 8192, 32_768)  # of training
    generated: Sequence[int] = (1024, 4096, 16_384, 65_536)  # tokens behind which one is generated
    dim: int = 1024
    depth: int = 24  # Mamba blocks that generate; the Transformer has half as many
    tokens: int = 65_536  # of a training step at every length; a longer sequence is one
    batch: int = 16  # sequences that generate side by side
    dtype: str = "bf16"  # of the products (autocast) in training, of weights and cache in generation


_CPU = Size(lengths=(64, 256, 1024), generated=(64, 256, 1024), dim=64, depth=4, tokens=1024, batch=2, dtype="fp32")


def sized(device: torch.device, given: Mapping[str, Any]) -> Size:
    """Return the usual size on a device, with what was given.

    Raises: DgbenchError for a width, depth or type that cannot be timed.
    """
    size = dataclasses.replace(_CPU if device.type == "cpu" else Size(), **given)
    if size.dim < _HEAD or size.dim % _HEAD:
        raise DgbenchError(f"a width of {size.dim} has no heads of {_HEAD}", f"give --dim a multiple of {_HEAD}")
    if size.depth < 2 or size.depth % 2:
        raise DgbenchError(f"{size.depth} Mamba blocks have no Transformer of equal size", "give --depth an even number")
    if size.dtype not in _DTYPES:
        raise DgbenchError(f"unknown dtype `{size.dtype}`", f"choose from {', '.join(_DTYPES)}")
    return size


def speeds(size: Size, *, device: torch.device, progress: Progress, seconds: float = 0.3) -> Speeds:
    """Measure training over the length, and generation behind a number of tokens; `seconds` are for each timing."""
    lengths, generated, dim, depth = size.lengths, size.generated, size.dim, size.depth
    tokens, batch, dtype = size.tokens, size.batch, _DTYPES[size.dtype]
    progress.start("timing", len(lengths) * len(_LAYERS) + 2 * len(generated), "timings")
    training = [
        _trained(name, length, max(1, tokens // length), dim, device, dtype, seconds, progress)
        for length in lengths
        for name in _LAYERS
    ]
    torch.manual_seed(0)
    with torch.inference_mode():
        mamba = _cast(_MambaStack(dim, depth).to(device), dtype)
        transformer = _Transformer(dim, depth // 2).to(device, dtype)
        generation = []
        for length in generated:
            generation.append(_generated(mamba, length, batch, dim, device, dtype, seconds))
            generation.append(_generated(transformer, length, batch, dim, device, dtype, seconds))
            progress.advance(2)
    progress.stop()
    names = {"Mamba": mamba, "Transformer": transformer}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in names.items()}
    about = hardware(device)
    graph = device.type == "cuda"
    environment = describe_environment(about.name, torch.get_num_threads())
    if graph:
        environment |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return Speeds(about, environment, size.dtype, dim, depth, counts, graph, tuple(training), tuple(generation))


def _trained(
    name: str,
    length: int,
    batch: int,
    dim: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    progress: Progress,
) -> Throughput:
    torch.manual_seed(0)
    layer = _LAYERS[name](dim).to(device)
    x = torch.randn(batch, length, dim, device=device, requires_grad=True)

    def call() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = layer(x)
        out.float().mean().backward()

    spent = _median(call, device, seconds)
    progress.advance(1)
    return Throughput(name, length, batch, spent, None if spent is None else 1e3 * batch * length / spent)


def _generated(
    model: _MambaStack | _Transformer, length: int, batch: int, dim: int, device: torch.device, dtype: torch.dtype, seconds: float
) -> Generation:
    name = "Mamba" if isinstance(model, _MambaStack) else "Transformer"
    token = torch.randn(batch, dim, device=device, dtype=dtype)
    size, spent = 0, None
    try:
        if isinstance(model, _MambaStack):
            blocks = [block for block in model.blocks if isinstance(block, Mamba)]
            memory = [block.first_state(batch) for block in blocks]
            size = sum(part.nbytes for parts in memory for part in parts)
            spent = _median(_replayed(lambda: model.step(token, memory), device), device, seconds)
        else:
            shape = (batch, dim // _HEAD, length, _HEAD)
            size = 2 * len(model.attentions) * batch * dim * length * token.element_size()
            cache = [
                (torch.randn(shape, device=device, dtype=dtype), torch.randn(shape, device=device, dtype=dtype))
                for _ in model.attentions
            ]
            spent = _median(_replayed(lambda: model.step(token, cache), device), device, seconds)
    except torch.OutOfMemoryError:
        spent = None
    return Generation(name, length, batch, spent, None if spent is None else 1e3 * batch / spent, size / 2**20)


def _cast(stack: _MambaStack, dtype: torch.dtype) -> _MambaStack:
    """Give all weights a type but those of the recurrence, which stay in fp32."""
    precise = ("A_log", "D", "dt_proj.bias")
    for name, parameter in stack.named_parameters():
        if not name.endswith(precise):
            parameter.data = parameter.data.to(dtype)
    return stack


def _replayed(call: Callable[[], Tensor], device: torch.device) -> Callable[[], object]:
    """Return a CUDA graph of a call, so that launches do not count; on a CPU the call itself."""
    if device.type != "cuda":
        return call
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _median(call: Callable[[], object], device: torch.device, seconds: float) -> float | None:
    try:
        # the GPU's cache is left as it is: weights and memories of a step exceed it
        return interleaved({"": call}, device, at_most=seconds, least=3, flush=False)[""].median
    except torch.OutOfMemoryError:
        return None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()

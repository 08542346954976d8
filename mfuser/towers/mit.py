"""MiT, SegFormer's hierarchical transformer (Xie et al., NeurIPS 2021): an image to four maps of strides 4, 8, 16 and 32.

Patches overlap, keys and values come from a reduced map, and a depthwise convolution in each MLP takes the place of position
embeddings. Every size is taken, and nothing is padded to whole cells: a convolution of stride 2 gives half the size, rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.towers.meta import unfilled
from mfuser.towers.table import mits, tower

STRIDES = (4, 8, 16, 32)  # of the maps
_EPS = 1e-6  # of norms before attention, MLP and map; those behind convolutions have PyTorch's


class Attention(nn.Module):
    """Self-attention whose keys and values are those of a map reduced by a convolution, (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr: nn.Module | None = None
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, reduction)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Attend over the tokens of a map of (h, w) = `size`."""
        reduced = x if self.sr is None else self.norm(_tokens(self.sr(_map(x, size))))
        key, value = self.kv(reduced).chunk(2, -1)
        found = self.attend(*(self._by_head(part) for part in (self.q(x), key, value)))
        out: Tensor = self.proj(found.transpose(1, 2).flatten(2))
        return out

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return what queries (B, heads, N, d) find with keys and values (B, heads, M, d)."""
        return F.scaled_dot_product_attention(query, key, value)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    """Linear layer, depthwise 3x3 convolution, GELU, linear layer."""

    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.dwconv = nn.Conv2d(ratio * dim, ratio * dim, 3, padding=1, groups=ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        out: Tensor = self.fc2(F.gelu(_tokens(self.dwconv(_map(self.fc1(x), size)))))
        return out


class Block(nn.Module):
    """Attention and MLP, each behind a norm and with stochastic depth."""

    def __init__(self, dim: int, attention: Attention, drop_path: float) -> None:
        super().__init__()
        from timm.layers import DropPath  # here: the list of methods is read without timm

        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x), size))
        return out


class PatchEmbed(nn.Module):
    """Overlapping patches by a convolution, and a norm: (B, C, H, W) -> (B, D, H / stride, W / stride), rounded up."""

    def __init__(self, channels: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return _map(self.norm(_tokens(x)), (x.shape[-2], x.shape[-1]))


class Stage(nn.Module):
    """Patches, blocks and a norm, from a map to the next coarser one."""

    def __init__(self, patch_embed: PatchEmbed, block: Sequence[Block], dim: int) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.block = nn.ModuleList(block)
        self.norm = nn.LayerNorm(dim, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        size = (x.shape[-2], x.shape[-1])
        x = _tokens(x)
        for block in self.block:
            x = block(x, size)
        return _map(self.norm(x), size)


class MiT(nn.Module):
    """The four stages.

    Args:
        widths, depths, heads: of each stage.    reductions: of the side of the map of keys and values.
        drop_path: stochastic depth of the last block; it rises from 0 in equal steps.
        attention: makes each block's attention of (dim, heads, reduction).
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int] = (1, 2, 5, 8),
        reductions: Sequence[int] = (8, 4, 2, 1),
        drop_path: float = 0.1,
        attention: Callable[[int, int, int], Attention] = Attention,
    ) -> None:
        super().__init__()
        rates = iter([drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths))])
        before = 3
        made = []
        for i, (dim, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = [Block(dim, attention(dim, heads[i], reductions[i]), next(rates)) for _ in range(depth)]
            made.append(Stage(PatchEmbed(before, dim, *((7, 4) if i == 0 else (3, 2))), blocks, dim))
            before = dim
        self.stage1, self.stage2, self.stage3, self.stage4 = made
        self.apply(_initialise)


class MiTEncoder(nn.Module):
    """A MiT that gives the maps of its four stages.

    Attributes:
        channels: of the maps, finest first; their strides are `STRIDES`.
        stem_channels: of the map that `stem` gives.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, *, attention: Callable[[int, int, int], Attention] = Attention) -> None:
        """Build with random weights.

        Args:
            name: a MiT among TOWERS.    attention: makes each block's attention of (dim, heads, reduction).

        Raises: ValueError for another row, or an unknown name.
        """
        super().__init__()
        row = tower(name)
        if name not in mits():
            raise ValueError(f"`{name}` is no MiT; choose from {', '.join(mits())}")
        self.name, self.channels, self.stem_channels = name, row.channels, row.channels[0]
        if row.weights is None:
            self.trunk = MiT(row.channels, attention=attention, **row.options)
        else:
            # large: its parameters stay on the meta device until they are loaded, or drawn by `loading.fill`
            with unfilled():
                self.trunk = MiT(row.channels, attention=attention, **row.options)
        self.register_buffer("mean", torch.tensor(row.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(row.std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [0, 1] to four maps (B, C, h, w), finest first."""
        return self.maps(self.stem(self.normalised(images)))

    def normalised(self, images: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in [0, 1] with the tower's mean and deviation, in its precision."""
        normalised = (images - self.mean) / self.std
        kind = images.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):  # on shapes alone there is no autocast
            # of a model in 16 bits or fp64, whatever the images have
            normalised = normalised.to(next(self.trunk.parameters()).dtype)
        return normalised

    def stem(self, normalised: Tensor) -> Tensor:
        """Return the map (B, C, H/4, W/4) of the first stage, behind its norm."""
        out: Tensor = self.trunk.stage1(normalised)
        return out

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the four maps of what `stem` gives, which is the first of them."""
        found = [x]
        for stage in (self.trunk.stage2, self.trunk.stage3, self.trunk.stage4):
            found.append(stage(found[-1]))
        return found


def _tokens(x: Tensor) -> Tensor:
    """Map (B, C, h, w) to tokens (B, h * w, C)."""
    return x.flatten(2).transpose(1, 2)


def _map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (B, h * w, C) to a map (B, C, h, w)."""
    return x.transpose(1, 2).unflatten(2, size)


def _initialise(module: nn.Module) -> None:
    """Draw as SegFormer does: linear layers N(0, 0.02) cut off at two, convolutions by their fan-out; biases 0."""
    from timm.layers import trunc_normal_

    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)

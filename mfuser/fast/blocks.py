"""Blocks of plain transformers with fewer and larger operations than timm's, equal to them but for rounding.

One product makes queries, keys and values, also where a tower has a layer for each (EVA02), and one makes both halves of a
SwiGLU. Scales of a branch are part of its last weights. Rotary tables have rows for class and registers, too, which turn nothing.
Products are in the run's type; norms and their sums in fp32; tokens between blocks have the type in which they are given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.fast import normed
from mfuser.fast.activated import activated, joins
from mfuser.fast.attention import attend
from mfuser.fast.gated import fuses, gated_norm
from mfuser.padded import ALIGN, norm_of_padded
from mfuser.towers.vit import VisionEncoder


class Norm(nn.Module):
    """A layer norm, computed in fp32 (fp64 of fp64) and returned in a product's type."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype) -> None:
        super().__init__()
        wide = torch.promote_types(dtype, torch.float32)
        self.eps, self.dtype, self.wide = norm.eps, dtype, wide
        for name in ("weight", "bias"):
            value = getattr(norm, name)
            self.register_buffer(name, None if value is None else value.detach().to(wide), persistent=False)

    weight: Tensor | None
    bias: Tensor | None

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """(..., C) -> (..., C), the norm of x + added."""
        if normed.fuses(x, self.weight, self.dtype):
            assert self.weight is not None
            return normed.layer_norm(x, added, self.weight, self.bias, self.eps, self.dtype)
        x = x.to(self.wide) if added is None else x.to(self.wide) + added
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps).to(self.dtype)


class PaddedNorm(Norm):
    """The same of rows with `more` zeros behind their channels."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype, more: int) -> None:
        super().__init__(norm, dtype)
        self.width = norm.normalized_shape[-1]
        weight = torch.ones(self.width, dtype=self.wide) if self.weight is None else self.weight
        self.weight = F.pad(weight, (0, more))
        self.bias = None if self.bias is None else F.pad(self.bias, (0, more))

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """(..., C + more) -> the same."""
        assert self.weight is not None
        x = x.to(self.wide) if added is None else x.to(self.wide) + added
        return norm_of_padded(x, self.width, self.weight, self.bias, self.eps).to(self.dtype)


class Product(nn.Module):
    """A linear layer whose weight, of one or several layers over each other, is held in the run's type.

    Args:
        layers: of one input; those without a bias get one of zeros beside others that have one.
        scale: (out,) of what a single layer returns, multiplied into its weight and bias before they are rounded.
        more_rows, more_columns: zeros behind each layer's outputs, and behind the inputs.
    """

    def __init__(
        self,
        layers: list[nn.Linear],
        dtype: torch.dtype,
        scale: Tensor | None = None,
        *,
        more_rows: int = 0,
        more_columns: int = 0,
    ) -> None:
        super().__init__()
        weights = [F.pad(layer.weight.detach(), (0, more_columns, 0, more_rows)) for layer in layers]
        weight = torch.cat(weights) if len(layers) > 1 else weights[0]
        bias = None
        if any(layer.bias is not None for layer in layers):
            given = [(layer.bias, layer.weight.new_zeros(len(layer.weight))) for layer in layers]
            bias = torch.cat([F.pad(zeros if own is None else own.detach(), (0, more_rows)) for own, zeros in given])
        if scale is not None:
            weight, bias = weight * scale.detach()[:, None], None if bias is None else bias * scale.detach()
        self.register_buffer("weight", weight.to(dtype, copy=True), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.to(dtype, copy=True), persistent=False)

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight, self.bias)


class Block(nn.Module):
    """Attention and MLP, each beside a skip and behind a norm.

    Args:
        block: timm's, of which `reason` says nothing.    dtype: of products.
    """

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        attention, mlp = block.attn, block.mlp
        first, second = _scales(block)
        self.heads, self.halves = attention.num_heads, bool(getattr(attention, "rotate_half", False))
        self.norm1, self.norm2 = Norm(block.norm1, dtype), Norm(block.norm2, dtype)
        self.qkv = Product(_stacked(attention), dtype)
        self.q_norm, self.k_norm, self.inner = (
            _norm(part, dtype) for part in (attention.q_norm, attention.k_norm, attention.norm)
        )
        self.proj = Product([attention.proj], dtype, first)
        self.gated = hasattr(mlp, "fc1_g")
        # EVA02-L's 2730 are rows of no multiple of 16 bytes, for which products have slow kernels
        more = -mlp.fc2.in_features % ALIGN if self.gated else 0
        self.fc1 = Product([mlp.fc1_g, mlp.fc1_x] if self.gated else [mlp.fc1], dtype, more_rows=more)
        self.act, self.mlp_norm = mlp.act, _norm(mlp.norm, dtype, more)
        self.fc2 = Product([mlp.fc2], dtype, second, more_columns=more)
        self.joined = not self.gated and joins(self.act, self.fc1.bias, self.fc1.weight)
        self.fused = self.gated and fuses(self.act, self.mlp_norm, self.fc1.weight)
        self.hidden = mlp.fc2.in_features

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """(B, L, C) -> (B, L, C) in x's type; rope (2, L, D) of `table`."""
        with torch.autocast(x.device.type, enabled=False):
            attended = self._attended(self.norm1(x), rope)
            return x + attended + self.fc2(self._hidden(self.norm2(x, attended)))

    def _hidden(self, x: Tensor) -> Tensor:
        if self.joined:
            assert self.fc1.bias is not None
            return self.mlp_norm(activated(x, self.fc1.weight, self.fc1.bias, self.act))
        hidden: Tensor = self.fc1(x)
        if self.fused:
            norm: Any = self.mlp_norm
            return gated_norm(hidden, norm.weight, norm.bias, self.hidden, norm.eps)
        if self.gated:
            gate, hidden = hidden.chunk(2, -1)  # a padded one is zeros in both, and their product
            return self.mlp_norm(self.act(gate) * hidden)
        return self.mlp_norm(self.act(hidden))

    def _attended(self, x: Tensor, rope: Tensor | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._turned(q, rope), self._turned(k, rope)
        out = attend(q, k, v).transpose(1, 2).flatten(2)
        attended: Tensor = self.proj(self.inner(out))
        return attended

    def _turned(self, x: Tensor, rope: Tensor) -> Tensor:
        if self.halves:
            first, second = x.chunk(2, -1)
            other = torch.cat([-second, first], -1)
        else:
            other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * rope[1] + other * rope[0]


def table(rope: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """Return sine and cosine (2, prefix + N, D) of timm's rotary table (N, 2 D), for all tokens."""
    sine, cosine = rope.detach().chunk(2, -1)
    return torch.stack([F.pad(sine, (0, 0, prefix, 0)), F.pad(cosine, (0, 0, prefix, 0), value=1.0)]).to(dtype)


def reason(block: nn.Module) -> str:
    """Say why a block of a tower cannot be a `Block`; "" where it can."""
    from timm.layers import Mlp, SwiGLU
    from timm.layers.attention import Attention
    from timm.models.eva import EvaAttention, EvaBlock
    from timm.models.vision_transformer import Block as Plain

    b: Any = block
    if (type(block), type(getattr(block, "attn", None))) not in ((Plain, Attention), (EvaBlock, EvaAttention)):
        return f"{type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}"
    if type(b.mlp) not in (Mlp, SwiGLU):
        return f"an MLP of type {type(b.mlp).__name__}"
    if getattr(b.attn, "gate", None) is not None:
        return "a gate behind its attention"
    products = [
        *_stacked(b.attn),
        b.attn.proj,
        *(getattr(b.mlp, n) for n in ("fc1", "fc1_g", "fc1_x", "fc2") if hasattr(b.mlp, n)),
    ]
    norms = [b.norm1, b.norm2, b.attn.q_norm, b.attn.k_norm, b.attn.norm, b.mlp.norm]
    strange = [p for p in products if type(p) is not nn.Linear]
    strange += [n for n in norms if not isinstance(n, nn.LayerNorm | nn.Identity)]
    return f"a {type(strange[0]).__name__} where a plain layer is expected" if strange else ""


def take(encoder: VisionEncoder, dtype: torch.dtype) -> bool:
    """Replace the blocks of an encoder, in place, and keep its rotary table; False where they are of another build."""
    trunk = encoder.trunk
    mixed = bool(getattr(trunk, "rope_mixed", False))
    if mixed or any(reason(block) for block in trunk.blocks):
        return False
    rope = encoder.rope()
    turns = None if rope is None else table(rope, encoder.prefix, dtype)
    trunk.blocks = nn.ModuleList(Block(block, dtype) for block in trunk.blocks)
    if turns is not None:
        encoder.register_buffer("turns", turns, persistent=False)
        encoder.rope = lambda: encoder.turns  # type: ignore[method-assign,assignment,return-value]
    return True


def _stacked(attention: Any) -> list[nn.Linear]:
    """Return the layers of queries, keys and values: three, or the one that makes all."""
    if attention.qkv is None:
        return [attention.q_proj, attention.k_proj, attention.v_proj]
    if getattr(attention, "q_bias", None) is None:
        return [attention.qkv]
    whole = nn.Linear(attention.qkv.in_features, attention.qkv.out_features, device="meta")
    whole.weight = attention.qkv.weight
    whole.bias = nn.Parameter(torch.cat([attention.q_bias, attention.k_bias, attention.v_bias]).detach(), requires_grad=False)
    return [whole]


def _scales(block: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the scales of both branches."""
    if hasattr(block, "ls1"):
        found = [getattr(scale, "gamma", None) for scale in (block.ls1, block.ls2)]
        return found[0], found[1]
    return block.gamma_1, block.gamma_2


def _norm(norm: nn.Module, dtype: torch.dtype, more: int = 0) -> nn.Module:
    if not isinstance(norm, nn.LayerNorm):
        return nn.Identity()
    return PaddedNorm(norm, dtype, more) if more else Norm(norm, dtype)

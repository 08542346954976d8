"""The matrix products and attentions of a model's towers, alone: what the time of the whole model is compared with.

They are read off a forward pass on shapes alone and run as a bare sequence, one after the other with nothing between: no
norms, biases, activations, residuals or rotary tables. Each weight is a tensor of its own, as in a tower; inputs of equal shape
share one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dgbench.cost.timing import Call
from dgbench.errors import DgbenchError
from mfuser.towers.vit import VisionEncoder

_ALIGNED = 8  # numbers of 16 bits in the 16 bytes by which matrix units load


@dataclass(frozen=True, slots=True)
class Product:
    """`batch` products of (rows, inner) with (inner, columns).

    weight: the second factor is one, so that `batch` is 1.
    first, second: whether the training needs the gradient with regard to that factor.
    """

    batch: int
    rows: int
    inner: int
    columns: int
    weight: bool = True
    first: bool = False
    second: bool = False

    @property
    def flop(self) -> int:
        """Operations of the forward product, two a multiply-accumulate."""
        return 2 * self.batch * self.rows * self.inner * self.columns

    @property
    def training_flop(self) -> int:
        """Those of the forward product and of the gradients that the training needs."""
        return self.flop * (1 + self.first + self.second)


@dataclass(frozen=True, slots=True)
class Attention:
    """Scaled-dot-product attention: queries (B, H, L, D), keys (B, H, S, D), values (B, H, S, V), without a mask.

    gradient: whether the training needs those of queries, keys and values.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    gradient: bool = False

    @property
    def flop(self) -> int:
        """Operations of both products, two a multiply-accumulate."""
        return 2 * math.prod(self.query[:-1]) * self.key[-2] * (self.query[-1] + self.value[-1])

    @property
    def training_flop(self) -> int:
        """Those with the backward pass's five products, one of which computes the scores again, as fused kernels do."""
        scores = 2 * math.prod(self.query[:-1]) * self.key[-2]
        return self.flop + self.gradient * scores * (3 * self.query[-1] + 2 * self.value[-1])


Step = Product | Attention


def of_towers(towers: Sequence[VisionEncoder], batch: int, size: tuple[int, int]) -> list[Step]:
    """Return the products and attentions of towers on `batch` images, in the order of a pass, one tower after the other.

    Gradients are those of a training in which something trained stands behind every block, as MFuser's fusers do: the first block
    of a frozen tower needs none, the others those with regard to their inputs, and trained weights those with regard to them.

    Args:
        towers: on the meta device.    size: (H, W) of the images.

    Raises: DgbenchError for an operator with products that is not known here.
    """
    found: list[Step] = []
    with torch.enable_grad(), _Noted(found):
        for tower in towers:
            tokens, rope = tower.embed(torch.empty(batch, 3, *size, device="meta")), tower.rope()
            for i in range(tower.depth):
                tokens = tower.block(i, tokens, rope).detach().requires_grad_()
    return found


class _Noted(TorchFunctionMode):
    """Notes every call that multiplies matrices."""

    def __init__(self, found: list[Step]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = str(getattr(func, "__name__", ""))
        if name in _READ:
            self.found.append(_READ[name](out, *args, **kwargs))
        elif name.strip("_") in _UNREAD:
            raise DgbenchError(f"`{name}` has products that are not timed alone", "note it in dgbench/cost/products.py")
        return out


_OTHERS = ("conv1d", "conv3d", "conv_transpose2d", "multi_head_attention_forward", "tensordot")
_UNREAD = frozenset(("addmm", "baddbmm", "bilinear", "einsum", *_OTHERS))


def _linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Step:
    columns, inner = weight.shape
    return Product(1, x.numel() // inner, inner, columns, True, x.requires_grad, weight.requires_grad)


def _convolution(out: Tensor, x: Tensor, weight: Tensor, *rest: object, **named: object) -> Step:
    # the product that it is of unfolded images; patches of a transformer do not overlap
    columns = weight.shape[0]
    return Product(1, out.numel() // columns, weight[0].numel(), columns, True, x.requires_grad, weight.requires_grad)


def _product(out: Tensor, a: Tensor, b: Tensor) -> Step:
    rows, columns = out.shape[-2:]
    return Product(out.numel() // (rows * columns), rows, a.shape[-1], columns, False, a.requires_grad, b.requires_grad)


def _attention(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Step:
    if (rest and rest[0] is not None) or named.get("attn_mask") is not None or named.get("is_causal"):
        raise DgbenchError("attention with a mask is not timed alone", "note its mask in dgbench/cost/products.py")
    return Attention(tuple(query.shape), tuple(key.shape), tuple(value.shape), query.requires_grad)


_READ: dict[str, Any] = {
    "linear": _linear,
    "conv2d": _convolution,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("matmul", "__matmul__", "bmm", "mm"), _product),
}


def aligned(steps: Sequence[Step]) -> list[Step]:
    """Return the products with their widths padded to multiples of 8, which 16-bit matrix units load without detours."""

    def up(width: int) -> int:
        return -(-width // _ALIGNED) * _ALIGNED

    return [
        replace(step, inner=up(step.inner), columns=up(step.columns)) if isinstance(step, Product) and step.weight else step
        for step in steps
    ]


def bare(steps: Sequence[Step], device: torch.device, dtype: torch.dtype, *, training: bool = False) -> Call:
    """Return a call that runs them on random numbers; with `training`, also the gradients that they need, in reverse order."""
    tensors = _Tensors(device, dtype)
    runs = [_AttentionRun(s, tensors) if isinstance(s, Attention) else _ProductRun(s, tensors, training) for s in steps]

    def forward() -> None:
        with torch.no_grad():
            for run in runs:
                run.forward()

    def both() -> None:
        with torch.no_grad():
            kept = [run.kept() for run in runs]
            while kept:  # what was kept goes as in a training
                runs[len(kept) - 1].backward(kept.pop())

    return both if training else forward


class _Tensors:
    """Random numbers: weights each of their own, other tensors shared by what has the same role and shape."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)
        self.shared: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def fresh(self, *shape: int) -> Tensor:
        return (torch.randn(shape, device=self.device, generator=self.generator) / 8).to(self.dtype)

    def of(self, role: str, *shape: int) -> Tensor:
        key = (role, shape)
        if key not in self.shared:
            self.shared[key] = self.fresh(*shape)
        return self.shared[key]

    def of_heads(self, role: str, shape: tuple[int, ...]) -> Tensor:
        """(B, H, L, D), the heads of a token side by side in memory, as a projection leaves them."""
        batch, heads, length, width = shape
        return self.of(role, batch, length, heads, width).transpose(1, 2)


class _ProductRun:
    """A product with its tensors."""

    def __init__(self, step: Product, tensors: _Tensors, training: bool) -> None:
        self.step = step
        outer = () if step.weight else (step.batch,)
        self.a = tensors.of("input", *outer, step.rows, step.inner)
        self.b = tensors.fresh(step.columns, step.inner) if step.weight else tensors.of("other", *outer, step.inner, step.columns)
        needed = training and (step.first or step.second)
        self.above = tensors.of("gradient", *outer, step.rows, step.columns) if needed else None

    def forward(self) -> Tensor:
        return F.linear(self.a, self.b) if self.step.weight else self.a @ self.b

    kept = forward

    def backward(self, out: Tensor) -> None:
        if self.above is None:
            return
        if self.step.first:
            self.above @ (self.b if self.step.weight else self.b.mT)
        if self.step.second:
            self.above.mT @ self.a if self.step.weight else self.a.mT @ self.above


class _AttentionRun:
    """An attention with its tensors."""

    def __init__(self, step: Attention, tensors: _Tensors) -> None:
        self.step = step
        named = {"query": step.query, "key": step.key, "value": step.value}
        self.given = [tensors.of_heads(role, shape) for role, shape in named.items()]
        self.leaves = [each.detach().requires_grad_() for each in self.given]
        self.above = tensors.of_heads("attended", (*step.query[:-1], step.value[-1]))

    def forward(self) -> Tensor:
        query, key, value = self.given
        return F.scaled_dot_product_attention(query, key, value)

    def kept(self) -> Tensor:
        """Attend with a graph where the training needs it: a fused backward pass takes what the forward pass kept."""
        if not self.step.gradient:
            return self.forward()
        query, key, value = self.leaves
        with torch.enable_grad():
            return F.scaled_dot_product_attention(query, key, value)

    def backward(self, out: Tensor) -> None:
        if self.step.gradient:
            torch.autograd.grad(out, self.leaves, self.above)


def flop(steps: Sequence[Step], *, training: bool = False) -> int:
    """Return the operations of all steps."""
    return sum(step.training_flop if training else step.flop for step in steps)


def described(steps: Sequence[Step]) -> Iterator[str]:
    """Yield a line for each kind of step, with how often it is there."""
    counts: dict[str, int] = {}
    for step in steps:
        if isinstance(step, Attention):
            batch, heads, length, width = step.query
            text = f"attention of {batch} x {heads} heads, {length} by {step.key[-2]} tokens of {width}"
        else:
            text = f"product of {step.rows} x {step.inner} with {step.inner} x {step.columns}"
            text += f", {step.batch} at once" if step.batch > 1 else ""
        counts[text] = counts.get(text, 0) + 1
    for text, count in counts.items():
        yield f"{count} x {text}"

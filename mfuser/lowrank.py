"""Low-rank terms beside the weights of linear layers, y = x (W + s B A)' + b (LoRA, Hu et al., ICLR 2022).

The layers keep their places in a tower and their names of `weight` and `bias`; the factors A and B are `lora_a` and `lora_b`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FACTORS = ("lora_a", "lora_b")


class LowRankLinear(nn.Linear):
    """A linear layer with a low-rank term for its weight, or for each of several weights that are stacked by rows.

    Attributes:
        lora_a: (parts * rank, in).    lora_b: (out, rank); its rows of a part go with the rows of that part in `lora_a`.
        scale: s, alpha / rank.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, *, parts: int = 1) -> None:
        """Replace a layer, whose weight and bias it takes; its term is zero at first.

        Args:
            parts: how many weights are stacked in the layer's, 3 for queries, keys and values in one.

        Raises: ValueError for a rank beyond that of the weights.
        """
        # without a weight of its own, which would be drawn in vain
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.scale, self.parts = rank, alpha / rank, parts
        highest = min(self.in_features, self.out_features // parts)
        if not 0 < rank <= highest:
            shape = f"{self.out_features}x{self.in_features}"
            raise ValueError(f"rank {rank} is not one of 1..{highest}, which a layer of {shape} allows; choose a lower rank")
        self.lora_a = nn.Parameter(torch.empty(parts * rank, self.in_features))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        low = F.linear(x, self.lora_a).chunk(self.parts, -1)
        terms = [F.linear(part, b) for part, b in zip(low, self.lora_b.chunk(self.parts), strict=True)]
        term = terms[0] if self.parts == 1 else torch.cat(terms, -1)
        return F.linear(x, self.weight, self.bias) + self.scale * term

    def term(self) -> Tensor:
        """Return s B A, (out, in)."""
        pairs = zip(self.lora_a.chunk(self.parts), self.lora_b.chunk(self.parts), strict=True)
        return self.scale * torch.cat([b @ a for a, b in pairs])

    def weights(self) -> Sequence[Tensor]:
        """Return the weights that are stacked in the layer's."""
        return self.weight.detach().chunk(self.parts)

    @torch.no_grad()
    def take_components(self, matrices: Iterable[Tensor], *, largest: bool = False) -> None:
        """Set the term to `components` of matrices, one for each part."""
        pairs = [components(matrix, self.rank, self.scale, largest=largest) for matrix in matrices]
        self.lora_a.copy_(torch.cat([a for a, _ in pairs]))
        self.lora_b.copy_(torch.cat([b for _, b in pairs]))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a plain layer that computes the same."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.weight + self.term().to(self.weight.dtype), self.weight.requires_grad)
        plain.bias = self.bias
        return plain


def components(matrix: Tensor, rank: int, scale: float = 1.0, *, largest: bool = False) -> tuple[Tensor, Tensor]:
    """Return factors A (rank, in) and B (out, rank) of the part of a matrix with its smallest singular values (SoMA, CVPR 2025).

    With the singular value decomposition U S V' in fp32, A = sqrt(S / scale) V' and B = U sqrt(S / scale): the part is scale B A.

    Args:
        largest: of the largest singular values instead (PiSSA, NeurIPS 2024).
    """
    u, values, vt = torch.linalg.svd(matrix.detach().float(), full_matrices=False)
    chosen = slice(rank) if largest else slice(len(values) - rank, None)
    root = (values[chosen] / scale).sqrt()
    return root[:, None] * vt[chosen], u[:, chosen] * root


def add_low_rank(blocks: Iterable[nn.Module], rank: int, alpha: float) -> list[LowRankLinear]:
    """Replace the linear layers in attention and MLP of timm's transformer blocks, and return the new ones.

    Where one layer makes queries, keys and values, each has a term of its own.

    Raises: ValueError for an attention that does not call its layers, and for a rank that is too high.
    """
    added = []
    for block in blocks:
        attention: Any = block.attn
        if getattr(attention, "qkv", None) is not None and getattr(attention, "q_bias", None) is not None:
            raise ValueError("the tower's attention reads weights without calling its layers: low-rank terms would be ignored")
        for path, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear) and path.partition(".")[0] in ("attn", "mlp"):
                added.append(LowRankLinear(layer, rank, alpha, parts=3 if path == "attn.qkv" else 1))
                block.set_submodule(path, added[-1])
    return added


def factors(module: nn.Module) -> set[str]:
    """Return the names of all low-rank factors in a module, which no published file of a tower has."""
    paths = [path for path, layer in module.named_modules() if isinstance(layer, LowRankLinear)]
    return {f"{path}.{name}" for path in paths for name in _FACTORS}


def merge(module: nn.Module) -> bool:
    """Replace the low-rank layers in a module by plain ones that compute the same; return whether there were any."""
    layers = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, LowRankLinear)]
    for path, layer in layers:
        module.set_submodule(path, layer.merged())
    return bool(layers)

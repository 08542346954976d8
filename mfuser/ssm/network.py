"""The network of the selective copying task (Gu & Dao 2023, section 4.1.1): embedding, residual blocks, norm, linear head."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from mfuser.ssm.h3 import H3
from mfuser.ssm.hyena import LongConvolution
from mfuser.ssm.mamba import Mamba
from mfuser.ssm.s4 import S4
from mfuser.ssm.s4d import S4D
from mfuser.ssm.s6 import S6
from mfuser.ssm.ungated import Ungated

ARCHITECTURES = ("no gate", "h3", "mamba")
LAYERS = ("s4", "s4d", "hyena", "s6")
_EPS = 1e-5


class Network(nn.Module):
    """Blocks x + mixer(norm(x)) between an embedding and a head, without feed-forward blocks.

    Args:
        architecture: of `ARCHITECTURES`.    layer: of `LAYERS`.
        vocab: V.    dim: C.    depth: number of blocks.    length: L, the longest sequence, which Hyena's filter needs.
        backend: of S6's scan.    glu: behind a layer without a gate; None: behind S4 alone, as its authors have it.

    Raises: ValueError for an unknown architecture or layer.
    """

    def __init__(
        self,
        architecture: str,
        layer: str,
        *,
        vocab: int = 16,
        dim: int = 64,
        depth: int = 2,
        length: int = 4128,
        backend: str = "auto",
        glu: bool | None = None,
    ) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"unknown architecture `{architecture}`; there are: {', '.join(ARCHITECTURES)}")
        makers: dict[str, Callable[[int], nn.Module]] = {
            "s4": S4,
            "s4d": S4D,
            "hyena": lambda channels: LongConvolution(channels, length),
            "s6": lambda channels: S6(channels, rank=math.ceil(dim / 16), backend=backend),
        }
        if layer not in makers:
            raise ValueError(f"unknown layer `{layer}`; there are: {', '.join(LAYERS)}")

        def mixer() -> nn.Module:
            if architecture == "mamba":
                return Mamba(dim, makers[layer](2 * dim))
            if architecture == "h3":
                return H3(dim, makers[layer](dim))
            return Ungated(dim, makers[layer](dim), glu=layer in ("s4", "s4d") if glu is None else glu)

        self.embedding = nn.Embedding(vocab, dim)
        self.norms = nn.ModuleList(nn.RMSNorm(dim, eps=_EPS) for _ in range(depth))
        self.mixers = nn.ModuleList(mixer() for _ in range(depth))
        self.norm_f = nn.RMSNorm(dim, eps=_EPS)
        self.head = nn.Linear(dim, vocab, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self.mixers:
            # as Mamba's language models start: residual branches by the root of their number, no biases but those of steps
            out = block.output_linear if isinstance(block, Ungated) else block.out_proj
            assert isinstance(out, nn.Linear)
            out.weight.data /= math.sqrt(depth)
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear) and module.bias is not None and not name.endswith("dt_proj"):
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, read: int | None = None) -> Tensor:
        """Tokens (B, L) to logits (B, L, V), or to those of the last `read` tokens alone."""
        x = self.embedding(tokens)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        last = x if read is None else x[:, -read:]
        logits: Tensor = self.head(self.norm_f(last))
        return logits

"""The block without a gate: a sequence layer, GELU, and a projection of each token.

The authors' S4 projects to twice the width and multiplies one half by the sigmoid of the other (`glu`). This happens within one
token, behind the layer; it is not the gate that the Mamba paper's column "no gate" means.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Ungated(nn.Module):
    """A sequence layer over (B, L, C) and a projection.

    Args:
        dim: C.    layer: takes and returns (B, L, C), its skip connection included.
        glu: project to 2 C and halve by a gated linear unit.
    """

    def __init__(self, dim: int, layer: nn.Module, *, glu: bool) -> None:
        super().__init__()
        self.layer, self.glu = layer, glu
        self.output_linear = nn.Linear(dim, 2 * dim if glu else dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C), without the residual."""
        out = self.output_linear(F.gelu(self.layer(x)))
        return F.glu(out, -1) if self.glu else out

"""The block of Mamba (Gu & Dao 2023, section 3.4): one gate around a short convolution and a sequence layer.

    x, z = W_in u;    y = W_out (layer(silu(conv(x))) * silu(z))

With S6 as the layer it is mamba_ssm's `Mamba`, whose state dict `to_mamba_ssm` and `from_mamba_ssm` write and read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.ssm.convolution import short_convolution
from mfuser.ssm.s6 import S6

_OF_THE_LAYER = ("x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D")
_OF_THE_BLOCK = ("in_proj.weight", "conv1d.weight", "conv1d.bias", "out_proj.weight")


class Mamba(nn.Module):
    """A sequence layer over (B, L, E), gated, between projections from and to (B, L, C).

    Args:
        dim: C.    layer: takes and returns (B, L, E) with E = expand * C, its skip connection included.
        expand: E / C.    taps: of the short convolution.
    """

    def __init__(self, dim: int, layer: nn.Module, *, expand: int = 2, taps: int = 4) -> None:
        super().__init__()
        inner = expand * dim
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, taps, groups=inner)
        self.layer = layer
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C), without the residual."""
        x, z = self.in_proj(u).chunk(2, -1)
        out: Tensor = self.out_proj(self.layer(F.silu(short_convolution(x, self.conv1d))) * F.silu(z))
        return out

    def first_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return what a block with S6 remembers before the first token: the convolution's last inputs, and the state."""
        weight = self.conv1d.weight
        return weight.new_zeros(batch, len(weight), weight.shape[-1] - 1), _s6(self).first_state(batch)

    def step(self, u: Tensor, memory: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Take one token (B, C) and what is remembered; return its output and what is remembered after it."""
        window, state = memory
        x, z = self.in_proj(u).chunk(2, -1)
        inputs = torch.cat([window, x[..., None]], -1)
        taps = F.conv1d(inputs, self.conv1d.weight, self.conv1d.bias, groups=len(self.conv1d.weight))
        x = F.silu(taps[..., 0])
        y, state = _s6(self).step(x, state)
        return self.out_proj(y * F.silu(z)), (inputs[..., 1:], state)


def _s6(block: Mamba) -> S6:
    if not isinstance(block.layer, S6):
        raise TypeError(f"only a block around S6 runs token by token and has mamba_ssm's form, not {type(block.layer).__name__}")
    return block.layer


def to_mamba_ssm(block: Mamba) -> dict[str, Tensor]:
    """Return the state dict of mamba_ssm's `Mamba` of the same size.

    Raises: TypeError for a block around another layer than S6.
    """
    _s6(block)
    own = block.state_dict()
    return {**{key: own[key] for key in _OF_THE_BLOCK}, **{key: own[f"layer.{key}"] for key in _OF_THE_LAYER}}


def from_mamba_ssm(state: Mapping[str, Tensor]) -> Mamba:
    """Return the block that a state dict of mamba_ssm's `Mamba` describes, with its weights.

    Raises: ValueError naming the tensors that are missing or not known, such as biases of the projections.
    """
    wanted = {*_OF_THE_BLOCK, *_OF_THE_LAYER}
    if wrong := wanted ^ state.keys():
        raise ValueError(f"not the state of mamba_ssm's Mamba: {', '.join(sorted(wrong))} missing or unknown")
    inner, dim = state["x_proj.weight"].shape[1], state["in_proj.weight"].shape[1]
    layer = S6(inner, state["A_log"].shape[1], state["dt_proj.weight"].shape[1])
    block = Mamba(dim, layer, expand=inner // dim, taps=state["conv1d.weight"].shape[-1])
    block.load_state_dict({(f"layer.{key}" if key in _OF_THE_LAYER else key): value for key, value in state.items()})
    return block.to(state["D"].dtype)

"""Fusion of two token sequences: MVFuser, parts of it left out or added, and what its paper compares it with.

Every fuser takes the tokens of both towers and returns what to add to each; `FUSERS` has them by name. A `JointFuser` also adapts
one tower alone, by `mix`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.deformable import DeformableAttention, cell_centres
from mfuser.ops import mvfuser, selective_scan
from mfuser.ops.mvfuser import check, empty, plan
from mfuser.ssm.steps import reset_steps


class Fuser(nn.Module):
    """The face of all fusers."""

    def forward(self, vfm: Tensor, vlm: Tensor) -> tuple[Tensor, Tensor]:
        """Foundation tokens (B, L1, C) and vision-language tokens (B, L2, C) to what is added to each."""
        raise NotImplementedError(f"{type(self).__name__}.forward")


class JointFuser(Fuser):
    """A fuser of one sequence, the foundation tower's tokens first. A subclass says how it is mixed."""

    def mix(self, joint: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C), without a residual."""
        raise NotImplementedError(f"{type(self).__name__}.mix")

    def forward(self, vfm: Tensor, vlm: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L1, C), (B, L2, C) -> (B, L1, C), (B, L2, C)."""
        joint = self.mix(torch.cat([vfm, vlm], 1))
        first, second = joint.split([vfm.shape[1], vlm.shape[1]], 1)
        return first, second


class GatedRMSNorm(nn.Module):
    """x / rms(x) * weight * silu(z), over the last dimension (Mamba-2's norm, norm before gate); without z not gated."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """(..., D), (..., D) -> (..., D) in x's dtype; the mean of squares is taken in fp32."""
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return (normed if z is None else normed * F.silu(z.to(normed.dtype))).to(x.dtype)


class MVFuser(JointFuser):
    """A Mamba mixer in a bottleneck: half the channels are scanned, the other half gate them (paper, section 3.2).

    The scan runs once, from the first token to the last: information flows from the foundation tower to the
    vision-language tower, and not back.

    Args:
        dim: C.    state: N.    dropout: of the output, in training.
        backend: of the whole block; one without kernels for it runs `composed`, with its scan.
        double_bias: the steps' bias is added twice, as the release does, else once.
        double_gate: the gate passes SiLU twice, as in the release, else once.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: int = 16,
        dropout: float = 0.1,
        backend: str = "auto",
        double_bias: bool = True,
        double_gate: bool = True,
    ) -> None:
        super().__init__()
        self.double_bias, self.double_gate = double_bias, double_gate
        half, rank = dim // 2, math.ceil(dim / 16)
        self.state, self.rank, self.backend = state, rank, backend
        self.in_proj = nn.Linear(dim, dim, bias=False)
        # the authors' convolutions have no bias: their flag is True // 2, which is 0
        self.conv1d_x = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False)
        self.conv1d_z = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False)
        self.x_proj = nn.Linear(half, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, half)
        self.A_log = nn.Parameter(torch.arange(1, state + 1, dtype=torch.float32).log().repeat(half, 1))
        self.D = nn.Parameter(torch.ones(half))
        self.norm = GatedRMSNorm(half)
        self.out_proj = nn.Linear(half, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.scale = nn.Parameter(torch.tensor(0.001))
        reset_steps(self.dt_proj)

    def mix(self, joint: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        backends = plan(self.backend, self.in_proj.weight, self.A_log)
        if backends is None:
            return self.composed(joint)
        out = mvfuser(
            joint,
            *self._weights(),
            eps=self.norm.eps,
            double_bias=self.double_bias,
            double_gate=self.double_gate,
            backends=backends,
        )
        dropped: Tensor = self.dropout(out) if self.dropout.training else out
        return dropped

    def _weights(self) -> tuple[Tensor, ...]:
        """In the operator's order."""
        dt_proj = self.dt_proj
        return (
            self.in_proj.weight,
            self.conv1d_x.weight,
            self.conv1d_z.weight,
            self.x_proj.weight,
            dt_proj.weight,
            dt_proj.bias,
            self.A_log,
            self.D,
            self.norm.weight,
            self.out_proj.weight,
            self.scale,
        )

    def composed(self, joint: Tensor) -> Tensor:
        """Return the same of plain modules: the truth for the kernels."""
        check(joint, self._weights())
        if joint.numel() == 0:
            return empty(joint, tuple(self.parameters()))
        x, z = self.in_proj(joint).transpose(1, 2).chunk(2, 1)  # (B, C/2, L) each
        x, z = F.silu(self.conv1d_x(x)), self.conv1d_z(z)
        # the norm's gate is SiLU, so that z goes through it twice
        z = F.silu(z) if self.double_gate else z
        gated = self.norm(self._scanned(x.transpose(1, 2)), z.transpose(1, 2))
        out: Tensor = self.dropout(self.out_proj(gated)) * self.scale
        return out

    def _scanned(self, x: Tensor) -> Tensor:
        """(B, L, C/2) -> (B, L, C/2)."""
        return self._scan(x, self.x_proj, self.dt_proj, self.A_log, self.D)

    def _scan(self, x: Tensor, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, D: Tensor) -> Tensor:
        rank, B, C = x_proj(x).split([self.rank, self.state, self.state], -1)
        # the linear layer adds its bias, and the scan adds it again: the authors' weights rely on both
        delta = dt_proj(rank) if self.double_bias else F.linear(rank, dt_proj.weight)
        return selective_scan(
            x,
            delta,
            -A_log.float().exp(),
            B,
            C,
            D.float(),
            delta_bias=dt_proj.bias.float(),
            delta_softplus=True,
            backend=self.backend,
        )


class BidirectionalMVFuser(MVFuser):
    """MVFuser that is scanned both ways, so that the vision-language tower informs the foundation tower, too.

    The bidirectional block of Vision Mamba (Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with
    Bidirectional State Space Model", ICML 2024): (B, L, C) -> (B, L, C) with projections, convolutions and gate shared
    by both directions, which are (B, L, C/2) each and are added before the gated norm. Steps, B, C, A and D are each
    direction's own. The convolutions look both ways already, so that the second direction needs none of its own.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: int = 16,
        dropout: float = 0.1,
        backend: str = "auto",
        double_bias: bool = True,
        double_gate: bool = True,
    ) -> None:
        super().__init__(dim, state=state, dropout=dropout, backend=backend, double_bias=double_bias, double_gate=double_gate)
        half = dim // 2
        self.x_proj_b = nn.Linear(half, self.rank + 2 * state, bias=False)
        self.dt_proj_b = nn.Linear(self.rank, half)
        self.A_log_b = nn.Parameter(self.A_log.detach().clone())
        self.D_b = nn.Parameter(torch.ones(half))
        reset_steps(self.dt_proj_b)

    def mix(self, joint: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        return self.composed(joint)  # the kernels scan one way

    def _scanned(self, x: Tensor) -> Tensor:
        backward = self._scan(x.flip(1), self.x_proj_b, self.dt_proj_b, self.A_log_b, self.D_b)
        return super()._scanned(x) + backward.flip(1)


class UngatedMVFuser(MVFuser):
    """MVFuser without its gate z: half the channels are scanned, and nothing multiplies what the scan returns.

    The half of the projection and the convolution that make z are left out with it. Arguments are MVFuser's; `double_gate` has
    no effect.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: int = 16,
        dropout: float = 0.1,
        backend: str = "auto",
        double_bias: bool = True,
        double_gate: bool = True,
    ) -> None:
        super().__init__(dim, state=state, dropout=dropout, backend=backend, double_bias=double_bias, double_gate=double_gate)
        self.in_proj = nn.Linear(dim, dim // 2, bias=False)
        del self.conv1d_z

    def mix(self, joint: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        return self.composed(joint)  # the kernels have the gate

    def composed(self, joint: Tensor) -> Tensor:
        """Return the same of plain modules: there is no other form."""
        x = F.silu(self.conv1d_x(self.in_proj(joint).transpose(1, 2)))
        out: Tensor = self.dropout(self.out_proj(self.norm(self._scanned(x.transpose(1, 2))))) * self.scale
        return out


class SelfAttnConcat(JointFuser):
    """Self-attention over the tokens of both towers: the paper's ablation "self-attn (concat)".

    MVFuser's own scale of 0.001 keeps it from disturbing frozen towers at first. The paper's counts of parameters leave
    no room for one here, so that the output projection starts at zero instead, as in the other ablations.

    Args:
        dim: C.    dropout: of the output, in training.
    """

    def __init__(self, dim: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.attention = self_attention(dim)
        self.dropout = nn.Dropout(dropout)

    def mix(self, joint: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        attended, _ = self.attention(joint, joint, joint, need_weights=False)
        out: Tensor = self.dropout(attended)
        return out


class SelfAttnSeparate(Fuser):
    """Self-attention in each tower alone: as much to learn and nothing fused, the paper's ablation "self-attn (separate)".

    Args:
        dim: C.    dropout: of the outputs, in training.
    """

    def __init__(self, dim: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.vfm_attention, self.vlm_attention = self_attention(dim), self_attention(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, vfm: Tensor, vlm: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L1, C), (B, L2, C) -> (B, L1, C), (B, L2, C)."""
        first, _ = self.vfm_attention(vfm, vfm, vfm, need_weights=False)
        second, _ = self.vlm_attention(vlm, vlm, vlm, need_weights=False)
        return self.dropout(first), self.dropout(second)


class BiDeformAttn(Fuser):
    """Deformable attention across the patch grids of both towers: the paper's ablation "bi-deform-attn", reconstructed.

    The authors released no code of it. Its numbers of parameters and multiply-adds (3.35 M, 34.65 G) are met exactly by
    one attention over both grids as two maps, 8 heads with 4 points in each, and a projection of the queries, on patches
    alone: class and register tokens have no place on a grid, and get zeros. Each patch looks around its own place in
    both grids, so that each tower informs the other.

    Args:
        dim: C, a multiple of 8.    grid: (rows, columns) of patches, the same in both towers.
        prefixes: class and register tokens before the patches, of the foundation and the vision-language tower.
        dropout: of the outputs, in training.    backend: of the sampling.
    """

    def __init__(
        self, dim: int, grid: tuple[int, int], prefixes: tuple[int, int], *, dropout: float = 0.1, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.grid, self.prefixes = grid, prefixes
        self.query_proj = nn.Linear(dim, dim)
        self.attention = DeformableAttention(dim, heads=8, scales=2, points=4, backend=backend)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.query_proj.weight)
        nn.init.zeros_(self.query_proj.bias)
        nn.init.zeros_(self.attention.output_proj.weight)

    def forward(self, vfm: Tensor, vlm: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L1, C), (B, L2, C) -> (B, L1, C), (B, L2, C).

        Raises: ValueError for other numbers of tokens than those of the prefixes and the grid.
        """
        (rows, columns), cells = self.grid, self.grid[0] * self.grid[1]
        lengths, expected = (vfm.shape[1], vlm.shape[1]), tuple(prefix + cells for prefix in self.prefixes)
        if lengths != expected:
            raise ValueError(
                f"bi_deform_attn: the towers have {lengths[0]} and {lengths[1]} tokens, expected {expected[0]} and "
                f"{expected[1]}: {self.prefixes[0]} and {self.prefixes[1]} before a grid of {rows} x {columns}"
            )
        first, second = self.prefixes
        patches = torch.cat([vfm[:, first:], vlm[:, second:]], 1)
        # a place is the same share of both grids
        places = cell_centres(rows, columns, device=patches.device).repeat(2, 1)
        attended = self.dropout(self.attention(self.query_proj(patches), patches, places, [self.grid, self.grid]))
        dd, dv = attended.split(cells, 1)
        return F.pad(dd, (0, 0, first, 0)), F.pad(dv, (0, 0, second, 0))


def self_attention(dim: int) -> nn.MultiheadAttention:
    """Attention with heads of 64 channels, as the towers have them, that returns zeros at first."""
    attention = nn.MultiheadAttention(dim, max(1, dim // 64), batch_first=True)
    nn.init.zeros_(attention.out_proj.weight)  # its bias is zero already
    return attention


@dataclass(frozen=True)
class Site:
    """Where a model puts its fusers, and what its options say to them: each takes what concerns it."""

    dim: int  # C, of both towers
    grid: tuple[int, int]  # (rows, columns) of patches, of both towers
    prefixes: tuple[int, int]  # class and register tokens before them, of foundation and vision-language tower
    state: int = 16  # of scans
    dropout: float = 0.1
    backend: str = "auto"
    double_bias: bool = True  # of MVFuser, as the next
    double_gate: bool = True


def _scanning(kind: type[MVFuser], site: Site) -> MVFuser:
    return kind(
        site.dim,
        state=site.state,
        dropout=site.dropout,
        backend=site.backend,
        double_bias=site.double_bias,
        double_gate=site.double_gate,
    )


FUSERS: dict[str, Callable[[Site], Fuser]] = {
    "mvfuser": lambda s: _scanning(MVFuser, s),
    "mvfuser_bidir": lambda s: _scanning(BidirectionalMVFuser, s),
    "mvfuser_no_gate": lambda s: _scanning(UngatedMVFuser, s),
    "selfattn_concat": lambda s: SelfAttnConcat(s.dim, dropout=s.dropout),
    "selfattn_separate": lambda s: SelfAttnSeparate(s.dim, dropout=s.dropout),
    "bi_deform_attn": lambda s: BiDeformAttn(s.dim, s.grid, s.prefixes, dropout=s.dropout, backend=s.backend),
}

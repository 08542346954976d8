"""What `lab fusion` measures: the selective scan with its states (B, L, D, N) in memory, and by what keeps none there.

That is one fused kernel on a GPU. Of our backends, `torch` is none: on a CPU its blocks of states stay in the cache, which moves
as little; on a GPU they go to memory like those of the other forms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dgbench.cost.timing import interleaved
from dgbench.engine.device import device_name
from dgbench.errors import DgbenchError
from mfuser.ops import resolve, selective_scan
from mfuser.ssm.scans import blelloch, chunked

_CHUNK = 64
_MEANT = {"torch": "in blocks", "reference": "in order"}  # of backends that are no fused kernel


@dataclass(frozen=True, slots=True)
class Form:
    """One way to compute the forward pass."""

    name: str
    bytes: int  # read and written at least, by the tensors that this form has
    milliseconds: float
    peak_mib: float | None  # above the inputs, on a GPU
    error: float  # the largest difference from the first form, over the largest output


@dataclass(frozen=True, slots=True)
class Fused:
    """The forms at one shape, in fp32."""

    device: str
    shape: tuple[int, int, int, int]  # B, L, D, N
    forms: tuple[Form, ...]


def fusion_view(shape: tuple[int, int, int, int], *, device: torch.device, backend: str = "auto") -> Fused:
    """Time the forms of the selective scan.

    Raises: DgbenchError if the states do not fit into the GPU's memory; BackendError if the backend cannot run.
    """
    batch, length, dim, states = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    u, delta = normal(batch, length, dim), torch.rand(batch, length, dim, generator=generator, device=device) * 0.1
    A = -torch.arange(1, states + 1, device=device, dtype=torch.float32).repeat(dim, 1)
    B, C = normal(batch, length, states), normal(batch, length, states)
    chosen = resolve("selective_scan", backend, u, delta, A, B, C).name
    everything = 4 * batch * length * dim * states
    if device.type == "cuda" and 8 * everything > (free := torch.cuda.mem_get_info(device)[0]):
        raise DgbenchError(
            f"the states take {everything / 2**30:.1f} GiB, eight times as much is needed, and {free / 2**30:.1f} GiB are free",
            "give a smaller --shape",
        )

    def materialised(scan: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        decay = torch.exp(delta[..., None] * A).transpose(0, 1)
        inflow = ((delta * u)[..., None] * B[:, :, None]).transpose(0, 1)
        return (scan(decay, inflow).transpose(0, 1) @ C[..., None])[..., 0]

    calls: dict[str, Callable[[], Tensor]] = {
        "materialised, tree": lambda: materialised(blelloch),
        "materialised, chunks": lambda: materialised(lambda a, b: chunked(a, b, _CHUNK)),
        f"{_MEANT.get(chosen, 'fused')}, {chosen}": lambda: selective_scan(u, delta, A, B, C, backend=chosen),
    }
    with torch.inference_mode():
        times = interleaved(calls, device, at_most=0.5, least=3)
        expected = calls["materialised, tree"]()
        # written and read: decay and inflow, then states; each of the inputs and the output once
        small = 4 * (3 * u.numel() + 2 * B.numel() + A.numel())
        forms = []
        for name, call in calls.items():
            peak = None
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                held = torch.cuda.memory_allocated(device)
                call()
                peak = (torch.cuda.max_memory_allocated(device) - held) / 2**20
            error = float((call() - expected).abs().max() / expected.abs().max())
            none = name.startswith("fused") or (device.type == "cpu" and not name.startswith("materialised"))
            moved = small if none else small + 6 * everything
            forms.append(Form(name, moved, times[name].median, peak, error))
    return Fused(device_name(device), shape, tuple(forms))

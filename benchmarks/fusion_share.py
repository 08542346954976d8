"""Measure what share of a fusion layer's time is the scan, and what its projections take; print Markdown.

    python benchmarks/fusion_share.py --json share.json

Each part of MVFuser between two towers is timed alone, on the inputs that it gets there, and so is the whole layer with its
default backend; medians, all in turn. Separate calls take longer than a layer that kernels run as a whole: on a GPU, a second
table adds up the times of the kernels that the layer really runs, by torch.profiler.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from dgbench import atomic
from dgbench.cost.timing import Times, hardware, interleaved
from dgbench.engine.device import device_name, pick_device
from dgbench.environment import code_commit, describe_environment
from mfuser.fusion import MVFuser
from mfuser.ops import selective_scan
from mfuser.towers.meta import unfilled
from mfuser.towers.table import tower
from mfuser.towers.vit import VisionEncoder

Part = tuple[Callable[..., Tensor], tuple[Tensor, ...], list[nn.Parameter]]  # a call, its inputs, its weights
LAYER = "the whole layer"
SCAN, PROJECTIONS, REST = "scan", "projections", "convolutions, gate, norm"
_PRODUCTS = re.compile(r"gemm|gemv|cutlass|nvjet|xmma|splitk|cublas|ampere_|sm\d\d_", re.IGNORECASE)
_TRITON_SCAN = {"_forward", "_forward_ends", "_backward", "_backward_ends"}  # of mfuser.ops.selective_scan


def parts(fuser: MVFuser, joint: Tensor) -> dict[str, tuple[str, Part]]:
    """Return the steps of a layer by name, each with what it is counted as."""
    half, (first, middle, last) = fuser.D.shape[0], (fuser.rank, fuser.state, fuser.state)

    def scan(x: Tensor, delta: Tensor, B: Tensor, C: Tensor, A_log: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        # as MVFuser calls it
        out: Tensor = selective_scan(
            x, delta, -A_log.float().exp(), B, C, D.float(), delta_bias=bias.float(), delta_softplus=True, backend=fuser.backend
        )
        return out

    def gated(y: Tensor, z: Tensor) -> Tensor:
        out: Tensor = fuser.norm(y, F.silu(z))
        return out

    def convolved(pair: Tensor) -> Tensor:
        x, z = pair.mT.chunk(2, 1)
        return torch.cat([F.silu(fuser.conv1d_x(x)), fuser.conv1d_z(z)], 1).mT

    with torch.no_grad():
        pair = fuser.in_proj(joint)
        x, z = (each.contiguous() for each in convolved(pair).chunk(2, -1))
        steps, B, C = (each.contiguous() for each in fuser.x_proj(x).split([first, middle, last], -1))
        delta = fuser.dt_proj(steps)
        y = scan(x, delta, B, C, fuser.A_log, fuser.D, fuser.dt_proj.bias)
        g = gated(y, z)
    assert y.shape[-1] == half
    weights = [fuser.A_log, fuser.D, fuser.dt_proj.bias]
    return {
        f"in_proj, {fuser.in_proj.in_features} to {fuser.in_proj.out_features}": (PROJECTIONS, _linear(fuser.in_proj, joint)),
        "convolutions, SiLU": (REST, (convolved, (pair,), [fuser.conv1d_x.weight, fuser.conv1d_z.weight])),
        f"x_proj, {half} to {fuser.x_proj.out_features}": (PROJECTIONS, _linear(fuser.x_proj, x)),
        f"dt_proj, {first} to {half}": (PROJECTIONS, _linear(fuser.dt_proj, steps)),
        f"scan, {half} channels, {middle} states": (SCAN, (lambda *given: scan(*given, *weights), (x, delta, B, C), weights)),
        "gate, norm": (REST, (gated, (y, z), [fuser.norm.weight])),
        f"out_proj, {half} to {fuser.out_proj.out_features}": (PROJECTIONS, _linear(fuser.out_proj, g)),
        LAYER: ("", (fuser.mix, (joint,), list(fuser.parameters()))),
    }


def _linear(layer: nn.Linear, given: Tensor) -> Part:
    return layer, (given,), list(layer.parameters())


def timed(
    steps: Mapping[str, tuple[str, Part]], device: torch.device, dtype: torch.dtype, seconds: float
) -> tuple[dict[str, Times], dict[str, Times]]:
    """Return the times of each step: the forward pass, and forward and backward."""
    forward, both = {}, {}
    for name, (_, (call, given, weights)) in steps.items():
        leaves = [each.detach().clone().requires_grad_() for each in given]

        def ahead(call: Callable[..., Tensor] = call, given: Sequence[Tensor] = given) -> None:
            with torch.no_grad(), _precision(device, dtype):
                call(*given)

        def back(
            call: Callable[..., Tensor] = call, leaves: Sequence[Tensor] = leaves, weights: Sequence[Tensor] = tuple(weights)
        ) -> None:
            with _precision(device, dtype):
                out = call(*leaves)
            torch.autograd.grad(out, [*leaves, *weights], torch.ones_like(out))

        forward[name], both[name] = ahead, back
    return interleaved(forward, device, at_most=seconds), interleaved(both, device, at_most=seconds)


def _precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def kernel_times(fuser: MVFuser, joint: Tensor, dtype: torch.dtype, *, backward: bool, calls: int = 20) -> dict[str, float]:
    """Return the microseconds of one call in each kind of kernel, by torch.profiler."""
    given = joint.detach().clone().requires_grad_()

    def once() -> None:
        with torch.set_grad_enabled(backward), _precision(joint.device, dtype):
            out = fuser.mix(given)
        if backward:
            torch.autograd.grad(out, [given, *fuser.parameters()], torch.ones_like(out))

    for _ in range(3):
        once()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            once()
        torch.cuda.synchronize()
    found = dict.fromkeys((SCAN, PROJECTIONS, REST), 0.0)
    for event in seen.key_averages():
        found[kind_of(event.key)] += event.self_device_time_total / calls
    return found


def kind_of(kernel: str) -> str:
    """Return what a kernel of this name is counted as."""
    if "scan" in kernel.lower() or kernel in _TRITON_SCAN:
        return SCAN
    return PROJECTIONS if _PRODUCTS.search(kernel) else REST


def blocks(device: torch.device, dtype: torch.dtype, batch: int, size: int, seconds: float) -> dict[str, Times]:
    """Return the forward times of one block of each tower that the layer stands between."""
    found: dict[str, Callable[[], object]] = {}
    for name in ("dinov2_l", "eva02"):
        with unfilled():
            encoder = VisionEncoder(name, (size, size), patch=tower("eva02").patch)
        block = encoder.trunk.blocks[0].to_empty(device=device)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
        tokens = torch.randn(batch, encoder.prefix + encoder.grid[0] * encoder.grid[1], encoder.dim, device=device)

        def call(block: nn.Module = block, tokens: Tensor = tokens) -> None:
            with torch.no_grad(), _precision(device, dtype):
                block(tokens)

        found[f"block of {name}"] = call
    return interleaved(found, device, at_most=seconds)


def _head(what: str, unit: str) -> str:
    return f"\n| {what} | forward {unit} | share | forward and backward {unit} | share |\n|{' --- |' * 5}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--size", type=int, default=512, help="side of the images, in pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--width", type=int, default=1024, help="of the towers")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each call")
    parser.add_argument("--json", type=Path, dest="out", help="also write the numbers here")
    options = parser.parse_args()
    device = pick_device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cells = (options.size // 14) ** 2
    torch.manual_seed(0)
    fuser = MVFuser(options.width, dropout=0.0).to(device).train()
    joint = torch.randn(options.batch, 2 * (cells + 1), options.width, device=device)
    with _precision(device, dtype):
        steps = parts(fuser, joint)
    forward, both = timed(steps, device, dtype, options.seconds)
    beside = blocks(device, dtype, options.batch, options.size, options.seconds) if options.width == 1024 else {}
    gpu = device.type == "cuda"
    kernels = {kind: kernel_times(fuser, joint, dtype, backward=kind != "forward") for kind in ("forward", "both")} if gpu else {}

    shape = f"{options.batch} x {joint.shape[1]} tokens of {options.width} channels"
    print(f"MVFuser, {shape}, {str(dtype).removeprefix('torch.')}, {device_name(device)}")
    print(_head("part", "ms"))
    alone = [name for name in steps if name != LAYER]
    sums = [sum(taken[name].median for name in alone) for taken in (forward, both)]
    for name in alone:
        a, b = forward[name].median, both[name].median
        print(f"| {name} | {a:.3f} | {a / sums[0]:.0%} | {b:.3f} | {b / sums[1]:.0%} |")
    for kind in (SCAN, PROJECTIONS, REST):
        a, b = (sum(taken[name].median for name in alone if steps[name][0] == kind) for taken in (forward, both))
        print(f"| **{kind}** | {a:.3f} | {a / sums[0]:.0%} | {b:.3f} | {b / sums[1]:.0%} |")
    print(f"| {LAYER}, default backend | {forward[LAYER].median:.3f} | | {both[LAYER].median:.3f} | |")
    for name, taken in beside.items():
        print(f"| {name} | {taken.median:.3f} | | | |")
    if kernels:
        print(_head("kernels of the whole layer", "us"))
        totals = {kind: sum(found.values()) for kind, found in kernels.items()}
        for kind in (SCAN, PROJECTIONS, REST):
            a, b = kernels["forward"][kind], kernels["both"][kind]
            print(f"| {kind} | {a:.1f} | {a / totals['forward']:.0%} | {b:.1f} | {b / totals['both']:.0%} |")
    commit, dirty = code_commit()
    about = describe_environment(hardware(device).name, torch.get_num_threads())
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, commit {commit}{' with changes' if dirty else ''}")
    if options.out:
        content = {
            "shape": list(joint.shape),
            "dtype": str(dtype),
            "forward_ms": {name: each.median for name, each in (forward | beside).items()},
            "both_ms": {name: each.median for name, each in both.items()},
            "kernels_us": kernels,
            "environment": about,
            "commit": commit,
        }
        atomic.write(options.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

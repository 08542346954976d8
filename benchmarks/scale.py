"""How a training scales: by arithmetic for 1, 8 and 64 GPUs, or measured on the GPUs of this machine.

    python benchmarks/scale.py                                  # prints the tables of docs/cluster.md
    python benchmarks/scale.py --measure --gpus 1 2 --out DIR   # writes DIR/scale.json and DIR/scale.md
    python benchmarks/scale.py --measure --gpus 1 2 --device cpu --tiny --out DIR   # every path in seconds; means nothing

Measured is a step of a method with random towers on random images, two on each GPU, with the settings of `dgbench train`:
DistributedDataParallel with static graph, gradients as views of buckets, AdamW, bf16. Median over the steps of the slowest
process, after some that are not counted; and the all-reduce of the gradients' bytes alone. Weak scaling: efficiency is the time
of a step on one GPU over that on several.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import mfuser
from mfuser.segmentor import Batch

TRAINED = 118.65e6  # MFuser's trainable parameters with EVA02-CLIP-L and DINOv2-L
STEP = 0.329  # seconds of a step of 2 images on one H200 (benchmarks/methods.md)
WINDOWS = 64.0  # windows a second of one H200, 8 at once (the same)
IMAGES = 15.4  # images a second of one core, GTA5's PNG with rare-class sampling (benchmarks/loader.md)
FILE = 2.3e6  # bytes of an image of GTA5
BACKWARD = 2 / 3  # of a step, behind which the exchange can hide
# bytes a second of each GPU in an all-reduce: assumptions, to be replaced by what a cluster has
LINKS = {"one machine, NVLink": 200e9, "400 Gb/s for each GPU": 50e9, "100 Gb/s for 8 GPUs": 12.5e9 / 8}
# windows of 512x512 with a stride of 341: images of Cityscapes, BDD100K and Mapillary at the test sizes of `unified`
TEST = 500 * 18 + 1000 * 8 + 2000 * 18


def main() -> None:
    """Print or measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--method", default="mfuser")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on small images")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not given.measure:
        print(arithmetic())
        return
    if given.out is None:
        parser.error("--measure needs --out")
    given.out.mkdir(parents=True, exist_ok=True)
    found = [measured(count, given) for count in given.gpus]
    about = {
        "device": torch.cuda.get_device_name() if given.device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if given.device == "cuda" else None,
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "method": given.method,
        "steps": given.steps,
    }
    (given.out / "scale.json").write_text(json.dumps({"about": about, "results": found}, indent=1) + "\n")
    text = table(found, about)
    (given.out / "scale.md").write_text(text)
    print(text)


def arithmetic() -> str:
    """Return the tables of docs/cluster.md."""
    size = 4 * TRAINED
    lines = ["| GPUs | sent by each GPU a step | link | all-reduce | efficiency, nothing hidden | hidden by the backward pass |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for gpus in (1, 8, 64):
        sent = 2 * (gpus - 1) / gpus * size
        for name, speed in LINKS.items():
            if gpus == 1 or (name.startswith("one machine") != (gpus == 8)):
                continue
            seconds = sent / speed
            hidden = STEP / (STEP + max(0.0, seconds - BACKWARD * STEP))
            row = (f"{sent / 1e6:.0f} MB", name, f"{1e3 * seconds:.1f} ms", f"{100 * STEP / (STEP + seconds):.0f} %")
            lines.append(f"| {gpus} | {' | '.join(row)} | {100 * hidden:.0f} % |")
        if gpus == 1:
            lines.append("| 1 | 0 MB | – | – | 100 % | 100 % |")
    lines += ["", "| GPUs | images a second | cores that load | read from disk | scoring three targets | 20,000 steps |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for gpus in (1, 8, 64):
        rate = 2 * gpus / STEP
        score, training = TEST / WINDOWS / gpus, 20_000 * STEP
        row = (f"{rate:.0f}", f"{rate / IMAGES:.1f}", f"{rate * FILE / 1e6:.0f} MB/s", f"{score / 60:.1f} min")
        lines.append(f"| {gpus} | {' | '.join(row)} | {training / 3600:.1f} h |")
    return "\n".join(lines)


def measured(count: int, given: argparse.Namespace) -> dict[str, Any]:
    """Return seconds of a step and of an all-reduce with so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_work, args=(count, port, given, queue), nprocs=count)
    return dict(queue.get())


def _work(rank: int, count: int, port: int, given: argparse.Namespace, queue: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    on_gpu = given.device == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=count)
    side = 64 if given.tiny else 512
    options = {"vfm": "tiny", "vlm": "tiny"} if given.tiny and given.method == "mfuser" else {}
    torch.manual_seed(0)
    model = mfuser.build(given.method, image_size=(side, side), weights="random", **options)
    model.enter_training()
    model.train().to(device, memory_format=torch.channels_last)
    if on_gpu and count > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    loss = _Loss(model)
    wrapped: Any = loss
    if count > 1:
        ids = [rank] if on_gpu else None
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # as in dgbench/engine/parallel.py
        wrapped = DistributedDataParallel(loss, ids, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=on_gpu)
    batch = Batch(torch.rand(2, 3, side, side, device=device), torch.randint(19, (2, side, side), device=device))

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            terms = wrapped(batch)
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    gradients = torch.zeros(trained, device=device)
    steps = _median(step, given.steps, device)
    exchange = _median(lambda: dist.all_reduce(gradients), given.steps, device)
    if rank == 0:
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        queue.put({"gpus": count, "trained": trained, "step_s": steps, "all_reduce_s": exchange, "peak_gib": peak})
    dist.destroy_process_group()


class _Loss(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        terms: dict[str, torch.Tensor] = self.model.loss(batch)
        return terms


def _median(action: Any, times: int, device: torch.device) -> float:
    """Return the median seconds of an action, of the slowest process in each turn."""
    found = []
    for turn in range(times + 5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        begun = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        slowest = torch.tensor([time.perf_counter() - begun], device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if turn >= 5:
            found.append(float(slowest))
    return statistics.median(found)


def table(found: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = ["# Steps on several GPUs", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    lines += ["| GPUs | step, ms | images/s | efficiency | all-reduce of the gradients, ms | GB/s of each GPU | peak GiB |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    alone = next((one["step_s"] for one in found if one["gpus"] == 1), None)
    for one in found:
        n, seconds = one["gpus"], one["step_s"]
        share = f"{100 * alone / seconds:.0f} %" if alone else "–"
        speed = f"{2 * (n - 1) / n * 4 * one['trained'] / one['all_reduce_s'] / 1e9:.0f}" if n > 1 else "–"
        exchange = f"{1e3 * one['all_reduce_s']:.1f}" if n > 1 else "–"
        lines.append(
            f"| {n} | {1e3 * seconds:.0f} | {2 * n / seconds:.1f} | {share} | {exchange} | {speed} | {one['peak_gib']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

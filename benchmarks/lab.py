"""Measures the state-space lab on a GPU, and writes lab.md and lab.json beside this file, and two pictures for the docs.

    python benchmarks/lab.py --minutes 2.5

In one run on one device: the selective scan materialised and fused, scans in PyTorch, training and generation over the length,
the step of selective copying with our block and, if mamba_ssm can be imported, with its block, and all rows of selective copying
at length 4096 in the given minutes. Times are medians. Beside --minutes it takes the time of the other measurements, and of the
first build of the kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dgbench import render
from dgbench.cost.timing import hardware
from dgbench.engine.device import pick_device
from dgbench.environment import code_commit
from dgbench.lab.copying import begin, carry_out
from dgbench.lab.fusing import fusion_view
from dgbench.lab.graphs import GraphedStep, Step, optimizer_of
from dgbench.lab.scanning import scans_view
from dgbench.lab.settings import Settings, chosen
from dgbench.lab.speeds import sized, speeds
from dgbench.lab.task import Batches
from dgbench.render.lab import copying_tables, fused_tables, scan_tables, speed_tables
from dgbench.render.table import ABSENT, Cell, Table
from dgbench.render.texts import TEXTS
from mfuser.ssm.network import Network

HERE = Path(__file__).parent
FORMS = ("plain", "graph")
SHAPES = ((2, 2594, 512, 16), (16, 4128, 128, 16), (1, 16_384, 512, 16))


def steps_per_second(step: Step, batches: Batches, device: torch.device, seconds: float = 2.0) -> float:
    """Return the median speed of groups of ten steps, with the drawing of their batches."""

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    found, done, begun = [], 0, time.perf_counter()
    while len(found) < 3 or time.perf_counter() - begun < seconds:
        settle()
        since = time.perf_counter()
        for _ in range(10):
            step(*batches.at(done))
            done += 1
        settle()
        found.append(10 / (time.perf_counter() - since))
    return statistics.median(found[1:])


def of_theirs(settings: Settings) -> Network:
    """Return the network with mamba_ssm's blocks in the place of ours."""
    from mamba_ssm import Mamba

    network = Network("mamba", "s6", vocab=settings.vocab, length=settings.tokens)
    network.mixers = nn.ModuleList(Mamba(64) for _ in network.mixers)
    return network


def blocks(settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    """Return steps and tokens a second of the network of Mamba x S6, plain and as CUDA graph."""

    def of_ours(backend: str) -> Callable[[], Network]:
        return lambda: Network("mamba", "s6", vocab=settings.vocab, length=settings.tokens, backend=backend)

    makers = {
        "ours": of_ours("auto"),
        "ours, scan of mamba-ssm": of_ours("mamba_ssm"),
        "mamba-ssm's block": lambda: of_theirs(settings),
    }
    rows = []
    for name, make in makers.items():
        row: dict[str, Any] = {"block": name}
        for form in FORMS:
            if form == "graph" and device.type != "cuda":
                continue
            try:
                torch.manual_seed(0)
                network = make().to(device)
                optimizer, batches = optimizer_of(network, settings.lr, device), Batches(settings, 0, device)
                step = Step(network, optimizer, device)
                if form == "graph":
                    step = GraphedStep(network, optimizer, device, *batches.at(0))
                row[form] = steps_per_second(step, batches, device)
                row[f"{form}_tokens"] = row[form] * settings.batch * settings.tokens
            except Exception as error:  # why a peer cannot run is said in its row
                row[f"{form}_refused"] = (str(error).splitlines() or [type(error).__name__])[0][:120]
        rows.append(row)
    return rows


def block_table(rows: list[dict[str, Any]], settings: Settings, machine: str) -> Table:
    def cell(row: dict[str, Any], form: str, digits: int) -> Cell:
        value = row.get(form)
        return Cell(ABSENT if value is None else f"{value:,.{digits}f}")

    refused = [f"{row['block']}, {form}: {row[key]}" for row in rows for form in FORMS if (key := f"{form}_refused") in row]
    columns = (("plain", 1), ("plain_tokens", 0), ("graph", 1), ("graph_tokens", 0))
    return Table(
        f"Training steps of Mamba x S6, {settings.batch} sequences of {settings.tokens} symbols, fp32, on {machine}",
        ("block", "steps/s", "tokens/s", "steps/s, CUDA graph", "tokens/s, CUDA graph"),
        tuple((Cell(row["block"]), *(cell(row, form, digits) for form, digits in columns)) for row in rows),
        legend=("Medians of groups of ten steps, with the drawing of their sequences.", *refused),
    )


def versions() -> dict[str, str]:
    """Return what the figures depend on besides the device."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    found["cudnn"] = str(torch.backends.cudnn.version())
    for package in ("triton", "mamba-ssm", "causal-conv1d"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not there"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.5, help="of selective copying, all rows together")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each timing")
    parser.add_argument("--device", default=None)
    parser.add_argument("--length", type=int, default=None, help="of selective copying; default: 4096")
    parser.add_argument("--small", action="store_true", help="a trial of this script on a CPU: its figures mean nothing")
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    begun, device = time.perf_counter(), pick_device(given.device)
    progress = render.progress()
    about = hardware(device)
    small = {"length": 32, "steps": 20, "batch": 4, "sequences": 16} if given.small else {}
    small |= {"length": given.length} if given.length else {}
    settings, _ = chosen("gpu", small, None)
    fused = [fusion_view(shape, device=device) for shape in (((1, 64, 8, 4),) if given.small else SHAPES)]
    progress.note(f"fusion: {time.perf_counter() - begun:.0f} s so far")
    scans = scans_view((16, 64) if given.small else (64, 256, 1024, 4096), device=device)
    progress.note(f"scan: {time.perf_counter() - begun:.0f} s so far")
    size = sized(device, {"lengths": (16,), "generated": (16,), "depth": 2, "tokens": 16} if given.small else {})
    timed = speeds(size, device=device, progress=progress, seconds=given.seconds)
    progress.note(f"speed: {time.perf_counter() - begun:.0f} s so far")
    peers = blocks(settings, device)
    progress.note(f"blocks: {time.perf_counter() - begun:.0f} s so far")
    with tempfile.TemporaryDirectory() as folder:
        begin(settings, Path(folder))
        copied = carry_out(Path(folder), device=device, progress=progress, minutes=given.minutes)
    took = time.perf_counter() - begun
    commit, dirty = code_commit()
    told = versions()

    tables = [*speed_tables(timed), *(table for one in fused for table in fused_tables(one)), scan_tables(scans)[1]]
    tables += [block_table(peers, settings, about.name), *copying_tables(copied)]
    about_text = ", ".join(f"{name} {version}" for name, version in told.items())
    pictures = HERE.parent / "docs" / "img" if given.out == HERE else given.out
    beside = Path(os.path.relpath(pictures, given.out))
    lines = [
        "# The state-space lab on a GPU",
        "",
        f"Written by `python benchmarks/lab.py --minutes {given.minutes:g}` in {took:.0f} s on {about.name}, "
        f"driver {about.driver}; {about_text}; commit {commit}{' with changes' if dirty else ''}.",
        "[docs/ssm.md](../docs/ssm.md) explains the tables.",
        "",
        f"![Training and generation over the length]({(beside / 'lab-speed.png').as_posix()})",
        "",
        f"![Learning curves of selective copying]({(beside / 'lab-copying.png').as_posix()})",
        "",
        TEXTS["markdown"](tables),
        "",
    ]
    given.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines).replace(copied.run, "the run's folder")
    (given.out / "lab.md").write_text(text, encoding="utf-8")
    values = {
        "hardware": asdict(about),
        "versions": told,
        "commit": commit,
        "seconds": took,
        "speed": asdict(timed),
        "fusion": [asdict(one) for one in fused],
        "scan": asdict(scans),
        "blocks": peers,
        "copying": asdict(copied) | {"run": ""},
    }
    (given.out / "lab.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    render.draw_speeds(timed, pictures / "lab-speed.png")
    render.draw_copying(copied, pictures / "lab-copying.png")
    print(text)


if __name__ == "__main__":
    main()

"""Times of calls on a device and their spread, the GPU's properties, and the energy that it used."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dgbench.engine.device import device_name

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of repeated calls, as their caller waits for them: the median, and the central 90 % interval."""

    median: float
    low: float
    high: float
    calls: int

    @staticmethod
    def of(samples: list[float]) -> Times:
        """Sum up at least one sample."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        return Times(statistics.median(ordered), ordered[round(0.05 * last)], ordered[round(0.95 * last)], len(ordered))


def median_ms(call: Call, device: torch.device, *, at_most: float = 0.5, least: int | None = None, flush: bool = True) -> float:
    """Return the median time of a call in milliseconds; see `times`."""
    return times(call, device, at_most=at_most, least=least, flush=flush).median


def times(call: Call, device: torch.device, *, at_most: float = 0.5, least: int | None = None, flush: bool = True) -> Times:
    """Time a call, after a warm-up, with its inputs not in the GPU's cache.

    Args:
        at_most: seconds to spend; up to four times that until there are `least` repeats, by default 20 on a GPU and 5 on a CPU.
        flush: empty the GPU's cache before each call.
    """
    return interleaved({"": call}, device, at_most=at_most, least=least, flush=flush)[""]


def interleaved(
    calls: Mapping[str, Call], device: torch.device, *, at_most: float = 0.5, least: int | None = None, flush: bool = True
) -> dict[str, Times]:
    """Time several calls in turn, one of each per round, so that drift of the machine affects all equally.

    Args: as those of `times`; `at_most` is for each call.
    """
    found = samples(calls, device, at_most=at_most, least=least, flush=flush)
    return {name: Times.of(each) for name, each in found.items()}


def samples(
    calls: Mapping[str, Call], device: torch.device, *, at_most: float = 0.5, least: int | None = None, flush: bool = True
) -> dict[str, list[float]]:
    """Return the milliseconds of every call that `interleaved` sums up."""
    at_most *= len(calls)
    _warm_up(calls, device, at_most)
    gpu = device.type == "cuda"
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size if gpu and flush else 0
    cache = torch.empty(size, dtype=torch.uint8, device=device)
    found: dict[str, list[float]] = {name: [] for name in calls}
    least, rounds, begun = least or (20 if gpu else 5), 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < at_most or (rounds < least and spent < 4 * at_most):
        rounds += 1
        for name, call in calls.items():
            found[name].append(_gpu_ms(call, cache) if gpu else _cpu_ms(call))
    return found


def _warm_up(calls: Mapping[str, Call], device: torch.device, at_most: float) -> None:
    if device.type == "cpu":
        for call in calls.values():
            call()
        return
    begun = time.perf_counter()
    for _ in range(3):
        for call in calls.values():
            call()
        torch.cuda.synchronize(device)
        if time.perf_counter() - begun > at_most:
            return


def _cpu_ms(call: Call) -> float:
    begun = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begun)


def _gpu_ms(call: Call, cache: Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cache.zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def graphed(*calls: Call, before: int = 1) -> Call:
    """Capture calls as one CUDA graph, and return its replay, which keeps what they read.

    Args:
        before: how often each is called before, which compiles and warms up.

    Raises: RuntimeError with the first cause if one cannot run or be captured; the current stream is as it was.
    """
    from mfuser.cuda_graphs import captured, rehearsed  # with all of its models' parts

    def all_of_them() -> None:
        for call in calls:
            call()

    side = torch.cuda.Stream()
    for _ in range(before):
        rehearsed(all_of_them, side)
    _, graph = captured(all_of_them, side)

    def replay(kept: tuple[Call, ...] = calls) -> None:
        graph.replay()

    return replay


# ---- the GPU


@dataclass(frozen=True, slots=True)
class Hardware:
    """The device of the timings. Clocks in MHz, power in W, memory in GiB; None: unknown."""

    name: str
    driver: str | None = None
    clock: float | None = None  # of the multiprocessors, while busy
    clock_max: float | None = None
    power_limit: float | None = None
    memory: float | None = None


def hardware(device: torch.device) -> Hardware:
    """Query nvidia-smi about a GPU under load; for a CPU, only the name is known."""
    if device.type != "cuda":
        return Hardware(device_name(device))
    busy = torch.ones(8192, 8192, device=device)
    for _ in range(60):
        busy = busy @ busy * 1e-4
    texts = [nvidia_smi(what, device) for what in ("clocks.sm", "clocks.max.sm", "power.limit")]
    torch.cuda.synchronize(device)
    clock, clock_max, power = (None if text is None else float(text) for text in texts)
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return Hardware(device_name(device), nvidia_smi("driver_version", device), clock, clock_max, power, memory)


def nvidia_smi(what: str, device: torch.device) -> str | None:
    """Return a value that nvidia-smi states for a GPU, without its unit; None if it does not state it."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return text if text and not text.startswith("[") else None


def joules(call: Call, device: torch.device, *, seconds: float = 1.5) -> float | None:
    """Return the energy of a call in joules, by the GPU's counter over `seconds` of calls; None where it has none."""
    if device.type != "cuda":
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        before, calls = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), 0
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds:
            call()
            torch.cuda.synchronize(device)
            calls += 1
        used = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before  # millijoules
        return float(used) / 1e3 / calls
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()

"""Profiles on a CUDA GPU: times, memory, energy, and which kernels ran."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import mfuser
from dgbench import cli
from dgbench.cost.fusion import FusionProfile, profile_fusion
from dgbench.cost.model_times import Timing
from dgbench.cost.profile import Profile, profile, subjects
from dgbench.cost.timing import hardware, interleaved, joules, times
from dgbench.progress import Silent

pytestmark = pytest.mark.gpu
SIZE = (64, 64)
OURS = {"cuda", "triton"}  # kernels that "auto" takes on a GPU


@pytest.fixture(scope="module")
def found() -> Profile:
    return profile(subjects(["mfuser"], vlm="tiny", size=SIZE), Silent())


@pytest.fixture(scope="module")
def fusion() -> FusionProfile:
    return profile_fusion(Silent(), vfm="tiny", vlm="tiny", size=(256, 256), sweep=((64, 64),))


def ran(backends: dict[str, str]) -> set[str]:
    return {name for names in backends.values() for name in names.split("+")}


def check(timing: Timing | None, at_least: float) -> Timing:
    assert timing is not None
    assert 0 < timing.ms.low <= timing.ms.median <= timing.ms.high
    assert timing.ms.calls >= 3
    assert timing.gib is not None
    assert at_least < timing.gib < 40
    assert timing.joules is None or timing.joules > 0
    assert timing.images_per_second == pytest.approx(1e3 * timing.batch / timing.ms.median)
    return timing


def test_a_model_is_timed_with_its_memory_and_energy(found: Profile) -> None:
    (row,) = found.rows
    assert row.problem == ""
    assert (found.dtype, found.unmeasured) == ("bf16", "")
    weights = 4 * row.parameters / 2**30
    assert [timing.batch for timing in row.timings] == [1]
    single = check(row.timings[0], weights)
    best = check(row.best, weights)
    assert best.batch.bit_count() == 1  # powers of two are tried
    assert best.images_per_second > 0.8 * single.images_per_second
    assert best.batch == 1 or best.gib > single.gib  # type: ignore[operator]
    step = check(row.step, weights + 3 * 4 * row.trainable / 2**30)  # gradients, and two moments of Adam
    assert step.batch == 2
    assert step.ms.median > single.ms.median


def test_our_kernels_ran(found: Profile) -> None:
    backends = found.rows[0].backends
    assert ran(backends) <= OURS, backends  # the training step's, too
    assert {"ms_deform_attn", "selective_scan"} <= backends.keys()


def test_what_was_timed_on_is_told(found: Profile) -> None:
    gpu = found.hardware
    assert gpu is not None
    assert gpu.name == torch.cuda.get_device_name()
    assert gpu.memory == pytest.approx(torch.cuda.get_device_properties(0).total_memory / 2**30)
    for value in (gpu.clock, gpu.clock_max, gpu.power_limit):
        assert value is None or value > 0
    assert found.environment["device"] == gpu.name


def test_counts_are_those_of_a_machine_without_a_gpu(found: Profile) -> None:
    counted = profile(subjects(["mfuser"], vlm="tiny", size=SIZE), Silent(), timed=False).rows[0]
    row = found.rows[0]
    assert (row.cost, row.components, row.by_operator) == (counted.cost, counted.components, counted.by_operator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_counts_the_same_while_the_gpu_computes(dtype: torch.dtype) -> None:
    (subject,) = subjects(["source-only"], settings=["method.backbone=tiny"], size=SIZE)
    row = profile([subject], Silent(), timed=False).rows[0]
    model = mfuser.build("source-only", backbone="tiny", image_size=SIZE, weights="random").cuda().eval()
    images = torch.rand(3, 3, *SIZE, device="cuda")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32), counter:
        model(images)
    # of three images; it knows nothing of sampling
    assert counter.get_total_flops() == 3 * 2 * row.cost.products


def test_given_batches_are_timed_with_their_energy_and_no_best_is_looked_for() -> None:
    (subject,) = subjects(["source-only"], settings=["method.backbone=tiny"], size=SIZE)
    row = profile([subject], Silent(), batches=(1, 8), dtype="fp32").rows[0]
    assert [check(timing, 4 * row.parameters / 2**30).batch for timing in row.timings] == [1, 8]
    assert row.best is None


def test_windows_are_timed_on_whole_images() -> None:
    (subject,) = subjects(["source-only"], settings=["method.backbone=tiny"], size=SIZE)
    row = profile([subject], Silent(), batches=(1,), slide=(128, 256)).rows[0]
    assert row.windows == 3 * 6  # 64 every 42 pixels
    check(row.timings[0], 4 * row.parameters / 2**30)
    assert row.step is None


def test_a_batch_that_does_not_fit_is_told_beside_what_did() -> None:
    (subject,) = subjects(["source-only"], settings=["method.backbone=tiny"], size=SIZE)
    gc.collect()
    before = torch.cuda.memory_allocated()
    row = profile([subject], Silent(), batches=(2, 10_000_000)).rows[0]  # 490 GB of images
    assert "out of memory" in row.problem
    assert [timing.batch for timing in row.timings] == [2]  # what was measured before stays
    assert row.step is None
    gc.collect()
    # what stays of it is no more than a library's buffers
    assert torch.cuda.memory_allocated() < before + 2**28
    assert profile([subject], Silent(), batches=(1,)).rows[0].problem == ""


def test_fusers_are_timed_with_their_memory(fusion: FusionProfile) -> None:
    assert [point.size for point in fusion.sweep] == [(64, 64), (256, 256)]
    for point in fusion.sweep:
        for row in point.rows:
            assert row.forward is not None, row.fuser
            assert row.both is not None, row.fuser
            assert 0 < row.forward.median < row.both.median
            assert row.gib is not None
            # at least the outputs, and gradients of inputs and outputs: 2 images of both towers, 64 channels in bf16
            assert row.gib > 3 * 2 * sum(point.tokens) * 64 * 2 / 2**30
    assert fusion.hardware is not None
    assert (fusion.dtype, fusion.unmeasured) == ("bf16", "")
    small, large = ({row.fuser: row.gib for row in point.rows} for point in fusion.sweep)
    assert all(large[name] > small[name] for name in small)  # type: ignore[operator]


def test_fusers_ran_our_kernels(fusion: FusionProfile) -> None:
    assert ran(fusion.backends) <= OURS, fusion.backends
    assert {"selective_scan", "ms_deform_attn"} <= fusion.backends.keys()


def test_turns_are_taken_and_a_kernels_time_is_its_own() -> None:
    device = torch.device("cuda")
    few, many = (torch.randn(n, n, device=device) for n in (256, 4096))
    found = interleaved({"few": lambda: few @ few, "many": lambda: many @ many}, device, at_most=0.1)
    assert found["few"].calls == found["many"].calls >= 5
    assert found["few"].median < found["many"].median
    # not only the launch: 137 GFLOP take a millisecond of anything that is sold
    assert found["many"].median > 0.1
    assert times(lambda: many @ many, device, at_most=0.1, flush=False).median > 0.1


def test_energy_is_in_joules_or_unknown() -> None:
    device = torch.device("cuda")
    big = torch.randn(8192, 8192, device=device)
    used = joules(lambda: big @ big, device, seconds=1.0)
    seconds = times(lambda: big @ big, device, at_most=0.2).median / 1e3
    limit = hardware(device).power_limit
    if used is not None and limit is not None:
        # a busy GPU draws more than a twentieth of its limit, and not twice it
        assert 0.05 * limit < used / seconds < 2 * limit


def test_the_command_shows_times() -> None:
    arguments = ["profile", "source-only", "--set", "method.backbone=tiny", "--size", "64", "64", "--batch", "2", "--quiet"]
    result = CliRunner().invoke(cli.app, [*arguments, "--json"], prog_name="dgbench")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert row["timings"][0]["ms"]["median"] > 0
    result = CliRunner().invoke(cli.app, arguments, prog_name="dgbench")
    assert torch.cuda.get_device_name() in result.stdout.replace("\n", " ")
    assert "step ms" in result.stdout

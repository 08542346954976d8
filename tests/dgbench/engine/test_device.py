"""Devices by name: which are taken, which are refused before any work, and that training runs on the one that was named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dgbench.engine.device import accelerator_on, check_device, pick_device
from dgbench.engine.evaluate import evaluate
from dgbench.engine.team import join
from dgbench.engine.train import train
from dgbench.errors import DgbenchError
from dgbench.launch import Launched
from dgbench.progress import Silent
from dgbench.recipe import load_recipe

ROOT = Path(__file__).parents[3]
SMALL = [
    "data.size=[64, 128]",
    "data.crop=[64, 64]",
    "data.train_images=2",
    "data.val_images=1",
    "train.batch_size=2",
    "train.steps=1",
]


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:15"])
def test_a_device_is_named_as_torch_names_it(name):
    assert check_device(name) == str(torch.device(name))


@pytest.mark.parametrize("name", ["mps", "mps:0", "xpu", "xpu:1", "meta", "hip", "xla"])
def test_devices_that_nothing_was_tried_on_are_refused(name):
    with pytest.raises(DgbenchError, match=f"device `{name}` is not supported") as refused:
        pick_device(name)
    assert refused.value.hint == "use `cpu`, `cuda` or `cuda:1`"


@pytest.mark.parametrize(
    "name", ["", "gpu", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:01", "cuda:one", "cuda:99999", "cuda 1", "0"]
)
def test_what_is_no_device_is_refused(name):
    with pytest.raises(DgbenchError, match=f"unknown device `{name}`"):
        pick_device(name)


@pytest.mark.parametrize(("count", "there"), [(1, "one CUDA device, `cuda:0`"), (4, "4 CUDA devices, `cuda:0` to `cuda:3`")])
def test_a_gpu_that_is_not_there_is_refused_with_how_many_there_are(count, there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(DgbenchError, match=f"no device `cuda:7`: this machine has {there}"):
        pick_device("cuda:7")


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1"])
def test_accelerate_is_given_the_named_device(name):
    # one after the other in this process: the state of the one before does not stay
    accelerator = accelerator_on(torch.device(name), "no")
    assert accelerator.device == torch.device(name)
    assert accelerator.state.device == torch.device(name)


def test_precision_is_that_of_the_recipe_after_another_training():
    assert accelerator_on(torch.device("cpu"), "bf16").mixed_precision == "bf16"
    assert accelerator_on(torch.device("cpu"), "no").mixed_precision == "no"


def test_a_launched_process_takes_no_named_gpu():
    with pytest.raises(DgbenchError, match="`cuda:1` was named, but a launcher has started this process"):
        join(Launched(0, 2, 0, 2), torch.device("cuda:1"))


@pytest.mark.parametrize("command", [train, lambda _, run, **rest: evaluate(run, **rest)])
def test_a_device_is_refused_before_data_and_runs_are_looked_at(command, tmp_path):
    recipe = load_recipe("mfuser/eva02-gta", check_method=False)
    with pytest.raises(DgbenchError, match="device `mps` is not supported"):
        command(recipe, tmp_path / "run", progress=Silent(), device="mps", root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_are_checked_without_torch():
    code = "import sys; sys.modules['torch'] = None; from dgbench.engine.device import check_device; check_device('cuda:1')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(max(torch.cuda.device_count(), 1)))
def test_every_command_runs_on_the_named_gpu(index, tmp_path, monkeypatch):
    monkeypatch.setenv("DGBENCH_CACHE", str(tmp_path / "cache"))
    name = f"cuda:{index}"
    torch.cuda.reset_peak_memory_stats(index)
    before = torch.cuda.max_memory_allocated(index)
    trained = train(load_recipe("streets/mfuser", SMALL), tmp_path / "run", progress=Silent(), device=name)
    assert torch.cuda.current_device() == index
    assert torch.cuda.max_memory_allocated(index) > before
    scored = evaluate(tmp_path / "run", ["streets-city"], progress=Silent(), device=name)
    assert {record.environment["device"] for record in (trained, *scored)} == {torch.cuda.get_device_name(index)}

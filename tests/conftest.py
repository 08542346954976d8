"""What every test shares: fixed seeds, a folder of its own, and the user's settings kept out."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

# PyTorch reads this when it is imported. The limits of the full-size tests were set with its kernels for AVX2; those for
# AVX-512 round otherwise, and what that leaves of numbers which nearly cancel is another matter (docs/mfuser.md).
_cpu = Path("/proc/cpuinfo")
if _cpu.exists() and "avx512f" in _cpu.read_text():
    os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")

# Two processes share the tests (pyproject.toml): a thread each, on two cores. Read at import, and by the processes they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# Triton reads this when it is imported, which any test module may do
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Behind nohup, or in a script's background, a process and its children begin deaf to these
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# Autograd starts a thread for each GPU that torch knows at a process's first backward pass, and no fork of the process can train
# from then on. Fake tensors on "cuda" register 255 GPUs where there is none: so the first pass is before them.
if not torch.cuda.is_available():
    torch.ones(1, requires_grad=True).sum().backward()


_OF_THE_USER = ("DGBENCH_DEBUG", "DGBENCH_DATA", "DGBENCH_DOMAINS", "NO_COLOR", "FORCE_COLOR", "COLUMNS")


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fix the seeds; forget variables that change what is printed or where files go."""
    random.seed(0)
    np.random.seed(0)  # libraries under test may use the global generator
    torch.manual_seed(0)
    for name in _OF_THE_USER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True, scope="session")
def _outside_the_clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures of modules come before those of tests: they, too, see neither the user's variables nor what is in the clone."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _OF_THE_USER:
            patch.delenv(name, raising=False)
        patch.chdir(tmp_path_factory.mktemp("before"))
        yield


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A clone in which someone has worked has `runs/` and `data/`, which commands read and complete."""
    folder = tmp_path_factory.mktemp("here")  # beside `tmp_path`, in which tests look for what was written
    monkeypatch.chdir(folder)
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def _programs_are_built_once() -> Iterator[None]:
    """Typer's runner makes all commands of a program anew at every call, which takes as long as what most tests do with them."""
    from typer import Typer, testing

    make, made = testing._get_command, {}

    def once(app: Typer) -> object:
        # a test may add commands to it
        key = (app, len(app.registered_commands), len(app.registered_groups), app.registered_callback)
        if key not in made:
            made[key] = make(app)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing, "_get_command", once)
        yield


@pytest.fixture(autouse=True)
def _full_size_models_go(request: pytest.FixtureRequest) -> Iterator[None]:
    """Models hang in reference cycles: the next test of several GB must not wait for the collector's turn."""
    yield
    if request.node.get_closest_marker("full"):
        gc.collect()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, so that `-m full` alone works anywhere."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))

"""Checkpoints written in the background, as on a GPU: the same files, whole ones after a kill or a signal, and errors."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import kills
import processes
import pytest
import torch
from plain_training import Ended, fit, fit_by_two

import mfuser
from dgbench.engine import checkpoint_writer, checkpoints, stops
from dgbench.errors import CheckpointError, Terminated

EVERY = "train.checkpoint_every=2"


@pytest.fixture(scope="module", autouse=True)
def _set(tmp_path_factory: pytest.TempPathFactory):
    os.environ["DGBENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a fork: the same bits need as many
    with processes.plain():
        yield
    torch.set_num_threads(threads)
    del os.environ["DGBENCH_CACHE"]


@pytest.fixture
def _background(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's checkpoints are written as a GPU's are."""
    monkeypatch.setattr(checkpoint_writer, "BACKGROUND", ("cpu", "cuda"))


def files(run: Path) -> dict[str, bytes]:
    """Return the checkpoint's files but the one with times in it, which the manifest hashes."""
    (folder,) = (run / "checkpoint").iterdir()
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("training.json", "manifest.json")}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A disk on which a file takes as long as some steps; the names of the threads that waited for it."""
    seen: list[str] = []
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        seen.append(threading.current_thread().name)
        time.sleep(0.02)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


@pytest.mark.parametrize("option", [(), ("train.ema=0.5",)])
def test_files_are_those_that_are_written_between_steps(option, tmp_path, monkeypatch, slow):
    """With an average, too, whose trained weights are in another file."""
    found = []
    for kinds in ((), ("cpu",)):
        monkeypatch.setattr(checkpoint_writer, "BACKGROUND", kinds)
        slow.clear()
        run = fit(tmp_path / f"{len(kinds)}", "train.checkpoint_every=4", "train.steps=5", *option)
        assert any(name.startswith("checkpoint") for name in slow) == bool(kinds)
        found.append(files(run))
    assert found[0] == found[1]
    assert {"model.safetensors", "optimizer.pt"} < found[0].keys()


def test_a_snapshot_is_of_its_step_whatever_the_next_ones_do(tmp_path):
    model = mfuser.build("linear", vfm="tiny", image_size=(32, 32), weights="random").train()
    model.vfm.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)

    def step() -> None:
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    step()
    checkpoints.save(model, optimizer, tmp_path / "at once", 1)
    own = checkpoint_writer.snapshot(model, optimizer, copy=True)
    step()
    checkpoints.write(own, tmp_path / "later", 1)
    first, later = (files(tmp_path / name) for name in ("at once", "later"))
    assert first == later
    checkpoints.save(model, optimizer, tmp_path / "changed", 1)
    changed = files(tmp_path / "changed")
    assert all(changed[name] != first[name] for name in ("model.safetensors", "optimizer.pt"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
def test_the_first_of_two_processes_writes_while_both_go_on(tmp_path, monkeypatch):
    found = []
    for kinds in ((), ("cpu",)):
        monkeypatch.setattr(checkpoint_writer, "BACKGROUND", kinds)
        found.append(files(fit_by_two(tmp_path / f"{len(kinds)}", EVERY)))
    assert found[0] == found[1]


@pytest.mark.usefixtures("_background", "slow")
@pytest.mark.parametrize("at", [2, 3])
def test_a_signal_behind_a_checkpoint_leaves_the_last_step_whole(at, tmp_path):
    """While one is written: at its step there is no other to write, and behind it there is."""
    with pytest.raises(Terminated):
        fit(tmp_path / "stopped", EVERY, progress=Ended(at))
    run = tmp_path / "stopped" / "run"
    assert [path.name for path in (run / "checkpoint").iterdir()] == [f"step-{at:06d}"]
    assert checkpoints.load_model(run) is not None
    fit(tmp_path / "stopped", EVERY, resume=True)
    whole = fit(tmp_path / "whole", EVERY)
    assert files(run) == files(whole)
    assert (run / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


@pytest.mark.usefixtures("_background", "slow")
def test_a_second_signal_waits_for_what_is_being_written_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(stops, "_BURST", 0.0)

    class Twice(Ended):
        def interrupts(self) -> None:
            threading.Timer(0.03, super().interrupts).start()
            super().interrupts()

    with pytest.raises(Terminated):
        fit(tmp_path / "stopped", EVERY, progress=Twice(3))
    run = tmp_path / "stopped" / "run"
    assert [path.name for path in (run / "checkpoint").iterdir()] == ["step-000002"], "nothing half written"
    fit(tmp_path / "stopped", EVERY, resume=True)
    assert files(run) == files(fit(tmp_path / "whole", EVERY))


def test_weights_that_are_not_finite_are_refused_where_the_writer_is_asked(tmp_path):
    """As they would between steps; the checkpoint before is kept."""
    run = fit(tmp_path, EVERY, "train.steps=2")
    model = checkpoints.load_model(run)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    next(model.parameters()).data.fill_(torch.nan)
    writer = checkpoint_writer.Writer(background=True)
    own = checkpoint_writer.snapshot(model, optimizer, copy=True)
    writer.put(lambda: checkpoints.write(own, run, 3))
    with pytest.raises(CheckpointError, match="step 3: .* not finite"):
        writer.wait()
    writer.wait()
    writer.close()
    assert [path.name for path in (run / "checkpoint").iterdir()] == ["step-000002"]


@pytest.mark.usefixtures("_background")
def test_a_checkpoint_that_cannot_be_written_ends_the_training(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint").write_text("no folder")
    with pytest.raises(FileExistsError):
        fit(tmp_path, EVERY, "train.steps=40")
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) < 40, "some steps later, not behind the last"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
@pytest.mark.usefixtures("_background")
def test_a_training_killed_at_some_changes_of_the_disk_ends_as_one_that_was_not(tmp_path):
    whole, folder = fit(tmp_path / "whole", EVERY), tmp_path / "killed"
    run = folder / "run"

    def again() -> None:
        fit(folder, EVERY, resume=(run / "recipe.yaml").is_file())

    found = kills.stops(again, run)
    assert len(found) > 60
    for stop in found[4::13]:
        shutil.rmtree(run, ignore_errors=True)
        assert kills.kill(again, run, stop), stop
        again()
        assert files(run) == files(whole), stop
        assert (run / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes(), stop
        assert not [path.name for path in run.rglob("*") if path.name.startswith(".")], stop

"""A run's files: damage to any of them is told by the command that reads it, and what is lost is written again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dgbench import results, streets, temporaries
from dgbench.data.labels import CLASSES
from dgbench.engine import checkpoints
from dgbench.engine.evaluate import evaluate
from dgbench.engine.predict import predict
from dgbench.engine.stops import Stops
from dgbench.engine.train import train
from dgbench.errors import CheckpointError, DataError, DgbenchError, RecipeError, Terminated
from dgbench.progress import Silent
from dgbench.recipe import load_recipe
from dgbench.runs import claim_run
from mfuser import manifest

SETTINGS = [
    "data.size=[64, 128]",
    "data.crop=[64, 64]",
    "data.train_images=4",
    "data.val_images=2",
    "train.batch_size=2",
    "train.log_every=1",
    "train.steps=4",
    "train.checkpoint_every=2",
    "train.workers=0",
]
IN_STEP = ("model.safetensors", "model.json", "optimizer.pt", "source.json", "training.json", "manifest.json")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    os.environ["DGBENCH_CACHE"] = str(path)
    yield path
    del os.environ["DGBENCH_CACHE"]


def recipe(*overrides: str):
    return load_recipe("streets/source-only", [*SETTINGS, *overrides])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    path = tmp_path_factory.mktemp("runs") / "whole"
    train(recipe(), path, progress=Silent(), device="cpu")
    return path


@pytest.fixture
def run(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def step(run: Path) -> Path:
    return run / "checkpoint" / "step-000004"


def resume(run: Path) -> results.Record:
    """As the command does: by the recipe that lies in the run."""
    return train(load_recipe(str(run / "recipe.yaml")), run, progress=Silent(), device="cpu", resume=True)


def flip(path: Path, place: float, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)


def test_a_step_folder_says_what_all_its_files_are(whole):
    assert sorted(p.name for p in step(whole).iterdir()) == sorted(IN_STEP)
    files = json.loads((step(whole) / "manifest.json").read_text())["files"]
    assert sorted(files) == sorted(set(IN_STEP) - {"manifest.json"})
    for name, row in files.items():
        content = (step(whole) / name).read_bytes()
        assert row == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("name", [*(f"checkpoint/step-000004/{name}" for name in IN_STEP), "log.jsonl", "recipe.yaml"])
def test_a_flipped_bit_in_any_file_is_told_when_a_training_is_gone_on_with(run, name):
    for place, bit in ((0, 0), (0.4, 5), (1, 3)):
        path = run / name
        before = path.read_bytes()
        flip(path, place, bit)
        with pytest.raises(DgbenchError, match=path.name) as error:
            resume(run)
        assert "\n" not in error.value.message
        assert error.value.hint
        path.write_bytes(before)
    resume(run)


@pytest.mark.parametrize("place", [*np.linspace(0, 0.17, 12), *np.linspace(0.2, 1, 8)])
def test_a_flipped_bit_anywhere_in_a_runs_recipe_is_told(run, place):
    for bit in range(8):
        before = (run / "recipe.yaml").read_bytes()
        flip(run / "recipe.yaml", place, bit)
        with pytest.raises(DgbenchError, match=r"recipe\.yaml"):
            load_recipe(str(run / "recipe.yaml"), check_method=False)
        (run / "recipe.yaml").write_bytes(before)


def test_recipes_of_older_runs_and_changes_that_are_meant_are_read(run):
    path = run / "recipe.yaml"
    head, _, text = path.read_text().partition("\n")
    path.write_text(f"{head.partition(', sha256')[0]}.\n{text}")
    assert load_recipe(str(path), check_method=False).train.steps == 4
    path.write_text(text.replace("steps: 4", "steps: 5"))
    assert load_recipe(str(path), check_method=False).train.steps == 5


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "source.json", "manifest.json"])
def test_a_flipped_bit_is_told_when_a_checkpoint_is_scored(run, name):
    flip(step(run) / name, 0.5, 2)
    with pytest.raises(CheckpointError, match=name):
        evaluate(run, ["streets-city"], progress=Silent(), device="cpu")
    assert not list(run.glob("record-*-eval-*"))


def test_a_flipped_bit_is_told_when_a_photograph_is_segmented(run, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    flip(step(run) / "model.safetensors", 0.9, 2)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        predict([tmp_path / "photo.png"], run, tmp_path / "out.png", device="cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "optimizer.pt", "source.json", "training.json"])
@pytest.mark.parametrize("change", ["missing", "empty", "cut"])
def test_a_missing_an_empty_and_a_cut_file_are_told_by_name(run, name, change):
    path = step(run) / name
    content = path.read_bytes()
    path.unlink()
    if change != "missing":
        path.write_bytes(b"" if change == "empty" else content[:-1])
    with pytest.raises(CheckpointError, match=name.replace("model.json", "model.json|step-000004")) as error:
        resume(run)
    assert "\n" not in error.value.message


def test_of_two_steps_the_older_one_is_advised(run):
    shutil.copytree(step(run), run / "checkpoint" / "step-000002")
    flip(step(run) / "model.safetensors", 0.5, 0)
    with pytest.raises(CheckpointError) as error:
        resume(run)
    assert str(error.value.hint).endswith("step-000004 to go on from step 2")


def test_a_step_under_the_name_of_another_is_refused(run):
    step(run).rename(run / "checkpoint" / "step-000002")
    with pytest.raises(CheckpointError, match="holds the checkpoint of step 4"):
        resume(run)


def test_weights_that_the_record_of_the_training_does_not_name_are_not_scored(run):
    file = step(run) / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    manifest.seal(step(run), [file.name])
    with pytest.raises(CheckpointError, match=r"other weights than its training wrote: SHA-256 .* by .*record-.*train"):
        evaluate(run, ["streets-city"], progress=Silent(), device="cpu")


def as_older(run: Path) -> Path:
    """As versions before there were manifests left a run."""
    for name in ("manifest.json", "training.json"):
        (step(run) / name).unlink()
    return step(run)


def test_a_run_of_an_older_version_is_read_with_a_warning(run, caplog):
    as_older(run)
    for record in run.glob("record-*"):
        record.unlink()
    resumed = resume(run)
    assert "damage to its files cannot be detected" in caplog.text
    assert results.read(resumed.path) == resumed
    assert resumed.extra["loss"] == json.loads((run / "log.jsonl").read_text().splitlines()[-1])["loss"]
    assert evaluate(run, ["streets-city"], progress=Silent(), device="cpu")


def test_an_empty_optimizer_file_and_log_of_an_older_version_are_no_tracebacks(run):
    as_older(run)
    (run / "log.jsonl").write_bytes(b"")
    for record in run.glob("record-*"):
        record.unlink()
    assert resume(run).extra["loss"] is None
    for content in (b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"no pickle"):
        (step(run) / "optimizer.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"optimizer\.pt cannot be resumed from: \w") as error:
            resume(run)
        assert "weights_only" not in str(error.value)
        assert "\n" not in error.value.message


def test_a_log_that_was_removed_is_begun_anew(run, caplog):
    (run / "log.jsonl").unlink()
    resume(run)
    assert "the losses of the steps before 4 are lost" in caplog.text


def test_the_record_that_a_kill_prevented_is_written_when_the_training_is_gone_on_with(run):
    (path,) = run.glob("record-*-train-*")
    before = results.read(path)
    path.unlink()
    again = resume(run)
    same = {"id": before.id, "created": before.created, "digest": "", "path": None, "seconds": {**before.seconds, "total": None}}
    assert dataclasses.replace(again, **same) == dataclasses.replace(before, **same)
    assert results.read(again.path) == again
    assert resume(run) == again
    assert len(list(run.glob("record-*-train-*"))) == 1


def test_steps_are_in_the_order_of_their_numbers_and_other_names_are_none(run):
    folder = run / "checkpoint"
    for name in ("step-1000000", "step-999999", "step-9999999-backup", "step-", "step-x", "step-00000५", "step-000004 (copy)"):
        shutil.copytree(step(run), folder / name)
    assert checkpoints.newest(run) == (folder / "step-1000000", 1_000_000)
    model, optimizer = checkpoints.load_model(run), torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    checkpoints.save(model, optimizer, run, 1_000_001)
    assert {p.name for p in folder.iterdir()} == {
        "step-1000001",
        "step-9999999-backup",
        "step-",
        "step-x",
        "step-00000५",
        "step-000004 (copy)",
    }


def test_what_dead_processes_left_in_a_run_is_removed_and_that_of_living_ones_is_not(run):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone, kept = run / f".recipe.yaml.{dead.pid}.tmp", [run / f".recipe.yaml.{os.getppid()}.tmp", run / ".mine.tmp"]
    for path in (gone, *kept):
        path.touch()
    resume(run)
    assert not gone.exists()
    assert all(path.exists() for path in kept)
    temporaries.clear(run / "no-such-folder", shared=True)


def test_a_training_killed_before_its_first_checkpoint_starts_anew_in_its_folder(run, whole):
    shutil.rmtree(run / "checkpoint")
    next(run.glob("record-*")).unlink()
    (run / "log.jsonl").write_text('{"step": 1, "lo')
    (run / "checkpoint" / ".partial-000002").mkdir(parents=True)
    record = resume(run)
    assert record.checkpoint == checkpoints.sha256(step(whole))
    assert (run / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    with pytest.raises(DgbenchError) as error:
        claim_run(run)
    assert "train --resume" in str(error.value.hint)


def test_weights_that_are_not_finite_make_no_checkpoint(run):
    model, optimizer = checkpoints.load_model(run), torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    torch.nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(CheckpointError, match=r"step 5: .*head\.bias holds 19 values of 19 that are not finite"):
        checkpoints.save(model, optimizer, run, 5)
    assert [p.name for p in (run / "checkpoint").iterdir()] == ["step-000004"]


class Signalled(Silent):
    """Sends this process signals when a step is counted, which is while it is still worked on."""

    def __init__(self, *signals: int, at: int, pause: float = 0.0) -> None:
        self.signals, self.at, self.pause, self.steps = signals, at, pause, 0

    def advance(self, count: int = 1, **values: float) -> None:
        self.steps += count
        if count and self.steps == self.at:
            for number in self.signals:
                os.kill(os.getpid(), number)
                time.sleep(self.pause)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_keeps_the_step_in_which_it_arrives_and_the_rest_is_the_same_bit_for_bit(number, whole, tmp_path):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.raises((Terminated, KeyboardInterrupt)) as stop:
        # sent twice, as `timeout` does
        train(recipe(), tmp_path, progress=Signalled(number, number, at=1), device="cpu")
    assert getattr(stop.value, "signum", signal.SIGINT) == number
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    assert checkpoints.newest(tmp_path)[1] == 1
    resume(tmp_path)
    assert checkpoints.sha256(step(tmp_path)) == checkpoints.sha256(step(whole))
    assert (tmp_path / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


class SignalledGroup(Silent):
    """Sends this process and the loader's workers a signal while a step is worked on, as `timeout` and Ctrl-C do."""

    def advance(self, count: int = 1, **values: float) -> None:
        workers = multiprocessing.active_children() if "loss" in values else []
        if not workers:
            return
        # by somebody else: a worker that its parent ends is one that PyTorch does not miss
        subprocess.run(["kill", "-TERM", str(os.getpid()), *(str(worker.pid) for worker in workers)], check=True)
        time.sleep(0.5)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_signal_that_ends_the_workers_too_keeps_the_step(tmp_path):
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(Terminated):
        train(recipe("train.workers=1"), tmp_path, progress=SignalledGroup(), device="cpu")
    assert checkpoints.newest(tmp_path)[1] == 1
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_second_signal_ends_at_once_and_keeps_the_checkpoint_before(tmp_path):
    with pytest.raises(Terminated):
        train(recipe(), tmp_path, progress=Signalled(signal.SIGTERM, signal.SIGTERM, at=3, pause=0.6), device="cpu")
    assert checkpoints.newest(tmp_path)[1] == 2


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stops() as stops:
            os.kill(os.getpid(), signal.SIGHUP)
            stops.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_number_of_threads_or_torch_is_said_when_a_training_is_gone_on_with(run, caplog):
    path = step(run) / "training.json"
    made = json.loads(path.read_text())
    assert made["environment"]["threads"] == str(torch.get_num_threads())
    resume(run)
    assert "bit for bit" not in caplog.text
    made["environment"] |= {"threads": "31", "torch": "2.0.0"}
    path.write_text(json.dumps(made))
    manifest.seal(step(run), [path.name])
    resume(run)
    assert f"started with threads 31, now {torch.get_num_threads()}, torch 2.0.0, now" in caplog.text


def test_labels_without_a_class_are_told_before_rare_ones_are_drawn(tmp_path):
    image, _ = streets.render("streets-city", "val", 0, (64, 128))
    for number in range(2):
        for kind, array in (("leftImg8bit", image), ("gtFine_labelIds", np.zeros((64, 128), np.uint8))):
            path = tmp_path / f"cityscapes/{kind.partition('_')[0]}/train/lindau/lindau_{number:06d}_000019_{kind}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    assert 0 not in {c.label_id for c in CLASSES}
    settings = ("data.source=cityscapes", "data.rare_class_sampling=0.1", "data.train_images=null")
    with pytest.raises(DataError, match="no pixel of `cityscapes` train has one of the 19 classes"):
        train(recipe(*settings), tmp_path / "run", progress=Silent(), device="cpu", root=tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_step_that_the_memory_does_not_suffice_for_is_told_in_one_line(tmp_path):
    resource = pytest.importorskip("resource")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), before[1]))
    try:
        with pytest.raises(RecipeError, match=r"step 1: the memory does not suffice") as error:
            train(
                recipe("data.crop=[256, 512]", "data.size=[256, 512]", "train.batch_size=64", "data.train_images=1"),
                tmp_path,
                progress=Silent(),
                device="cpu",
            )
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert "\n" not in error.value.message

"""An evaluation that is interrupted goes on from what it has scored, and leaves one record with the same numbers."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time

import kills
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mfuser
from dgbench import locks, matrices, results
from dgbench.cli import app
from dgbench.engine import checkpoints, partial
from dgbench.engine.device import memory_refused
from dgbench.engine.evaluate import evaluate
from dgbench.engine.train import train
from dgbench.errors import CheckpointError, DgbenchError, Terminated
from dgbench.progress import Silent
from dgbench.protocol import PROTOCOLS, lookup
from dgbench.recipe import dump, load_recipe
from mfuser import manifest


@pytest.fixture(autouse=True, scope="module")
def _one_thread_and_cache(tmp_path_factory):
    os.environ["DGBENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    del os.environ["DGBENCH_CACHE"]


def other_weights(model, run):
    """Put a model in the place of the one that was trained, whole and sealed."""
    step = run / "checkpoint" / "step-000001"
    mfuser.save(model, step)
    manifest.seal(step, [file.name for file in step.iterdir() if file.name != manifest.NAME])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose model sees many classes, scored on two domains of five images in batches of two."""
    path = tmp_path_factory.mktemp("runs") / "a-run"
    small = ["data.size=[64, 128]", "data.crop=[64, 64]", "data.train_images=4", "data.val_images=5", "train.steps=1"]
    recipe = load_recipe("streets/source-only", [*small, "train.batch_size=2", "eval.batch_size=2", "train.workers=0"])
    train(recipe, path, progress=Silent(), device="cpu")
    model = checkpoints.load_model(path)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    other_weights(model, path)
    for record in path.glob("record-*-train-*.json"):  # of other weights than these
        record.unlink()
    return path


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


TARGETS = ["streets-city", "streets-fog"]


def scores(run, targets=TARGETS, **settings):
    return evaluate(run, targets, progress=settings.pop("progress", Silent()), device="cpu", **settings)


def evals(run):
    return [record for record in results.query(run) if record.kind == "eval"]


def hidden(run):
    return sorted(path.name for path in run.iterdir() if path.name.startswith("."))


def lone(run):
    return [path.name for path in run.glob("confusion-*") if path.name not in {record.confusion for record in evals(run)}]


class Stops(Silent):
    """A bar that ends the evaluation when so many images are scored, and counts them."""

    def __init__(self, after=10**9, error=KeyboardInterrupt):
        self.after, self.error, self.images, self.notes = after, error, 0, []

    def advance(self, n=1, **_):
        self.images += n
        if n and self.images >= self.after:
            raise self.error

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def whole(trained, tmp_path):
    """The matrices of an uninterrupted evaluation, by domain."""
    shutil.copytree(trained, tmp_path / "whole")
    return {record.target: results.read_confusion(record) for record in scores(tmp_path / "whole")}


def check_same(records, whole, targets=TARGETS):
    assert [record.target for record in records] == targets
    for record in records:
        assert np.array_equal(results.read_confusion(record), whole[record.target])


@pytest.mark.parametrize(("targets", "each"), [(TARGETS[:1], 3), pytest.param(TARGETS, 1, marks=pytest.mark.full)])
def test_an_evaluation_killed_anywhere_goes_on_and_leaves_one_record_of_each_domain(
    targets, each, trained, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(partial, "_EVERY", 0.0)
    run = tmp_path / "run"

    def fresh():
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(trained, run)

    def action():
        scores(run, targets)

    fresh()
    moments = kills.stops(action, run)
    assert len(moments) > 20 * len(targets)
    for stop in moments[::each]:
        fresh()
        assert kills.kill(action, run, stop)
        if complete := len(evals(run)) == len(targets):
            check_same(evals(run), whole, targets)  # whatever else was to be removed
        records = scores(run, targets)
        check_same(records, whole, targets)
        if not complete:
            assert evals(run) == records, str(stop)
        left = [name for name in hidden(run) if not name.endswith(".lock")]
        assert (left, lone(run)) == ([], []), str(stop)


def test_what_was_scored_is_not_scored_again_and_the_seconds_add_up(run, whole):
    with pytest.raises(KeyboardInterrupt):
        scores(run, progress=Stops(after=9))
    kept = [matrices.unpacked(path) for path in run.glob(".scoring-*.npz")]
    assert sorted(len(part.counts) for part in kept) == [4, 5], "all of the first domain, two batches of the second"
    assert all(part.ids == tuple(f"{i:06d}" for i in range(len(part.ids))) for part in kept)
    seconds = {(n := json.loads(part.note))["about"]["target"]: n["seconds"] for part in kept}
    (first,) = evals(run)
    bar = Stops()
    records = scores(run, progress=bar)
    check_same(records, whole)
    assert records[0] == first
    assert bar.notes == [
        "streets-city was scored before the interruption",
        "streets-fog: 4 of 5 images were scored before the interruption",
    ]
    assert bar.images == 5, "four that were done, and one"
    assert all(records[1].seconds[name] > spent for name, spent in seconds["streets-fog"].items())
    assert hidden(run) == []


@pytest.mark.parametrize("change", ["weights", "protocol", "batch", "code", "threads", "damaged", "hostile"])
def test_nothing_is_mixed_with_what_was_scored_under_anything_else(change, run, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        scores(run, TARGETS[:1], progress=Stops(after=4))
    (path,) = run.glob(".scoring-*.npz")
    if change == "weights":
        model = checkpoints.load_model(run)
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
        other_weights(model, run)
    elif change == "protocol":
        monkeypatch.setitem(PROTOCOLS, "unified", dataclasses.replace(lookup("unified"), flip=True))
    elif change == "batch":
        dump(load_recipe(str(run / "recipe.yaml"), ["eval.batch_size=3"]), run / "recipe.yaml")
    elif change == "code":
        monkeypatch.setattr(partial, "_code", lambda: "other")
    elif change == "threads":
        torch.set_num_threads(2)
    elif change == "damaged":
        data = path.read_bytes()
        path.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    else:
        found = matrices.unpacked(path)
        note = json.loads(found.note) | {"id": "../../x"}
        path.write_bytes(matrices.packed(found.counts, found.ids, json.dumps(note)))
    bar = Stops()
    try:
        (record,) = scores(run, TARGETS[:1], progress=bar)
    finally:
        torch.set_num_threads(1)
    assert bar.notes == []
    assert evals(run) == [record]
    if change != "protocol":  # what is of another protocol may still be gone on with
        assert hidden(run) == []


def test_what_another_backend_scored_is_scored_again(tmp_path):
    small = ["data.size=[64, 128]", "data.crop=[64, 64]", "data.val_images=3", "eval.batch_size=1", "train.workers=0"]
    recipe = load_recipe("streets/mfuser", small)
    dump(recipe, tmp_path / "recipe.yaml")
    model = mfuser.build("mfuser", **recipe.method.options, image_size=recipe.data.crop, weights="random")
    mfuser.save(model, tmp_path / "checkpoint" / "step-000001")
    with pytest.raises(KeyboardInterrupt):
        scores(tmp_path, TARGETS[:1], progress=Stops(after=2))
    (path,) = tmp_path.glob(".scoring-*.npz")
    found = matrices.unpacked(path)
    note = json.loads(found.note)
    assert note["backends"]
    for backends, same in ((note["backends"], True), (dict.fromkeys(note["backends"], "another"), False)):
        other = matrices.packed(found.counts + 7, found.ids, json.dumps(note | {"backends": backends, "id": results.new_id()}))
        path.write_bytes(other)
        (record,) = scores(tmp_path, TARGETS[:1])
        assert record.backends == note["backends"]
        taken = np.array_equal(results.read_confusion(record)[:2], found.counts + 7)
        assert taken is same


def test_two_evaluations_of_one_run_at_once_both_write_their_record(run, whole):
    class Meanwhile(Stops):
        def advance(self, n=1, **_):
            super().advance(n)
            if self.images == 4:
                self.images += 1
                check_same(scores(run), whole)

    check_same(scores(run, progress=Meanwhile()), whole)
    assert len(evals(run)) == 4
    assert (hidden(run), lone(run)) == ([], [])


def test_leftovers_of_dead_processes_are_removed_and_others_stay(run):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old = time.time() - 7200
    removed = [
        f".recipe.yaml.{dead.pid}.tmp",
        f".record-x.json.{dead.pid}.tmp",
        "confusion-lone.npz",
        f"..scoring-0123456789abcdef.npz.{dead.pid}.tmp",
        ".scoring-0123456789abcdef.lock",
    ]
    stay = [
        f".log.jsonl.{os.getpid()}.tmp",
        "notes.txt",
        ".mine.tmp",
        "confusion-new.npz",
        "confusion-named.npz",
        f".record-y.json.{dead.pid}.tmp",
    ]
    for name in removed + stay:
        (run / name).write_bytes(b"x")
    for name in [*removed[1:3], "confusion-named.npz"]:
        os.utime(run / name, (old, old))
    (run / "record-z.json").write_text('{"confusion": "confusion-named.npz"}')
    scores(run, TARGETS[:1])
    assert [name for name in removed if (run / name).exists()] == []
    assert [name for name in stay if not (run / name).exists()] == []


def test_a_trainings_unfinished_files_stay_while_it_runs(run):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (run / f".recipe.yaml.{dead.pid}.tmp").touch()
    with locks.training(run):
        note = json.loads((run / locks.NOTE).read_text())
    (run / locks.NOTE).write_text(json.dumps(note | {"host": "elsewhere", "boot": "another"}))
    scores(run, TARGETS[:1])
    assert (run / f".recipe.yaml.{dead.pid}.tmp").exists()


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (Terminated(15), 143), (Terminated(1), 129)])
def test_a_stopped_eval_says_how_to_go_on_and_goes_on(stop, code, run, whole, monkeypatch):
    from dgbench import render

    monkeypatch.setattr(render, "progress", lambda **_: Stops(after=4, error=stop))
    arguments = ["eval", str(run), "--targets", *TARGETS, "--device", "cpu"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code, done.output
    said = " ".join(done.stderr.split())
    assert said.endswith(f"go on with: dgbench eval {run} --targets streets-city streets-fog --device cpu"), said
    monkeypatch.undo()
    assert CliRunner().invoke(app, said.partition("dgbench ")[2].split()).exit_code == 0
    check_same(evals(run), whole)


def test_the_newest_checkpoint_is_taken_when_one_is_replaced_while_it_is_read(run, monkeypatch):
    load, model = checkpoints.load_for, checkpoints.load_model(run)

    def replaced(recipe, folder):
        """Reading takes so long that a training writes its next step."""
        if folder.name == "step-000001":
            mfuser.save(model, run / "checkpoint" / "step-000002")
            shutil.rmtree(folder)
        return load(recipe, folder)

    monkeypatch.setattr(checkpoints, "load_for", replaced)
    (record,) = scores(run, TARGETS[:1])
    assert record.checkpoint == checkpoints.sha256(run / "checkpoint" / "step-000002")


def test_a_checkpoint_that_is_damaged_is_told_at_once(run):
    path = run / "checkpoint/step-000001/model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        scores(run)


@pytest.mark.parametrize("absent", ["skip", "unlabelled", "zero"])
def test_a_domain_without_a_labelled_pixel_has_no_miou_and_one_line_says_so(absent, run, tmp_path, monkeypatch, recwarn, caplog):
    for number in range(3):
        for array, name in (
            (np.zeros((64, 128, 3), np.uint8), "rgb_anon/val/night/a/{}_rgb_anon.png"),
            (np.full((64, 128), 255, np.uint8), "gt/val/night/a/{}_gt_labelTrainIds.png"),
        ):
            path = tmp_path / "dark_zurich" / name.format(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    monkeypatch.setitem(PROTOCOLS, "unified", dataclasses.replace(lookup("unified"), absent_classes=absent))
    (record,) = scores(run, ["dark-zurich"], root=tmp_path)
    assert (record.miou, set(record.iou), record.interval) == (None, {None}, (None, None))
    assert results.read(record.path) == record
    said = [message for message in caplog.messages if "mIoU" in message]
    assert said == ["dark-zurich val: mIoU is undefined: no labelled pixel in 3 images"]
    assert not [w for w in recwarn if "nan" in str(w.message).lower()]


@pytest.mark.parametrize("allocate", [lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: np.empty(1 << 60, np.uint8)])
def test_exhausted_memory_is_recognized_in_the_words_of_each_library(allocate):
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate()
    assert memory_refused(caught.value)
    assert memory_refused(RuntimeError("shape mismatch")) is None
    assert memory_refused(torch.OutOfMemoryError("CUDA out of memory")) is None
    # by whom is not known: told as a killed worker, wherever PyTorch raises it
    assert memory_refused(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")) is None


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_an_evaluation_without_enough_memory_ends_in_one_line(run, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "unified", dataclasses.replace(lookup("unified"), scales=(4000.0,)))

    def action():
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
        with pytest.raises(DgbenchError, match="not enough memory to score `streets-city`, 2 images at once"):
            scores(run, TARGETS[:1])

    assert kills.kill_after(action, 60) == 0

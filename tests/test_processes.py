"""Several processes train and score as one does: the same numbers, one run folder, one voice, and one end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from processes import RECIPE, Ended, Then, command

from dgbench import results
from dgbench.matrices import unpacked

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")


@pytest.fixture(scope="module", autouse=True)
def _set(tmp_path_factory: pytest.TempPathFactory):
    os.environ["DGBENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    with processes.plain():
        yield
    del os.environ["DGBENCH_CACHE"]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, scored."""
    folder = tmp_path_factory.mktemp("one")
    recipe = folder / "plain.yaml"
    recipe.write_text(RECIPE)
    (ended,) = processes.together(
        lambda: command("train", str(recipe), "--device", "cpu", "--quiet", "--out", str(folder / "run")), 1, folder
    )
    assert ended.status == 0, ended.err
    return folder / "run"


def train(folder: Path, *words: str, count: int = 2, then: Then | None = None, **env: str) -> list[Ended]:
    recipe = folder / "plain.yaml"
    recipe.write_text(RECIPE)
    given = words if "--resume" in words else (str(recipe), "--out", str(folder / "run"), *words)
    return processes.together(lambda: command("train", *given, "--device", "cpu", "--no-eval"), count, folder, then=then, **env)


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def kinds(run: Path) -> list[str]:
    return sorted(record.kind for record in results.query(run))


def said(ended: list[Ended]) -> list[str]:
    """The processes' errors and last words, without progress."""
    return [
        line for one in ended for line in one.err.splitlines() if line.startswith(("error", "stopped", "interrupted", "Trace"))
    ]


def test_two_processes_train_and_score_as_one(one: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "plain.yaml"
    recipe.write_text(RECIPE)
    run = tmp_path / "run"
    ended = processes.together(lambda: command("train", str(recipe), "--device", "cpu", "--out", str(run)), 2, tmp_path)
    assert [one.status for one in ended] == [0, 0], ended
    assert (ended[1].out, ended[1].err) == ("", "")
    assert "2 processes on one machine (gloo), 2 images of a batch each" in ended[0].err
    for step, alone in zip(losses(run), losses(one), strict=True):
        assert step == pytest.approx(alone, rel=1e-5)
    assert kinds(run) == kinds(one) == ["eval", "eval", "train"]
    trained = next(record for record in results.query(run) if record.kind == "train")
    assert trained.environment["processes"] == "2"
    assert [json.loads(line)["processes"] for line in (run / "speed.jsonl").read_text().splitlines()] == [2] * 6


def test_evaluation_is_that_of_one_process_bit_for_bit(one: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(one, run)
    for path in (*run.glob("record-*eval*"), *run.glob("confusion-*")):
        path.unlink()
    ended = processes.together(lambda: command("eval", str(run), "--device", "cpu", "--quiet"), 2, tmp_path)
    assert [e.status for e in ended] == [0, 0], ended
    assert ended[0].out
    assert not ended[1].out

    def matrices(folder: Path) -> dict[str, tuple[list[str], np.ndarray]]:
        found = {path.name.split("-eval-")[1]: unpacked(path) for path in folder.glob("confusion-*.npz")}
        return {name: (list(m.ids or ()), m.counts) for name, m in found.items()}

    np.testing.assert_equal(matrices(run), matrices(one))


@pytest.mark.full
def test_a_training_goes_on_with_another_number_of_processes(one: Path, tmp_path: Path) -> None:
    first = train(tmp_path, "--set", "train.steps=6", PLAIN_DOES="raise 4 1")
    assert [e.status != 0 for e in first] == [True, True]
    run = str(tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 4
    second = train(tmp_path, "--resume", run, count=1, PLAIN_DOES="raise 5 0")
    assert second[0].status == 1
    third = train(tmp_path, "--resume", run)
    assert [e.status for e in third] == [0, 0], third
    for step, alone in zip(losses(tmp_path / "run"), losses(one), strict=True):
        assert step == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("kill 4 1", "error: another process of this command has ended"),
        pytest.param("raise 4 1", "error: step 5: the memory does not suffice", marks=pytest.mark.full),
        pytest.param("nan 4 1", "error: the loss became nan at step 5", marks=pytest.mark.full),
    ],
)
def test_what_ends_one_process_ends_all_with_one_line(what: str, words: str, tmp_path: Path) -> None:
    ended = train(tmp_path, "--quiet", PLAIN_DOES=what)
    assert 0 not in [e.status for e in ended]
    assert [line[: len(words)] for line in said(ended)] == [words]
    assert [path.name for path in (tmp_path / "run/checkpoint").iterdir()] == ["step-000003"]


def test_a_process_that_is_stopped_because_another_failed_is_silent(tmp_path: Path) -> None:
    def stop(children: list[int]) -> bool:
        told = tmp_path / "1.err"
        if not told.exists() or "error" not in told.read_text():
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(children[0], signal.SIGTERM)  # as torchrun does
        return True

    ended = train(tmp_path, "--quiet", then=stop, PLAIN_DOES="raise 4 1")
    assert [line.partition(":")[2] for line in said(ended)] == [
        " step 5: the memory does not suffice: 0.0 GiB more were asked for"
    ]


def test_a_signal_to_one_process_stops_all_behind_the_same_step(one: Path, tmp_path: Path) -> None:
    log = tmp_path / "run/log.jsonl"

    def stop(children: list[int]) -> bool:
        if log.exists() and log.read_bytes().count(b"\n") > 1:
            os.kill(children[1], signal.SIGTERM)
            return True
        return False

    ended = train(tmp_path, "--quiet", "--set", "train.steps=100000", "train.checkpoint_every=100000", then=stop)
    assert [e.status for e in ended] == [143, 143], ended
    assert [line.partition(";")[0] for line in said(ended)] == ["stopped by SIGTERM"]
    (checkpoint,) = (tmp_path / "run/checkpoint").iterdir()
    assert int(checkpoint.name.removeprefix("step-")) == len(losses(tmp_path / "run"))


@pytest.mark.full
def test_a_hanging_process_is_named(tmp_path: Path) -> None:
    ended = train(tmp_path, "--quiet", PLAIN_DOES="sleep 4 1", DGBENCH_HANG_MINUTES="0.03")
    assert 0 not in [e.status for e in ended]
    (line,) = said(ended)
    assert line.endswith("run: no step for 0.03 minutes: process 1 is at step 5, computing")


@pytest.mark.full
def test_a_first_process_that_is_stopped_is_named_though_it_holds_the_store(tmp_path: Path) -> None:
    def end(children: list[int]) -> bool:
        told = tmp_path / "1.err"
        if not told.exists() or "error" not in told.read_text():
            return False
        os.kill(children[0], signal.SIGKILL)  # as the launcher does some seconds later
        return True

    ended = train(tmp_path, "--quiet", then=end, PLAIN_DOES="stop 4 0", DGBENCH_HANG_MINUTES="0.1")
    assert [e.status for e in ended] == [-9, 1]
    (line,) = said(ended)
    assert "run: no step for 0.1 minutes: process 0 gave no sign of life for " in line


@pytest.mark.full
@pytest.mark.parametrize("part", range(4))
def test_a_training_killed_at_any_moment_ends_with_the_same_weights(part: int, tmp_path: Path) -> None:
    """Forty kills in four parts: of either process or of both, spread over a training from its start to its end."""
    whole = tmp_path / "whole"
    whole.mkdir()
    begun = time.monotonic()
    assert [e.status for e in train(whole, "--quiet")] == [0, 0]
    seconds = time.monotonic() - begun
    for number in range(part, 40, 4):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        victims = ([0], [1], [0, 1])[number // 4 % 3]
        at = time.monotonic() + seconds * number / 40

        def kill(children: list[int], victims: list[int] = victims, at: float = at) -> bool:
            if time.monotonic() < at:
                return False
            for victim in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(children[victim], signal.SIGKILL)
            return True

        train(folder, "--quiet", then=kill, DGBENCH_JOIN_SECONDS="5")
        again = ["--resume", str(folder / "run")] if (folder / "run/recipe.yaml").exists() else []
        ended = train(folder, "--quiet", *again)
        assert [e.status for e in ended] == [0, 0], (number, ended)
        assert weights(folder / "run") == weights(whole / "run"), number
        assert kinds(folder / "run") == ["train"]


def weights(run: Path) -> bytes:
    (folder,) = (run / "checkpoint").glob("step-*")
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.full
def test_the_option_starts_the_processes_and_says_which_was_killed(tmp_path: Path) -> None:
    recipe = tmp_path / "plain.yaml"
    recipe.write_text(RECIPE)
    program = [
        sys.executable,
        str(Path(__file__).parent / "plain_program.py"),
        "train",
        str(recipe),
        "--out",
        str(tmp_path / "run"),
    ]
    words = [*program, "--gpus", "2", "--device", "cpu", "--no-eval", "--quiet"]
    path = str(Path(__file__).parents[1])
    done = subprocess.run(
        words, env={**os.environ, "PLAIN_DOES": "kill 4 0", "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "error: process 0 of 2 was killed (SIGKILL), most often because memory was used up"


def on_gpus(folder: Path, recipe: str, count: int, *words: str, **env: str) -> Path:
    """A run by so many processes; in processes of their own: CUDA does not survive a fork."""
    folder.mkdir()
    (folder / "plain.yaml").write_text(recipe)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    program = [sys.executable, str(Path(__file__).parent / "plain_program.py"), "train", str(folder / "plain.yaml")]
    given = ["--out", str(folder / "run"), "--gpus", str(count), "--quiet", *words]
    done = subprocess.run(
        [*program, *given], env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.gpu
@pytest.mark.parametrize(("norm", "options"), [("group", []), ("batch", []), ("group", ["train.graphs=true"])])
def test_two_processes_on_one_gpu_train_as_one(norm: str, options: list[str], tmp_path: Path) -> None:
    told = ["--set", f"method.norm={norm}", *options]
    one, two = (on_gpus(tmp_path / f"{count}", RECIPE, count, *told, DGBENCH_SHARE_GPU="1") for count in (1, 2))
    for step, alone in zip(losses(two), losses(one), strict=True):
        assert step == pytest.approx(alone, rel=1e-3)
    scores = [{r.target: r.miou for r in results.query(run) if r.kind == "eval"} for run in (one, two)]
    assert scores[0].keys() == scores[1].keys()


MFUSER = RECIPE.replace("{name: plain}", "{name: mfuser, vfm: tiny, vlm: tiny, freeze_towers: true, dropout: 0.1}")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (RECIPE, ["method.norm=group"]),
        (RECIPE, ["method.norm=batch"]),
        (MFUSER, ["train.precision=bf16", "train.frozen=bf16", "train.clip_norm=1.0"]),
        (MFUSER, ["train.precision=bf16", "train.frozen=bf16", "train.compile=blocks"]),
    ],
    ids=["without BatchNorm", "with BatchNorm", "mfuser", "mfuser, compiled"],
)
def test_two_gpus_train_with_graphs_as_without_them(recipe: str, options: list[str], tmp_path: Path) -> None:
    """Statistics of BatchNorm are exchanged within the graphs, gradients behind them; the processes part by themselves."""
    near = 2e-2 if recipe is MFUSER else 1e-3
    runs = [
        on_gpus(tmp_path / graphs, recipe, 2, "--no-eval", "--set", *options, f"train.graphs={graphs}")
        for graphs in ("false", "true")
    ]
    plain, captured = map(losses, runs)
    assert plain[0]["loss"] != plain[1]["loss"]
    for step, expected in zip(captured, plain, strict=True):
        assert step == pytest.approx(expected, rel=near)

"""Sweeps: their cells, what becomes of them here and on Slurm, and that a second call keeps what is done."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dgbench import cli
from dgbench.errors import DgbenchError, RecipeError, ResultError
from dgbench.progress import Silent
from dgbench.sweep import cells, cluster
from dgbench.sweep.attempt import Training
from dgbench.sweep.local import carry_out

GOLDEN = Path(__file__).parent / "goldens" / "sweep.sbatch"
SMALL = ["data.train_images=4", "data.val_images=2", "train.steps=2", "train.checkpoint_every=1", "train.log_every=1"]
# a program that trains nothing: what it does is the run's name
PROGRAM = """
import os, pathlib, sys, time
run = pathlib.Path(sys.argv[3])
if "killed" in str(run): os.kill(os.getpid(), 9)
if "wrong" in str(run): sys.exit("error: there is no such thing\\n\\nhint: none")
if "slow" in str(run):
    import signal
    signal.signal(signal.SIGTERM, lambda *_: (run.joinpath("stopped").touch(), sys.exit(143)))
    run.joinpath("begun").touch(); time.sleep(60)
"""


def run(*words: str, code: int = 0) -> Result:
    done = CliRunner().invoke(cli.app, list(words))
    assert done.exit_code == code, done.output
    return done


def appears(path: Path, seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} has not appeared"
        time.sleep(0.02)


def made(folder: Path, *names: str) -> list[cells.Cell]:
    return [cells.planned(folder / name, ["streets/smoke"], seeds=[0])[0] for name in names]


def test_a_sweep_has_a_cell_for_every_combination(tmp_path: Path) -> None:
    grid = cells.grid_of(["method.fuser=mvfuser,selfattn_concat", "data.size=[64, 128],[128, 256]"])
    found = cells.planned(tmp_path, ["streets/smoke"], grid=grid, seeds=[0, 1], settings=["train.steps=5"])
    assert len(found) == 8
    assert found[0].name == "streets-smoke-fuser=mvfuser-size=-64-128/seed-0"
    assert {(c.recipe.method.options["fuser"], c.recipe.data.size, c.recipe.train.seed) for c in found} == {
        (fuser, size, seed) for fuser in grid["method.fuser"] for size in ((64, 128), (128, 256)) for seed in (0, 1)
    }
    assert {c.recipe.train.steps for c in found} == {5}
    assert cells.found(tmp_path) == sorted(found, key=lambda cell: cell.run)


@pytest.mark.parametrize("text", ["method.fuser", "method.fuser=", "=a", "method.fuser=a,a"])
def test_a_grid_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        cells.grid_of([text])


def test_a_folder_with_another_recipe_is_refused(tmp_path: Path) -> None:
    cells.planned(tmp_path, ["streets/smoke"])
    with pytest.raises(ResultError, match="holds another recipe"):
        cells.planned(tmp_path, ["streets/smoke"], settings=["train.steps=7"])


def test_cells_that_fail_do_not_stop_the_others_and_say_why(tmp_path: Path) -> None:
    there = made(tmp_path, "killed", "wrong", "good")
    carry_out(there, 2, [sys.executable, "-c", PROGRAM], ["--no-eval"], Silent(), cpu=True)
    states = [cells.status(cell, scored=False) for cell in there]
    assert [(one.state, one.reason) for one in states] == [
        ("failed", "killed by SIGKILL"),
        ("failed", "there is no such thing"),
        ("waiting", ""),
    ]


def test_a_cell_that_is_told_to_stop_has_not_failed(tmp_path: Path) -> None:
    (cell,) = made(tmp_path, "slow")
    training = Training(cell.run, [sys.executable, "-c", PROGRAM], [])
    appears(cell.run / "begun")
    training.stop_and_wait()
    assert training.outcome() == ""
    assert (cell.run / "stopped").exists()
    assert cells.status(cell, scored=False).state == "waiting"


@pytest.mark.parametrize(
    ("text", "minutes"), [("90", 90), ("4:00:00", 240), ("1-12", 2160), ("1-12:30", 2190), ("2:30", 3), ("0:00:30", 1)]
)
def test_times_are_those_of_sbatch(text: str, minutes: int) -> None:
    assert cluster._minutes(text) == minutes


@pytest.mark.parametrize("text", ["soon", "-1", "1:2:3:4", "0"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(DgbenchError, match="is no time"):
        cluster._minutes(text)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which sbatch keeps the script that it is given, and sacct says what a file says."""
    pytest.importorskip("submitit")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {
        "sbatch": f'n=$(ls {tools} | grep -c script); cp "$1" {tools}/script-$n.sh; echo "Submitted batch job 4$((n + 1))"',
        "srun": "exit 1",
        "sacct": f"cat {tools}/states",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tools


def test_the_script_for_slurm_is_the_golden_one(slurm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    options = ["--slurm", "partition=gpu,time=4:00:00,account=vision,mail-type=END"]
    run("sweep", "streets/smoke", "--seeds", "0", "--out", str(folder), "--gpus", "2", *options)
    text = (slurm / "script-0.sh").read_text().replace(str(folder), "SWEEP").replace(sys.executable, "PYTHON")
    assert text == GOLDEN.read_text()


def test_jobs_in_the_queue_are_not_submitted_again_and_failed_ones_are(slurm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    words = ["sweep", "streets/smoke", "--seeds", "0", "1", "--out", str(folder), "--slurm", "partition=gpu"]
    (slurm / "states").write_text("")
    run(*words)
    (slurm / "states").write_text("JobID|State|NodeList\n41|PENDING|\n42|OUT_OF_MEMORY|n1\n")
    (shown,) = [json.loads(run("sweep", "--out", str(folder), "--json", code=1).stdout)]
    assert [(row["state"], row["job"], row["reason"]) for row in shown] == [
        ("waiting", "41", ""),
        ("failed", "42", "job 42: out of memory"),
    ]
    run(*words)
    assert len(list(slurm.glob("script-*"))) == 3


@pytest.mark.parametrize("executor", ["debug", "local"])
def test_submitit_runs_a_cell_and_tells_its_failure(executor: str, tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    good, wrong = made(tmp_path, "good", "wrong")
    ran = submitit.AutoExecutor(tmp_path / "jobs", cluster=executor)
    program = [sys.executable, "-c", PROGRAM]
    assert ran.submit(cluster.Job(good.run, program, [])).result() == str(good.run)
    if executor == "debug":  # starts a debugger where a job fails
        return
    with pytest.raises(Exception, match="there is no such thing"):
        ran.submit(cluster.Job(wrong.run, program, [])).result()
    assert cells.status(wrong, scored=False).reason == "there is no such thing"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_job_that_makes_room_stops_its_training_and_is_queued_again(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    (slow,) = made(tmp_path, "slow")
    ran = submitit.AutoExecutor(tmp_path / "jobs", cluster="local")
    ran.update_parameters(timeout_min=10)
    job = ran.submit(cluster.Job(slow.run, [sys.executable, "-c", PROGRAM], []))
    appears(slow.run / "begun")
    (slow.run / "begun").unlink()
    (task,) = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR2)  # as Slurm does
    appears(slow.run / "begun")  # submitit has started it again
    assert (slow.run / "stopped").exists()
    job.cancel()


@pytest.mark.full
def test_a_sweep_goes_on_with_what_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGBENCH_CACHE", str(tmp_path / "cache"))
    words = ["sweep", "streets/smoke", "--seeds", "0", "1", "--set", *SMALL, "--set-grid", "optim.lr=0.001,1e30"]
    words += ["--local", "2", "--device", "cpu", "--out", str(tmp_path / "all"), "--json", "--quiet"]
    states = {row["cell"]: row for row in json.loads(run(*words, code=1).stdout)}
    assert [states[f"streets-smoke-lr={lr}/seed-{seed}"]["state"] for lr in ("0.001", "1e30") for seed in (0, 1)] == [
        "done",
        "done",
        "failed",
        "failed",
    ]
    assert (
        "the loss became" in states["streets-smoke-lr=1e30/seed-0"]["reason"]
        or "finite" in states["streets-smoke-lr=1e30/seed-0"]["reason"]
    )
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("all/*=0.001/*/record-*.json")}
    run(*words, code=1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("all/*=0.001/*/record-*.json")} == before
    board = json.loads(run("leaderboard", "--runs", str(tmp_path / "all"), "--json", "--all").stdout)
    assert board

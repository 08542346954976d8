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
from dgbench.slurm import Job
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


def test_a_cell_that_is_scored_is_running_and_is_not_begun_again(tmp_path: Path) -> None:
    (cell,) = made(tmp_path, "slow")
    scoring = Training(cell.run, [sys.executable, "-c", PROGRAM], [])  # it does not hold the folder as a training does
    appears(cell.run / "begun")
    try:
        assert cells.status(cell, scored=True).state == "running"
        with pytest.raises(ResultError, match="trained or scored by another sweep"):
            Training(cell.run, [sys.executable, "-c", PROGRAM], [])
        carry_out([cell], 1, [sys.executable, "-c", PROGRAM], [], Silent(), cpu=True)
        assert not scoring.ended()
    finally:
        scoring.stop_and_wait()
    assert scoring.outcome() == ""
    assert cells.status(cell, scored=True).state == "waiting"


def test_the_time_left_counts_from_the_checkpoint_that_a_killed_cell_went_on_from(tmp_path: Path) -> None:
    (cell,) = made(tmp_path, "slow")
    (cell.run / "log.jsonl").write_text('{"step": 2}\n')
    (cell.run / "checkpoint" / "step-000001").mkdir(parents=True)
    cells.note(cell.run, job="7", began=time.time() - 10)
    assert cells.attempted(cell.run) == cells.Attempt(pytest.approx(time.time() - 10, abs=5), 1, "7")
    shown = cells.status(cell, scored=False, job=Job("running"))
    assert (shown.state, shown.seconds_left) == ("running", pytest.approx(10, abs=2))


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
    """A machine on which sbatch keeps the script that it is given, and squeue says what a file says; without accounting."""
    pytest.importorskip("submitit")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {
        "sbatch": f'n=$(ls {tools} | grep -c script); cp "$1" {tools}/script-$n.sh; echo "Submitted batch job 4$((n + 1))"',
        "srun": "exit 1",
        "squeue": f"cat {tools}/states",
        "sacct": 'echo "Slurm accounting storage is disabled" >&2; exit 1',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    (tools / "states").write_text("")
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
    words = ["sweep", "streets/smoke", "--seeds", "0", "1", "2", "3", "--out", str(folder), "--slurm", "partition=gpu"]
    run(*words)
    (slurm / "states").write_text("41|PENDING|Resources\n42|OUT_OF_MEMORY|OutOfMemory\n43|RUNNING|None\n44|PENDING|None\n")
    done = run("sweep", "--out", str(folder), "--json", code=1)
    assert [(row["state"], row["job"], row["reason"]) for row in json.loads(done.stdout)] == [
        ("waiting", "41", "in the queue: Resources"),
        ("failed", "42", "job 42: out of memory"),
        ("running", "43", ""),
        ("waiting", "44", ""),
    ]
    assert not done.stderr
    run(*words)
    assert len(list(slurm.glob("script-*"))) == 5


def test_a_job_that_slurm_forgot_has_failed_and_is_submitted_again(slurm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    words = ["sweep", "streets/smoke", "--seeds", "0", "--out", str(folder), "--slurm", "partition=gpu"]
    run(*words)
    (cell,) = cells.found(folder)
    assert cells.status(cell, scored=True, job=cluster.jobs_of([cell])[cell.run]).state == "waiting"  # may not be known yet
    note = json.loads((cell.run / cells.NOTE).read_text())
    (cell.run / cells.NOTE).write_text(json.dumps(note | {"began": note["began"] - 100}))
    (slurm / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n")
    (shown,) = json.loads(run("sweep", "--out", str(folder), "--json", code=1).stdout)
    assert (shown["state"], shown["reason"]) == ("failed", "Slurm no longer knows job 41")
    run(*words)
    assert len(list(slurm.glob("script-*"))) == 2


def test_nothing_is_submitted_twice_while_slurm_does_not_answer(slurm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    words = ["sweep", "streets/smoke", "--seeds", "0", "--out", str(folder)]
    run(*words, "--slurm", "partition=gpu")
    (slurm / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n")
    refused = run(*words, "--slurm", "partition=gpu", code=1)
    assert "Slurm does not answer: slurm_load_jobs error: Unable to contact slurm controller" in " ".join(refused.stderr.split())
    assert len(list(slurm.glob("script-*"))) == 1
    shown = run("sweep", "--out", str(folder))
    assert "waiting" in shown.stdout
    assert "Slurm does not answer" in shown.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodes=2", "nodes=2 is said by the sweep itself"),
        ("signal=USR1@5", "signal=USR1@5 is said by the sweep itself"),
        ("array=0-3", "array=0-3 is said by the sweep itself"),
        ("ntasks-per-node=2", "ntasks-per-node=2 is said by the sweep itself"),
        ("gpus-per-node=2", "dgbench sweep --gpus N"),
        ("time=1", "time=1 is too short"),
        ("cluster=pbs", "cluster=pbs is unknown"),
    ],
)
def test_options_that_would_break_the_jobs_are_refused_before_anything_is_made(
    text: str, words: str, slurm: Path, tmp_path: Path
) -> None:
    done = run("sweep", "streets/smoke", "--seeds", "0", "--out", str(tmp_path / "all"), "--slurm", text, code=1)
    assert words in " ".join(done.stderr.split())
    assert not (tmp_path / "all").exists()


def test_what_sbatch_says_is_said_once(slurm: Path, tmp_path: Path) -> None:
    said = "sbatch: error: invalid partition specified: nosuch\nsbatch: error: Batch job submission failed"
    (slurm / "sbatch").write_text(f"#!/bin/sh\necho '{said}\nTry \"sbatch --help\"' >&2; exit 1\n")
    done = run("sweep", "streets/smoke", "--seeds", "0", "--out", str(tmp_path / "all"), "--slurm", "partition=nosuch", code=1)
    words = "streets-smoke/seed-0 was not submitted: invalid partition specified: nosuch; Batch job submission failed hint:"
    assert words in " ".join(done.stderr.split())
    assert done.stderr.count("nosuch") == 1


@pytest.mark.parametrize("executor", ["debug", "local"])
def test_submitit_runs_a_cell_and_tells_its_failure(executor: str, tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    good, wrong = made(tmp_path, "good", "wrong")
    ran = submitit.AutoExecutor(tmp_path / "jobs", cluster=executor)
    program = [sys.executable, "-c", PROGRAM]
    assert ran.submit(cluster.Work(good.run, program, [])).result() == str(good.run)
    if executor == "debug":  # starts a debugger where a job fails
        return
    with pytest.raises(Exception, match="there is no such thing"):
        ran.submit(cluster.Work(wrong.run, program, [])).result()
    assert cells.status(wrong, scored=False).reason == "there is no such thing"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_job_that_makes_room_stops_its_training_and_is_queued_again(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    (slow,) = made(tmp_path, "slow")
    ran = submitit.AutoExecutor(tmp_path / "jobs", cluster="local")
    ran.update_parameters(timeout_min=10)
    job = ran.submit(cluster.Work(slow.run, [sys.executable, "-c", PROGRAM], []))
    appears(slow.run / "begun")
    (slow.run / "begun").unlink()
    (task,) = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR2)  # as Slurm does
    appears(slow.run / "begun")  # submitit has started it again
    assert (slow.run / "stopped").exists()
    job.cancel()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])  # as a cancelled one shows itself while its processes end
def test_a_job_whose_training_slurm_told_to_stop_is_queued_again_unless_it_was_cancelled(
    state: str, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preemption with a time of grace: SIGTERM to all processes of a job that goes on."""
    submitit = pytest.importorskip("submitit")
    (slow,) = made(tmp_path, "slow")
    (slurm / "states").write_text(f"7|{state}|None\n")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    ran = submitit.AutoExecutor(tmp_path / "jobs", cluster="local")
    ran.update_parameters(timeout_min=10)
    job = ran.submit(cluster.Work(slow.run, [sys.executable, "-c", PROGRAM], []))
    appears(slow.run / "begun")
    (slow.run / "begun").unlink()
    (task,) = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    (training,) = Path(f"/proc/{task}/task/{task}/children").read_text().split()
    for process in (task, training):
        os.kill(int(process), signal.SIGTERM)
    if state == "RUNNING":
        appears(slow.run / "begun")  # submitit has started it again
        job.cancel()
    else:
        assert job.result() == str(slow.run)
        assert not (slow.run / "begun").exists()
    assert (slow.run / "stopped").exists()


def test_a_training_that_was_stopped_before_it_heeds_signals_has_not_failed(tmp_path: Path) -> None:
    (cell,) = made(tmp_path, "early")
    training = Training(cell.run, [sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"], [])
    assert training.outcome() == ""
    assert training.stopped


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

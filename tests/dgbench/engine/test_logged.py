"""Lines of logged steps that are written one step later, as on a GPU: the same lines, and none is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path

import processes
import pytest
import torch
from plain_training import Ended, Shown, fit, fit_by_two
from processes import RECIPE, command

from dgbench.engine import logged
from dgbench.engine.log import Log
from dgbench.engine.logged import Logged
from dgbench.engine.pace import Pace
from dgbench.engine.team import ALONE
from dgbench.engine.tracking import Trackers
from dgbench.errors import RecipeError, Terminated
from dgbench.progress import Silent


@pytest.fixture(scope="module", autouse=True)
def _set(tmp_path_factory: pytest.TempPathFactory):
    os.environ["DGBENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    with processes.plain():
        yield
    del os.environ["DGBENCH_CACHE"]


@pytest.fixture
def _late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's losses are written where a GPU's are."""
    monkeypatch.setattr(logged, "LATE", ("cpu", "cuda"))


def lines(run: Path, name: str = "log.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def steps(run: Path, name: str = "log.jsonl") -> list[float]:
    return [line["step"] for line in lines(run, name)]


@pytest.mark.parametrize("every", [1, 2, 4])
def test_lines_are_those_that_are_written_at_once(every, tmp_path, monkeypatch):
    """Steps that are logged one behind the other, before a checkpoint, at one, and at the end."""
    runs, shown = [], []
    for late in ((), ("cpu",)):
        monkeypatch.setattr(logged, "LATE", late)
        shown.append(Shown())
        runs.append(fit(tmp_path / f"{len(late)}", f"train.log_every={every}", progress=shown[-1]))
    assert [(run / "log.jsonl").read_bytes() for run in runs] == [(runs[0] / "log.jsonl").read_bytes()] * 2
    assert steps(runs[1], "speed.jsonl") == steps(runs[1])
    assert all(line["images_per_second"] > 0 for line in lines(runs[1], "speed.jsonl"))
    assert shown[0].told == shown[1].told == [line["loss"] for line in lines(runs[0])]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
def test_processes_exchange_what_they_write_later(tmp_path, monkeypatch):
    found = []
    for late in ((), ("cpu",)):
        monkeypatch.setattr(logged, "LATE", late)
        run = fit_by_two(tmp_path / f"{len(late)}", "train.log_every=2")
        found.append((run / "log.jsonl").read_bytes())
        assert steps(run, "speed.jsonl") == [2, 3, 4, 6]
    assert found[0] == found[1]


@pytest.mark.usefixtures("_late")
@pytest.mark.parametrize(("kind", "error"), [(Shown, KeyboardInterrupt), (Ended, Terminated)])
def test_a_training_interrupted_behind_a_logged_step_has_its_line(kind, error, tmp_path):
    """Whatever raises; a signal also leaves a checkpoint, whose log has the line."""
    with pytest.raises(error):
        fit(tmp_path, "train.log_every=2", "train.checkpoint_every=6", progress=kind(at=2))
    run = tmp_path / "run"
    assert steps(run) == [2]
    if kind is Ended:
        assert [path.name for path in (run / "checkpoint").iterdir()] == ["step-000002"]
        fit(tmp_path, "train.log_every=2", "train.checkpoint_every=6", resume=True)
        assert steps(run) == [2, 4, 6]


@pytest.mark.usefixtures("_late")
def test_a_step_that_fails_leaves_the_line_of_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAIN_DOES", "raise 4 0")
    with pytest.raises(RecipeError, match="step 5: the memory does not suffice"):
        fit(tmp_path, "train.log_every=2", "train.checkpoint_every=6")
    assert steps(tmp_path / "run") == [2, 4]


@pytest.mark.usefixtures("_late")
@pytest.mark.parametrize("then", ["checkpoint", "signal"])
def test_a_loss_that_is_not_finite_is_named_by_its_step_and_nothing_is_kept_behind_it(then, tmp_path, monkeypatch):
    monkeypatch.setenv("PLAIN_DOES", "nan 3 0")
    progress = Ended(at=4) if then == "signal" else Silent()
    with pytest.raises(RecipeError, match="the loss became nan at step 4"):
        fit(tmp_path, "train.log_every=2", "train.checkpoint_every=5", progress=progress)
    assert steps(tmp_path / "run") == [2]
    assert list((tmp_path / "run").glob("checkpoint/step-*")) == []


@pytest.mark.usefixtures("_late")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
@pytest.mark.parametrize(
    ("does", "words"),
    [("nan 3 1", "error: the loss became nan at step 4"), ("raise 4 1", "error: step 5: the memory does not suffice")],
)
def test_what_ends_one_of_two_processes_is_said_once_and_nobody_waits_for_the_line(does, words, tmp_path):
    (tmp_path / "plain.yaml").write_text(RECIPE)
    told = ["--no-eval", "--quiet", "--device", "cpu", "--set", "train.log_every=2", "train.checkpoint_every=5"]
    words_of = ["train", str(tmp_path / "plain.yaml"), "--out", str(tmp_path / "run"), *told]
    ended = processes.together(lambda: command(*words_of), 2, tmp_path, PLAIN_DOES=does)
    assert 0 not in [one.status for one in ended]
    said = [line for one in ended for line in one.err.splitlines() if line.startswith(("error", "Trace"))]
    assert [line[: len(words)] for line in said] == [words]
    assert steps(tmp_path / "run") == [2]
    assert list((tmp_path / "run").glob("checkpoint/step-*")) == []


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_waited_for_until_a_step_is_written(tmp_path):
    device = torch.device("cuda")
    pace = Pace(tmp_path, ALONE, lambda: 1.0, device)
    said = Logged(ALONE, device, pace, Log(tmp_path / "log.jsonl", 0, None), Trackers(), Silent())
    loss = torch.full((), 2.0, device=device)
    loss += 0  # a kernel that is loaded for the first time is waited for
    pace.step(4)
    said.take(1, loss, {"loss_mask": loss}, 0.1, now=True)  # memory of the host is there from here on
    torch.cuda._sleep(2_000_000_000)  # about a second, in the GPU's cycles
    loss += 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        pace.step(4)
        said.take(2, loss, {"loss_mask": loss}, 0.1, now=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.cuda.current_stream().query()
    loss += 1  # by the next step
    said.write()
    assert lines(tmp_path)[1] == {"step": 2, "loss": 3.0, "lr": 0.1, "loss_mask": 3.0}
    assert lines(tmp_path, "speed.jsonl")[1]["images_per_second"] < 40  # the GPU's time, not Python's


@pytest.mark.gpu
def test_on_a_gpu_how_often_a_training_is_logged_changes_no_line(tmp_path):
    runs = [fit(tmp_path / f"{every}", "train.steps=20", f"train.log_every={every}", device="cuda") for every in (1, 10)]
    every, tenth = map(lines, runs)
    assert steps(runs[0]) == list(range(1, 21))
    chosen = [line for line in every if line["step"] in steps(runs[1])]
    assert {10, 20} < set(steps(runs[1]))
    for one, other in zip(tenth, chosen, strict=True):
        assert one == pytest.approx(other, rel=1e-3)

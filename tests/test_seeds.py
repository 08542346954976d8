"""Several seeds in one call of `train`, several runs in one of `eval`, and what both say when they are stopped."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dgbench import cli, results
from dgbench.cli import trainings
from dgbench.engine import checkpoints
from dgbench.errors import StoppedError
from dgbench.progress import Silent
from dgbench.recipe import load_recipe

sys.path.insert(0, str(Path(__file__).parent / "dgbench"))
from records import model

SETTINGS = (
    "data.size=[64,128]",
    "data.crop=[64,64]",
    "data.train_images=2",
    "data.val_images=1",
    "data.targets=[streets-city]",
    "train.batch_size=1",
    "train.steps=2",
    "train.log_every=1",
    "train.workers=0",
)
TRAIN = ("train", "streets/source-only", "--quiet", "--device", "cpu")
EVAL = ("eval", "--quiet", "--device", "cpu")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, list(arguments), prog_name="dgbench")
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    return result


def train(*arguments: str, code: int = 0) -> Result:
    return run(*TRAIN, *arguments, "--set", *SETTINGS, code=code)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of the seeds 0 and 1, trained and scored."""
    folder = tmp_path_factory.mktemp("runs") / "both"
    (folder.parent / "shown.txt").write_text(train("--seeds", "0", "1", "--out", str(folder)).stdout)
    return folder


@pytest.fixture
def trained(both: Path) -> Path:
    """A copy of them that was never scored."""
    copy = Path(shutil.copytree(both, "all"))
    for path in (*copy.rglob("record-*-eval-*"), *copy.rglob("confusion-*")):
        path.unlink()
    return copy


def sha(folder: Path | str) -> str:
    return checkpoints.sha256(checkpoints.folder_of(Path(folder)))


def kinds(folder: Path | str) -> list[str]:
    return [record.kind for record in results.query(folder)]


class _Interrupts(logging.Handler):
    """Interrupts the program when it warns for the n-th time, which it does at the end of every score of few images."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def emit(self, _: logging.LogRecord) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.fixture
def interrupted_at(request: pytest.FixtureRequest) -> Iterator[None]:
    logger, handler = logging.getLogger("dgbench.engine.evaluate"), _Interrupts(request.param)
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def test_each_seed_has_a_run_that_is_the_same_as_if_it_were_trained_alone(both: Path) -> None:
    train("--seed", "1", "--out", "alone", "--no-eval")
    assert sorted(path.name for path in both.iterdir()) == ["seed-0", "seed-1"]
    assert sha(both / "seed-1") == sha("alone") != sha(both / "seed-0")
    assert [record.seed for record in results.query(both) if record.kind == "train"] == [0, 1]


def test_several_seeds_are_shown_with_their_mean_and_standard_deviation(both: Path) -> None:
    shown = (both.parent / "shown.txt").read_text()
    assert [line.split()[2:4] for line in shown.splitlines()[2:5]] == [
        ["streets-game", "seed-0"],
        ["streets-game", "seed-1"],
        ["streets-game", "2"],
    ]
    (found,) = json.loads(run("train", "--resume", str(both), "--quiet", "--json").stdout)
    scores = [row["values"]["streets-city"]["miou"] for row in found["rows"]]
    assert found["rows"][2]["seeds"] == [0, 1]
    assert scores[2] == pytest.approx(sum(scores[:2]) / 2)
    assert found["rows"][2]["values"]["streets-city"]["deviation"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)


class _Stopped(Silent):
    """A progress display during whose second training the process is interrupted, after a step."""

    def __init__(self) -> None:
        self.trainings = 0

    def start(self, what: str, total: int, unit: str) -> None:
        self.trainings += what.startswith("training")
        self.left = 1 if what.startswith("training") and self.trainings == 2 else total + 1

    def advance(self, n: int = 1, **_: Any) -> None:
        self.left -= n
        if not self.left:
            raise KeyboardInterrupt


def test_an_interruption_says_which_seeds_are_done_and_the_rest_goes_on(both: Path) -> None:
    recipes = [load_recipe("streets/source-only", [*SETTINGS, f"train.seed={seed}"]) for seed in (0, 1)]
    options = trainings.Options(scored=True, device="cpu", root=None)
    planned = trainings.of_seeds(recipes, Path("runs"), Path("part"))
    with pytest.raises(StoppedError, match="^interrupted; done: seed 0; go on with: dgbench train --resume part$"):
        trainings.one_by_one(planned, options, _Stopped(), new=True)
    before = sorted(Path("part/seed-0").rglob("*"))
    run("train", "--resume", "part", "--quiet", "--device", "cpu")
    assert sorted(Path("part/seed-0").rglob("*")) == before
    for seed in (0, 1):
        assert sha(f"part/seed-{seed}") == sha(both / f"seed-{seed}")
        assert kinds(f"part/seed-{seed}") == ["train", "eval", "eval"]


@pytest.mark.parametrize("interrupted_at", [3], indirect=True)
@pytest.mark.usefixtures("interrupted_at")
def test_a_seed_that_was_interrupted_while_it_was_scored_is_scored_by_the_same_command(trained: Path) -> None:
    command = ("train", "--resume", "all", "--quiet", "--device", "cpu")
    stopped = run(*command, code=130)
    assert stopped.stderr.endswith("interrupted; done: seed 0; go on with: dgbench train --resume all\n")
    assert kinds("all/seed-1") == ["train"]
    run(*command)
    assert kinds("all/seed-1") == ["train", "eval", "eval"]


def test_latest_goes_on_with_all_seeds(trained: Path) -> None:
    Path("runs").mkdir()
    trained.rename("runs/all")
    done = run("train", "--resume", "latest", "--device", "cpu", "--no-eval")
    assert done.stderr.startswith("seed 0 is done: runs/all/seed-0\nseed 1 is done: runs/all/seed-1\n")


def test_seeds_that_cannot_begin_leave_nothing() -> None:
    failed = run(
        *TRAIN, "--seeds", "0", "1", "--out", "it", "--set", *SETTINGS, "method.backbone=tiny", "train.init=here", code=1
    )
    assert "train.init: no folder here" in failed.stderr
    failed = run("train", "streets/smoke", "--quiet", "--seeds", "0", "1", "--set", "method.backend=nonsense", code=1)
    assert "selective_scan has no backend `nonsense`" in failed.stderr
    assert not list(Path("runs").iterdir())
    assert not Path("it").exists()


def test_a_seed_that_fails_says_how_to_go_on_with_the_others(trained: Path) -> None:
    (trained / "seed-0/checkpoint/step-000002/optimizer.pt").write_bytes(b"")
    for path in trained.rglob("record-*-train-*"):
        path.unlink()
    failed = run("train", "--resume", "all", "--quiet", "--device", "cpu", code=1)
    advice = "go on with: dgbench train --resume all; or without it: dgbench train --resume all/seed-1"
    assert f"seed 0 ended with an error; done: no seed yet; {advice}\nerror: " in failed.stderr


def test_a_folder_of_seeds_is_not_trained_in_again(trained: Path) -> None:
    failed = train("--seeds", "2", "--out", "all", code=1)
    assert failed.stderr == (
        "error: all holds runs of several seeds already\n\nhint: go on with them: dgbench train --resume all\n"
    )


def test_a_folder_of_any_runs_is_not_gone_on_with(trained: Path) -> None:
    Path("runs").mkdir()
    for seed in (0, 1):
        (trained / f"seed-{seed}").rename(f"runs/{seed}")
    failed = run("train", "--resume", "runs", code=1)
    assert failed.stderr.startswith("error: runs holds 2 runs, not the seeds of one call of train\n")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--seeds 0 1 --seed 2", "error: invalid value for '--seeds': is given with --seed: give one of them"),
        ("--seeds 1 1", "error: invalid value for '--seeds': names a seed twice"),
        ("--seeds 1 x", "error: invalid value for '--seeds': expected an integer, got `x`"),
        ("--resume latest --seeds 1", "error: invalid value for '--resume': goes on with the recorded recipe"),
    ],
)
def test_seeds_that_make_no_sense_are_usage_errors(typed: str, message: str) -> None:
    assert message in run("train", *typed.split(), code=2).stderr


def test_a_launcher_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--seeds trains in one process" in train("--seeds", "0", "1", code=1).stderr


def test_an_unknown_tracker_is_refused_before_there_is_a_run() -> None:
    assert "error: unknown tracker `tensorbord`" in train("--track", "tensorbord", code=1).stderr
    assert not Path("runs").exists()


def test_a_training_leaves_its_curves(both: Path) -> None:
    assert (both / "seed-0" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_that_cannot_be_written_are_a_warning(trained: Path) -> None:
    picture = trained / "seed-0" / "curves.png"
    picture.unlink()
    picture.mkdir()
    done = run("train", "--resume", str(trained / "seed-0"), "--quiet", "--device", "cpu", "--no-eval")
    assert f"warning: {picture} was not drawn: " in done.stderr


def test_several_runs_and_folders_of_runs_are_scored_in_one_table(trained: Path) -> None:
    (found,) = json.loads(run(*EVAL, "all", "all/seed-1", "--targets", "streets-city", "--json").stdout)
    assert [row["runs"] for row in found["rows"]] == [["all/seed-0"], ["all/seed-1"], ["all/seed-0", "all/seed-1"]]
    assert [kinds(trained / f"seed-{seed}") for seed in (0, 1)] == [["train", "eval"]] * 2


@pytest.mark.parametrize("interrupted_at", [2], indirect=True)
@pytest.mark.usefixtures("interrupted_at")
def test_an_interrupted_scoring_of_several_runs_says_what_is_left(trained: Path) -> None:
    stopped = run(*EVAL, "all", "--targets", "streets-city", code=130)
    advice = "dgbench eval all/seed-1 --targets streets-city --device cpu"
    assert stopped.stderr.endswith(f"interrupted; 1 of 2 runs are scored; go on with: {advice}\n")
    run(*advice.split()[1:], "--quiet")
    assert [kinds(trained / f"seed-{seed}") for seed in (0, 1)] == [["train", "eval"]] * 2


def test_a_run_that_cannot_be_scored_says_what_is_left(trained: Path) -> None:
    (trained / "seed-0/checkpoint/step-000002/model.safetensors").write_bytes(b"")
    failed = run(*EVAL, "all", "--targets", "streets-city", code=1)
    assert "all/seed-0 cannot be scored; 0 of 2 runs are scored; go on with: dgbench eval all/seed-0 all/seed-1" in failed.stderr
    assert "error: " in failed.stderr


def test_the_leaderboard_is_shown_as_a_matrix() -> None:
    for record in model(0.5, 0.4, 0.3):
        results.write(record, Path("runs/20260101T000000Z-x"))
    (found,) = json.loads(run("leaderboard", "--matrix", "--targets", "streets-world", "--json").stdout)
    assert found["targets"] == ["streets-world"]
    text = run("leaderboard", "--matrix").stdout
    assert text.startswith("Source by target, protocol unified: mIoU in %\n")
    assert "Published" not in text

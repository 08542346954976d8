"""Selective copying: its sequences, trainings that stop and go on, and a table that does not mix ours with published figures."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dgbench import cli
from dgbench.errors import CheckpointError, DgbenchError, ResultError, Terminated
from dgbench.lab.copying import Copying, begin, carry_out, found
from dgbench.lab.settings import PAPER, PRESETS, ROWS, Settings, row_of
from dgbench.lab.task import Batches, drawn
from dgbench.lab.training import Trained, result_in, train
from dgbench.progress import Silent
from dgbench.render.lab import copying_tables

CPU = torch.device("cpu")
SMALL = Settings(
    length=12, vocab=6, memorize=2, steps=12, depth=1, batch=4, sequences=8, lr=1e-3, seeds=(0,), log_every=3, checkpoint_every=4
)


def trained(settings: Settings, folder: Path, row: str = "nogate-s6", **how: Any) -> Trained:
    return train(settings, row_of(row), 0, folder, device=CPU, **{"progress": Silent(), **how})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "checkpoint.pt", weights_only=True)["network"]
    return found


# ---- the task


def test_the_tokens_among_the_noise_are_the_targets_in_their_order() -> None:
    sequences, targets = drawn(PRESETS["cpu"], 50, 3, CPU)
    for sequence, target in zip(sequences, targets, strict=True):
        assert sequence[sequence != 0].tolist() == [*target.tolist(), *[7] * 4]
        assert sequence[-4:].tolist() == [7] * 4
    assert sequences.shape == (50, 64 + 2 * 4)
    assert targets.unique().tolist() == [1, 2, 3, 4, 5, 6]


def test_tokens_stand_everywhere_but_at_the_markers() -> None:
    sequences, _ = drawn(dataclasses.replace(PRESETS["cpu"], length=6), 400, 0, CPU)
    share = (sequences != 0).double().mean(0)
    assert share[:10].tolist() == pytest.approx([0.4] * 10, abs=0.1)


def test_the_papers_length_has_4128_symbols_and_total_4096() -> None:
    assert PAPER.tokens == 4128
    assert dataclasses.replace(PAPER, total=True).tokens == 4096


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    ahead, later = Batches(SMALL, 1, CPU), Batches(SMALL, 1, CPU)
    for step in range(30):
        ahead.at(step)
    assert torch.equal(ahead.at(29)[0], later.at(29)[0])
    assert not torch.equal(ahead.at(29)[0], ahead.at(28)[0])
    assert not torch.equal(ahead.at(29)[0], Batches(SMALL, 2, CPU).at(29)[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab": 2}, "vocab is 2, but must be 3 or more"),
        ({"total": True, "length": 3}, "3 symbols in all do not hold 2 tokens"),
        ({"rows": ("mamba-s7",)}, "no row `mamba-s7`"),
        ({"lr": 0.0}, "lr is 0"),
        ({"rows": ("h3-s6", "h3-s6")}, "h3-s6, h3-s6: one is given twice"),
    ],
)
def test_settings_without_a_task_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(DgbenchError, match=said):
        dataclasses.replace(SMALL, **change).check()


# ---- training


def test_a_training_learns() -> None:
    settings = dataclasses.replace(SMALL, length=2, memorize=1, steps=40, batch=16, lr=2e-2, sequences=64)
    assert trained(settings, Path("run")).token_accuracy > 0.9


class _Stopping(Silent):
    """Ends its process politely after so many steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, n: int = 1, **_: Any) -> None:
        self.left -= n
        if n and not self.left:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_training_that_was_stopped_and_goes_on_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = trained(SMALL, tmp_path / "whole")
    with pytest.raises(Terminated):
        trained(SMALL, tmp_path / "parts", progress=_Stopping(5))
    assert result_in(tmp_path / "parts") is None
    parts = trained(SMALL, tmp_path / "parts")
    assert (tmp_path / "parts" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (parts.token_accuracy, parts.curve, parts.steps) == (whole.token_accuracy, whole.curve, 12)


class _Dying(Silent):
    """Ends the training without any farewell after so many steps, as a kill does."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, n: int = 1, **_: Any) -> None:
        self.left -= n
        if n and not self.left:
            raise RuntimeError("killed")


def test_a_training_that_died_behind_its_checkpoint_repeats_what_was_lost(tmp_path: Path) -> None:
    whole = trained(SMALL, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        trained(SMALL, tmp_path / "parts", progress=_Dying(7))  # the checkpoint is of step 4, the log of step 6
    parts = trained(SMALL, tmp_path / "parts")
    assert (parts.token_accuracy, parts.curve, parts.loss) == (whole.token_accuracy, whole.curve, whole.loss)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_training_out_of_time_says_how_far_it_came_and_goes_on(tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, steps=20, rows=("nogate-s4", "mamba-hyena"))
    begin(settings, tmp_path)
    part = carry_out(tmp_path, device=CPU, progress=Silent(), minutes=1e-6)
    assert [one.steps for one in part.trained] == [10, 10]
    assert not any(one.complete for one in part.trained)
    rest = carry_out(tmp_path, device=CPU, progress=Silent())
    assert all(one.complete for one in rest.trained)
    assert [point.step for point in rest.trained[0].curve] == [3, 6, 9, 12, 15, 18, 20]


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert result_in(tmp_path) is None
    assert trained(SMALL, tmp_path, "mamba-hyena") == result_in(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    trained(SMALL, tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="checkpoint.pt cannot be resumed from"):
        trained(SMALL, tmp_path)
    (tmp_path / "result.json").write_text('{"steps": 1}')
    with pytest.raises(ResultError, match="result.json is no result of selective copying"):
        result_in(tmp_path)


def test_a_changed_byte_of_a_weight_is_seen(tmp_path: Path) -> None:
    trained(SMALL, tmp_path)
    path, weight = tmp_path / "checkpoint.pt", weights(tmp_path)["head.weight"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(weight) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        trained(SMALL, tmp_path)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    trained(SMALL, tmp_path)
    with pytest.raises(CheckpointError, match="it is of another network"):
        trained(dataclasses.replace(SMALL, depth=2), tmp_path)


def test_a_training_whose_log_was_lost_still_has_its_last_loss(tmp_path: Path) -> None:
    whole = trained(SMALL, tmp_path)
    (tmp_path / "log.jsonl").unlink()
    again = trained(SMALL, tmp_path)
    assert again.curve == ()
    assert again.loss == whole.loss == whole.curve[-1].loss


def test_a_training_that_ends_before_its_first_line_has_no_loss(tmp_path: Path) -> None:
    short = trained(dataclasses.replace(SMALL, log_every=100, steps=100), tmp_path, seconds=1e-6)
    assert (short.steps, short.loss, short.curve) == (10, None, ())
    assert result_in(tmp_path) == short


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.pop("lr"), "lr missing"),
        (lambda content: content.update(speed=3), "speed"),
        (lambda content: content.update(lr="0.1"), "lr"),
        (lambda content: content.update(depth=2), "was trained with depth 1, but the run has 2"),
        (lambda content: content.update(steps=40), "was trained with planned 12, but the run has 40"),
    ],
)
def test_a_run_whose_settings_were_changed_is_refused(change: Callable[[dict[str, Any]], Any], said: str, tmp_path: Path) -> None:
    begin(dataclasses.replace(SMALL, rows=("h3-s6",)), tmp_path)
    carry_out(tmp_path, device=CPU, progress=Silent())
    content = json.loads((tmp_path / "copying.json").read_text())
    change(content)
    (tmp_path / "copying.json").write_text(json.dumps(content))
    with pytest.raises(ResultError, match=said):
        carry_out(tmp_path, device=CPU, progress=Silent())


def test_a_result_that_is_no_json_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"steps": ')
    with pytest.raises(ResultError, match="result of selective copying: it is not valid JSON"):
        result_in(tmp_path)


def test_s4_without_a_gate_can_do_without_its_gated_linear_unit(tmp_path: Path) -> None:
    with_unit = trained(SMALL, tmp_path / "with", "nogate-s4")
    without = trained(dataclasses.replace(SMALL, glu=False), tmp_path / "without", "nogate-s4")
    assert with_unit.parameters - without.parameters == 64 * 64 + 64


@pytest.mark.gpu
@pytest.mark.parametrize("row", [row.name for row in ROWS])
def test_a_step_as_a_cuda_graph_is_the_plain_one_also_when_it_goes_on(row: str, tmp_path: Path) -> None:
    gpu = torch.device("cuda")
    plain = train(SMALL, row_of(row), 0, tmp_path / "plain", device=gpu, progress=Silent(), graphs=False)
    train(SMALL, row_of(row), 0, tmp_path / "graph", device=gpu, progress=Silent(), seconds=1e-6)
    graph = train(SMALL, row_of(row), 0, tmp_path / "graph", device=gpu, progress=Silent())
    assert (plain.graph, graph.graph, graph.steps) == (False, True, 12)
    for first, second in zip(plain.curve, graph.curve, strict=True):
        assert first.loss == pytest.approx(second.loss, rel=1e-3)


@pytest.mark.full
def test_on_a_cpu_mamba_with_selection_leaves_mamba_without_behind(tmp_path: Path) -> None:
    begin(dataclasses.replace(PRESETS["cpu"], rows=("mamba-s4", "mamba-hyena", "mamba-s6")), tmp_path)
    result = carry_out(tmp_path, device=CPU, progress=Silent())
    scores = {one.layer: one.token_accuracy for one in result.trained}
    assert scores["s6"] > max(scores["s4"], scores["hyena"]) + 0.2


# ---- the table


def made(settings: Settings, tmp_path: Path, **change: Any) -> Copying:
    """The results of a run, as if it had been trained with these settings."""
    one = trained(SMALL, tmp_path / "one", "mamba-s4")
    same = {name: getattr(settings, name) for name in ("length", "vocab", "memorize", "depth", "batch", "lr", "sequences")}
    one = dataclasses.replace(one, steps=settings.steps, planned=settings.steps, **same, **change)
    begin(dataclasses.replace(settings, rows=("mamba-s4",), seeds=(0,)), tmp_path)
    (tmp_path / "mamba-s4-seed-0").mkdir()
    (tmp_path / "mamba-s4-seed-0" / "result.json").write_text(json.dumps(dataclasses.asdict(one)))
    return found(tmp_path)


def test_figures_of_a_shortened_run_stand_apart_from_the_published_ones(tmp_path: Path) -> None:
    ours, published = copying_tables(made(SMALL, tmp_path))
    assert "published" not in ours.header
    assert "not comparable" in published.title
    assert [cell.text for cell in ours.rows[0]][:2] == ["Mamba", "S4"]
    assert [row[-1].text for row in published.rows] == ["18.3", "97.0", "57.0?", "30.1?", "99.7?", "56.4", "28.4", "99.8"]


def test_figures_of_the_papers_task_stand_beside_the_published_ones(tmp_path: Path) -> None:
    (both,) = copying_tables(made(PAPER, tmp_path))
    assert both.header[-1] == "published"
    assert [cell.text for cell in both.rows[0]][-1] == "56.4"


@pytest.mark.parametrize("change", [{"batch": 32}, {"lr": 1e-3}, {"steps": 399_999}, {"depth": 1}, {"length": 4095}])
def test_figures_of_another_training_stand_apart_too(change: dict[str, Any], tmp_path: Path) -> None:
    assert len(copying_tables(made(dataclasses.replace(PAPER, **change), tmp_path))) == 2


def test_a_run_of_which_a_seed_is_missing_is_no_run_of_the_papers(tmp_path: Path) -> None:
    made(PAPER, tmp_path)
    begin(dataclasses.replace(PAPER, rows=("mamba-s4",), seeds=(0, 1)), tmp_path)
    assert len(copying_tables(found(tmp_path))) == 2


def test_a_long_run_that_is_not_complete_is_no_run_of_the_papers(tmp_path: Path) -> None:
    made(PAPER, tmp_path)
    path = tmp_path / "mamba-s4-seed-0" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "steps": 399_999}))
    assert len(copying_tables(found(tmp_path))) == 2


# ---- the command


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["lab", "copying", *arguments], prog_name="dgbench")


def test_the_command_trains_resumes_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--length", "8", "--steps", "2", "--rows", "nogate-s4", "h3-s6", "--device", "cpu", "--batch", "64", "--quiet"]
    done = run("--preset", "cpu", *small, "--json", "--plot", "curves.png")
    assert done.exit_code == 0, done.stderr
    first = json.loads(done.stdout)
    assert [(one["architecture"], one["layer"], one["steps"]) for one in first["trained"]] == [
        ("no gate", "s4", 2),
        ("h3", "s6", 2),
    ]
    assert Path("curves.png").stat().st_size > 1000
    again = run("--resume", "latest", "--device", "cpu", "--json")
    assert json.loads(again.stdout) == first


def test_a_run_keeps_its_settings() -> None:
    done = run("--resume", "latest", "--steps", "3")
    assert done.exit_code == 2
    assert "a run keeps its settings" in done.stderr


def test_a_row_that_does_not_exist_is_refused_before_a_run_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("--preset", "cpu", "--rows", "mamba-s5", "--device", "cpu")
    assert done.exit_code == 1
    assert "no row `mamba-s5`" in done.stderr
    assert "mamba-s6" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_scan_that_cannot_run_is_refused_before_a_run_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("--preset", "cpu", "--rows", "nogate-s4", "mamba-s6", "--device", "cpu", "--backend", "fastest")
    assert done.exit_code == 1
    assert "no backend `fastest`" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_row_named_twice_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--length", "8", "--steps", "1", "--batch", "64", "--device", "cpu", "--quiet", "--json"]
    done = run("--preset", "cpu", "--rows", "h3-s6", "h3-s6", *small)
    assert done.exit_code == 0, done.stderr
    assert len(json.loads(done.stdout)["trained"]) == 1

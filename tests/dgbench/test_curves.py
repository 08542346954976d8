"""The curves of a training: read from its log, and drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from records import model

from dgbench.render import draw_curves
from dgbench.render.curves import draw_losses
from dgbench.report.curves import curves


def logged(run: Path, *lines: dict[str, float]) -> Path:
    run.mkdir(exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_losses_and_rates_are_read_by_step(tmp_path: Path) -> None:
    run = logged(tmp_path, {"step": 2, "loss": 3.0, "lr": 0.1, "a": 1.0, "b": 2.0}, {"step": 4, "loss": 1.0, "lr": 0.2, "a": 1.0})
    found = curves(run)
    assert found is not None
    assert (found.steps, found.rate) == ((2, 4), (0.1, 0.2))
    assert list(found.losses) == ["loss", "a", "b"]
    assert found.losses["a"] == (1.0, 1.0)
    assert math.isnan(found.losses["b"][1])


def test_the_only_term_of_a_loss_is_not_shown_beside_it(tmp_path: Path) -> None:
    found = curves(logged(tmp_path, {"step": 1, "loss": 3.0, "lr": 0.1, "loss_ce": 3.0}))
    assert found is not None
    assert list(found.losses) == ["loss"]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    run = logged(tmp_path, {"step": 1, "loss": 3.0, "lr": 0.1})
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    found = curves(run)
    assert found is not None
    assert found.steps == (1,)


def test_a_run_without_a_log_has_no_curves(tmp_path: Path) -> None:
    assert curves(tmp_path) is None
    assert curves(logged(tmp_path)) is None


def test_scores_say_which_domain_was_trained_on(tmp_path: Path) -> None:
    found = curves(logged(tmp_path, {"step": 1, "loss": 3.0, "lr": 0.1}), model(0.5, 0.4, 0.3))
    assert found is not None
    assert [(score.domain, score.miou, score.seen) for score in found.scores] == [
        ("streets-game", 0.5, True),
        ("streets-city", 0.4, False),
        ("streets-world", 0.3, False),
    ]


def test_a_picture_is_wider_with_scores_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    run = logged(tmp_path / "run", {"step": 1, "loss": 3.0, "lr": 0.1, "$a": 1, "b": 2}, {"step": 2, "loss": -1.0, "lr": 0.2})
    without, with_scores = curves(run), curves(run, model(0.5, 0.4, 0.3))
    assert without is not None
    assert with_scores is not None
    first = draw_curves(without, tmp_path / "a.png")
    second = draw_curves(with_scores, tmp_path / "b.png")
    assert Image.open(first).width < Image.open(second).width
    assert draw_curves(with_scores, tmp_path / "c.png").read_bytes() == second.read_bytes()


def test_numbers_at_the_axes_are_plain_and_steps_are_whole(tmp_path: Path) -> None:
    found = curves(logged(tmp_path, *({"step": step, "loss": 3 - step / 20, "lr": 0.1} for step in (2, 4, 6))))
    assert found is not None
    axis = Figure().subplots()
    draw_losses(found, axis)
    axis.figure.draw_without_rendering()
    labels = [label.get_text() for label in (*axis.get_yticklabels(), *axis.get_yticklabels(minor=True))]
    assert {float(label) for label in labels if label}
    assert all(float(label.get_text().replace("\N{MINUS SIGN}", "-")).is_integer() for label in axis.get_xticklabels())

"""What is drawn for people, for pipes and for programs."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from records import model, record

from dgbench import render
from dgbench.doctor import Check
from dgbench.protocol import lookup
from dgbench.report.expected import Reference
from dgbench.report.leaderboard import leaderboard

BOARD = [
    *model(0.481, 0.43, 0.35, half=0.012),
    *model(
        0.44,
        0.39,
        0.31,
        half=0.012,
        method="source-only",
        variant="tiny",
        recipe="streets/source-only",
        recipe_hash="bbbbbbbbbbbb",
        checkpoint="c2",
    ),
]
REFERENCE = Reference("streets/mfuser-gpu", "mfuser", "tiny + tiny", "streets-game", "unified", {"streets-city": 0.6}, "one H200")
GLYPHS = re.compile("[\u2500-\u257f\u2580-\u259f\x1b]")


def shown(result: object, capsys: pytest.CaptureFixture[str]) -> str:
    render.show(result)
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_the_leaderboard_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(leaderboard(BOARD, published=False), capsys) == (
        "Trained on streets-game, scored on streets-*, protocol unified: mIoU in %\n"
        "#  method                source val        city       world        mean  gap  retention  spread\n"
        "1  mfuser (tiny + tiny)  48.1* ±1.2  43.0* ±1.2  35.0* ±1.2  39.0* ±0.8  9.1       81.1     8.0\n"
        "2  source-only (tiny)     44.0 ±1.2   39.0 ±1.2   31.0 ±1.2   35.0 ±0.8  9.0       79.5     8.0\n"
        "#  method                worst  images        date\n"
        "1  mfuser (tiny + tiny)  world     200  2026-11-24\n"
        "2  source-only (tiny)    world     200  2026-11-24\n"
        "Higher is better; * best.\n"
        "±: half the 95 % interval over images (not over training runs).\n"
        "source val: streets-game, seen in training. mean: over the targets, only where all are complete.\n"
        "gap: source val - mean, in points. retention: mean / source val, in %.\n"
        "spread: best target - worst target, in points. worst: the target with the lowest mIoU.\n"
        "No test of ties, ranked by the mean alone: no per-image matrices.\n"
    )


def test_every_table_of_scores_names_its_protocol_and_the_protocols_hash(capsys: pytest.CaptureFixture[str]) -> None:
    digest = lookup("unified").digest
    scored = [dataclasses.replace(r, protocol_digest=digest) for r in BOARD]
    board = shown(leaderboard(scored, published=False), capsys).splitlines()
    assert board[0] == f"Trained on streets-game, scored on streets-*, protocol unified ({digest}): mIoU in %"
    assert max(map(len, board)) <= 100
    assert shown(scored, capsys).splitlines()[0].endswith(f"trained on streets-game, protocol unified ({digest})")


def test_means_over_fewer_classes_have_columns_where_there_are_some(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown([record("cityscapes", 0.4, extra={"miou16": 0.45, "miou13": 0.5})], capsys).splitlines()
    assert lines[1].split()[:4] == ["domain", "mIoU", "mIoU16", "mIoU13"]
    assert lines[2].split()[:4] == ["cityscapes", "40.0", "45.0", "50.0"]
    assert "mIoU16, mIoU13: over the classes that SYNTHIA has" in lines[4]


def test_piped_tables_have_no_glyphs_and_are_narrow(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(leaderboard(BOARD, [REFERENCE]), capsys)
    assert not GLYPHS.search(text)
    tables = [line for line in text.splitlines() if not line.startswith(("From", "ref:", "†", "tested ", "["))]
    assert max(map(len, tables)) <= 100


def test_reference_and_published_rows_are_marked_without_colour(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(leaderboard(BOARD, [REFERENCE]), capsys)
    assert re.search(r"^ref  streets/mfuser-gpu", text, re.MULTILINE)
    assert "ref: expected of recipe streets/mfuser-gpu, not run here. From: one H200." in text
    assert re.search(r"^pub  MFuser +EVA02-L +70\.19 +63\.13 +71\.28 +68\.20 +full +own$", text, re.MULTILINE)
    assert "arXiv:2504.03193, Table 1" in text
    assert "70.19*" not in text


def test_partial_and_missing_scores_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    partial = record("streets-city", 0.5, n_images=10, checkpoint="c3", recipe_hash="cccccccccccc")
    text = shown(leaderboard([*BOARD, partial], published=False), capsys)
    assert re.search(r"^–  streets/mfuser#cccc +– +50\.0~ ±1\.0 +– +–", text, re.MULTILINE)
    assert "~ only some images of the split" in text


def test_two_runs_of_one_recipe_have_two_names(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(leaderboard([*BOARD, *model(0.4, 0.2, 0.2, checkpoint="c9", sequence=61)], every=True), capsys)
    assert "streets/mfuser#aaaa 11-24 00:00" in text
    assert "streets/mfuser#aaaa 11-24 01:01" in text


def test_many_targets_wrap_into_blocks_that_repeat_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    targets = ("streets-city", *(f"streets-fog@0.{n}" for n in range(1, 10)))
    text = shown(leaderboard(model(*([0.4] * 11), targets=targets), published=False), capsys)
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("1  mfuser (tiny + tiny)") == 3
    assert all(f"fog@0.{n}" in text for n in range(1, 10))


def test_records_say_domain_interval_and_count(capsys: pytest.CaptureFixture[str]) -> None:
    records = [record("streets-game", 0.5, seconds={"total": 20.0}), record("streets-city", None, n_images=3)]
    lines = shown(records, capsys).splitlines()
    assert lines[0] == "mfuser (tiny + tiny), recipe streets/mfuser, trained on streets-game, protocol unified"
    assert lines[2].split() == ["streets-game", "(source)", "50.0", "[49.0,", "51.0]", "100", "20s", "5.0"]
    assert lines[3].split() == ["streets-city", "–", "–", "3", "of", "100", "–", "–"]


def test_one_image_has_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    alone = record("streets-city", 0.4, n_images=1, interval=(float("nan"), float("nan")))
    assert "nan" not in shown([alone], capsys)


def test_checks_keep_their_hints(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown([Check("gpu", "info", "none", "use the CPU"), Check("disk", "fail", "full")], capsys)
    assert text == "state  check  found\ninfo   gpu    none\nfail   disk   full\nhint (gpu): use the CPU\n"


def test_json_is_json_with_null_for_what_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    render.show([record(miou=float("nan"), path=Path("x/record.json"))], "json")
    [content] = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(word))
    assert content["miou"] is None
    assert content["path"] == "x/record.json"
    render.show(leaderboard(BOARD), "json")
    board = json.loads(capsys.readouterr().out)
    assert board["groups"][0]["rows"][0]["rank"] == 1
    assert board["published"][0]["protocol"] == "as published"


def test_nothing_is_said_about_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown([], capsys) == "nothing to show\n"
    assert "dgbench train" in shown(leaderboard([], published=False), capsys)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1:00"), (65, "1:05"), (7384, "2:03:04")])
def test_durations(seconds: float, text: str) -> None:
    assert render.duration(seconds) == text


def test_errors_go_to_stderr_with_a_hint_after_an_empty_line(capsys: pytest.CaptureFixture[str]) -> None:
    render.failure("unknown method `mfusr`", "did you mean `mfuser`?")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: unknown method `mfusr`\n\nhint: did you mean `mfuser`?\n"


def test_progress_in_a_log_is_lines_with_loss_speed_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = render.progress()
    progress.start("training x", 4, "steps")
    progress.advance(0, loss=1.23456, images_per_second=35.12)
    progress.advance(2)
    progress.note("a remark")
    progress.stop()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[:2] == ["training x: 4 steps", "a remark"]
    assert re.fullmatch(r"training x: 2/4 steps, loss 1\.235, 35\.1 images/s, \d+s left", captured.err.splitlines()[2])


def test_quiet_progress_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = render.progress(quiet=True)
    progress.start("x", 1, "steps")
    progress.advance(loss=1.0)
    progress.stop()
    assert capsys.readouterr().err == ""


TERMINAL = """
import sys
sys.path.insert(0, {here!r})
from dgbench import render
from dgbench.report.leaderboard import leaderboard
from test_render import BOARD
render.show(leaderboard(BOARD))
progress = render.progress()
progress.start("training x", 4, "steps")
progress.advance(4, loss=1.23456, images_per_second=35.12)
progress.stop()
render.failure("wrong", "right")
"""


def on_a_terminal(columns: int, **variables: str) -> str:
    """Run the drawing code under a pseudo-terminal and return what it wrote."""
    import pty
    import struct
    from fcntl import ioctl
    from termios import TIOCSWINSZ

    master, slave = pty.openpty()
    ioctl(slave, TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    here = Path(__file__).parent
    code = TERMINAL.format(here=str(here))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(here.parents[1]), **variables}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    chunks = []
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(master)
    assert child.wait() == 0, b"".join(chunks).decode()
    return b"".join(chunks).decode()


def test_a_terminal_gets_rules_bold_and_a_bar() -> None:
    text = on_a_terminal(120)
    assert "─" in text
    assert re.search("\x1b\\[1m *48\\.1\\* ±1\\.2", text)
    assert "━" in text
    assert "loss 1.235, 35.1 images/s" in text
    assert "\x1b[1;31merror:\x1b[0m wrong" in text
    visible = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", text)
    assert max(len(line) for line in re.split("[\r\n]+", visible)) <= 100


def test_a_narrow_terminal_gets_fewer_columns_and_says_so() -> None:
    text = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", on_a_terminal(72))
    assert "48.1*" in text
    assert "±" not in text
    assert "Intervals, spread, images, date, commit: in a wider terminal" in text
    assert max(len(line) for line in re.split("[\r\n]+", text)) <= 72


def test_no_color_holds() -> None:
    assert not re.search("\x1b\\[[0-9;]*3[0-9]", on_a_terminal(100, NO_COLOR="1"))


def test_one_is_told_in_the_singular(capsys: pytest.CaptureFixture[str]) -> None:
    progress = render.progress()
    progress.start("segmenting", 1, "images")
    progress.advance()
    progress.stop()
    assert capsys.readouterr().err == "segmenting: 1 image\nsegmenting: 1/1 image, 0s in all\n"

"""Commands as they are typed: what is printed where, and how fast they start."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typed import fails, run

from dgbench import __version__, cli, results
from dgbench.protocol import PROTOCOLS, lookup

sys.path.insert(0, str(Path(__file__).parent / "dgbench"))
from records import model

ROOT = Path(__file__).parents[1]
DOMAINS = ["streets-game", "streets-city"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- start-up

BARE = """
import typer
app = typer.Typer(pretty_exceptions_enable=False)
@app.callback()
def program(): "A program"
for name in {names!r}:
    def command(a: str = "", b: str = "", c: int = 0): "Do it"
    app.command(name)(command)
app()
"""


def seconds_of_help(code: str) -> float:
    """Return the best of several processor times: the machine may be busy."""
    best = float("inf")
    for _ in range(4):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
        after = os.times()
        assert done.returncode == 0, done.stderr
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        best = min(best, spent)
    return best


@pytest.mark.parametrize("terminal", [False, True])
def test_help_needs_no_heavy_import_and_little_time(terminal: bool) -> None:
    heavy = ("torch", "numpy", "yaml", "pydantic", "timm", "PIL", "mfuser")
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in heavy)
    drawn = f"sys.stdout.isatty = lambda: {terminal}; "
    ours = seconds_of_help(f"import sys; {blocked}{drawn}from dgbench.cli import main; main()")
    names = [name for name, command in typer.main.get_command(cli.app).commands.items() if isinstance(command, cli.Command)]
    assert ours < 3 * seconds_of_help(BARE.format(names=names))


@pytest.mark.parametrize(
    "arguments", [["leaderboard"], ["data", "list"], ["protocols"], ["methods"], ["methods", "mfuser"], ["--version"]]
)
def test_light_commands_run_without_torch(arguments: list[str], here: Path) -> None:
    code = f"import sys; sys.modules['torch'] = None; sys.argv[1:] = {arguments}; from dgbench.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stderr == ""


# ---- commands


def test_version() -> None:
    assert run("--version").stdout == f"dgbench {__version__}\n"


def test_help_in_a_pipe_is_plain() -> None:
    for arguments in ([], ["train"], ["data"], ["data", "show"], ["kernels"], ["kernels", "bench"]):
        result = run(*arguments, "--help")
        assert result.exit_code == 0
        assert "Usage: dgbench" in result.stdout
        assert not set("╭│╰─") & set(result.stdout)


def test_data_list() -> None:
    lines = run("data", "list").stdout.splitlines()
    assert lines[0].split() == ["domain", "role", "train", "/", "val", "H", "x", "W", "access", "licence", "on", "disk"]
    listed = json.loads(run("data", "list", "--json").stdout)
    assert {"streets-game", "cityscapes"} <= {row["name"] for row in listed}


def test_data_list_says_what_is_on_the_disk(here: Path) -> None:
    (here / "sets" / "cityscapes").mkdir(parents=True)
    rows = {row["name"]: row["where"] for row in json.loads(run("data", "list", "--root", "sets", "--json").stdout)}
    assert rows["cityscapes"] == "sets/cityscapes"
    assert rows["mapillary"] is None
    assert rows["streets-fog"] == "rendered"


def test_protocols_are_shown_field_by_field() -> None:
    text = run("protocols").stdout
    lines = {line.split("  ")[0]: line.split()[1:] for line in text.splitlines()}
    assert text.splitlines()[0].split() == list(PROTOCOLS)[:4]
    header = [line for line in text.splitlines() if line.split()[-1:] == [list(PROTOCOLS)[-1]]]  # of the last block of columns
    assert lines["hash"] == [lookup(name).digest for name in header[0].split()]
    assert all(f"{name}: " in text for name in PROTOCOLS)
    one = run("protocols", "paper-half").stdout
    assert "half, fit 512x1024" in one
    assert "openseg" in one
    assert "paper-full" not in one
    [shown] = json.loads(run("protocols", "clouds", "--json").stdout)
    assert (shown["name"], shown["digest"]) == ("clouds", lookup("clouds").digest)
    assert shown["rules"]["absent classes"] == "unlabelled"
    assert "did you mean `paper-half`?" in fails("protocols", "paper-hlf")


def test_an_unknown_protocol_is_refused_before_a_run_is_looked_for(here: Path) -> None:
    error = fails("eval", "nothing", "--protocol", "unifid")
    assert error == "error: unknown protocol `unifid`\n\nhint: did you mean `unified`?\n"


def test_eval_scores_under_the_protocol_that_is_asked_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGBENCH_CACHE", str(here / "cache"))
    trained = run("train", "streets/smoke", "--no-eval", "--quiet", "--out", "runs/a", "--device", "cpu", "--format", "csv")
    assert trained.exit_code == 0, trained.output
    (row,) = csv.DictReader(io.StringIO(trained.stdout))
    assert (row["kind"], row["recipe"]) == ("train", "streets/smoke")
    done = run("eval", "runs/a", "--targets", "streets-city", "--protocol", "paper-half", "--quiet", "--device", "cpu")
    assert f"protocol paper-half ({lookup('paper-half').digest})" in done.stdout
    assert "run: " not in done.stderr
    unnamed = run("eval", "--targets", "streets-city", "--quiet", "--json", "--device", "cpu")
    assert "run: runs/a\n" in unnamed.stderr
    usual = json.loads(unnamed.stdout)
    assert [record["protocol"] for record in usual] == ["unified"]
    board = json.loads(run("leaderboard", "--no-published", "--json").stdout)
    ours = [group for group in board["groups"] if any(row["kind"] == "run" for row in group["rows"])]
    assert sorted(group["protocol"] for group in ours) == ["paper-half", "unified"]


def test_leaderboard_shows_runs_and_published_rows_apart(here: Path) -> None:
    for record in model(0.5, 0.4, 0.3):
        results.write(record, here / "runs" / "20260101T000000Z-x")
    text = run("leaderboard").stdout
    assert text.index("mfuser (tiny + tiny)") < text.index("Published, trained on gta5")
    assert "Published" not in run("leaderboard", "--no-published").stdout
    board = json.loads(run("leaderboard", "--targets", "streets-world", "--json").stdout)
    [group] = [g for g in board["groups"] if g["source"] == "streets-game" and g["protocol_hashes"]]
    assert group["targets"] == ["streets-world"]
    assert group["rows"][0]["mean"]["miou"] == pytest.approx(0.3)


@pytest.mark.parametrize("command", ["leaderboard", "profile --fusion", "profile --plot x.png"])
def test_runs_that_are_not_there_are_an_error(command: str, here: Path) -> None:
    error = fails(*command.split(), "--runs", "NOSUCH")
    assert error.startswith("error: no runs in NOSUCH: there is no such folder\n\nhint: ")
    (here / "file").touch()
    assert fails(*command.split(), "--runs", "file").startswith("error: no runs in file: is not a folder")


def test_without_runs_and_without_naming_them_the_board_shows_what_is_expected(here: Path) -> None:
    assert "ref: expected of recipe streets/mfuser-scratch, not run here" in run("leaderboard").stdout


def test_training_says_why_a_run_has_no_expected_range(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGBENCH_CACHE", str(here / "cache"))
    small = ("data.size=[64, 128]", "data.crop=[64, 64]", "data.train_images=2", "data.val_images=1", "train.batch_size=1")
    done = run("train", "streets/source-only", "--quiet", "--device", "cpu", "--set", "train.steps=1", *small)
    assert done.exit_code == 0, done.output
    last = done.stdout.splitlines()[-1]
    assert last.startswith("No expected range of recipe streets/source-only for this run: not as in the recipe: data.size=")
    assert "train.steps=1" in last


def test_a_broken_record_is_a_warning(here: Path) -> None:
    (here / "runs" / "x").mkdir(parents=True)
    (here / "runs" / "x" / "record-broken.json").write_text("{")
    result = run("leaderboard", "--no-published")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: runs/x/record-broken.json is not valid JSON")


def test_doctor() -> None:
    result = run("doctor", "--json")
    assert {"python", "torch", "cores", "memory", "recipes"} <= {check["name"] for check in json.loads(result.stdout)}
    assert result.exit_code == int(any(check["state"] == "fail" for check in json.loads(result.stdout)))

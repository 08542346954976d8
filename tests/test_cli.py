"""Commands as they are typed: exit codes, what is printed where, and how fast they start."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from dgbench import __version__, cli, results
from dgbench.errors import DataError
from dgbench.protocol import PROTOCOLS, lookup

sys.path.insert(0, str(Path(__file__).parent / "dgbench"))
from records import model

ROOT = Path(__file__).parents[1]
DOMAINS = ["streets-game", "streets-city"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), prog_name="dgbench")


def fails(*arguments: str, code: int = 1) -> str:
    """Run what must fail; return stderr, which is a message and no traceback."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return str(result.stderr)


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


# ---- mistakes


@pytest.mark.parametrize(
    ("typed", "message", "hint"),
    [
        ("train mfusr", "error: unknown method `mfusr`", "did you mean `mfuser`?"),
        ("train streets/mfusr", "error: unknown recipe `streets/mfusr`", "did you mean `streets/mfuser`?"),
        ("train nothing.yaml", "error: no recipe file nothing.yaml", "recipes of dgbench need no path"),
        ("train --source streets-gme", "error: unknown domain `streets-gme`", "did you mean `streets-game`?"),
        ("eval --targets strets-city", "error: unknown domain `strets-city`", "did you mean `streets-city`?"),
        ("eval --targets streets-fog@2", "error: severity `2`", "streets-fog@0.6"),
        ("eval", "error: no run with checkpoint in runs", "dgbench train"),
        ("severity", "error: no run with checkpoint in runs", "dgbench train"),
        ("eval nowhere", "error: no run `nowhere`", "runs in runs"),
        ("predict x.jpg", "error: no run with checkpoint in runs", "dgbench train"),
        ("train --resume latest", "error: no run with recipe.yaml in runs", "dgbench train"),
        ("leaderboard --source gta6", "error: unknown domain `gta6`", "did you mean `gta`?"),
        ("data show strets-night", "error: unknown domain `strets-night`", "did you mean `streets-night`?"),
        ("data show streets-night --split vall", "error: `streets-night` has no split `vall`", "train"),
        ("data stats mapillary", "error: `mapillary` is not on this disk", "DGBENCH_DATA"),
    ],
)
def test_a_mistake_is_one_message_and_a_hint(typed: str, message: str, hint: str, here: Path) -> None:
    error, _, advice = fails(*typed.split()).partition("\n\nhint: ")
    assert error.startswith(message)
    assert hint in advice
    assert not (here / "runs").exists()


def test_an_unknown_recipe_is_told_methods_not_a_hundred_recipes(here: Path) -> None:
    for typed in (
        ["train", "nosuch"],
        ["train", "nosuch/nowhere"],
        ["profile", "nosuch"],
        ["train", "nosuch.yaml"],
    ):
        advice = fails(*typed)
        assert "(2,200 characters)" not in advice
        assert len(advice) < 400
    hint = "methods are clouds, erm, famix, ibaformer, linear, mask2former, mfuser, rein, "
    assert hint in fails("train", "nosuch")
    assert "`dgbench methods METHOD` lists the recipes of one" in fails("train", "nosuch")


def test_a_value_where_a_list_belongs_is_told_how_a_list_is_written(here: Path) -> None:
    error = fails("train", "streets/smoke", "--set", "data.targets=streets-city", "data.crop=64")
    assert "data.targets: expected a list, got 'streets-city': write [streets-city]" in error
    assert "data.crop: expected a list, got 64: write [64]" in error


def test_towers_that_do_not_fit_are_one_message_and_a_hint(here: Path) -> None:
    error = fails("train", "streets/smoke", "--set", "method.vfm=timm:vit_tiny_patch16_224")
    assert "error: `mfuser` cannot be built: `timm:vit_tiny_patch16_224` has 12 blocks and `tiny` 3; they must be equal" in error
    assert "hint: change `method` or `data.crop`" in error


def test_a_backend_that_cannot_run_is_one_message_and_a_hint(here: Path) -> None:
    error = fails("train", "streets/smoke", "--set", "method.backend=nonsense")
    assert error.startswith("error: selective_scan has no backend `nonsense`; there are: ")
    assert error.endswith("hint: `dgbench kernels list` says what runs on this machine\n")
    assert not list((here / "runs").iterdir())


def test_all_problems_of_a_recipe_are_listed_at_once(here: Path) -> None:
    error = fails("train", "streets/mfuser", "--set", "train.stepz=3", "train.steps=abc", "--seed", "-1")
    assert "has 3 problems:" in error
    assert "\n  train.stepz: unknown key, did you mean `steps`?\n" in error
    assert "\n  train.steps: expected an integer, got 'abc'\n" in error
    assert "\n  train.seed: must be at least 0, got -1\n" in error


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("evl", "error: no such command 'evl'. Did you mean 'eval'?"),
        ("data shw x", "error: no such command 'shw'. Did you mean 'show'?"),
        ("eval --taget x", "error: no such option: --taget\n\nhint: did you mean --targets? see `dgbench eval --help`"),
        ("eval a --checkpoint b", "error: invalid value for '--checkpoint': names the run a second time"),
        ("train --resume latest --seed 3", "error: invalid value for '--resume': goes on with the recorded recipe"),
        ("predict", "error: missing argument 'PHOTO...'\n\nhint: see `dgbench predict --help`"),
        ("data show streets-fog --n 0", "error: invalid value for '--n': must be at least 1, got 0"),
        ("train --seed x", "error: invalid value for '--seed': expected an integer, got `x`"),
        ("severity --plot x.jpg", "error: invalid value for '--plot': x.jpg must end in .png, .svg, .pdf"),
        ("severity --levels 6", "error: invalid value for '--levels'"),
        ("profile --convention x", "error: invalid value for '--convention': 'x' is not one of 'mac', 'flop', 'paper'"),
        ("train --seed", "error: option '--seed' requires an argument"),
        (
            "train --source streets-game mfuser",
            "error: invalid value for '--source': `mfuser` is a method, but was read as a value of --source: put the method "
            "first, as in `dgbench train mfuser --source streets-game`",
        ),
        ("train --targets streets-city streets/mfuser", "as in `dgbench train streets/mfuser --targets streets-city`"),
        ("train --set train.steps=2 source-only", "as in `dgbench train source-only --set train.steps=2`"),
        ("--nosuch", "error: no such option: --nosuch"),
    ],
)
def test_usage_errors_exit_2(typed: str, message: str, here: Path) -> None:
    assert message in fails(*typed.split(), code=2)


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (["train", "--out", ""], "'--out'"),
        (["data", "show", "streets-fog", "--out="], "'--out'"),
        (["train", ""], "'an argument'"),
        (["eval", "--targets", "streets-fog", ""], "'an argument'"),
    ],
)
def test_an_empty_value_is_a_usage_error_and_never_the_current_folder(typed: list[str], named: str, here: Path) -> None:
    assert fails(*typed, code=2).startswith(f"error: invalid value for {named}: is empty; is a variable of the shell not set?\n")
    assert not list(here.iterdir())


def test_a_run_folder_in_use_is_refused(here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "recipe.yaml").write_text("name: x\n")
    error = fails("train", "streets/mfuser", "--out", "mine")
    assert error == "error: mine holds a run already\n\nhint: go on with it: dgbench train --resume mine\n"


class ForeignError(ValueError):
    """Stands for an error of the models' package that carries a message and a hint."""

    def __init__(self) -> None:
        super().__init__("weights are missing: get them there")
        self.message, self.hint = "weights are missing", "get them there"


ForeignError.__module__ = "mfuser.towers.vit"


def chained() -> BaseException:
    """Return an error of a library that wraps a full disk."""
    try:
        try:
            raise OSError(28, "No space left on device", "out/model.bin")
        except OSError as full:
            raise RuntimeError("writer failed") from full
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("raised", "code", "printed"),
    [
        (DataError("bad", "do good"), 1, "error: bad\n\nhint: do good\n"),
        (DataError("bad"), 1, "error: bad\n"),
        (ForeignError(), 1, "error: weights are missing\n\nhint: get them there\n"),
        (OSError(28, "No space left on device", "out/x"), 1, "error: no space left on the disk while writing out/x\n"),
        (chained(), 1, "error: no space left on the disk while writing out/model.bin\n"),
        (PermissionError(13, "Permission denied", "out/x"), 1, "error: no permission: out/x\n"),
        (OSError(30, "Read-only file system", "out/x"), 1, "error: the file system is read-only: out/x\n"),
        (NotADirectoryError(20, "Not a directory", "out/x"), 1, "error: not a directory: out/x\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_a_user_can_mend_has_no_traceback(raised: BaseException, code: int, printed: str) -> None:
    program = typer.Typer(cls=cli.Program, pretty_exceptions_enable=False)

    @program.callback()
    def _program() -> None:
        """Have commands."""

    @program.command(cls=cli.Command)
    def go() -> None:
        """Fail."""
        raise raised

    result = CliRunner().invoke(program, ["go"])
    assert result.exit_code == code
    assert result.stderr.startswith(printed)
    assert "Traceback" not in result.stderr


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    program = typer.Typer(cls=cli.Program, pretty_exceptions_enable=False)

    @program.callback()
    def _program() -> None:
        """Have commands."""

    @program.command(cls=cli.Command)
    def go() -> None:
        """Fail."""
        raise KeyError("ours")

    assert isinstance(CliRunner().invoke(program, ["go"]).exception, KeyError)


def in_a_shell(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    program = f"{sys.executable} -m dgbench"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        ["bash", "-c", line.replace("dgbench", program)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_debug_shows_the_traceback(here: Path) -> None:
    done = in_a_shell("dgbench eval", here, DGBENCH_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "Traceback" not in in_a_shell("dgbench eval", here).stderr


def test_a_closed_pipe_is_quiet(here: Path) -> None:
    done = in_a_shell("dgbench leaderboard --json | head -n 1", here)
    assert done.stdout == "{\n"
    assert done.stderr == ""
    assert in_a_shell("dgbench data list | true", here).stderr == ""


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX signal")
@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        ([signal.SIGINT], 130, "interrupted\n"),
        ([signal.SIGTERM], 143, "terminated\n"),
        ([signal.SIGHUP, signal.SIGTERM], 129, "terminated\n"),
    ],
)
def test_a_signal_ends_a_command_with_one_line(here: Path, sent: list[signal.Signals], code: int, said: str) -> None:
    # a shell starts background jobs deaf to Ctrl-C, and this test may run in one
    script = (
        "import signal, typer, time\nfrom dgbench import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "@cli.app.command()\ndef wait(): \n print('ready', flush=True)\n"
        " try: time.sleep(60)\n finally: time.sleep(0.5)\n"
        "cli.main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", script, "wait"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    for number in sent:
        child.send_signal(number)
    _, error = child.communicate(timeout=120)  # without a signal it would end after a minute, with 0
    assert child.returncode == code
    assert error == said

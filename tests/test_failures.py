"""Commands that fail: one message, a hint and an exit code, and no traceback unless the mistake is ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typed import fails
from typer.testing import CliRunner

from dgbench import cli
from dgbench.errors import DataError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- what is typed


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


# ---- errors


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


# ---- pipes and signals


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

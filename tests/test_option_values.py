"""Several values after one option, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner, Result

from dgbench import cli

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


probe_app = typer.Typer()


@probe_app.command(cls=cli.Command)
def probe(
    words: Annotated[list[str] | None, typer.Argument()] = None,
    targets: cli.TargetsOpt = None,
    settings: Annotated[list[str] | None, typer.Option("--set", "-s")] = None,
    device: Annotated[str, typer.Option()] = "",
    flag: Annotated[bool, typer.Option("--flag")] = False,
) -> None:
    """Print what was understood."""
    typer.echo(json.dumps([words or [], targets or [], settings or [], device, flag]))


@pytest.mark.parametrize(
    ("typed", "understood"),
    [
        ("--targets a b c", [[], ["a", "b", "c"], [], "", False]),
        ("--targets a b --flag", [[], ["a", "b"], [], "", True]),
        ("x --targets a --targets b c", [["x"], ["a", "b", "c"], [], "", False]),
        ("--targets a b -- x y", [["x", "y"], ["a", "b"], [], "", False]),
        ("--targets a,b c --targets d,", [[], ["a", "b", "c", "d"], [], "", False]),
        ("--targets=a b --device cpu", [[], ["a", "b"], [], "cpu", False]),
        ("--set a=1 b=-2 --targets c -s d=3 e=4", [[], ["c"], ["a=1", "b=-2", "d=3", "e=4"], "", False]),
        ("x y --device cpu", [["x", "y"], [], [], "cpu", False]),
        ("-- --targets a", [["--targets", "a"], [], [], "", False]),
        ("", [[], [], [], "", False]),
    ],
)
def test_an_option_takes_values_up_to_the_next_flag(typed: str, understood: list[object]) -> None:
    result = CliRunner().invoke(probe_app, typed.split())
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == understood


def test_a_file_whose_name_has_a_comma_is_one_value(here: Path) -> None:
    (here / "a,b.yaml").touch()
    assert json.loads(CliRunner().invoke(probe_app, ["--targets", "a,b.yaml", "c,d"]).stdout)[1] == ["a,b.yaml", "c", "d"]


@pytest.mark.parametrize("typed", ["--targets", "--targets --flag", "--targets -- a", "--set --targets a"])
def test_an_option_without_a_value_is_a_usage_error(typed: str) -> None:
    result = CliRunner().invoke(probe_app, typed.split())
    assert result.exit_code == 2
    assert f"nvalid value for '{typed.split()[0]}': needs at least one value" in result.stderr


@pytest.mark.parametrize("command", ["train", "eval", "leaderboard"])
def test_help_shows_that_several_values_may_follow(command: str) -> None:
    assert "--targets NAME..." in run(command, "--help").stdout

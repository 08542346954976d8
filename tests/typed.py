"""Commands as they are typed, run within the test's process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from dgbench import cli


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), prog_name="dgbench")


def fails(*arguments: str, code: int = 1) -> str:
    """Run what must fail; return stderr, which is a message and no traceback."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return str(result.stderr)

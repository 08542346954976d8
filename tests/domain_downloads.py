"""Downloads of domains as tests type them, and what is in a folder afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from loopback_files import Server
from typer.testing import CliRunner, Result

from dgbench import cli
from dgbench.data.catalog import lookup
from dgbench.data.index import find

ROOT = Path(__file__).parents[1]


def run(data: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["download", *arguments, "--root", str(data)], prog_name="dgbench")


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    return result.stderr[result.stderr.index("error: ") :]


def below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def counts(name: str, data: Path) -> dict[str, int]:
    row = lookup(name)
    return {split: len(find(row, split, data)) for split in row.splits if split in ("train", "val")}


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DGBENCH_", "HF_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "NO_PROXY": "127.0.0.1", **more}


def started(data: Path, server: Server, *names: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-m", "dgbench", "download", *names, "--mirror", server.url, "--root", str(data), "--yes"]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

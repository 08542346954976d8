"""What a result depends on besides code and recipe is found out, and whose commit it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dgbench import environment
from dgbench.environment import code_commit, describe_environment


def test_environment_names_versions_and_device() -> None:
    found = describe_environment("NVIDIA H200", 8)
    assert found["device"] == "NVIDIA H200"
    assert found["threads"] == "8"
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["numpy"] == np.__version__


def test_commit_is_that_of_this_repository() -> None:
    here = Path(__file__).parents[2]
    git = subprocess.run(
        ["git", "ls-files", "--error-unmatch", "dgbench/environment.py"], cwd=here, capture_output=True, check=False
    )
    code_commit.cache_clear()  # somebody may commit while the tests run
    found = code_commit()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    if git.returncode or head.returncode:
        pytest.skip("not a checkout")
    assert found[0] == head.stdout.strip()


def test_commit_of_an_installed_copy_is_not_that_of_the_folder_around_it(tmp_path: Path) -> None:
    """A copy of the package inside somebody's repository has no commit of ours."""
    source = Path(environment.__file__).parent
    shutil.copytree(source, tmp_path / "env" / "dgbench", ignore=shutil.ignore_patterns("__pycache__", "data", "engine"))
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "env"), "HOME": str(tmp_path)}
    for command in (
        ["init", "-q"],
        ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, env=variables, check=True)
    code = "from dgbench.environment import code_commit, __file__ as f; print(code_commit(), f)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("(None, None)")
    assert str(tmp_path) in done.stdout

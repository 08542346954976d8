"""The environment that a result depends on besides code and recipe, and the commit of the code that runs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from dgbench import __version__

_CODE = (".", "../mfuser", "../recipes", "../cuda")  # folders that can change a number, relative to this one


def describe_environment(device: str = "cpu", threads: int | None = None) -> dict[str, str]:
    """Return what a result may depend on besides code and recipe: versions, platform, device name, threads."""
    found = {
        "dgbench": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
    }
    if device == "cpu":
        found["cpu"] = cpu_name()
    if threads is not None:
        found["threads"] = str(threads)
    for package in ("torch", "torchvision", "timm", "open_clip_torch", "accelerate", "numpy", "pillow", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def cpu_name() -> str:
    """Return the model of the processor as the system names it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def code_commit() -> tuple[str | None, bool | None]:
    """Return the (git commit, dirty flag) of the dgbench code that runs; (None, None) when it cannot be known.

    A checkout counts only if it tracks this file: a virtual environment may lie inside another repository.
    """
    here = Path(__file__)
    if _git("ls-files", "--error-unmatch", here.name, folder=here.parent) is not None:
        sha, status = (
            _git("rev-parse", "HEAD", folder=here.parent),
            _git("status", "--porcelain", "--", *_CODE, folder=here.parent),
        )
        return sha, None if status is None else bool(status)
    try:
        direct = json.loads(metadata.distribution("dgbench").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return None, None
    sha = direct.get("vcs_info", {}).get("commit_id")
    return sha, False if sha else None


def _git(*arguments: str, folder: Path) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

"""Checks of this machine, one per line: each says what was found and, if something is wrong, what to do."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from dgbench.errors import DgbenchError
from dgbench.resources import usable_cores

State = Literal["ok", "warn", "fail", "info"]


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `fail` means that dgbench cannot do its main job here, `warn` that some job will not work."""

    name: str
    state: State
    detail: str
    hint: str | None = None


def doctor(root: Path | None = None) -> list[Check]:
    """Return all checks; none needs the network and none changes anything.

    Args:
        root: the data root; by default DGBENCH_DATA or ./data.
    """
    parts: dict[str, Callable[[], Check | Iterable[Check]]] = {
        "dgbench": _dgbench,
        "python": _python,
        "torch": _torch,
        "packages": _packages,
        "driver": _driver,
        "kernels": _kernels,
        "cores": _cores,
        "memory": _memory,
        "disk (here)": lambda: _disk("disk (here)", Path.cwd()),
        "data root": lambda: _data("data root", root),
        "cache folder": lambda: _cache("cache folder"),
        "recipes": _recipes,
        "hub": _hub,
    }
    return [check for name, look in parts.items() for check in _looked(name, look)]


def _looked(name: str, look: Callable[[], Check | Iterable[Check]]) -> list[Check]:
    """Make a check; one that fails is reported as a finding, and the others are still made."""
    try:
        found = look()
        return [found] if isinstance(found, Check) else list(found)
    except DgbenchError as error:
        return [Check(name, "fail", error.message, error.hint)]
    except Exception as error:  # any library may fail here: broken installations are what this command is for
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        return [Check(name, "fail", f"cannot be checked: {reason}")]


def _dgbench() -> Check:
    from dgbench import __version__
    from dgbench.environment import code_commit

    commit, dirty = code_commit()
    where = f"commit {commit[:12]}{', changed' if dirty else ''}" if commit else "not in a git checkout"
    return Check("dgbench", "ok", f"{__version__}, {where} ({Path(__file__).parent})")


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} ({sys.executable})")


def _torch() -> list[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        failed = Check("torch", "fail", str(error).splitlines()[0], "install it again: pip install --force-reinstall torch")
        return [failed]
    version = torch.__version__
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if not torch.cuda.is_available():
        reason = "the torch build has no CUDA" if torch.version.cuda is None else "no usable GPU or driver"
        gpu = [Check("gpu", "info", f"none: {reason}", "the streets recipes run on the CPU; full-size recipes need a GPU")]
        threads = torch.get_num_threads()
        return [Check("torch", "ok", f"{version}, {build}, {threads} thread{'s' * (threads != 1)}"), *gpu]
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        found.append(Check(f"gpu {index}", "ok", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}, {memory}"))
    return [Check("torch", "ok", f"{version}, {build}"), *found]


def _packages() -> list[Check]:
    found, missing = [], []
    for package in ("torchvision", "timm", "open_clip_torch", "accelerate", "safetensors", "triton"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            missing.append(package)
    checks = [Check("packages", "ok", ", ".join(found))] if found else []
    needed = [package for package in missing if package != "triton"]
    if needed:
        checks.append(Check("packages missing", "fail", ", ".join(needed), f"pip install {' '.join(needed)}"))
    if "triton" in missing:
        checks.append(Check("triton", "info", "not installed: its kernels are off"))
    return checks


def _driver() -> Check:
    text = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if text is None:
        return Check("driver", "info", "no NVIDIA driver answers (nvidia-smi)")
    return Check("driver", "ok", f"NVIDIA {text.splitlines()[0]}" if text else "nvidia-smi lists no GPU")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _kernels() -> list[Check]:
    try:
        from mfuser import ops
        from mfuser.ops import compiled, dispatch
    except (ImportError, OSError) as error:
        return [Check("ops", "fail", f"cannot be imported: {error}")]
    found = compiled.status()
    if found.nvcc is None:
        nvcc = Check("nvcc", "info", "not found: CUDA kernels cannot be compiled here, Triton and torch are used")
    else:
        path, _, version = found.nvcc.rpartition(" ")
        nvcc = Check("nvcc", "ok", f"{version} ({path})")
    if found.reason is None:
        library = Check("kernel library", "ok", str(compiled.library().path))
    else:
        # suggest the command only if it would work and its result would be used
        helps = found.nvcc is not None and found.architecture is not None and found.sources
        hint = f"{compiled.BUILD_COMMAND}; until then other backends are used" if helps else None
        library = Check("kernel library", "info", found.reason, hint)
    checks = [nvcc, library]
    for op in dispatch.TABLE:
        for backend, reason in ops.explain(op).items():
            state: State = "ok" if reason is None else "info"
            checks.append(Check(f"{op}: {backend}", state, reason or "usable"))
    return checks


def _cores() -> Check:
    # a container may be allowed less time than it has cores
    quota = _cgroup("cpu.max")
    allowed = ""
    if quota and quota.split()[0] != "max":
        limit, period = map(int, quota.split())
        allowed = f", limited to {limit / period:.1f} by the container"
    return Check("cores", "ok", f"{usable_cores()}{allowed}")


def _memory() -> Check:
    total, available = _meminfo("MemTotal"), _meminfo("MemAvailable")
    if total is None or available is None:
        return Check("memory", "info", "unknown on this system")
    limit = _cgroup("memory.max")
    if limit and limit != "max":
        used = int(_cgroup("memory.current") or 0)
        total, available = min(total, int(limit)), min(available, int(limit) - used)
    detail = f"{available / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if available < 4 * 2**30:
        return Check("memory", "warn", detail, "the streets recipes want 4 GiB")
    return Check("memory", "ok", detail)


def _meminfo(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def _cgroup(name: str) -> str | None:
    try:
        return Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None


def _disk(name: str, folder: Path) -> Check:
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free / 2**30
    detail = f"{free:.1f} GiB free in {folder}"
    if not os.access(place, os.W_OK):
        return Check(name, "fail", f"no permission to write in {place}", "change to a folder that you may write to")
    if free < 2:
        return Check(name, "warn", detail, "runs, caches and checkpoints want 2 GiB: free some space")
    return Check(name, "ok", detail)


def _data(name: str, root: Path | None) -> Check:
    from dgbench.data.domains import DOMAINS
    from dgbench.data.places import data_root

    base = data_root(root)
    present = [domain for domain, row in DOMAINS.items() if not row.procedural and row.root(base) is not None]
    detail = f"{base}: {', '.join(present) or 'no data sets'}" if base.is_dir() else f"{base} does not exist"
    hint = None if present else "the streets domains need none; for others point DGBENCH_DATA at the folder that holds them"
    return Check(name, "ok" if present else "info", detail, hint)


def _cache(name: str) -> Check:
    from dgbench.data.places import cache_root

    folder = cache_root()
    found = _disk(name, folder)
    size = _size(folder)
    if not size or found.state != "ok":
        return found
    detail = f"{size / 2**30:.1f} GiB used, {found.detail}"
    return Check(name, "ok", detail, "all in it is made again where it is needed: remove the folder to free its space")


def _size(folder: Path) -> int:
    """Return the bytes of a folder's files; those that vanish meanwhile are not counted."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(where, name)).st_size
    return total


def _recipes() -> Check:
    from dgbench.recipe import recipe_names
    from dgbench.resources import recipes_dir

    count = len(recipe_names())
    if not count:
        return Check("recipes", "fail", f"none in {recipes_dir()}", "install dgbench again")
    return Check("recipes", "ok", f"{count} in {recipes_dir()}")


def _hub() -> Check:
    if os.environ.get("DGBENCH_OFFLINE") == "1":
        return Check("hub", "info", "DGBENCH_OFFLINE=1: nothing is downloaded")
    try:
        from huggingface_hub import get_token
    except ImportError:
        return Check("hub", "warn", "huggingface_hub is not installed", "pip install huggingface-hub")
    # only whether there is a login: the token is not shown
    return Check("hub", "ok" if get_token() else "info", "logged in" if get_token() else "not logged in: public files only")

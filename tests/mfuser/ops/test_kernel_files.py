"""Compiled kernels are loaded from folders that are the user's own, and compilers end with the process that started them."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from mfuser.ops import compiled, kernel_files

from .emulation import HEADERS, ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MFUSER_KERNELS", raising=False)
    path = kernel_files.kernels_dir() / "0123" / "sm_90-cuda13.so"
    kernel_files.make_folder(path.parent)
    path.write_bytes(b"")
    return path


@pytest.mark.parametrize("mode", [0o002, 0o020], ids=["anyone", "the group"])
@pytest.mark.parametrize("above", range(4), ids=["library", "folder", "kernels", "mfuser"])
def test_a_library_that_others_may_replace_is_not_loaded(library: Path, above: int, mode: int) -> None:
    assert kernel_files.distrusted(library) is None
    place = (library, *library.parents)[above]
    place.chmod(stat.S_IMODE(place.stat().st_mode) | mode)
    problem = kernel_files.distrusted(library)
    assert problem is not None
    assert problem.startswith(f"others may write to {place}: ")
    assert f"chmod go-w {place}" in problem


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("above", range(4), ids=["library", "folder", "kernels", "mfuser"])
def test_a_library_of_another_user_is_not_loaded(library: Path, above: int) -> None:
    place = (library, *library.parents)[above]
    os.chown(place, 65534, -1)
    assert kernel_files.distrusted(library) == f"{place} belongs to user 65534, neither to you nor to root"


def test_a_link_is_as_good_as_where_it_leads(library: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.so").write_bytes(b"")
    library.unlink()
    library.symlink_to(elsewhere / "x.so")
    assert kernel_files.distrusted(library) is None
    elsewhere.chmod(0o777)
    assert str(elsewhere) in str(kernel_files.distrusted(library))


def test_what_is_made_is_the_users_own_whatever_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFUSER_KERNELS", str(tmp_path / "a/kernels"))
    before = os.umask(0)
    try:
        kernel_files.make_folder(tmp_path / "a/kernels/0123")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/kernels", "a/kernels/0123")] == [0o755] * 3


@pytest.mark.parametrize("value", ["", "cache", "./cache"])
def test_a_cache_folder_that_is_empty_or_relative_is_ignored(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MFUSER_KERNELS", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert kernel_files.kernels_dir() == Path("/home/me/.cache/mfuser/kernels")
    monkeypatch.setenv("MFUSER_KERNELS", "")
    assert kernel_files.kernels_dir() == Path("/home/me/.cache/mfuser/kernels")


def test_without_a_place_for_kernels_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFUSER_KERNELS", "kernels")
    relative = f"MFUSER_KERNELS is `kernels`, which is no absolute path: set it to {Path.cwd() / 'kernels'}, or unset it"
    assert compiled.status().reason == relative
    with pytest.raises(compiled.BuildError, match="MFUSER_KERNELS is `kernels`"):
        compiled.build(["sm_90"])
    monkeypatch.delenv("MFUSER_KERNELS")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    found = compiled.status()
    assert found.reason == "there is no home folder to keep kernels in: set HOME, or MFUSER_KERNELS to a folder that is yours"
    assert (found.folder, found.built) == (None, ())


FAKE = """#!/bin/sh
case "$1" in --version) echo 'release 13.0, V13.0.88'; exit;; esac
sleep 300 &
echo $$ $! > "$PIDS/$$"
wait
"""


def _runs(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_a_compiler_and_what_it_started_end_with_the_build(tmp_path: Path, sent: signal.Signals) -> None:
    (tmp_path / "cuda/bin").mkdir(parents=True)
    (tmp_path / "cuda/bin/nvcc").write_text(FAKE)
    (tmp_path / "cuda/bin/nvcc").chmod(0o755)
    pids, sources = tmp_path / "pids", tmp_path / "sources"
    pids.mkdir()
    sources.mkdir()
    for name in ("a.cu", "b.cu"):
        shutil.copy(HEADERS / "probe.cu", sources / name)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_HOME": str(tmp_path / "cuda"),
        "PIDS": str(pids),
        "MFUSER_KERNELS": str(tmp_path / "kernels"),
        "MARK": uuid.uuid4().hex,
    }
    script = (
        "import signal, sys, pathlib\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from mfuser.ops import compiled\ncompiled.build(['sm_90'], sources=pathlib.Path(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(sources)], env=environment, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while len(started := [pid for path in pids.iterdir() for pid in path.read_text().split()]) < 4:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(sent)
    process.wait(30)
    end = time.monotonic() + 30
    while any(_runs(int(pid)) for pid in started):
        assert time.monotonic() < end
        time.sleep(0.05)
    folder = next((tmp_path / "kernels").iterdir())
    kernel_files.clear_builds(folder)
    assert not list(folder.iterdir())

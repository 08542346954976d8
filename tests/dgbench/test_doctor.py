"""The doctor looks at this very machine and tells nothing it should not."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dgbench import __version__
from dgbench.doctor import Check, doctor
from dgbench.environment import code_commit


@pytest.fixture(scope="module")
def checks() -> dict[str, Check]:
    return {check.name: check for check in doctor()}


def test_versions_and_cores_are_those_of_this_machine(checks: dict[str, Check]) -> None:
    assert platform.python_version() in checks["python"].detail
    assert torch.__version__ in checks["torch"].detail
    assert str(len(os.sched_getaffinity(0))) in checks["cores"].detail


def test_gpu_is_told_as_torch_sees_it(checks: dict[str, Check]) -> None:
    assert ("gpu 0" in checks) == torch.cuda.is_available()
    if not torch.cuda.is_available():
        assert checks["gpu"].state == "info"
        assert checks["gpu"].hint


def test_every_backend_of_every_op_is_listed_with_a_reason(checks: dict[str, Check]) -> None:
    from mfuser import ops
    from mfuser.ops import dispatch

    for op in dispatch.TABLE:
        for backend, reason in ops.explain(op).items():
            check = checks[f"{op}: {backend}"]
            assert check.detail == (reason or "usable")
            assert check.state == ("info" if reason else "ok")


def test_the_build_command_is_told_where_it_would_help(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mfuser.ops import compiled

    library = {check.name: check for check in doctor()}["kernel library"]
    assert library.detail == (compiled.status().reason or str(compiled.library().path))
    sources = (tmp_path / "a.cu",)
    reason = "not built for sm_90: run `dgbench kernels build`"
    here = compiled.Status(sources, "/bin/nvcc 13.0.88", "sm_90", tmp_path, (), reason)
    for status, helps in ((here, True), (replace(here, nvcc=None), False), (replace(here, architecture=None), False)):
        monkeypatch.setattr(compiled, "status", lambda status=status: status)
        check = {check.name: check for check in doctor()}["kernel library"]
        assert check.state == "info"
        assert check.detail == status.reason
        assert bool(check.hint and check.hint.startswith("dgbench kernels build")) == helps


def test_nothing_fails_where_the_main_job_runs(checks: dict[str, Check]) -> None:
    assert not [check for check in checks.values() if check.state == "fail"]


def test_data_sets_are_found_below_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cityscapes").mkdir()
    monkeypatch.setenv("DGBENCH_DATA", str(tmp_path))
    assert {c.name: c.detail for c in doctor()}["data root"] == f"{tmp_path}: cityscapes"


def test_the_hub_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DGBENCH_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_one")
    found = {check.name: check for check in doctor()}
    assert found["hub"].detail == "logged in"
    assert not [check for check in found.values() if "hf_not_a_real_one" in f"{check.detail}{check.hint}"]
    monkeypatch.setenv("DGBENCH_OFFLINE", "1")
    assert "DGBENCH_OFFLINE=1" in {c.name: c.detail for c in doctor()}["hub"]


def test_a_folder_without_permission_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may write anywhere, so the system's answer is set rather than the folder's mode
    ask = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and ask(path, mode))
    monkeypatch.setenv("DGBENCH_CACHE", str(tmp_path / "cache"))
    found = {check.name: check for check in doctor()}
    assert found["cache folder"].state == "fail"


def test_a_check_that_cannot_be_made_is_a_finding_and_the_others_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    checks = {check.name: check for check in doctor()}
    assert checks["disk (here)"].state == "fail"
    assert checks["disk (here)"].detail == "cannot be checked: [Errno 2] No such file or directory"
    assert {"python", "torch", "cores", "memory", "recipes"} <= set(checks)


def test_a_report_of_a_fault_begins_with_version_and_commit(checks: dict[str, Check]) -> None:
    assert next(iter(checks)) == "dgbench"
    sha, dirty = code_commit()
    assert checks["dgbench"].detail.startswith(f"{__version__}, ")
    assert (sha is None) == ("commit" not in checks["dgbench"].detail.replace("git checkout", ""))
    assert sha is None or f"commit {sha[:12]}{', changed' if dirty else ''} " in checks["dgbench"].detail


def test_the_cache_says_how_much_it_holds_and_that_it_may_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DGBENCH_CACHE", str(tmp_path / "cache"))
    assert {check.name: check for check in doctor()}["cache folder"].hint is None
    (tmp_path / "cache/streets").mkdir(parents=True)
    with (tmp_path / "cache/streets/a.png").open("wb") as file:
        file.truncate(3 * 2**29)  # takes no room on the disk
    check = {check.name: check for check in doctor()}["cache folder"]
    assert check.detail.startswith("1.5 GiB used, ")
    assert "remove the folder" in (check.hint or "")

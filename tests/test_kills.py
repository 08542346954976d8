"""The driver of crash tests stops where it says."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kills
import numpy as np
import pytest

from dgbench import atomic


def states(folder: Path) -> dict[str, int]:
    """Every file below a folder, and its size."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_an_action_is_stopped_before_every_change_and_within_what_it_writes(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def action() -> None:
        (folder / "a").write_bytes(b"1234")
        (tmp_path / "elsewhere").write_bytes(b"1")
        (folder / "a").rename(folder / "b")
        (folder / "b").unlink()

    folder.mkdir()
    moments = kills.stops(action, folder)
    assert not states(folder)
    assert [str(stop) for stop in moments] == [
        "before open a (change 0)",
        "empty open a (change 0)",
        "half open a (change 0)",
        "before os.rename a (change 1)",
        "before os.remove b (change 2)",
    ]
    found = []
    for stop in moments:
        assert kills.kill(action, folder, stop)
        found.append(states(folder))
        shutil.rmtree(folder)
        folder.mkdir()
    assert found == [{}, {"a": 0}, {"a": 2}, {"a": 4}, {"b": 4}]


def test_what_libraries_write_and_remove_is_seen(tmp_path: Path) -> None:
    def action() -> None:
        np.savez(tmp_path / "x.npz", a=np.zeros(3))
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub/file").touch()
        shutil.rmtree(tmp_path / "sub")

    changes = [stop.what for stop in kills.stops(action, tmp_path) if stop.when == "before"]
    assert changes == ["open x.npz", "os.mkdir sub", "open file", "os.remove file", "os.rmdir sub"]


def test_an_atomic_write_leaves_the_old_bytes_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old!")
    for stop in kills.stops(lambda: None, tmp_path) + kills.stops(lambda: atomic.write(path, b"newer"), tmp_path):
        path.write_bytes(b"old!")
        assert kills.kill(lambda: atomic.write(path, b"newer"), tmp_path, stop)
        assert path.read_bytes() == b"old!"


def test_an_action_that_fails_or_ends_early_is_told(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the action ended with 70"):
        kills.stops(lambda: 1 // 0, tmp_path)
    assert not kills.kill(lambda: None, tmp_path, kills.Stop(3, "before", "nothing"))


def test_an_action_is_stopped_at_a_name_in_whatever_thread(tmp_path: Path) -> None:
    def action() -> None:
        (tmp_path / "a").write_bytes(b"1")
        with ThreadPoolExecutor(1) as pool:
            pool.submit((tmp_path / "b").write_bytes, b"1").result()
        (tmp_path / "c").write_bytes(b"1")

    kills.kill_at(action, tmp_path, "b")
    assert states(tmp_path) == {"a": 1}
    with pytest.raises(AssertionError, match="ended with 0, to be stopped at a change of d"):
        kills.kill_at(action, tmp_path, "d")

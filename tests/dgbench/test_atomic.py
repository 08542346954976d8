"""A file is written whole or not at all, and what a killed process left is removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import kills
import pytest

from dgbench import atomic, temporaries


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_writer_leaves_the_old_bytes_or_the_new(tmp_path: Path) -> None:
    def writes() -> None:
        for i in range(10**9):
            atomic.write(tmp_path / "record-x.json", bytes([65 + i % 26]) * 200_000)

    atomic.write(tmp_path / "record-x.json", b"0" * 200_000)
    for number in range(8):
        assert kills.kill_after(writes, 0.03 + 0.003 * number) == -signal.SIGKILL
        content = (tmp_path / "record-x.json").read_bytes()
        assert len(content) == 200_000
        assert len(set(content)) == 1
        visible = [path.name for path in tmp_path.glob("record-*")]
        assert visible == ["record-x.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_names_the_file_and_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "record-x.json"
    atomic.write(target, "old")
    # the hidden file of this process is a way into a device that is always full
    temporaries.beside(target).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        atomic.write(target, "new")
    assert caught.value.filename == str(target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["record-x.json"]


@pytest.mark.skipif(os.name != "posix", reason="needs a named pipe")
def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE)
    atomic.write(pipe, "through")
    assert reader.communicate(timeout=20)[0] == b"through"
    assert pipe.is_fifo()


def test_what_dead_writers_left_is_removed_and_nothing_else_in_a_folder_of_the_users(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ours = temporaries.beside(tmp_path / "record-x.json").name
    left = [ours.replace(str(os.getpid()), str(dead.pid)), f".older.yaml.{dead.pid}.tmp"]
    stay = [ours, f".notes.{dead.pid}", f".another.json.elsewhere-{dead.pid}.tmp", "record-x.json", ".hidden.tmp"]
    for name in (*left, *stay):
        (tmp_path / name).touch()
    (tmp_path / f".folder.{dead.pid}.tmp").mkdir()
    temporaries.clear(tmp_path, shared=True)
    assert {path.name for path in tmp_path.iterdir()} == {*stay, f".folder.{dead.pid}.tmp"}

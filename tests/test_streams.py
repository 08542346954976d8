"""The process's streams: closed, full, cut off, or of an encoding without our marks. Real processes, and light commands alone."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dgbench import cli
from dgbench.cli.refusals import refusal
from dgbench.errors import DataError

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")


def shell(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    line = re.sub("^dgbench", f"{sys.executable} -m dgbench", line)
    return subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, timeout=60, check=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["leaderboard", "leaderboard --json", "--version", "train --help"])
@pytest.mark.parametrize("where", [">/dev/full", ">&-"])
def test_a_result_that_cannot_be_written_is_an_error_of_one_line(command: str, where: str, tmp_path: Path) -> None:
    unbuffered = {"PYTHONUNBUFFERED": "1" if "json" in command else ""}
    done = shell(f"dgbench {command} {where}", tmp_path, **unbuffered)
    reason = "no space left on device" if "full" in where else "bad file descriptor"
    assert (done.returncode, done.stderr.decode()) == (1, f"error: standard output cannot be written: {reason}\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full", ">&- 2>&- <&-", "2>&1 | true; exit ${PIPESTATUS[0]}"])
def test_messages_that_cannot_be_written_leave_the_exit_code(where: str, tmp_path: Path) -> None:
    done = shell(f"dgbench nosuch {where}", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


def test_notes_do_not_go_to_stdout_where_stderr_is_closed(tmp_path: Path) -> None:
    assert shell("dgbench data list 2>&-", tmp_path).stdout == shell("dgbench data list", tmp_path).stdout


def test_a_file_is_never_opened_as_a_closed_stream(tmp_path: Path) -> None:
    code = (
        "import os\nfrom dgbench.render import streams\nstreams.prepare()\n"
        "f = open('out', 'w')\nassert f.fileno() > 2, f.fileno()\nos.write(2, b'raw')\n"
    )
    done = shell(f'{sys.executable} -c "{code}" <&- >&- 2>&-', tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "out").read_bytes() == b""


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "cp1252"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "POSIX"},
    ],
    ids=lambda variables: " ".join(variables.values()),
)
def test_a_stream_without_our_marks_gets_stand_ins(variables: dict[str, str], tmp_path: Path) -> None:
    done = shell("dgbench leaderboard", tmp_path, **{"LC_ALL": "C.UTF-8", **variables})
    text = done.stdout.decode(variables.get("PYTHONIOENCODING", "utf-8"))
    assert (done.returncode, done.stderr) == (0, b"")
    assert re.search(r"^ref  mfuser \(tiny \+ tiny\) .* adverse$", text, re.MULTILINE)
    assert re.search(r"^pub  VFMNet \+ MGRNet +DINOv2-L +[-–] +[-–] +[-–] +70\.3 ", text, re.MULTILINE)


def test_bytes_that_are_no_text_come_back_as_escapes(tmp_path: Path) -> None:
    done = shell("dgbench train $'no\\xff\\x1b[31msuch'", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: unknown method or recipe `no\\udcff\\x1b[31msuch`\n")
    done = shell("dgbench train --seed $'\\xff\\xe2\\x80\\xae'", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: invalid value for '--seed': expected text in UTF-8, got `\\udcff\\u202e`\n")


def test_warnings_of_other_libraries_are_visible(tmp_path: Path) -> None:
    code = "import warnings; from dgbench.render import streams; streams.prepare(); warnings.warn(chr(27) + '[2J.png')"
    done = shell(f'{sys.executable} -c "{code}"', tmp_path)
    assert done.stderr.decode().splitlines()[0].endswith("UserWarning: \\x1b[2J.png")
    assert b"\x1b" not in done.stderr


# ---- what the machine refuses


def _unencodable(name: str) -> Exception:
    with pytest.raises(UnicodeEncodeError) as caught:
        name.encode()
    return caught.value


SHM = "unable to write to file </torch_12_34_0>: No space left on device (28)"
BUS = (
    "DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit."
)
FILES = "Too many open files. Communication with the workers is no longer possible. Please increase the limit using `ulimit -n`"
OPEN = "unable to open shared memory object </torch_5_6_7> in read-write mode: Too many open files (24)"


@pytest.mark.parametrize(
    ("raised", "message", "hint"),
    [
        (RuntimeError(SHM), "shared memory", "--shm-size"),
        (RuntimeError(BUS), "shared memory", "train.workers=0"),
        (OSError(errno.ENOSPC, "No space left on device", "/dev/shm/torch_1"), "shared memory", "--shm-size"),
        (RuntimeError(FILES), "too many open files", "ulimit -n"),
        (RuntimeError(OPEN), "too many open files", "ulimit -n"),
        (OSError(errno.EMFILE, "Too many open files", "x.png"), "too many open files", "ulimit -n"),
        (MemoryError(), "out of memory", "batch_size"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory", "train.workers=0"),
        (_unencodable("photo-\udcff\x1b.png"), "`photo-\\udcff\\x1b.png` has bytes that are no UTF-8", "rename"),
        (RuntimeError("can't start new thread"), "no further process or thread", "ulimit -u"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no further process or thread", "ulimit -u"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "was killed", "batch_size"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "was killed", "workers"),
    ],
)
def test_what_the_machine_refuses_is_one_line_and_a_hint(raised: Exception, message: str, hint: str) -> None:
    program = typer.Typer(cls=cli.Program, pretty_exceptions_enable=False)

    @program.callback()
    def _program() -> None:
        """Have commands."""

    @program.command(cls=cli.Command)
    def go() -> None:
        """Fail."""
        raise raised

    result = CliRunner().invoke(program, ["go"])
    lines = result.stderr.splitlines()
    assert (result.exit_code, len(lines), lines[1]) == (1, 3, "")
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert lines[2].startswith("hint: ")
    assert hint in lines[2]


def test_torch_and_numpy_without_memory_say_how_much_was_asked_for() -> None:
    import numpy as np
    import torch

    for allocate in (lambda: torch.empty(1 << 55, dtype=torch.uint8), lambda: np.empty(1 << 55, dtype=np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        told = refusal(caught.value)
        assert told is not None
        assert re.fullmatch(r"out of memory: (33,554,432\.0 GiB|32\.0 PiB) were asked for at once", told[0])


@pytest.mark.parametrize(
    "raised",
    [
        RuntimeError("out of resource: shared memory, Required: 200000, Hardware limit: 101376"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        KeyError("no space"),
        DataError("shared memory: no space"),
        OSError("nothing is said of /dev/shm but its name"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
    ],
)
def test_other_errors_are_not_taken_for_refusals(raised: Exception) -> None:
    assert refusal(raised) is None


def test_a_current_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    done = shell("mkdir gone; cd gone; rmdir ../gone; " + f"{sys.executable} -m dgbench data list", tmp_path)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().startswith("error: the current folder is gone, or cannot be entered\n\nhint: change into")

"""What is left of workers once their parent has ended, by a signal that it can handle or by one that it cannot: nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from dgbench import streets
from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset
from dgbench.data.workers import worker_init
from dgbench.progress import Silent

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


def processes(mark: str) -> list[int]:
    """Those that have `mark` in their environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (place / "environ").read_bytes() and " Z " not in (place / "stat").read_text():
                found.append(int(place.name))
        except OSError:
            continue
    return found


def wait_until(true: object, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(
    ("sent", "to_group", "code"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, True, 143), (signal.SIGKILL, False, -9)],
)
def test_a_rendering_ends_with_all_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, to_group: bool, code: int
) -> None:
    mark = uuid.uuid4().hex
    cache = tmp_path / "cache"
    script = (
        "import signal\nfrom dgbench import cli\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from dgbench.data import dataset\nfrom dgbench.data.catalog import lookup\nfrom dgbench.progress import Silent\n"
        "@cli.app.command()\n"
        "def render(): dataset.SegDataset(lookup('streets-city'), 'train', size=(64, 128)).prepare(Silent(), workers=2)\n"
        "if __name__ == '__main__': cli.main()"
    )
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DGBENCH_CACHE": str(cache), "MARK": mark}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), "render"],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert wait_until(lambda: len(list(cache.rglob("*.png"))) > 4, 60)
    (os.killpg if to_group else os.kill)(process.pid, sent)
    # a moment; on a busy machine more, and to render all the rest takes longer by far
    assert wait_until(lambda: not processes(mark), 30), processes(mark)
    _, error = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in error
    if sent != signal.SIGKILL:
        assert error == ("interrupted\n" if sent == signal.SIGINT else "terminated\n")
        assert not list(cache.rglob(".*"))

    monkeypatch.setenv("DGBENCH_CACHE", str(cache))
    data = SegDataset(lookup("streets-city"), "train", size=(64, 128), limit=6)
    data.prepare(Silent(), workers=1)
    assert not list(cache.rglob(".*"))
    for index in (0, 5):
        image, label = streets.render("streets-city", "train", index, (64, 128))
        assert np.array_equal(data[index].image, image)
        assert np.array_equal(data[index].label, label)


class _Slow(Dataset[NDArray[np.uint8]]):
    """Says who reads, and takes a minute."""

    def __init__(self, told: Path) -> None:
        self.told = told

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        (self.told / str(os.getpid())).touch()
        time.sleep(60)
        return np.zeros(1, np.uint8)


def _load(told: Path) -> None:
    for _ in DataLoader(_Slow(told), num_workers=2, worker_init_fn=worker_init):
        pass


def _runs(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_workers_of_a_loader_end_with_a_parent_that_is_killed(tmp_path: Path, sent: signal.Signals) -> None:
    parent = multiprocessing.get_context("fork").Process(target=_load, args=(tmp_path,))
    parent.start()
    assert parent.pid is not None
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
    os.kill(parent.pid, sent)
    parent.join(30)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    assert wait_until(lambda: not any(map(_runs, workers)), 30)  # they are at it for a minute

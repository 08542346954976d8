"""What a loader's workers run out of is told in one line, and nothing waits for a batch that never comes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dgbench.cli.refusals import refusal
from dgbench.data.workers import worker_init
from dgbench.ends import NO_FILES, NO_SHARED_MEMORY

ROOT = Path(__file__).parents[1]


class _Pieces(Dataset[list[torch.Tensor]]):
    """Items of many tensors, each of which takes an open file to be handed over."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, _: int) -> list[torch.Tensor]:
        return [torch.zeros(4) for _ in range(400)]


@pytest.mark.parametrize("collate", [None, list], ids=["batches", "lists"])
def test_too_many_open_files_are_told_with_the_limit_to_raise(collate: Callable[[object], object] | None) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(used + 200, before[1]), before[1]))
    loader = DataLoader(_Pieces(), 2, num_workers=1, collate_fn=collate, worker_init_fn=worker_init)
    try:
        with pytest.raises((RuntimeError, OSError)) as raised:
            list(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    told = refusal(raised.value)
    assert told is not None
    # the worker may be gone before PyTorch asks for the code with which it ended
    assert told[0].startswith("too many open files" if collate is None else ("too many open files", "a worker that loads images"))
    assert told[1] is not None
    assert "ulimit -n" in told[1]
    assert "train.workers=0" in told[1]


SHM = """
import sys, torch
from torch.utils.data import DataLoader
from dgbench.cli.refusals import refusal
from dgbench.data.workers import worker_init
from dgbench.ends import NO_FILES, NO_SHARED_MEMORY
images = [torch.zeros(3, 512, 1024) for _ in range(8)]
for collate in (None, list):
    kept = []
    try:
        for batch in DataLoader(images, 2, num_workers=1, collate_fn=collate, worker_init_fn=worker_init):
            kept.append(batch)
        print('it fits')
    except RuntimeError as error:
        print(*refusal(error), sep=' / ')
"""


def test_a_full_shared_memory_is_told_with_dockers_option() -> None:
    mount = "mount -t tmpfs -o size=8m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("needs a /dev/shm of its own")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, SHM],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line in lines:
        assert line.startswith("the shared memory through which workers hand over images is full"), (line, done.stderr)
        assert "--shm-size" in line
        assert "train.workers=0" in line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...",
            "the shared memory through which workers hand over images is full",
        ),
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "a worker that loads images was killed"),
        ("received 0 items of ancdata", "too many open files"),
        ("CUDA error: an illegal memory access was encountered", None),
    ],
)
def test_pytorchs_words_are_understood(text: str, told: str | None) -> None:
    found = refusal(RuntimeError(text))
    assert (found is None) if told is None else (found is not None and found[0].startswith(told))


def test_other_errors_of_the_system_are_not_taken_for_a_limit() -> None:
    told = [
        refusal(error) for error in (FileNotFoundError(2, "No such file or directory", "a"), OSError(28, "No space left", "out"))
    ]
    assert [found and found[0] for found in told] == [
        "no such file or directory: a",
        "no space left on the disk while writing out",
    ]


@pytest.mark.parametrize(("code", "told"), [(NO_SHARED_MEMORY, "shared memory"), (NO_FILES, "too many open files")])
def test_a_workers_exit_code_tells_what_it_lacked(code: int, told: str) -> None:
    found = refusal(RuntimeError(f"DataLoader worker (pid(s) 7) exited unexpectedly with exit code {code}. Details are lost"))
    assert found is not None
    assert told in found[0]

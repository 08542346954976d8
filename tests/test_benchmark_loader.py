"""`benchmarks/loader.py` on small files: every path, and that both sides do the same work."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch

from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset
from dgbench.data.sampling import UniformSampler
from dgbench.data.transforms import Augmentation, TrainView

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "loader.py"
ROWS = re.compile(r"^\| (PNG|JPEG) \| (uniform|rare classes) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.M)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("benchmark_of_the_loader", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    threads = torch.get_num_threads(), cv2.getNumThreads()
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])


def test_a_quick_run_takes_every_path(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--quick", "--out", str(tmp_path / "table.md")])
    assert script.main() == 0
    text = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert [row[:2] for row in ROWS.findall(text)] == [
        ("PNG", "uniform"),
        ("PNG", "rare classes"),
        ("JPEG", "uniform"),
        ("JPEG", "rare classes"),
    ]
    assert all(float(rate) > 0 for row in ROWS.findall(text) for rate in row[2:])
    assert "| PNG, Pillow |" in text


def test_both_sides_make_the_same_kind_of_crops(script: ModuleType, tmp_path: Path) -> None:
    script.write_files(tmp_path, 3, (132, 240))
    a = Augmentation((64, 64), (0.5, 2.0), 0.75, 0.5)
    for domain in ("gta5", "bdd100k"):
        dataset = SegDataset(lookup(domain), "train", root=tmp_path)
        pairs = [(path, Path(str(path).replace(*swap))) for path, swap in script._paths(tmp_path, domain)]
        plain = script.Plain(pairs, dataset.label_map.table, UniformSampler(3, 0), a)
        view = TrainView(dataset, UniformSampler(3, 0), a, 0)
        seen: list[list[np.ndarray]] = [[], []]
        for position in range(60):
            for side, (image, label) in enumerate((plain[position], script._finished(view, position))):
                assert image.shape == (1, 3, 64, 64)
                assert image.dtype == torch.float32
                assert 0 <= float(image.min()) <= float(image.max()) <= 1
                assert label.dtype == torch.int64
                seen[side].append(np.bincount(label.numpy().ravel(), minlength=256))
        shares = [np.sum(side, 0) / np.sum(side) for side in seen]
        assert np.abs(shares[0] - shares[1]).max() < 0.08


def test_the_committed_table_shows_at_least_twice_the_throughput() -> None:
    text = (SCRIPT.parent / "loader.md").read_text()
    assert len(ROWS.findall(text)) == 4
    assert all(float(ratio) >= 2 for *_, ratio in ROWS.findall(text))
    assert "cores" in text

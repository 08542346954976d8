"""`benchmarks/end_to_end.py` with tiny towers: files that are Cityscapes', and rates that are the record's."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dgbench import streets
from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset
from dgbench.errors import DgbenchError

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("end_to_end")


def test_files_are_read_as_cityscapes(script: ModuleType, tmp_path: Path) -> None:
    script.write_files(tmp_path / "cityscapes", 5, 2, (64, 128))
    dataset = SegDataset(lookup("cityscapes"), "val", root=tmp_path)
    assert len(dataset) == 5
    first, second, third = (dataset[i] for i in range(3))
    assert first.image.shape == (64, 128, 3)
    assert np.array_equal(first.label, streets.render("streets-city", "val", 0, (64, 128))[1])
    assert not np.array_equal(first.image, second.image)
    assert np.array_equal(first.image, third.image)
    assert np.array_equal(first.label, third.label)


def test_softened_scenes_make_smaller_files(script: ModuleType, tmp_path: Path) -> None:
    picture, _ = streets.render("streets-city", "val", 0, (256, 512))
    for name, pixels in (("as", picture), ("soft", script.softened(picture))):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    sizes = [(tmp_path / f"{name}.png").stat().st_size for name in ("soft", "as")]
    assert sizes[0] < 0.75 * sizes[1]


@pytest.mark.full
def test_a_run_is_made_once_and_scored_by_the_command(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    options = [
        "--towers",
        "tiny",
        "--images",
        "6",
        "--unique",
        "2",
        "--side",
        "64",
        "--workers",
        "1",
        "--device",
        "cpu",
        "--start",
        "2",
    ]
    assert script.main([str(tmp_path / "work"), *options, "--json", str(out)]) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text(encoding="utf-8"))
    assert found["images"] == 4  # beyond the first two
    seconds, whole = found["seconds"], found["whole"]
    assert 0 < whole["model"] < whole["total"] < whole["command"]
    assert found["images_per_second"] == pytest.approx(4 / seconds["total"])
    assert found["own_images_per_second"] == pytest.approx(4 / seconds["model"])
    assert found["share_of_own_rate"] == pytest.approx(seconds["model"] / seconds["total"])
    assert found["images_per_second_with_start"] == pytest.approx(6 / whole["command"])
    assert re.search(r"^\| 4 \| [\d.e+]+ \| [\d.e+]+ \| [\d.e+]+ \| [\d.]+% \| -?[\d.]+% \|$", text, re.M)
    # the second call finds files and run
    folders = sorted((tmp_path / "work").iterdir())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    assert script.main([str(tmp_path / "work"), *options, "--start", "0", "--protocol", "unified-tiled", "--own-ms", "1000"]) == 0
    text = capsys.readouterr().out
    assert "protocol unified-tiled" in text
    assert "| 1 |" in text  # a second an image
    assert sorted((tmp_path / "work").iterdir()) == folders
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")} == before


def test_rates_are_of_the_images_beyond_the_first_ones(script: ModuleType) -> None:
    def record(images: int, model: float, waited: float) -> dict[str, Any]:
        seconds = {"data": waited, "model": model, "metric": 1.0, "total": model + waited + 1.0}
        return {"n_images": images, "seconds": seconds}

    # 30 s of compilation in both
    found = script.summed(record(500, 80, 5), record(20, 32, 4.5), 120.0, None)
    assert found["images"] == 480
    assert found["own_images_per_second"] == pytest.approx(480 / 48)
    assert found["images_per_second"] == pytest.approx(480 / 48.5)
    assert found["waiting"] == pytest.approx(0.5 / 48.5)
    assert script.summed(record(500, 80, 5), None, 120.0, 50.0)["own_images_per_second"] == 20.0


def test_what_the_command_says_is_told(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(DgbenchError, match="no run"):
        script.scored(tmp_path / "nothing", tmp_path, [])

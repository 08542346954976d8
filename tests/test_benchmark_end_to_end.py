"""`benchmarks/end_to_end.py` with tiny towers: files that are Cityscapes', and rates that are the record's."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

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


def test_a_run_is_made_once_and_scored_by_the_command(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    options = ["--towers", "tiny", "--images", "6", "--unique", "2", "--side", "64", "--workers", "1", "--device", "cpu"]
    assert script.main([str(tmp_path / "work"), *options, "--json", str(out)]) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text(encoding="utf-8"))
    assert found["images"] == 6
    seconds = found["seconds"]
    assert 0 < seconds["model"] < seconds["total"] < seconds["command"]
    assert found["images_per_second"] == pytest.approx(6 / seconds["total"])
    assert found["own_images_per_second"] == pytest.approx(6 / seconds["model"])
    assert found["share_of_own_rate"] == pytest.approx(seconds["model"] / seconds["total"])
    assert re.search(r"^\| 6 \| [\d.e+]+ \| [\d.e+]+ \| [\d.e+]+ \| [\d.]+% \| [\d.]+% \|$", text, re.M)
    # the second call finds files and run
    folders = sorted((tmp_path / "work").iterdir())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    assert script.main([str(tmp_path / "work"), *options, "--protocol", "unified-tiled", "--own-ms", "1000"]) == 0
    text = capsys.readouterr().out
    assert "protocol unified-tiled" in text
    assert "| 1 |" in text  # a second an image
    assert sorted((tmp_path / "work").iterdir()) == folders
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")} == before


def test_what_the_command_says_is_told(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(DgbenchError, match="no run"):
        script.scored(tmp_path / "nothing", tmp_path, [])

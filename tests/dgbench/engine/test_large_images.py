"""Photographs whose scores would fill the memory: scored in parts, and what they are told to be is the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import mfuser
from dgbench.data.dataset import Sample
from dgbench.data.sheet import contact_sheet, overlay
from dgbench.engine import predict, scoring
from dgbench.engine.scoring import predicted, score
from dgbench.protocol import lookup
from mfuser.inference import bands
from mfuser.segmentor import Segmentor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Segmentor:
    torch.manual_seed(0)
    return mfuser.build("source-only", backbone="tiny", image_size=(64, 64), weights="random").eval()


class Colours(Segmentor):
    """Scores that are the colours, without any parameter: what a model adds to memory is left out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.image_size = (size, size)

    def forward(self, images: Tensor) -> Tensor:
        return F.pad(images, (0, 0, 0, 0, 0, 16))


def picture(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(64, 64), (200, 130), (90, 500), (500, 64), (50, 30)])
@pytest.mark.parametrize("axis", [2, 3])
def test_bands_are_the_scores_of_the_whole_image(model: Segmentor, size: tuple[int, int], axis: int) -> None:
    images = torch.from_numpy(picture(*size)).permute(2, 0, 1)[None]
    whole = mfuser.slide(model, images.float() / 255, (64, 64), (42, 30))
    parts, end = [], 0
    for start, part in bands(model, images, (64, 64), (42, 30), axis=axis):
        assert start == end
        assert part.shape[axis] <= 64
        end += part.shape[axis]
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, axis), whole)
    if axis == 2:  # windows come in the same order
        assert torch.equal(torch.cat(parts, axis), whole)


@pytest.mark.parametrize("size", [(200, 130), (150, 700), (300, 64)])
@pytest.mark.parametrize("height", [None, 100])
def test_a_large_photograph_is_segmented_as_a_small_one(
    model: Segmentor, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], height: int | None
) -> None:
    image = picture(*size)
    expected = predict.segment(model, image, CPU, height)
    monkeypatch.setattr(predict, "LARGE", 1)
    monkeypatch.setattr(scoring, "_STRIP", 19 * 500 * 7)
    assert (predict.segment(model, image, CPU, height) == expected).mean() > 0.9999


@pytest.mark.parametrize(
    "changed",
    [{}, {"flip": True}, {"scales": (1.0, 1.5)}, {"upsampling": "scores"}],
    ids=["plain", "flip", "scales", "upsampling"],
)
@pytest.mark.parametrize("grid", [(100, 130), (200, 260)])
def test_a_large_image_is_scored_as_a_small_one(
    model: Segmentor, monkeypatch: pytest.MonkeyPatch, changed: dict[str, object], grid: tuple[int, int]
) -> None:
    rules = replace(lookup("unified"), **changed)  # type: ignore[arg-type]
    views = [torch.stack([torch.from_numpy(picture(round(100 * s), round(130 * s)))] * 2) for s in rules.scales]
    floats = [view.permute(0, 3, 1, 2).float() / 255 for view in views]
    with torch.inference_mode():
        expected = score(model, floats, grid, rules).argmax(1)
        assert torch.equal(predicted(model, views, grid, rules, CPU), expected)
        monkeypatch.setattr(scoring, "LARGE", 1)
        monkeypatch.setattr(scoring, "_STRIP", 19 * 260 * 9)
        found = predicted(model, views, grid, rules, CPU)
    assert found.shape == expected.shape
    assert (found == expected).float().mean() > 0.9999


def peak(call: Callable[[], object]) -> int:
    """Bytes that the process holds at most during a call beyond those that it held before."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
    before = held("VmRSS")
    call()
    return held("VmHWM") - before


def held(what: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells how much memory a process has held")
@pytest.mark.parametrize("height", [None, 128])
def test_memory_does_not_grow_with_the_scores_of_the_whole_image(monkeypatch: pytest.MonkeyPatch, height: int | None) -> None:
    image = picture(1600, 1600)  # whose scores are 195 MB, and are held three times
    model = Colours(64)
    monkeypatch.setattr(predict, "LARGE", 1 << 20)
    monkeypatch.setattr(scoring, "_STRIP", 1 << 21)
    predict.segment(model, picture(200, 6000), CPU, height)  # what libraries allocate at their first call
    held_at_most = peak(lambda: predict.segment(model, image, CPU, height))
    assert held_at_most < 150_000_000


def test_a_stripe_is_not_enlarged_without_bounds(
    model: Segmentor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(predict, "LARGE", 100_000)
    assert predict.segment(model, picture(4, 1000), CPU).shape == (4, 1000)
    (told,) = caplog.messages
    assert told.startswith("a photograph of 4x1000 (H x W) is shown to the model at 20x5000 and filled up with black: 64x16000")
    caplog.clear()
    predict.segment(model, picture(300, 500), CPU, 200)
    assert not caplog.messages


@pytest.mark.parametrize("size", [(1, 1), (4, 4000), (4000, 4), (60, 90)])
def test_a_contact_sheet_of_any_shape_is_drawn(size: tuple[int, int]) -> None:
    sample = Sample("a", picture(*size), np.zeros(size, np.uint8))
    drawn = contact_sheet([sample, Sample("b", picture(60, 90), np.zeros((60, 90), np.uint8))], "title")
    assert drawn.width == 1200
    assert drawn.height < 700


def test_an_overlay_in_parts_is_the_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    image, label = picture(50, 70), np.random.default_rng(1).choice([0, 5, 18, 255], (50, 70)).astype(np.uint8)
    whole = overlay(image, label)
    monkeypatch.setattr("dgbench.data.sheet._AT_ONCE", 200)
    assert np.array_equal(overlay(image, label), whole)
    assert np.array_equal(whole[label == 255], image[label == 255])


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3)])
def test_a_photograph_of_any_shape_gets_an_overlay(model: Segmentor, tmp_path: Path, size: tuple[int, int]) -> None:
    mfuser.save(model, tmp_path / "model")
    Image.fromarray(picture(*size)).save(tmp_path / "x.png")
    (found,) = predict.predict([tmp_path / "x.png"], tmp_path / "model", tmp_path / "out", device="cpu")
    assert sum(found.shares.values()) == pytest.approx(1)

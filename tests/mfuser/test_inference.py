from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import mfuser
from mfuser.inference import windows
from mfuser.segmentor import Segmentor


class Where(Segmentor):
    """Scores that depend on the pixel and on its place in the window."""

    def forward(self, images: Tensor) -> Tensor:
        ramp = torch.linspace(0, 1, images.shape[3]) + torch.linspace(0, 2, images.shape[2])[:, None]
        return torch.stack([images[:, 0] * ramp, images.sum(1)], 1)


def by_hand(model: Segmentor, images: Tensor, crop: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """The usual loop (mmsegmentation's), window by window."""
    height, width = images.shape[2:]
    rows, columns = (max(n - c + s - 1, 0) // s + 1 for n, c, s in ((height, crop[0], stride[0]), (width, crop[1], stride[1])))
    total, count = torch.zeros(len(images), 2, height, width), np.zeros((height, width))
    for i in range(rows):
        for j in range(columns):
            bottom, right = min(i * stride[0] + crop[0], height), min(j * stride[1] + crop[1], width)
            top, left = max(bottom - crop[0], 0), max(right - crop[1], 0)
            total[:, :, top:bottom, left:right] += model(images[:, :, top:bottom, left:right])
            count[top:bottom, left:right] += 1
    return total / torch.from_numpy(count).float()


@pytest.mark.parametrize("size", [(8, 8), (8, 20), (13, 9), (16, 24)])
@pytest.mark.parametrize("stride", [(5, 5), (8, 8), (3, 7)])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_windows_are_averaged_as_in_a_plain_loop(size, stride, at_once):
    images = torch.rand(3, 3, *size)
    scores = mfuser.slide(Where(), images, (8, 8), stride, windows_at_once=at_once)
    torch.testing.assert_close(scores, by_hand(Where(), images, (8, 8), stride))


def test_a_small_image_is_padded_and_cut_back():
    images = torch.rand(1, 3, 5, 6)
    scores = mfuser.slide(Where(), images, (8, 8), (5, 5))
    padded = torch.zeros(1, 3, 8, 8)
    padded[:, :, :5, :6] = images
    torch.testing.assert_close(scores, Where()(padded)[:, :, :5, :6])


def test_a_stride_that_leaves_gaps_is_refused():
    with pytest.raises(ValueError, match=r"stride \(9, 8\) must be positive and at most the window"):
        mfuser.slide(Where(), torch.rand(1, 3, 20, 20), (8, 8), (9, 8))


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (13, 8), (16, 24), (100, 67)])
@pytest.mark.parametrize("stride", [(8, 8), (5, 7), (1, 3)])
def test_windows_are_where_an_image_asks_for_its_scores(size, stride):
    seen = []

    def model(crops: Tensor) -> Tensor:
        seen.extend((int(crop[0, 0, 0]), int(crop[1, 0, 0])) for crop in crops)
        return crops

    rows, columns = windows(size, (8, 8), stride)
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    mfuser.slide(model, torch.stack([y, x, x])[None].float(), (8, 8), stride)
    assert sorted(seen) == [(row, column) for row in rows for column in columns]
    covered = torch.zeros(size, dtype=torch.bool)
    for row, column in seen:
        covered[row : row + 8, column : column + 8] = True
    assert covered.all()


def test_a_city_has_three_by_six_windows():
    # crop 512, stride 341, the last one shifted back to the border
    assert windows((1024, 2048), (512, 512), (341, 341)) == ([0, 341, 512], [0, 341, 682, 1023, 1364, 1536])
    assert windows((300, 512), (512, 512), (341, 341)) == ([0], [0])

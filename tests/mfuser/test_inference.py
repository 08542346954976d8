from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import mfuser
from mfuser import methods
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


class Mixed(Where):
    """Scores that depend on the other images of a batch, as where their Fourier amplitudes are mixed."""

    mixes_batch = True

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + images.mean()


@pytest.mark.parametrize(
    "through", [lambda model: model, lambda model: partial(Segmentor.__call__, model)], ids=["model", "partial"]
)
def test_a_model_that_mixes_images_of_a_batch_sees_windows_one_at_a_time(through):
    images = torch.rand(2, 3, 13, 20)
    alone = torch.cat([mfuser.slide(Mixed(), image, (8, 8), (5, 5), windows_at_once=1) for image in images.split(1)])
    for at_once in (1, 3, 100):
        assert torch.equal(mfuser.slide(through(Mixed()), images, (8, 8), (5, 5), windows_at_once=at_once), alone)


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
        seen.extend((round(float(crop[0, 0, 0]) * 128), round(float(crop[1, 0, 0]) * 128)) for crop in crops)
        return crops

    rows, columns = windows(size, (8, 8), stride)
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    mfuser.slide(model, torch.stack([y, x, x])[None] / 128, (8, 8), stride)
    assert sorted(seen) == [(row, column) for row in rows for column in columns]
    covered = torch.zeros(size, dtype=torch.bool)
    for row, column in seen:
        covered[row : row + 8, column : column + 8] = True
    assert covered.all()


class Noisy(Segmentor):
    """The same scores of 19 classes for every window, in bf16."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.scores = torch.nn.Parameter(torch.randn(19, 3, 1, generator=torch.Generator().manual_seed(0)))
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return torch.einsum("kcx,bchw->bkhw", self.scores, images.float()).to(self.dtype)


def test_sums_of_bf16_scores_are_as_good_as_in_fp64():
    images = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    model = Noisy()
    scores = mfuser.slide(model, images, (8, 8), (2, 2))
    assert scores.dtype == torch.float32

    def wide(windows: Tensor) -> Tensor:
        return model(windows).double()

    expected = mfuser.slide(wide, images, (8, 8), (2, 2))
    assert expected.dtype == torch.float64
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=1e-6)
    # but for scores that are equal in bf16
    assert (scores.argmax(1) != expected.argmax(1)).double().mean() < 1e-3


@pytest.mark.parametrize(("given", "returned"), [(torch.float16, torch.float32), (torch.float64, torch.float64)], ids=str)
def test_scores_are_of_fp32_at_least(given, returned):
    assert mfuser.slide(Noisy(given), torch.rand(1, 3, 9, 9), (8, 8), (4, 4)).dtype == returned


def test_windows_are_scored_in_inference_mode_and_the_result_is_an_ordinary_tensor():
    modes, model = [], Noisy(torch.float32)

    def watched(windows: Tensor) -> Tensor:
        modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return model(windows)

    scores = mfuser.slide(watched, torch.rand(1, 3, 12, 8, requires_grad=True), (8, 8), (4, 4))
    assert set(modes) == {(True, False)}
    assert not scores.requires_grad
    # a target of a loss, which an inference tensor cannot be
    logits = torch.zeros_like(scores).requires_grad_()
    (logits * scores).sum().backward()
    assert torch.equal(logits.grad, scores)
    assert model.train().training
    mfuser.slide(model, torch.rand(1, 3, 12, 8), (8, 8), (4, 4))
    assert model.training


RAMP = torch.linspace(0, 1, 64).view(1, 1, 8, 8).repeat(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("images", "range_"),
    [
        (RAMP * 255, "0 to 255"),
        (RAMP - 1, "-1 to 0"),
        (2 * RAMP, "0 to 2"),
        (RAMP.bfloat16() * 255, "0 to 255"),
        ((RAMP - 0.45) / 0.23, "-1.95652 to 2.3913"),
        (RAMP.log(), "-inf to 0"),
        (RAMP * float("nan"), "nan to nan"),
    ],
)
def test_images_of_another_range_are_refused_with_theirs(images, range_):
    says = f"images reach from {range_}, expected .0, 1.: divide those of 8 bits by 255"
    with pytest.raises(ValueError, match=says):
        mfuser.slide(Noisy(), images, (8, 8), (8, 8))
    with pytest.raises(ValueError, match=says):
        mfuser.build("source-only", backbone="tiny", image_size=(8, 8))(images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
def test_images_of_integers_are_refused(dtype):
    images = torch.ones(1, 3, 32, 32, dtype=dtype)
    for name in methods.names():
        model = mfuser.build(name, **methods.constants(name)["BACKBONES"][-1], image_size=(32, 32))
        for call in (model, lambda x, m=model: mfuser.slide(m, x, (32, 32), (32, 32))):
            with pytest.raises(TypeError, match=f"images are {dtype}, expected floating point in .0, 1.: .*divide by 255"):
                call(images)


def test_what_a_bicubic_resize_leaves_is_taken():
    images = torch.nn.functional.interpolate((RAMP > 0.5).float(), (16, 16), mode="bicubic", antialias=True)
    assert images.min() < -0.05
    mfuser.slide(Noisy(), images, (8, 8), (8, 8))


def test_a_batch_of_nothing_and_images_of_another_shape_are_named():
    with pytest.raises(ValueError, match="the batch is empty"):
        mfuser.slide(Noisy(), torch.rand(0, 3, 8, 8), (8, 8), (8, 8))
    with pytest.raises(ValueError, match=r"images are \(3, 8, 8\), expected \(B, 3, H, W\)"):
        mfuser.slide(Noisy(), torch.rand(3, 8, 8), (8, 8), (8, 8))
    with pytest.raises(TypeError, match="images are ndarray"):
        mfuser.slide(Noisy(), torch.rand(1, 3, 8, 8).numpy(), (8, 8), (8, 8))


def test_a_city_has_three_by_six_windows():
    # crop 512, stride 341, the last one shifted back to the border
    assert windows((1024, 2048), (512, 512), (341, 341)) == ([0, 341, 512], [0, 341, 682, 1023, 1364, 1536])
    assert windows((300, 512), (512, 512), (341, 341)) == ([0], [0])

"""How a protocol lets a model look: windows or the whole, masks before or after mixing, mirrored and at several scales."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mfuser
from dgbench.engine.scoring import score
from dgbench.errors import DataError
from dgbench.protocol import lookup
from mfuser.segmentor import Segmentor

RULES = lookup("unified")
SIZE = (64, 64)


@pytest.fixture(scope="module")
def masked() -> Segmentor:
    torch.manual_seed(0)
    return mfuser.build("mfuser", vfm="tiny", vlm="tiny", image_size=SIZE, weights="random").eval()


@pytest.fixture(scope="module")
def plain() -> Segmentor:
    torch.manual_seed(0)
    return mfuser.build("source-only", backbone="tiny", image_size=SIZE, weights="random").eval()


def images(height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def scored(model: Segmentor, *views: Tensor, grid: tuple[int, int] | None = None, **changed: Any) -> Tensor:
    rules = replace(RULES, **changed)
    return score(model, views, grid or (views[0].shape[-2], views[0].shape[-1]), rules)


@torch.inference_mode()
def asked(model: Segmentor, x: Tensor) -> Tensor:
    return model(x)


def up(x: Tensor, size: tuple[int, int] = SIZE) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def test_windows_slide_by_the_stride_and_are_averaged(plain: Segmentor) -> None:
    x = images(64, 96)
    # stride 2/3 of 64 is 43: windows at 0 and, shifted back to the border, at 32
    left, right = asked(plain, x[..., :64]), asked(plain, x[..., 32:])
    expected = torch.cat([left[..., :32], (left[..., 32:] + right[..., :32]) / 2, right[..., 32:]], -1)
    assert torch.allclose(scored(plain, x), expected, atol=1e-5)
    # half a window: at 0 and 32 as well; a quarter: at 0, 16 and 32
    assert torch.allclose(scored(plain, x, stride=0.5), expected, atol=1e-5)
    assert not torch.allclose(scored(plain, x, stride=0.25), expected, atol=1e-3)


def test_masks_are_upsampled_before_or_after_they_are_mixed(masked: Segmentor) -> None:
    x = images()
    with torch.inference_mode():
        found = masked.masks(x)
        assert found is not None
        logits, masks = found
        shares = logits.softmax(-1)[..., :19]
        after = up(torch.einsum("bqk,bqhw->bkhw", shares, masks.sigmoid()))
        before = torch.einsum("bqk,bqhw->bkhw", shares, up(masks).sigmoid())
    assert masks.shape[-1] < 64
    assert torch.allclose(scored(masked, x, upsampling="scores"), after, atol=1e-5)
    assert torch.allclose(scored(masked, x, upsampling="masks"), before, atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-3)
    # MFuser's own way
    assert torch.allclose(scored(masked, x, upsampling="method"), after, atol=1e-5)


def test_a_method_without_masks_has_one_way(plain: Segmentor) -> None:
    x = images()
    assert plain.masks(x) is None
    for order in ("masks", "scores", "method"):
        assert torch.equal(scored(plain, x, upsampling=order), asked(plain, x))


def test_a_whole_image_goes_through_at_once_if_the_model_was_built_for_it(plain: Segmentor) -> None:
    x = images()
    assert torch.equal(scored(plain, x, window="whole"), asked(plain, x))
    with pytest.raises(
        DataError, match=r"shows whole images, here 64x96 \(H x W\), but `source-only` was built for 64x64"
    ) as caught:
        scored(plain, images(64, 96), window="whole")
    assert "dgbench protocols" in str(caught.value.hint)


class Loose(Segmentor):
    """Takes sides that are multiples of 8, and looks at the mean of all images of a batch."""

    any_size, size_step, mixes_batch, method, image_size = True, 8, True, "loose", SIZE

    def forward(self, images: Tensor) -> Tensor:
        self.check_size(images)
        return images.repeat(1, 7, 1, 1)[:, :19] - images.mean()


def test_a_whole_image_of_any_size_is_shown_to_a_model_that_takes_it() -> None:
    x = images(64, 96)
    alone = torch.cat([asked(Loose(), image) for image in x.split(1)])
    assert torch.equal(scored(Loose(), x, window="whole"), alone), "and one at a time, as it mixes them"
    assert torch.equal(scored(Loose(), x[:1], window="whole"), alone[:1])
    with pytest.raises(DataError, match=r"shows whole images, here 64x100 \(H x W\), but `loose` takes multiples of 8"):
        scored(Loose(), images(64, 100), window="whole")


def test_scores_are_brought_to_the_labels_grid(plain: Segmentor) -> None:
    x = images()
    assert torch.allclose(scored(plain, x, grid=(128, 150)), up(asked(plain, x), (128, 150)), atol=1e-6)


def test_a_mirrored_view_counts_as_much_as_the_other(plain: Segmentor) -> None:
    x = images()
    expected = (asked(plain, x).softmax(1) + asked(plain, x.flip(-1)).flip(-1).softmax(1)) / 2
    assert torch.allclose(scored(plain, x, flip=True), expected, atol=1e-6)


def test_scales_are_averaged_on_the_labels_grid(plain: Segmentor) -> None:
    x, larger = images(), images(96, 96)
    each = [up(scored(plain, view)).softmax(1) for view in (x, larger)]
    assert torch.allclose(scored(plain, x, larger, scales=(1.0, 1.5)), sum(each) / 2, atol=1e-6)

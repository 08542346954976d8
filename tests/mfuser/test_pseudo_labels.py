"""A teacher's labels, refined by segments, and the distortion of colours."""

from __future__ import annotations

import pytest
import torch

from mfuser.pseudo_labels import distorted, refined


def halves(left: int, right: int, size: int = 8) -> torch.Tensor:
    labels = torch.full((1, size, size), left)
    labels[:, :, size // 2 :] = right
    return labels


def test_a_component_takes_the_segment_that_its_points_fall_on() -> None:
    torch.manual_seed(0)
    labels, segments = halves(3, 8), torch.full((1, 8, 8), 255)
    segments[:, :6, :4] = 0
    segments[:, :, 4:] = 1
    found = refined(labels, segments, 10)
    assert (found[segments == 0] == 3).all()
    assert (found[segments == 1] == 8).all()
    assert (found[segments == 255] == 255).all(), "what no mask claims is ignored"


def test_a_segment_that_two_components_claim_is_ignored() -> None:
    labels = halves(3, 8)
    segments = torch.zeros(1, 8, 8, dtype=torch.long)
    assert (refined(labels, segments, 10) == 255).all()


def test_components_of_a_class_are_told_apart_by_four_neighbours() -> None:
    labels = torch.full((1, 8, 8), 10)
    labels[:, :4, :4] = labels[:, 4:, 4:] = 3  # they touch at a corner
    segments = torch.full((1, 8, 8), 255)
    segments[:, :4, :4], segments[:, 4:, 4:] = 1, 2
    found = refined(labels, segments, 10)
    # one component would have claimed one segment alone
    assert (found[0, :4, :4] == 3).all()
    assert (found[0, 4:, 4:] == 3).all()


@pytest.mark.parametrize("larger_than", [32, 64])
def test_an_image_without_a_large_component_keeps_its_labels(larger_than: int) -> None:
    labels = halves(3, 8)  # each of 32 pixels
    assert torch.equal(refined(labels, torch.zeros_like(labels), larger_than), labels)


def test_an_image_without_a_segment_keeps_its_labels() -> None:
    labels = halves(3, 8)
    assert torch.equal(refined(labels, torch.full_like(labels, 255), 10), labels)


def test_distorted_images_stay_images_and_grey_keeps_no_colour() -> None:
    torch.manual_seed(0)
    images = torch.rand(16, 3, 6, 6)
    found = distorted(images)
    assert found.shape == images.shape
    assert 0 <= found.min() <= found.max() <= 1
    assert 8 < sum(not torch.equal(a, b) for a, b in zip(found, images, strict=True)) <= 16
    grey = distorted(torch.rand(16, 1, 6, 6).expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey, grey[:, :1].expand(-1, 3, -1, -1), atol=1e-5, rtol=0)

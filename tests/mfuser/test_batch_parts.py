"""Parts of a batch one after the other: their mean gradient is the whole batch's, with the draws of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mfuser.decoder.criterion import MaskCriterion, alignment_loss, pixel_loss
from mfuser.decoder.deeplab import pixel_loss as loss_of_another_size
from mfuser.decoder.matching import Hungarian, Matcher, fixed
from mfuser.processes import PartError, divisor, even_rows, part_of


def labels_of(images: int = 4) -> Tensor:
    torch.manual_seed(3)
    labels = torch.randint(0, 19, (images, 4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[0, :20], labels[2] = 255, 255  # parts differ in what is labelled
    return labels


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(("matcher", "queries"), [(fixed, 19), (Hungarian(50), 25)], ids=["fixed", "Hungarian"])
def test_the_criterions_gradient_is_the_mean_of_its_parts(matcher: Matcher, queries: int, parts: int):
    labels, criterion = labels_of(), MaskCriterion(matcher=matcher, points=64)
    outputs = [(torch.randn(4, queries, 20).requires_grad_(), torch.randn(4, queries, 16, 16).requires_grad_()) for _ in range(2)]
    leaves = [tensor for pair in outputs for tensor in pair]
    torch.manual_seed(1)
    expected = torch.autograd.grad(torch.stack(list(criterion(outputs, labels).values())).sum(), leaves)
    every, found = labels.chunk(parts), [torch.zeros_like(leaf) for leaf in leaves]
    for index in range(parts):
        torch.manual_seed(1)
        with part_of(every, index):
            part = [tuple(tensor.chunk(parts)[index] for tensor in pair) for pair in outputs]
            loss = torch.stack(list(criterion(part, every[index]).values())).sum() / parts
        for total, own in zip(found, torch.autograd.grad(loss, leaves), strict=True):
            total += own
    for total, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "loss",
    [pixel_loss, alignment_loss, lambda x, y: alignment_loss(x, y, count_ignored=False)],
    ids=["pixels", "alignment", "alignment, labelled"],
)
def test_losses_of_pixels_are_the_mean_of_their_parts(loss):
    labels, logits = labels_of(), torch.randn(4, 19, 32, 32)
    every = labels.chunk(2)
    found = []
    for index, part in enumerate(logits.chunk(2)):
        with part_of(every, index):
            found.append(loss(part, every[index]) / 2)
    torch.testing.assert_close(sum(found), loss(logits, labels))


def test_draws_for_images_are_rows_of_the_whole_batchs():
    every = labels_of().chunk(2)
    torch.manual_seed(0)
    whole = torch.rand(4, 3)
    for index in range(2):
        torch.manual_seed(0)
        with part_of(every, index):
            assert torch.equal(even_rows(2).of(lambda rows: torch.rand(rows, 3)), whole[2 * index : 2 * index + 2])


def test_what_does_not_follow_from_the_batchs_labels_is_refused():
    every = labels_of().chunk(2)
    with part_of(every, 0), pytest.raises(PartError, match="needs the whole batch at once"):
        divisor(torch.tensor(3.0))
    with part_of(every, 0), pytest.raises(PartError):
        pixel_loss(torch.randn(2, 19, 32, 32), every[0].clone())  # labels of another origin, for all one knows
    with part_of(every, 0), pytest.raises(PartError):
        loss_of_another_size(torch.randn(2, 19, 8, 8), every[0])


def test_after_the_block_there_are_no_parts():
    every = labels_of().chunk(2)
    with part_of(every, 0):
        pass
    assert divisor(torch.tensor(3.0)) == 3

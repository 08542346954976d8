"""Tensors that are kept by size."""

from __future__ import annotations

import torch

from mfuser.by_size import by_size, handed_out
from mfuser.decoder.pixel_decoder import sine_encoding
from mfuser.deformable import cell_centres, extents

CPU = torch.device("cpu")


def test_a_size_is_made_once():
    made = []

    @by_size
    def ramp(length, *, device=None):
        made.append(length)
        return torch.arange(length, device=device)

    assert ramp(3, device=CPU) is ramp(3, device=CPU)
    assert ramp(4, device=CPU).tolist() == [0, 1, 2, 3]
    assert made == [3, 4]
    for length in range(200):
        ramp(length, device=CPU)
    before = len(made)
    ramp(3, device=CPU)
    assert len(made) == before + 1, "old sizes are forgotten"


def test_sizes_in_use_are_kept_the_longest():
    made = []

    @by_size
    def ramp(length, *, device=None):
        made.append(length)
        return torch.arange(length, device=device)

    for length in range(200):
        ramp(length, device=CPU)
        ramp(3, device=CPU)
    assert made.count(3) == 1


def test_what_is_asked_for_is_collected_once_made_or_found():
    with handed_out() as outer:
        first = sine_encoding(6, 7, 16, device=CPU)
        with handed_out() as inner:
            again = sine_encoding(6, 7, 16, device=CPU)
    sine_encoding(6, 8, 16, device=CPU)
    assert [id(each) for each in outer] == [id(first), id(again)]
    assert [id(each) for each in inner] == [id(first)]


def test_what_inference_made_can_be_trained_with():
    with torch.inference_mode():
        kept = sine_encoding(5, 7, 16, device=CPU)
    weight = torch.ones(16, requires_grad=True)
    (kept * weight).sum().backward()
    assert torch.equal(weight.grad, kept.sum(0))


def test_on_shapes_alone_nothing_is_kept():
    meta = torch.device("meta")
    assert sine_encoding(5, 7, 16, device=meta).is_meta
    assert cell_centres(5, 7, device=meta) is not cell_centres(5, 7, device=meta)


def test_extents_are_width_and_height_also_under_a_compiler():
    shapes = ((2, 3), (4, 5))
    assert extents(shapes, device=CPU).tolist() == [[3, 2], [5, 4]]
    compiled = torch.compile(lambda x: x + extents(shapes, device=CPU), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(2, 2)).tolist() == [[3, 2], [5, 4]]

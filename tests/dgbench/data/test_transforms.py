"""The training stream: the same sample for the same position, labels that stay with their pixels."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader

from dgbench.data.catalog import lookup
from dgbench.data.dataset import Sample, SegDataset
from dgbench.data.images import Part
from dgbench.data.photometric import mmsegmentation
from dgbench.data.sampling import Around, RareClassSampler, UniformSampler, Wanted
from dgbench.data.transforms import (
    Augmentation,
    StepBatches,
    TrainView,
    draw_window,
    resized,
    to_model,
)
from dgbench.data.workers import worker_init
from dgbench.errors import DataError
from dgbench.recipe.data import ResizeSpec

PLAIN = Augmentation(crop=(32, 32), scale=(1.0, 1.0), cat_max_ratio=1.0, flip=0.0, photometric="none")
FULL = Augmentation((32, 48), (0.5, 2.0), 0.75, 0.5)


def gradient(height: int = 64, width: int = 128) -> Sample:
    """An image whose red channel is twice its label: a wrong pairing of the two shows in any pixel."""
    label = np.add.outer(np.arange(height), np.arange(width)).astype(np.uint8) % 19
    image = np.repeat(2 * label[..., None], 3, axis=2)
    return Sample("gradient", image, label)


class Fixed:
    """Four times the gradient; the face of a SegDataset."""

    size = None

    def __init__(self, height: int = 64, width: int = 128) -> None:
        self.sample = gradient(height, width)

    def locate(self, index: int) -> tuple[Fixed, int]:
        return self, index

    def label(self, index: int) -> NDArray[np.uint8]:
        return self.sample.label

    def image(self, index: int, part: Part) -> NDArray[np.uint8]:
        return part.of(self.sample.image)

    def image_size(self, index: int) -> tuple[int, ...]:
        return self.sample.label.shape


def batches(start: int, workers: int, a: Augmentation = FULL) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of steps `start` up to 6, as the training loop makes them."""
    counts = np.ones((4, 19), np.int64)
    view = TrainView(Fixed(), RareClassSampler(counts, 0.1, 3, (64, 128)), a, 3)
    loader = DataLoader(view, batch_sampler=StepBatches(start, 6, 2), num_workers=workers, worker_init_fn=worker_init)
    return [(images, labels) for images, labels in loader]


def test_the_same_position_gives_the_same_sample_in_any_order():
    views = [TrainView(Fixed(), UniformSampler(4, 3), FULL, 3) for _ in range(2)]
    forward = [views[0][i] for i in range(6)]
    torch.manual_seed(99)
    backward = [views[1][i] for i in reversed(range(6))][::-1]
    for (x, y), (u, v) in zip(forward, backward, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
        assert x.shape == (3, 32, 48)
        assert x.dtype == y.dtype == torch.uint8
    assert not torch.equal(forward[0][0], forward[4][0])


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_and_any_start_give_the_same_batches(workers):
    alone = batches(0, 0)
    for start in (0, 3):
        for (x, y), (u, v) in zip(batches(start, workers), alone[start:], strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)


def test_a_batch_reaches_the_model_as_fractions_and_whole_numbers():
    [(images, labels), *_] = batches(5, 0)
    x, y = to_model(images, labels, torch.device("cpu"))
    assert torch.equal(x, images.to(torch.float32) / 255)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, labels.to(torch.int64))


def crop_of(sample: Sample, a: Augmentation, seed: int = 0, wanted: Wanted | None = None):
    """A crop's image and label as arrays, and its window."""
    window, size, label = draw_window(sample.label, a, np.random.default_rng(seed), wanted)
    return resized(window.of(sample.image), size, a.crop), label, window


def test_a_crop_at_scale_one_is_a_window_of_the_image():
    sample = gradient()
    image, label, window = crop_of(sample, PLAIN)
    assert np.array_equal(image[..., 0], 2 * label)
    assert np.array_equal(label, window.of(sample.label))
    assert (window.bottom - window.top, window.right - window.left) == (32, 32)


@pytest.mark.parametrize("seed", range(5))
def test_cropping_first_equals_resizing_first_but_at_the_border(seed):
    """At twice the size every window starts at a pixel of the resized image, too."""
    rng = np.random.default_rng(9)
    sample = Sample("noise", rng.integers(0, 256, (64, 128, 3), dtype=np.uint8), rng.integers(0, 19, (64, 128), dtype=np.uint8))
    image, label, window = crop_of(sample, Augmentation((32, 48), (2.0, 2.0), 1.0, 0.0, "none"), seed)
    doubled = Part(2 * window.top, 2 * window.left, 2 * window.bottom, 2 * window.right)
    whole = cv2.resize(sample.image, (256, 128), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(image[1:-1, 1:-1], doubled.of(whole)[1:-1, 1:-1])
    assert np.array_equal(label, doubled.of(cv2.resize(sample.label, (256, 128), interpolation=cv2.INTER_NEAREST)))


@pytest.mark.parametrize("scale", [0.5, 0.73, 1.9])
def test_a_window_covers_what_the_scale_says(scale):
    sample = gradient(200, 300)
    heights, tops = set(), set()
    for seed in range(50):
        _, _, window = crop_of(sample, Augmentation((64, 96), (scale, scale), 1.0, 0.0, "none"), seed)
        heights.add((window.bottom - window.top, window.right - window.left))
        tops.add(window.top)
        assert 0 <= window.top <= window.bottom <= 200
        assert 0 <= window.left <= window.right <= 300
    assert heights == {(round(64 / scale), round(96 / scale))}
    assert max(tops) > 0.8 * (200 - 64 / scale)
    assert min(tops) < 0.2 * (200 - 64 / scale)


def test_scales_are_drawn_evenly():
    sample = gradient(400, 400)
    windows = [crop_of(sample, Augmentation((64, 64), (0.5, 2.0), 1.0, 0.0, "none"), seed)[2] for seed in range(400)]
    scales = np.sort([64 / (w.bottom - w.top) for w in windows])
    assert scales == pytest.approx(np.linspace(0.5, 2.0, 400), abs=0.2)


def test_flipping_flips_image_and_label_together():
    view = TrainView(Fixed(), UniformSampler(4, 0), Augmentation((32, 32), (1.0, 1.0), 1.0, 1.0, "none"), 0)
    image, label = view[0]
    assert torch.equal(image[0], 2 * label)
    assert int(label[0, 1]) == (int(label[0, 0]) - 1) % 19  # the gradient falls after a flip


def test_a_window_beyond_the_image_is_padded_with_ignore():
    image, label, _ = crop_of(gradient(16, 16), PLAIN)
    assert label.shape == (32, 32)
    assert (label[16:] == 255).all()
    assert (label[:, 16:] == 255).all()
    assert (image[:, 16:] == 0).all()
    assert np.array_equal(image[:16, :16, 0], 2 * label[:16, :16])
    # at half the size, half as much of the crop is filled
    _, label, _ = crop_of(gradient(16, 16), Augmentation((32, 32), (0.5, 0.5), 1.0, 0.0, "none"))
    assert (label[:8, :8] != 255).all()
    assert (label != 255).sum() == 64


def test_resized_labels_hold_only_values_of_the_original():
    a = Augmentation((64, 64), (2.0, 2.0), 1.0, 0.0, "none")
    label = np.where(np.arange(64)[:, None] < 32, 0, 18).astype(np.uint8).repeat(64, 1)
    _, out, _ = crop_of(Sample("halves", np.zeros((64, 64, 3), np.uint8), label), a, 1)
    assert set(np.unique(out)) <= {0, 18}


def test_crops_avoid_a_dominating_class_when_they_can():
    label = np.zeros((64, 256), np.uint8)
    label[:, 200:] = np.arange(64)[:, None] % 10
    a = Augmentation((32, 32), (1.0, 1.0), 0.75, 0.0, "none")
    shares = [float((draw_window(label, a, np.random.default_rng(seed))[2] == 0).mean()) for seed in range(40)]
    assert np.mean([s < 0.75 for s in shares]) > 0.6  # 22 % of free windows qualify


def test_ignored_pixels_have_no_part_in_a_classs_share():
    label = np.full((64, 256), 255, np.uint8)
    label[:4] = np.arange(256) % 2  # half and half of what is labelled
    free, ruled = (Augmentation((64, 64), (1.0, 1.0), ratio, 0.0, "none") for ratio in (1.0, 0.75))
    for seed in range(20):
        windows = [draw_window(label, a, np.random.default_rng(seed))[0] for a in (free, ruled)]
        assert windows[0] == windows[1]  # the first place will do


def test_a_wanted_class_has_enough_pixels_in_the_crop_when_it_can():
    label = np.tile(np.arange(4, dtype=np.uint8), (64, 64))
    label[:16, :16] = 17
    a = Augmentation((24, 24), (0.5, 2.0), 1.0, 0.0, "none")

    def found(seed: int, wanted: Wanted | None) -> int:
        return int((draw_window(label, a, np.random.default_rng(seed), wanted)[2] == 17).sum())

    enough = sum(found(seed, Wanted(17, 20)) > 20 for seed in range(80))
    free = sum(found(seed, None) > 20 for seed in range(80))
    assert enough > 4 * max(free, 1)


def test_scales_are_drawn_anew_for_a_wanted_class():
    """A wanted class that only a large scale shows enough of: pixels are those of the crop, as in DAFormer."""
    label = np.tile(np.arange(4, dtype=np.uint8), (16, 16))
    label[:, 30:34] = 17
    a = Augmentation((32, 32), (0.5, 2.0), 1.0, 0.0, "none")
    scales = []
    for seed in range(60):
        window, _, crop = draw_window(label, a, np.random.default_rng(seed), Wanted(17, 160))
        if (crop == 17).sum() > 160:
            scales.append(32 / (window.right - window.left))
    assert len(scales) > 30
    assert min(scales) > 1.3


def test_processes_share_out_the_same_stream():
    alone = [i for batch in StepBatches(0, 3, 4) for i in batch]
    parts = [list(StepBatches(0, 3, 2, rank, 2)) for rank in range(2)]
    together = [i for step in zip(*parts, strict=True) for batch in step for i in batch]
    assert together == alone
    assert list(StepBatches(2, 3, 4)) == [alone[8:12]]


# ---- how the size is drawn


@pytest.mark.parametrize("shape", [(1052, 1914), (1914, 1052), (720, 1280), (333, 1001)])
@pytest.mark.parametrize("edge", [256, 307, 1024])
def test_a_short_edge_leads_to_the_size_of_detectron2s_rule(shape: tuple[int, int], edge: int) -> None:
    # ResizeShortestEdge, written out
    height, width = shape
    scale = edge / min(height, width)
    new = (edge, scale * width) if height < width else (scale * height, edge)
    if max(new) > 2048:
        new = tuple(side * 2048 / max(new) for side in new)
    expected = tuple(int(side + 0.5) for side in new)
    a = Augmentation((4096, 4096), (0.5, 2.0), 1.0, 0.0, "none", ResizeSpec(mode="short_edge", short_edge=edge, long_edge=2048))
    window, size, _ = draw_window(np.zeros(shape, np.uint8), a, np.random.default_rng(0))
    assert (window.bottom - window.top, window.right - window.left) == shape
    assert size == expected


def test_short_edges_are_drawn_from_a_list_or_a_range() -> None:
    rng, label = np.random.default_rng(0), np.zeros((100, 200), np.uint8)

    def edges(rule: ResizeSpec) -> set[int]:
        a = Augmentation((999, 999), (0.5, 2.0), 1.0, 0.0, "none", rule)
        return {draw_window(label, a, rng)[1][0] for _ in range(300)}

    assert edges(ResizeSpec(mode="short_edge", short_edge=(50, 75, 120))) == {50, 75, 120}
    assert edges(ResizeSpec(mode="short_edge", short_edge=(50, 60), sample="range")) == set(range(50, 61))


def test_a_fixed_size_gives_up_the_aspect_ratio() -> None:
    sample = gradient(60, 200)
    a = Augmentation((32, 32), (0.5, 2.0), 1.0, 0.0, "none", ResizeSpec(mode="fixed", size=(96, 64)))
    window, size, label = draw_window(sample.label, a, np.random.default_rng(0))
    assert (window.bottom - window.top, window.right - window.left) == (20, 100)  # 32 / (96/60), 32 / (64/200)
    assert size == (32, 32)
    assert label.shape == (32, 32)


def test_a_crop_around_a_place_holds_it_wherever_it_is() -> None:
    label = np.zeros((200, 300), np.uint8)
    a = Augmentation((64, 64), (0.5, 2.0), 1.0, 0.0, "none")
    for seed in range(200):
        rng = np.random.default_rng(seed)
        y, x = rng.uniform(0, 200), rng.uniform(0, 300)
        window, _, _ = draw_window(label, a, rng, Around(y, x))
        assert window.top <= int(y) < window.bottom
        assert window.left <= int(x) < window.right
        assert window.top >= 0
        assert window.right <= 300


def test_photometric_distortion_leaves_labels_and_the_global_generator_alone():
    view = TrainView(Fixed(), UniformSampler(4, 0), Augmentation((32, 32), (1.0, 1.0), 1.0, 0.0), 0)
    state = torch.get_rng_state()
    for i in range(4):
        _, label = view[i]
        assert label.max() < 19
    assert torch.equal(state, torch.get_rng_state())


def test_photometric_distortion_stays_within_its_ranges_and_never_swaps_channels():
    # hue turns by at most 36 degrees, so what is red stays reddest; grey has neither hue nor saturation to change
    red = np.full((4, 4, 3), (150, 60, 60), np.uint8)
    grey = np.full((4, 4, 3), 100, np.uint8)
    rng = np.random.default_rng(0)
    reds, greys = (np.stack([mmsegmentation(image, rng)[0, 0] for _ in range(400)]).astype(int) for image in (red, grey))
    assert (reds.argmax(1) == 0).all()
    assert (np.ptp(greys, 1) == 0).all()
    assert greys.min() >= (100 - 32) * 0.5 - 1
    assert greys.max() <= (100 + 32) * 1.5
    # brightness and contrast are each left alone in half of the draws
    assert (greys[:, 0] == 100).mean() == pytest.approx(0.25, abs=0.08)


def pair_of_files(root: Path, image: tuple[int, int], label: tuple[int, int]) -> Path:
    """A GTA5 of one image and one label of these sizes (H, W); left of column 20 is road, right of it sky."""
    for folder in ("images", "labels"):
        (root / "gta5" / folder).mkdir(parents=True)
    pixels = np.full((*image, 3), 200, np.uint8)
    pixels[:, : image[1] // 2] = 10
    ids = np.full(label, 23, np.uint8)
    ids[:, : label[1] // 2] = 7
    Image.fromarray(pixels).save(root / "gta5/images/00001.png")
    Image.fromarray(ids).save(root / "gta5/labels/00001.png")
    return root


@pytest.mark.parametrize(("image", "label"), [((40, 60), (40, 60)), ((40, 60), (36, 60)), ((36, 60), (40, 60))])
def test_a_label_with_a_few_rows_less_or_more_is_used_as_far_as_both_reach(image, label, tmp_path):
    dataset = SegDataset(lookup("gta5"), "train", root=pair_of_files(tmp_path, image, label))
    view = TrainView(dataset, UniformSampler(1, 0), Augmentation((40, 60), (1.0, 1.0), 1.0, 0.0, "none"), 0)
    pixels, labels = view[0]
    assert torch.equal(labels[:36], torch.where(pixels[0, :36] == 10, 0, 10).to(torch.uint8))
    if image != label:
        assert (labels[36:] == 255).all()


def test_a_pair_of_two_sizes_is_refused(tmp_path):
    dataset = SegDataset(lookup("gta5"), "train", root=pair_of_files(tmp_path, (40, 60), (80, 120)))
    with pytest.raises(DataError, match=r"images/00001.png is 40x60 \(H x W\), but its label is 80x120"):
        TrainView(dataset, UniformSampler(1, 0), PLAIN, 0)[0]


def test_files_brought_to_a_size_keep_their_labels_beside_them(tmp_path):
    dataset = SegDataset(lookup("gta5"), "train", root=pair_of_files(tmp_path, (80, 120), (80, 120)), size=(40, 60))
    view = TrainView(dataset, UniformSampler(1, 0), Augmentation((40, 60), (1.0, 1.0), 1.0, 0.0, "none"), 0)
    pixels, labels = view[0]
    assert torch.equal(labels, torch.where(pixels[0] < 100, 0, 10).to(torch.uint8))


def test_contact_sheet_has_image_overlay_and_legend(tmp_path):
    from dgbench.data.sheet import contact_sheet, save_image

    save_image(contact_sheet([gradient()] * 3, "gradients"), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 1200
        colors = {tuple(p) for p in np.asarray(sheet).reshape(-1, 3)}
    assert (0, 0, 142) in colors  # the legend's car

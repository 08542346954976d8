"""The training stream: the same sample for the same position, labels that stay with their pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dgbench.data.dataset import Sample
from dgbench.data.sampling import RareClassSampler, UniformSampler
from dgbench.data.transforms import Augmentation, StepBatches, TrainView, photometric, random_crop

PLAIN = Augmentation(crop=(32, 32), scale=(1.0, 1.0), cat_max_ratio=1.0, flip=0.0, photometric=False)


def gradient(height: int = 64, width: int = 128) -> Sample:
    """An image whose red channel is twice its label: a wrong pairing of the two shows in any pixel."""
    label = np.add.outer(np.arange(height), np.arange(width)).astype(np.uint8) % 19
    image = np.repeat(2 * label[..., None], 3, axis=2)
    return Sample("gradient", image, label)


class Fixed:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return gradient()


def test_the_same_position_gives_the_same_sample_in_any_order():
    a = Augmentation((32, 48), (0.5, 2.0), 0.75, 0.5, True)
    views = [TrainView(Fixed(), UniformSampler(4, 3), a, 3) for _ in range(2)]
    forward = [views[0][i] for i in range(6)]
    torch.manual_seed(99)
    backward = [views[1][i] for i in reversed(range(6))][::-1]
    for (x, y), (u, v) in zip(forward, backward, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
        assert x.shape == (3, 32, 48)
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64


def test_a_crop_at_scale_one_is_a_window_of_the_image():
    sample = gradient()
    image, label = random_crop(sample.image, sample.label, PLAIN, np.random.default_rng(0))
    assert torch.equal(image[0], 2 * label)


def test_flipping_flips_image_and_label_together():
    view = TrainView(Fixed(), UniformSampler(4, 0), Augmentation((32, 32), (1.0, 1.0), 1.0, 1.0, False), 0)
    image, label = view[0]
    assert torch.equal((image[0] * 255).round().long(), 2 * label)
    assert label[0, 1] == (label[0, 0] - 1) % 19  # the gradient falls after a flip


def test_a_window_beyond_the_image_is_padded_with_ignore():
    sample = gradient(16, 16)
    image, label = random_crop(sample.image, sample.label, PLAIN, np.random.default_rng(0))
    assert label.shape == (32, 32)
    assert (label[16:] == 255).all()
    assert (label[:, 16:] == 255).all()
    assert (image[:, 16:] == 0).all()


def test_resized_labels_hold_only_values_of_the_original():
    a = Augmentation((64, 64), (2.0, 2.0), 1.0, 0.0, False)
    label = np.where(np.arange(64)[:, None] < 32, 0, 18).astype(np.uint8).repeat(64, 1)
    sample = Sample("halves", np.zeros((64, 64, 3), np.uint8), label)
    _, out = random_crop(sample.image, sample.label, a, np.random.default_rng(1))
    assert set(out.unique().tolist()) <= {0, 18}


def test_crops_avoid_a_dominating_class_when_they_can():
    label = np.zeros((64, 256), np.uint8)
    label[:, 200:] = np.arange(64)[:, None] % 10
    a = Augmentation((32, 32), (1.0, 1.0), 0.75, 0.0, False)
    shares = []
    for seed in range(40):
        _, crop = random_crop(np.zeros((64, 256, 3), np.uint8), label, a, np.random.default_rng(seed))
        shares.append(float((crop == 0).float().mean()))
    assert np.mean([s < 0.75 for s in shares]) > 0.6  # 22 % of free windows qualify


def test_a_wanted_class_is_in_the_crop_when_it_can_be():
    label = np.tile(np.arange(4, dtype=np.uint8), (64, 64))
    label[:8, :8] = 17
    a = Augmentation((24, 24), (1.0, 1.0), 1.0, 0.0, False)
    hits = sum(
        bool((random_crop(np.zeros((64, 256, 3), np.uint8), label, a, np.random.default_rng(s), 17)[1] == 17).any())
        for s in range(60)
    )
    free = sum(
        bool((random_crop(np.zeros((64, 256, 3), np.uint8), label, a, np.random.default_rng(s))[1] == 17).any())
        for s in range(60)
    )
    assert hits > 3 * max(free, 1)


def test_uniform_sampling_shows_every_image_once_an_epoch():
    sampler = UniformSampler(7, seed=1)
    draws = [sampler.draw(i)[0] for i in range(21)]
    assert all(sorted(draws[e : e + 7]) == list(range(7)) for e in (0, 7, 14))
    assert draws[:7] != draws[7:14]


def test_rare_class_sampling_draws_classes_by_the_formula():
    counts = np.zeros((30, 19), np.int64)
    counts[:, 0] = 900
    counts[:3, 12] = 100  # a rare class in three images
    sampler = RareClassSampler(counts, temperature=0.1, seed=0)
    f = counts.sum(0) / counts.sum()
    weights = np.exp((1 - f[[0, 12]]) / 0.1)
    assert sampler.probability == pytest.approx(weights / weights.sum())
    drawn = [sampler.draw(i) for i in range(200)]
    assert all(image < 3 for image, c in drawn if c == 12)
    assert sum(c == 12 for _, c in drawn) > 190
    assert drawn[5] == RareClassSampler(counts, 0.1, 0).draw(5)


def test_processes_share_out_the_same_stream():
    alone = [i for batch in StepBatches(0, 3, 4) for i in batch]
    parts = [list(StepBatches(0, 3, 2, rank, 2)) for rank in range(2)]
    together = [i for step in zip(*parts, strict=True) for batch in step for i in batch]
    assert together == alone
    assert list(StepBatches(2, 3, 4)) == [alone[8:12]]


def test_photometric_distortion_leaves_labels_and_the_global_generator_alone():
    view = TrainView(Fixed(), UniformSampler(4, 0), Augmentation((32, 32), (1.0, 1.0), 1.0, 0.0, True), 0)
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
    reds, greys = (np.stack([photometric(image, rng)[0, 0] for _ in range(400)]).astype(int) for image in (red, grey))
    assert (reds.argmax(1) == 0).all()
    assert (np.ptp(greys, 1) == 0).all()
    assert greys.min() >= (100 - 32) * 0.5 - 1
    assert greys.max() <= (100 + 32) * 1.5
    # brightness and contrast are each left alone in half of the draws
    assert (greys[:, 0] == 100).mean() == pytest.approx(0.25, abs=0.08)


def test_contact_sheet_has_image_overlay_and_legend(tmp_path):
    from dgbench.data.sheet import contact_sheet, save_image

    save_image(contact_sheet([gradient()] * 3, "gradients"), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 1200
        colors = {tuple(p) for p in np.asarray(sheet).reshape(-1, 3)}
    assert (0, 0, 142) in colors  # the legend's car

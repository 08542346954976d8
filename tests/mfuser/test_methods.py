"""What every method keeps, whatever is in it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from streams import with_extras

import mfuser
from mfuser import methods, ops
from mfuser.segmentor import Batch

# of each method the smallest: its last row of BACKBONES
TINY = {name: methods.module(name).BACKBONES[-1] for name in mfuser.method_names()}


def build(name: str, size: tuple[int, int] = (64, 64)) -> mfuser.Segmentor:
    return mfuser.build(name, **TINY[name], image_size=size)


def batch(size: tuple[int, int] = (64, 64)) -> Batch:
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((2, *size), 255)
    labels[:, : size[0] // 2] = 0
    labels[0, size[0] // 2 :, : size[1] // 2] = 13
    images = torch.rand(2, 3, *size, generator=generator) * 0.1
    images[labels[:, None].expand(-1, 3, -1, -1) == 13] += 0.8
    return Batch(images, labels)


@dataclass
class Once:
    """Training data of one batch."""

    batch: Batch

    def batches(self, seed: int, *, augmented: bool = False) -> Iterator[Batch]:
        yield self.batch


def for_training(name: str) -> tuple[mfuser.Segmentor, Batch]:
    """A method's model as a training begins with it, and a batch with the streams that it declares."""
    model, given = build(name), batch()
    model.enter_training()
    with_extras(model, given)
    model.before_step(0, 6, Once(given))
    return model.train(), given


@pytest.fixture(params=mfuser.method_names())
def name(request):
    return request.param


def test_the_list_of_methods_is_the_folder():
    files = Path(mfuser.__file__).parent.joinpath("methods").glob("[!_]*.py")
    assert mfuser.method_names() == sorted(path.stem.replace("_", "-") for path in files)


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_images_become_scores_of_their_own_size(name, size):
    model = build(name, size).eval()
    with torch.no_grad():
        scores = model(torch.rand(2, 3, *size))
    assert scores.shape == (2, len(model.classes), *size)
    assert torch.isfinite(scores).all()


def test_an_image_is_scored_the_same_alone_and_in_a_batch(name):
    model = build(name).eval()
    if model.mixes_batch:
        pytest.skip("it declares that it mixes them")
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-5)


def test_a_few_steps_on_one_batch_lower_the_loss(name):
    torch.manual_seed(0)
    model, given = for_training(name)
    optimizer = torch.optim.AdamW(model.groups(2e-3, 0.01))
    values = []
    for _ in range(6):
        loss = torch.stack(list(model.loss(given).values())).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    assert values[-1] < 0.9 * values[0], values


def test_gradients_reach_every_trainable_parameter_and_no_other(name):
    model, given = for_training(name)
    terms = model.loss(given)
    assert all(term.dim() == 0 for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not without
    assert not frozen


def test_optimizer_groups_hold_each_trainable_parameter_once(name):
    model = build(name)
    groups = model.groups(1e-3, 0.05)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for n, p in model.named_parameters():
        if p.requires_grad and "norm" in n:
            assert decays[id(p)] == 0, n


def test_an_unlabelled_batch_gives_a_finite_loss(name):
    model, given = for_training(name)
    given.labels.fill_(255)
    torch.stack(list(model.loss(given).values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_other_sizes_are_refused_by_name(name):
    model = build(name).eval()
    if model.any_size:
        pytest.skip("it takes every size")
    with pytest.raises(ValueError, match=r"built for images of \(64, 64\) \(H, W\), got \(64, 96\); use mfuser.slide"):
        model(torch.rand(1, 3, 64, 96))


def test_the_operators_that_a_method_names_are_those_that_run(name):
    before = ops.tally()
    model, given = for_training(name)
    torch.stack(list(model.loss(given).values())).sum().backward()
    # an operator may be left to a composition of others
    assert set(ops.ran_since(before)) <= set(model.ops)
    assert bool(ops.ran_since(before)) == bool(model.ops)


def test_a_backend_that_cannot_run_is_told_before_it_is_used(name, monkeypatch):
    monkeypatch.setenv("MFUSER_BACKEND", "nonsense")
    model = build(name)
    if model.ops:
        with pytest.raises(ops.BackendError, match="has no backend `nonsense`"):
            model.check_backends()
    else:
        model.check_backends()


def test_the_package_lists_its_names_before_any_is_used():
    code = "import sys, mfuser; assert set(mfuser.__all__) <= set(dir(mfuser)); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"load", "build", "slide"} <= set(dir(mfuser))
    assert all(getattr(mfuser, name) is not None for name in mfuser.__all__)


def test_an_unknown_method_or_option_says_what_there_is():
    with pytest.raises(ValueError, match=f"unknown method `mfusr`; choose from {', '.join(TINY)}"):
        mfuser.build("mfusr")
    with pytest.raises(ValueError, match="has no option `depht`"):
        mfuser.build("mfuser", depht=3)
    with pytest.raises(ValueError, match="vlm `tinny` is unknown"):
        mfuser.build("mfuser", vlm="tinny")


def test_mfuser_names_its_losses_as_the_release_does():
    terms = build("mfuser").loss(batch())
    assert {"decode.loss_cls", "decode.loss_mask", "decode.loss_dice", "decode.d0.loss_cls", "scr_map.loss_seg"} <= set(terms)

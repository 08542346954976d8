"""The full-size model with weights by name against the authors' numbers: stages, scores, losses, gradients.

`-s` prints where each number stands to its limit and to the fp32 noise floor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from golden_files import VARIANTS, AuthorsWeights, description, numbers, relative_error
from named_weights import named_input, named_labels, sample_index, uniform01
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mfuser.authors import load_authors_checkpoint, release_of, sources_of, to_authors_state_dict
from mfuser.decoder.criterion import alignment_loss
from mfuser.decoder.mask_decoder import class_scores
from mfuser.inference import slide
from mfuser.methods import build

pytestmark = pytest.mark.full
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def image(name: str, shape: list[int]) -> Tensor:
    """The goldens name images as the authors normalise them; our model takes them in [0, 1]."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return torch.from_numpy(named_input(name, shape)) * std + mean


@contextmanager
def recorded(model) -> Iterator[dict[str, Tensor]]:
    """What passes between the model's parts, by the goldens' names."""
    seen: dict[str, Tensor] = {}
    handles = []

    def watch(module, note) -> None:
        handles.append(module.register_forward_hook(lambda _, given, out: note(given, out)))

    def tokens(name, tower) -> None:
        embed = tower.embed
        tower.embed = lambda images: seen.setdefault(name, embed(images))
        handles.append(type("Restore", (), {"remove": lambda _: vars(tower).pop("embed")})())

    tokens("tokens/dino_in", model.vfm)
    tokens("tokens/vlm_in", model.vlm)
    for i, fuser in enumerate(model.adapters):
        watch(
            fuser,
            lambda given, out, i=i: seen.update({f"adapter/{i}/in": torch.cat(given, 1), f"adapter/{i}/out": torch.cat(out, 1)}),
        )
    watch(model.fpn1, lambda given, out: seen.update({"feat/0/before_fpn": given[0]}))
    watch(model.fpn2, lambda given, out: seen.update({"feat/1/before_fpn": given[0]}))
    watch(
        model.embedding,
        lambda given, out: seen.update({"embed/global": out[0], "embed/visual": out[1].mT.unflatten(2, model.vlm.grid)}),
    )
    watch(model.text, lambda given, out: seen.update({"text/raw": out}))
    watch(model.context_decoder, lambda given, out: seen.update({"text/context_in_visual": given[1], "text/context_out": out}))
    watch(
        model.pixel_decoder,
        lambda given, out: seen.update(
            {f"feat/{i}/after_fpn": m for i, m in enumerate(given[0])}
            | {"text/final": given[1], "pixel/mask_feature": out[0]}
            | {f"pixel/ms/{i}": m for i, m in enumerate(out[1])}
        ),
    )
    yield seen
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module", params=["clip", "eva", "siglip"])
def loaded(request):
    layout = description(f"layout_{request.param}")
    model = build("mfuser", vlm=VARIANTS[request.param], vfm="dinov2_l", token_ids=layout["tokens"], weights="meta").eval()
    report = load_authors_checkpoint(model, AuthorsWeights(request.param))
    if request.param == "siglip":  # the release keeps them outside its checkpoints; the goldens were recorded with these
        model.logit_scale.fill_(math.exp(3))
        model.logit_bias.fill_(-10)
    return request.param, model, report


def stages(model, images: Tensor) -> dict[str, Tensor]:
    """Every recorded stage of a forward pass."""
    with torch.no_grad(), recorded(model) as seen:
        outputs, score_map = model.training_outputs(images)
        seen["score_map"] = score_map
        for i, (classes, masks) in enumerate(outputs):
            seen |= {f"head/cls/{i}": classes, f"head/mask/{i}": masks}
        seen["out/logits_quarter"] = class_scores(*outputs[-1])
    return seen


def check_stages(variant: str, seen: dict[str, Tensor], file: str, device: str = "cpu") -> None:
    goldens, floor = numbers(file), description(f"noise_{variant}")["stages"]
    errors = {name: relative_error(goldens, name, value) for name, value in seen.items() if name in goldens}
    # equal to after_fpn there, or the pooling's input
    assert set(goldens) - set(errors) <= {"feat/2/before_fpn", "feat/3/before_fpn", "out/logits", "out/argmax"}
    worst = max(errors, key=lambda name: errors[name])
    print(f"{file} {device}: worst {errors[worst]:.1e} at {worst}, noise there {floor.get(worst, {}).get('rel_l2', 0):.1e}")
    # with these weights SigLIP's 24 text layers amplify rounding, and on a GPU what they feed as well
    loose = set() if variant != "siglip" else {"text/raw"} if device == "cpu" else set(errors)
    assert not {name: e for name, e in errors.items() if not e < (3e-4 if name in loose else 1e-4)}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_stage_of_a_forward_equals_the_authors(loaded, device, monkeypatch):
    variant, model, _ = loaded
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the numbers are fp32's
    given = description(f"forward_{variant}")["input"]
    check_stages(variant, stages(model.to(device), image(given["name"], given["shape"]).to(device)), f"forward_{variant}", device)
    model.to("cpu")


@pytest.fixture(scope="module")
def two_images(loaded):
    """Every stage for the two images that the losses are taken of."""
    variant, model, _ = loaded
    given = description(f"loss_{variant}")["input"]
    return stages(model, image(given["name"], given["shape"]))


def test_a_batch_of_two_equals_the_authors(loaded, two_images):
    variant, _, _ = loaded
    if variant == "eva":
        check_stages(variant, two_images, "forward_eva_batch2")
    goldens = numbers(f"loss_{variant}")
    assert not {n: e for n in two_images if n in goldens and (e := relative_error(goldens, n, two_images[n])) > 1e-4}


def test_sliding_window_scores_equal_the_authors(loaded):
    variant, model, _ = loaded
    goldens, given = numbers(f"slide_{variant}"), description(f"slide_{variant}")
    images = image(given["input"]["name"], given["input"]["shape"])
    with torch.no_grad():
        scores = slide(model, images, tuple(given["crop"]), tuple(given["stride"]), windows_at_once=2)
    errors = {
        "slide/logits": relative_error(goldens, "slide/logits", scores),
        "slide/softmax_of_logits": relative_error(goldens, "slide/softmax_of_logits", scores.softmax(1)),
    }
    print(variant, errors)
    assert max(errors.values()) < 1e-4


def fixed(output: int, kind: str, shape: tuple[int, int, int], like: Tensor) -> Tensor:
    return torch.from_numpy(uniform01(f"rand/{output}/{kind}", shape)).float().reshape(shape)


def test_losses_and_their_gradients_equal_the_authors(loaded, two_images):
    variant, model, _ = loaded
    goldens, expected = numbers(f"loss_{variant}"), description(f"loss_{variant}")
    labels = torch.from_numpy(named_labels(expected["labels"]["name"], expected["labels"]["shape"])).long()
    leaves = {n: v.clone().requires_grad_() for n, v in two_images.items() if n.startswith("head/") or n == "score_map"}
    outputs = [(leaves[f"head/cls/{i}"], leaves[f"head/mask/{i}"]) for i in range(10)]
    logits = (leaves["score_map"] * model.logit_scale + model.logit_bias).detach().requires_grad_()
    terms = {name.removeprefix("decode."): value for name, value in model.criterion(outputs, labels, draw=fixed).items()}
    aligned = alignment_loss(logits, labels)
    errors = {n: abs(float(v.detach()) / expected["decode_fixed_points"][n] - 1) for n, v in terms.items()}
    errors["alignment"] = abs(float(aligned.detach()) / expected["identity_head"]["loss_seg"] - 1)
    assert len(errors) == len(expected["decode_fixed_points"]) + 1
    (sum(terms.values()) + aligned).backward()
    grads = {f"fixed/grad_cls/{i}": c.grad for i, (c, _) in enumerate(outputs)}
    grads |= {f"fixed/grad_mask/{i}": m.grad for i, (_, m) in enumerate(outputs)}
    grads["fixed/grad_score_logits"] = logits.grad
    assert {n for n in goldens if n.startswith("fixed/")} == set(grads)
    errors |= {name: relative_error(goldens, name, value) for name, value in grads.items()}
    worst = max(errors, key=lambda name: errors[name])
    print(f"loss_{variant}: worst {errors[worst]:.1e} at {worst}")
    # of 9408 points chosen as least certain, the last few are others after rounding: losses hardly notice, and the
    # gradient of a mask has it at two other places (on given logits it is equal, see test_decoder.py)
    assert not {n: e for n, e in errors.items() if e > (3e-2 if "grad_mask" in n else 1e-4)}


def test_losses_over_seeds_are_distributed_as_the_authors(loaded, two_images):
    variant, model, _ = loaded
    expected = description(f"loss_{variant}")
    labels = torch.from_numpy(named_labels(expected["labels"]["name"], expected["labels"]["shape"])).long()
    outputs = [(two_images[f"head/cls/{i}"], two_images[f"head/mask/{i}"]) for i in range(10)]
    runs = []
    for seed in range(5):
        torch.manual_seed(seed)
        runs.append({n.removeprefix("decode."): float(v) for n, v in model.criterion(outputs, labels).items()})
    for name, theirs in expected["decode_over_5_seeds"].items():
        ours = sum(run[name] for run in runs) / len(runs)
        assert abs(ours - theirs["mean"]) <= 3 * theirs["std"] + 1e-4 * theirs["mean"], name


def test_gradients_of_every_trained_parameter_equal_the_authors(loaded, monkeypatch):
    variant, model, _ = loaded
    goldens, expected = numbers(f"grad_{variant}"), description(f"grad_{variant}")
    floor = description("noise_grad_eva")["per_parameter"]
    # blocks are computed again in the backward: the same numbers in half the memory
    for owner, name in ((model.vfm, "block"), (model.vlm, "block"), *((fuser, "forward") for fuser in model.adapters)):
        monkeypatch.setattr(owner, name, partial(checkpoint, getattr(owner, name), use_reentrant=False))
    model.zero_grad()
    outputs, score_map = model.training_outputs(image(expected["input"]["name"], expected["input"]["shape"]))
    logits = F.interpolate(class_scores(*outputs[-1]), model.image_size, mode="bilinear", align_corners=False)
    parts = [
        (value * torch.from_numpy(named_input(expected[probe]["name"], expected[probe]["shape"], "noise"))).sum()
        for value, probe in ((logits, "probe_logits"), (score_map, "probe_score"))
    ]
    sum(parts).backward()
    assert [float(p.detach()) for p in parts] == pytest.approx(
        expected["scalar_parts"], rel=1e-3
    )  # of two sums that nearly cancel

    names = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in names.values())
    theirs = {}
    for name, source in sources_of(model, release_of(model), names).items():
        theirs |= source.write(names[name])
    assert set(theirs) == set(expected["l2"]) - set(expected["no_gradient"])
    norms, samples = {}, {}
    for key, grad in theirs.items():
        norm, flat = expected["l2"][key], grad.flatten()
        taken = flat[torch.from_numpy(sample_index(key, flat.numel(), 16))]
        norms[key] = abs(float(grad.norm()) / norm - 1)
        samples[key] = float((taken - goldens[key].flatten()).norm()) / norm
    for kind, errors in (("l2_rel", norms), ("samples_rel", samples)):
        ordered = sorted(errors.values())
        beyond = {key: e for key, e in errors.items() if e > max(1e-3, floor.get(key, {}).get(kind, 0))}
        print(
            f"grad_{variant} {kind}: median {ordered[len(ordered) // 2]:.1e}, 95 % {ordered[len(ordered) * 95 // 100]:.1e}, "
            f"worst {ordered[-1]:.1e} at {max(errors, key=lambda key: errors[key])}, "
            f"{len(beyond)} of {len(errors)} beyond 1e-3 and the noise"
        )
        # The goldens' own rounding is what is left, see docs/mfuser.md. A fuser's `scale` is a sum that nearly cancels.
        assert len(beyond) < (0.3 if variant == "siglip" else 0.15) * len(errors)
        assert ordered[len(ordered) * 95 // 100] < (5e-3 if variant == "siglip" else 2.5e-3)
        assert not {key: e for key, e in beyond.items() if e > (0.3 if key.endswith(".scale") else 2e-2)}
    model.zero_grad()


def test_the_authors_format_is_written_key_for_key(loaded):
    variant, model, report = loaded
    written, given = to_authors_state_dict(model), AuthorsWeights(variant)
    assert set(written) == set(report.used)
    for key, value in written.items():
        if given.keys_of[key]["named"]:
            assert torch.equal(value, given[key]), key
        assert list(value.shape) == given.keys_of[key]["shape"], key

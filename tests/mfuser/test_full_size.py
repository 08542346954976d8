"""The full-size model with weights by name against the authors' numbers, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from golden_files import VARIANTS, AuthorsWeights, description, numbers, relative_error
from named_weights import named_input
from torch import Tensor

from mfuser.checkpoints import load_authors_checkpoint, to_authors_state_dict
from mfuser.decoder.mask_decoder import class_scores
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
    watch(model.embedding, lambda given, out: seen.update(
        {"embed/global": out[0], "embed/visual": out[1].mT.unflatten(2, model.vlm.grid)}
    ))  # fmt: skip
    watch(model.text, lambda given, out: seen.update({"text/raw": out}))
    watch(model.context_decoder, lambda given, out: seen.update(
        {"text/context_in_visual": given[1], "text/context_out": out}
    ))  # fmt: skip
    watch(model.pixel_decoder, lambda given, out: seen.update(
        {f"feat/{i}/after_fpn": m for i, m in enumerate(given[0])}
        | {"text/final": given[1], "pixel/mask_feature": out[0]}
        | {f"pixel/ms/{i}": m for i, m in enumerate(out[1])}
    ))  # fmt: skip
    yield seen
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def loaded(request):
    layout = description(f"layout_{request.param}")
    model = build(
        "mfuser", vlm=VARIANTS[request.param], vfm="dinov2_l", token_ids=layout["tokens"], pretrained=False, filled=False
    ).eval()
    report = load_authors_checkpoint(model, AuthorsWeights(request.param))
    return request.param, model, report


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_stage_of_a_forward_equals_the_authors(loaded, device, monkeypatch):
    variant, model, _ = loaded
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the numbers are fp32's
    model.to(device)
    goldens, given = numbers(f"forward_{variant}"), description(f"forward_{variant}")["input"]
    with torch.no_grad(), recorded(model) as seen:
        outputs, score_map = model._decode(image(given["name"], given["shape"]).to(device))
        seen["score_map"] = score_map
        for i, (classes, masks) in enumerate(outputs):
            seen |= {f"head/cls/{i}": classes, f"head/mask/{i}": masks}
        seen["out/logits_quarter"] = class_scores(*outputs[-1])
    errors = {name: relative_error(goldens, name, value) for name, value in seen.items() if name in goldens}
    stages = {name for name in goldens if "#" not in name and name not in ("out/logits", "out/argmax")}
    # equal to after_fpn there, or the pooling's input
    assert stages - set(errors) <= {"feat/2/before_fpn", "feat/3/before_fpn"}
    # with these weights SigLIP's 24 text layers amplify rounding, and on a GPU what they feed as well
    siglip = {"text/raw": 3e-4} if device == "cpu" else dict.fromkeys(errors, 3e-4)
    limit = siglip if variant == "siglip" else {}
    wrong = {name: e for name, e in errors.items() if not e < limit.get(name, 1e-4)}
    assert not wrong


def test_the_authors_format_is_written_key_for_key(loaded):
    _, model, report = loaded
    written = to_authors_state_dict(model)
    assert set(written) == set(report.used)

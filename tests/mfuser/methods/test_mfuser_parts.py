"""MFuser with a part left out: what is built, what is trained, what is named, and that the default is as before."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import mfuser
from dgbench.cost.profile import profile, subjects
from dgbench.progress import Silent
from dgbench.recipe import dump, load_recipe, recipe_hash
from mfuser.decoder.mtenhancer import MTEnhancer, MTEnhancerLayer
from mfuser.fusion import FUSERS, Site
from mfuser.segmentor import Batch, Segmentor

TINY = {"vfm": "tiny", "vlm": "tiny", "patch": 16, "image_size": (64, 64)}
PARTS = (
    {"fuser": "mvfuser_no_gate"},
    {"fuser": "none"},
    {"enhancer": "none"},
    {"enhancer": "single_copy"},
    {"image_tower": "vfm"},
    {"image_tower": "vlm"},
    {"image_tower": "vlm", "fuser": "none", "enhancer": "none"},
)


def tiny(**options: object) -> Segmentor:
    torch.manual_seed(0)
    return mfuser.build("mfuser", weights="random", **{**TINY, **options})


@pytest.fixture(params=PARTS, ids=lambda given: "-".join(f"{key}={value}" for key, value in given.items()))
def part(request: pytest.FixtureRequest) -> dict[str, str]:
    found: dict[str, str] = request.param
    return found


def test_all_that_is_trained_gets_a_gradient(part: dict[str, str]) -> None:
    model = tiny(**part).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(1.0)
    labels = torch.arange(2 * 64 * 64).reshape(2, 64, 64) % 19
    sum(model.loss(Batch(torch.rand(2, 3, 64, 64), labels)).values()).backward()
    still = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())}
    # without an embedding that reads its last norm, and biases of keys, which no softmax sees
    assert not {name for name in still if "k_proj" not in name and "in_proj_bias" not in name}


def test_the_image_decides_the_scores(part: dict[str, str]) -> None:
    model = tiny(**part)
    with torch.no_grad():
        one, other = model(torch.rand(1, 3, 64, 64)), model(torch.rand(1, 3, 64, 64))
    assert one.shape == (1, 19, 64, 64)
    assert not torch.equal(one, other)


def test_the_recipe_names_the_part_and_reads_back(part: dict[str, str], tmp_path) -> None:
    recipe = load_recipe("streets/smoke", [f"method.{key}={value}" for key, value in part.items()])
    assert recipe_hash(recipe) != recipe_hash(load_recipe("streets/smoke"))
    again = load_recipe(dump(recipe, tmp_path / "copy.yaml"))
    assert again.method == recipe.method
    assert recipe.method.variant != load_recipe("streets/smoke").method.variant


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"enhancer": "none"}, "tiny + tiny, enhancer none"),
        ({"fuser": "mvfuser_no_gate"}, "tiny + tiny, mvfuser_no_gate"),
        ({"image_tower": "vfm"}, "tiny + tiny, image tower vfm"),
        ({"image_tower": "vlm"}, "tiny, image tower vlm"),
        ({"fuser": "none"}, "tiny + tiny, fuser none"),
    ],
)
def test_records_name_what_is_not_the_default(given: dict[str, str], named: str) -> None:
    recipe = load_recipe("streets/mfuser-scratch", [f"method.{key}={value}" for key, value in given.items()])
    assert recipe.method.variant == named


def test_a_recipe_without_new_options_is_written_as_before(tmp_path) -> None:
    text = dump(load_recipe("streets/mfuser-scratch"), tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    assert "enhancer" not in text
    assert "image_tower" not in text


def test_full_size_counts_differ_by_the_part_alone() -> None:
    def trained(**options: str) -> int:
        ids = [[0] * 5 for _ in range(19)]
        model = mfuser.build("mfuser", vlm="eva02", weights="meta", token_ids=ids, **options)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    whole = trained()
    # half the projection, a convolution of width 3
    assert whole - trained(fuser="mvfuser_no_gate") == 24 * (512 * 1024 + 512 * 3)
    assert whole - trained(fuser="none") == 24 * 1_667_585
    with torch.device("meta"):
        enhancer = sum(p.numel() for p in MTEnhancer(768).parameters())
    assert whole - trained(enhancer="none") == enhancer + 768  # gamma
    assert whole == trained(enhancer="single_copy")


@pytest.mark.parametrize(("one", "absent"), [("vfm", "vlm.trunk."), ("vlm", "vfm.trunk.")])
def test_one_tower_alone_has_none_of_the_other(one: str, absent: str) -> None:
    names = tiny(image_tower=one).state_dict()
    assert not [name for name in names if name.startswith(absent)]
    assert [name for name in names if name.startswith(f"{one}.trunk.")]
    assert [name for name in names if name.startswith("text.tower.")]


def test_a_tower_that_is_left_out_needs_no_weights(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(mfuser.WeightsNotFound) as both:
        mfuser.build("mfuser", vlm="eva02", token_ids=[[0] * 5] * 19)
    with pytest.raises(mfuser.WeightsNotFound) as one:
        mfuser.build("mfuser", vlm="eva02", image_tower="vlm", token_ids=[[0] * 5] * 19)
    assert "dinov2" in f"{both.value} {both.value.hint}"
    assert "dinov2" not in f"{one.value} {one.value.hint}"


@pytest.mark.parametrize("vlm", ["eva02", "clip", "siglip"])
@pytest.mark.parametrize("one", ["vfm", "vlm"])
def test_one_tower_alone_runs_with_every_kind_of_text(vlm: str, one: str) -> None:
    ids = [[0] * 5 for _ in range(19)]
    model = mfuser.build(
        "mfuser", vlm=vlm, weights="meta", token_ids=ids, image_tower=one, image_size=(224, 224), backend="torch"
    ).to("meta")
    assert model(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 19, 224, 224)


def test_attention_apart_needs_two_towers() -> None:
    with pytest.raises(ValueError, match="`selfattn_separate` needs two image towers; choose mvfuser or none"):
        tiny(image_tower="vlm", fuser="selfattn_separate")


def test_without_its_gate_mvfuser_is_scan_norm_and_projection() -> None:
    torch.manual_seed(0)
    fuser = FUSERS["mvfuser_no_gate"](Site(32, (2, 3), (1, 1), state=4, backend="torch")).eval()
    joint = torch.randn(2, 9, 32)
    with torch.no_grad():
        fuser.scale.fill_(1.0)
        x = F.silu(F.conv1d((joint @ fuser.in_proj.weight.T).mT, fuser.conv1d_x.weight, padding=1, groups=16)).mT
        steps, B, C = (x @ fuser.x_proj.weight.T).split([2, 4, 4], -1)
        delta = F.softplus(steps @ fuser.dt_proj.weight.T + 2 * fuser.dt_proj.bias)
        state, rows = torch.zeros(2, 16, 4), []
        for i in range(9):  # the recurrence as it is written down
            decay = (delta[:, i, :, None] * -fuser.A_log.exp()).exp()
            state = decay * state + (delta[:, i] * x[:, i])[..., None] * B[:, i, None]
            rows.append((state * C[:, i, None]).sum(-1) + fuser.D * x[:, i])
        expected = F.rms_norm(torch.stack(rows, 1), (16,), fuser.norm.weight, 1e-5) @ fuser.out_proj.weight.T
        torch.testing.assert_close(fuser.mix(joint), expected, rtol=1e-4, atol=1e-5)


def test_without_its_copy_the_enhancer_scans_the_texts_behind_the_image_alone() -> None:
    torch.manual_seed(0)
    layer = MTEnhancerLayer(32, 2, 4, 0.0, "torch", copied=False).eval()
    text, memory = torch.randn(1, 19, 32), torch.randn(1, 7, 32)
    with torch.no_grad():
        layer.cross_attn.scale.fill_(1.0)
        attended = text + layer.self_attn(layer.norm1(text))
        seen = attended + layer.cross_attn.mix(torch.cat([memory, layer.norm2(attended)], 1))[:, 7:]
        torch.testing.assert_close(layer(text, memory), seen + layer.mlp(layer.norm3(seen)))


@pytest.mark.parametrize("part", [PARTS[2], PARTS[4], PARTS[6]], ids=str)
def test_what_is_left_is_counted(part: dict[str, str]) -> None:
    settings = [f"method.{key}={value}" for key, value in part.items()]
    (row,) = profile(subjects(["streets/mfuser-scratch"], settings=settings, size=(64, 64)), Silent(), timed=False).rows
    assert row.trainable == sum(p.numel() for p in tiny(**part).parameters() if p.requires_grad)

"""tqdm's checkpoints: every name of the authors' is used or known to be dead, and a file in their form becomes a run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_files import description
from torch import Tensor
from typer.testing import CliRunner

import mfuser
from dgbench import cli
from mfuser.authors import load_authors_checkpoint, recognise, to_authors_state_dict
from mfuser.towers.meta import unfilled
from mfuser.towers.table import TOWERS, TextTower

SHAPES = dict[str, tuple[int, ...]]


def linear(name: str, out: int, into: int) -> SHAPES:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> SHAPES:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def context_decoder(width: int) -> SHAPES:
    shapes = norm("memory_proj.0", width) | linear("memory_proj.1", 256, width) | norm("memory_proj.2", 256)
    shapes |= norm("text_proj.0", width) | linear("text_proj.1", 256, width)
    for i in range(3):
        for attention in (f"decoder.{i}.self_attn", f"decoder.{i}.cross_attn"):
            shapes |= {f"{attention}.{part}_proj.weight": (256, 256) for part in "qkv"} | linear(f"{attention}.proj", 256, 256)
        shapes |= {key: shape for k in (1, 2, 3) for key, shape in norm(f"decoder.{i}.norm{k}", 256).items()}
        shapes |= linear(f"decoder.{i}.mlp.0", 1024, 256) | linear(f"decoder.{i}.mlp.3", 256, 1024)
    shapes |= norm("out_proj.0", 256) | linear("out_proj.1", width, 256)
    return {f"context_decoder.{key}": shape for key, shape in shapes.items()}


def clip_blocks(prefix: str, width: int) -> SHAPES:
    shapes: SHAPES = {}
    for i in range(12):
        block = f"{prefix}.transformer.resblocks.{i}"
        shapes |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width) | linear(f"{block}.attn.out_proj", width, width)
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= linear(f"{block}.mlp.c_fc", 4 * width, width) | linear(f"{block}.mlp.c_proj", width, 4 * width)
    return shapes


def neck_and_head(width: int, text: int) -> SHAPES:
    """Those of MFuser's recorded layout, which has the same head, for maps of another width and texts of another."""
    found = {}
    for key, row in description("layout_eva")["keys"].items():
        if key.startswith("backbone.fpn"):
            found[key] = tuple(width if side == 2048 else side for side in row["shape"])
        if key.startswith("decode_head."):
            wide = {2048: width} if re.search(r"(input|lateral)_convs\.\d\.conv\.weight$", key) else {}
            wide |= {768: text} if key in ("decode_head.text_proj.0.weight", "decode_head.pixel_decoder.text_proj.weight") else {}
            found[key] = tuple(wide.get(side, side) for side in row["shape"])
    return found


def layout(vlm: str) -> SHAPES:
    """Names and shapes of the authors' checkpoint."""
    if vlm == "eva02":
        tower = re.compile(r"(backbone\.(?!dinov2|adapter|fpn)|text_encoder\.)")
        shapes = {key: tuple(row["shape"]) for key, row in description("layout_eva")["keys"].items() if tower.match(key)}
        shapes |= neck_and_head(1024, 768) | context_decoder(768) | {"contexts": (1, 8, 768), "gamma": (768,)}
    else:
        shapes = clip_blocks("backbone", 768) | clip_blocks("text_encoder", 512)
        shapes |= {"backbone.class_embedding": (768,), "backbone.positional_embedding": (1025, 768)}
        shapes |= {"backbone.conv1.weight": (768, 3, 16, 16), "backbone.proj": (768, 512)}
        shapes |= norm("backbone.ln_pre", 768) | norm("backbone.ln_post", 768) | norm("text_encoder.ln_final", 512)
        shapes |= {"text_encoder.token_embedding.weight": (49408, 512), "text_encoder.positional_embedding": (10, 512)}
        shapes |= {"text_encoder.text_projection": (512, 512)}
        shapes |= neck_and_head(768, 512) | context_decoder(512) | {"contexts": (1, 5, 512), "gamma": (512,)}
    return shapes | {f"reg_E0.{key[9:]}": shape for key, shape in shapes.items() if key.startswith("backbone.")}


def is_dead(key: str) -> bool:
    return key.startswith("reg_E0.") or key.endswith(("freqs_cos", "freqs_sin"))


@pytest.mark.parametrize("vlm", ["eva02", "clip_b"])
def test_every_name_of_the_authors_is_used_or_dead_and_every_shape_fits(vlm):
    state = {key: torch.empty(shape, device="meta") for key, shape in layout(vlm).items()}
    ((method, release),) = recognise(state)
    assert (method, release.options["vlm"], release.recipe) == ("tqdm", vlm, f"tqdm/{vlm}-gta")
    with unfilled():
        model = mfuser.build("tqdm", vlm=vlm, weights="meta")
    report = load_authors_checkpoint(model, state)
    assert set(report.used) == {key for key in state if not is_dead(key)}
    assert set(report.dead) == {key for key in state if is_dead(key)}
    written = to_authors_state_dict(model)
    assert {key: tuple(value.shape) for key, value in written.items()} == {
        key: shape for key, shape in layout(vlm).items() if not is_dead(key)
    }


def test_weights_of_the_release_are_refused_by_the_other_variant():
    with unfilled():
        model = mfuser.build("tqdm", vlm="eva02", variant="sane", weights="meta")
    with pytest.raises(ValueError, match="the authors' weights are those of variant `release`, not of `sane`"):
        to_authors_state_dict(model)


RECIPE = """
method: {name: tqdm, vlm: eva02, decoder_dim: 64, heads: 4, pixel_layers: 1, mask_layers: 2, ffn_dim: 64, points: 2, groups: 8,
         context_dim: 32, mask_points: 64}
data: {source: gta5, targets: [cityscapes], crop: [64, 64]}
train: {steps: 20, batch_size: 2}
optim: {lr: 1.0e-5}
"""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """EVA02-CLIP's tower of three narrow blocks, with the tiny text tower."""
    options = {"embed_dim": 64, "depth": 3, "num_heads": 2}
    text = TextTower(None, 8, "EVA02-L-14-336", "sum")
    monkeypatch.setitem(TOWERS, "eva02", replace(TOWERS["eva02"], options=options, width=64, depth=3, text=text))


def test_a_file_in_the_authors_form_becomes_a_run_that_scores_as_the_model_did(small: None, tmp_path: Path) -> None:
    (tmp_path / "made.yaml").write_text(RECIPE)
    sizes = {"decoder_dim": 64, "heads": 4, "pixel_layers": 1, "mask_layers": 2, "ffn_dim": 64, "points": 2, "groups": 8}
    torch.manual_seed(0)
    model = mfuser.build("tqdm", **sizes, context_dim=32, mask_points=64, image_size=(64, 64), weights="random")
    theirs: dict[str, Tensor] = to_authors_state_dict(model)
    assert theirs.keys() <= layout("eva02").keys()
    theirs |= {f"reg_E0.{key[9:]}": value + 1 for key, value in theirs.items() if key.startswith("backbone.")}
    theirs |= {f"backbone.{place}rope.freqs_cos": torch.zeros(16, 32) for place in ("", "blocks.0.attn.")}
    file = tmp_path / "tqdm.pth"
    torch.save({"meta": {"iter": 20000}, "state_dict": theirs, "optimizer": {"state": {}, "param_groups": []}}, file)
    typed = ["convert", str(file), str(tmp_path / "run"), "--recipe", str(tmp_path / "made.yaml"), "--json"]
    done = CliRunner().invoke(cli.app, typed, prog_name="dgbench")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["used"] + len(told["dead"]) == len(theirs)
    assert all(is_dead(key) for key in told["dead"])
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(mfuser.load(tmp_path / "run")(images), model(images))

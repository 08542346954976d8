"""Options of a training's speed and memory: what each changes, an exact resume with each, and what is refused."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from timm.layers import LayerNorm, SwiGLU

import mfuser
from dgbench import results
from dgbench.engine import batches, checkpoints, step
from dgbench.engine.team import ALONE
from dgbench.engine.train import train
from dgbench.errors import RecipeError
from dgbench.progress import Silent
from dgbench.recipe import Recipe, load_recipe, recipe_hash

SMALL = ["data.size=[64, 128]", "data.crop=[64, 64]", "data.train_images=6", "data.val_images=2", "train.workers=0"]
SMALL += ["train.log_every=1", "train.batch_size=4", "train.steps=3", "train.checkpoint_every=1", "data.rare_class_sampling=null"]
BF16 = "train.precision=bf16"
OPTIONS = {
    "bf16": [BF16],
    "frozen": [BF16, "train.frozen=bf16"],
    "checkpointed": ["train.checkpoint_activations=true"],
    "parts": ["train.accumulate=2"],
    "average": ["train.ema=0.9"],
    "all but compiled": [BF16, "train.frozen=bf16", "train.checkpoint_activations=true", "train.accumulate=2", "train.ema=0.9"],
}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    os.environ["DGBENCH_CACHE"] = str(path)
    yield path
    del os.environ["DGBENCH_CACHE"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe(*overrides: str, method: str = "{name: rein, vfm: tiny, freeze_towers: true}", folder: Path) -> Recipe:
    """Of the smallest model with a frozen tower; Rein's has no BatchNorm."""
    file = folder / "it.yaml"
    file.write_text(f"extends: _streets.yaml\nmethod: {method}\n")
    return load_recipe(file, [*SMALL, *overrides])


def losses(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(mfuser.load(checkpoints.folder_of(run)).state_dict())


class _Stopped(Silent):
    """A progress display during whose second step the process is stopped."""

    def start(self, what: str, total: int, unit: str) -> None:
        self.left = 2 if what.startswith("training") else total + 1

    def advance(self, n: int = 1, **fields: float | str) -> None:
        self.left -= n
        if not self.left:
            raise KeyboardInterrupt


def goes_on_exactly(its: Recipe, folder: Path) -> None:
    train(its, folder / "whole", progress=Silent(), device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(its, folder / "part", progress=_Stopped(), device="cpu")
    assert checkpoints.newest(folder / "part")[1] == 1
    torch._dynamo.reset()  # as in another process: graphs come from the disk
    train(its, folder / "part", progress=Silent(), device="cpu", resume=True)
    assert losses(folder / "part") == losses(folder / "whole")
    whole, part = (checkpoints.folder_of(folder / run) for run in ("whole", "part"))
    assert checkpoints.sha256(whole) == checkpoints.sha256(part)
    beside = [path / "training.safetensors" for path in (whole, part) if (path / "training.safetensors").exists()]
    assert len({path.read_bytes() for path in beside}) < 2
    first, second = (torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (whole, part))
    assert all(torch.equal(value, second[i][key]) for i, state in first.items() for key, value in state.items())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_resumed_training_repeats_the_uninterrupted_one_bit_for_bit(options, tmp_path):
    goes_on_exactly(recipe(*options, folder=tmp_path), tmp_path)


def test_so_does_one_of_compiled_blocks(tmp_path):
    """The smallest that has any, forward and backward."""
    its = recipe("train.compile=blocks", method="{name: source-only}", folder=tmp_path)
    goes_on_exactly(its, tmp_path)
    (record,) = [one for one in map(results.read, (tmp_path / "part").glob("record-*.json")) if one.kind == "train"]
    assert record.environment["training"].endswith("blocks compiled")


@pytest.mark.full
def test_so_does_one_of_compiled_blocks_with_dropout(tmp_path):
    method = "{name: mfuser, vfm: tiny, vlm: tiny, freeze_towers: true, dropout: 0.3}"
    goes_on_exactly(recipe("train.compile=blocks", method=method, folder=tmp_path), tmp_path)


def test_graphs_of_a_training_are_kept_apart_by_the_vector_instructions_too(tmp_path, monkeypatch):
    monkeypatch.setenv("DGBENCH_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    model = mfuser.build("linear", vfm="tiny", image_size=(64, 64), weights="random")
    step.prepare(model.train(), load_recipe("streets/smoke", ["train.compile=blocks"]).train, ALONE)
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.parent == tmp_path / "compiled"
    assert torch.backends.cpu.get_cpu_capability().lower() in folder.name


def test_mfuser_trains_with_every_option_but_the_compiler(tmp_path):
    """Its BatchNorm in the neck takes the statistics of a part, for which it is asked."""
    its = recipe(
        *OPTIONS["all but compiled"], method="{name: mfuser, vfm: tiny, vlm: tiny, freeze_towers: true}", folder=tmp_path
    )
    with pytest.raises(RecipeError, match=r"has \d+ BatchNorm layers") as caught:
        train(its, tmp_path / "run", progress=Silent(), device="cpu")
    assert "--local-batchnorm" in caught.value.hint
    train(its, tmp_path / "run", progress=Silent(), device="cpu", local_norms=True)
    assert len(losses(tmp_path / "run")) == 3


def test_graphs_are_of_methods_with_a_part_of_fixed_shapes():
    cuda, its = torch.device("cuda"), load_recipe("streets/smoke", ["train.graphs=true"]).train
    several = copy.copy(ALONE)
    several.world = 2
    rein, linear = (mfuser.build(name, vfm="tiny", image_size=(64, 64), weights="random").train() for name in ("rein", "linear"))
    for team in (ALONE, several):
        with pytest.raises(RecipeError, match=r"train.graphs: the loss of `linear` has no part of fixed shapes") as caught:
            step.prepare(linear, its, team, cuda)
        assert caught.value.hint == "--set train.graphs=false"
        assert step.prepare(rein, its, team, cuda).said == "CUDA graphs"


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["train.compile=blocks"]], ids=["blocks as they are", "blocks compiled"])
def test_graphs_train_as_without_them_and_a_resumed_training_goes_on(options, tmp_path):
    """But for the order in which some kernels add."""
    method = "{name: mfuser, vfm: tiny, vlm: tiny, freeze_towers: true}"
    usual = [BF16, "train.frozen=bf16", "train.ema=0.9", "train.clip_norm=1.0", *options]
    its = recipe(*usual, "train.graphs=true", "train.workers=2", method=method, folder=tmp_path)
    train(its, tmp_path / "graphs", progress=Silent(), device="cuda")
    with pytest.raises(KeyboardInterrupt):
        train(its, tmp_path / "part", progress=_Stopped(), device="cuda")
    train(its, tmp_path / "part", progress=Silent(), device="cuda", resume=True)
    train(recipe(*usual, method=method, folder=tmp_path), tmp_path / "plain", progress=Silent(), device="cuda")
    expected = losses(tmp_path / "plain")
    assert expected[0]["loss"] != expected[1]["loss"]
    for name in ("graphs", "part"):
        for line, wanted in zip(losses(tmp_path / name), expected, strict=True):
            assert line == pytest.approx(wanted, rel=2e-2)
        whole, plain = weights(tmp_path / name), weights(tmp_path / "plain")
        assert {key: (value.dtype, value.shape) for key, value in whole.items()} == {
            key: (value.dtype, value.shape) for key, value in plain.items()
        }
    (record,) = [one for one in map(results.read, (tmp_path / "part").glob("record-*.json")) if one.kind == "train"]
    assert record.environment["training"].endswith("CUDA graphs")


def test_frozen_mlps_are_padded_for_a_gpu_and_the_record_says_so():
    its = load_recipe("streets/smoke", [BF16, "train.frozen=bf16"]).train
    for device, said in (("cpu", "frozen bf16"), ("cuda", "frozen bf16, 2 MLPs padded")):
        model = mfuser.build("rein", vfm="tiny", image_size=(64, 64), weights="random", freeze_towers=True)
        for block in model.vfm.trunk.blocks[:2]:
            block.mlp = SwiGLU(block.mlp.fc1.in_features, 85, norm_layer=LayerNorm).requires_grad_(False)
        assert step.prepare(model.train(), its, ALONE, torch.device(device)).said == said


def test_frozen_weights_and_checkpointing_change_no_number(tmp_path):
    runs = {}
    for name, options in (("usual", ()), ("frozen", ("train.frozen=bf16",)), ("again", ("train.checkpoint_activations=true",))):
        runs[name] = tmp_path / name
        train(recipe(BF16, *options, folder=tmp_path), runs[name], progress=Silent(), device="cpu")
    for name in ("frozen", "again"):
        assert losses(runs[name]) == losses(runs["usual"])
        expected = weights(runs["usual"])
        assert all(torch.equal(value, expected[key]) for key, value in weights(runs[name]).items())


def test_parts_have_the_whole_batchs_gradients_but_for_rounding(tmp_path):
    """Losses of three steps, which follow from the gradients of two."""
    for parts in (1, 2, 4):
        its = recipe(f"train.accumulate={parts}", "optim.lr=0.001", "optim.warmup_steps=0", folder=tmp_path)
        train(its, tmp_path / str(parts), progress=Silent(), device="cpu")
    expected = losses(tmp_path / "1")
    assert expected[0]["loss"] != pytest.approx(expected[2]["loss"], rel=1e-3)
    for parts in (2, 4):
        for line, wanted in zip(losses(tmp_path / str(parts)), expected, strict=True):
            assert line == pytest.approx(wanted, rel=1e-4)


def test_the_average_is_what_a_run_is_scored_by_and_the_training_goes_on_from_the_weights(tmp_path):
    decay, usual = 0.5, "optim.schedule=constant"
    trained, scored = [], []
    for steps in (1, 2, 3):
        for kept, options in ((trained, ()), (scored, (f"train.ema={decay}",))):
            run = tmp_path / f"{steps}{len(options)}"
            train(recipe(usual, f"train.steps={steps}", *options, folder=tmp_path), run, progress=Silent(), device="cpu")
            kept.append(weights(run))
    assert losses(tmp_path / "31") == losses(tmp_path / "30")
    name = "decoder.mask_decoder.cls_embed.weight"
    average = scored[0][name]  # of the start and the first step
    assert not torch.equal(average, trained[0][name])
    for later in trained[1:]:
        average = decay * average + (1 - decay) * later[name]
    torch.testing.assert_close(scored[2][name], average)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["train.frozen=bf16"], "frozen: bf16 goes with `precision: bf16`, got no"),
        (
            ["train.compile=blocks", "train.checkpoint_activations=true"],
            "checkpoint_activations does not go with `compile: blocks`",
        ),
        (
            ["train.graphs=true", "train.checkpoint_activations=true"],
            "graphs does not go with `checkpoint_activations`: leave one of the two out",
        ),
        (["train.graphs=true", "train.accumulate=2"], "graphs goes with whole batches, got accumulate: 2"),
        (["train.accumulate=3"], "accumulate: 3 parts of equal size cannot be made of batch_size 4"),
        (["train.ema=1.0"], "train.ema: must be below 1, got 1.0"),
        (["train.compile=all"], "train.compile: expected 'blocks', got 'all'"),
    ],
)
def test_a_recipe_refuses(options, problem, tmp_path):
    with pytest.raises(RecipeError) as caught:
        recipe(*options, folder=tmp_path)
    assert problem in caught.value.message


@pytest.mark.parametrize(
    ("options", "method", "problem"),
    [
        (["train.compile=blocks"], "{name: erm, backbone: tiny_resnet}", "train.compile: `erm` has no blocks"),
        (["train.checkpoint_activations=true"], "{name: erm, backbone: tiny_resnet}", "the towers of `erm` have no blocks"),
        ([BF16, "train.frozen=bf16"], "{name: source-only}", "`source-only` has no frozen weights of products"),
        (["train.graphs=true"], "{name: source-only}", "train.graphs: CUDA graphs need a GPU, and this is a cpu"),
        (["train.ema=0.9"], "{name: soma, vfm: tiny, ema_start: 0}", "`soma` keeps an average of its own"),
    ],
)
def test_a_method_refuses_what_it_has_not(options, method, problem, tmp_path):
    with pytest.raises(RecipeError) as caught:
        train(recipe(*options, method=method, folder=tmp_path), tmp_path / "run", progress=Silent(), device="cpu")
    assert problem in caught.value.message
    assert not (tmp_path / "run").exists()


def test_a_frozen_part_that_computes_in_32_bits_is_told(tmp_path):
    """CLOUDS' texts do, whatever autocast says."""
    its = recipe(
        BF16,
        "train.frozen=bf16",
        "data.extra={generated: textures}",
        method="{name: clouds, backbone: tiny_cnn, freeze_towers: true}",
        folder=tmp_path,
    )
    with pytest.raises(RecipeError, match=r"train.frozen: `clouds` has a frozen part that computes in 32 bits"):
        train(its, tmp_path / "run", progress=Silent(), device="cpu")


def test_options_at_their_defaults_are_not_in_the_hash_and_each_other_value_is(tmp_path):
    usual = recipe(BF16, folder=tmp_path)
    given = recipe(
        BF16,
        "train.frozen=null",
        "train.compile=null",
        "train.graphs=false",
        "train.accumulate=1",
        "train.ema=null",
        folder=tmp_path,
    )
    assert recipe_hash(given) == recipe_hash(usual)
    others = ["frozen=bf16", "compile=blocks", "graphs=true", "checkpoint_activations=true", "accumulate=2", "ema=0.9"]
    hashes = {recipe_hash(recipe(BF16, f"train.{other}", folder=tmp_path)) for other in others}
    assert len(hashes | {recipe_hash(usual)}) == 1 + len(others)


def test_batches_are_the_loaders_in_their_order():
    samples = [
        (torch.full((1, 3, 4, 4), i, dtype=torch.uint8), torch.full((1, 4, 4), i, dtype=torch.uint8), {}) for i in range(3)
    ]
    found = list(batches.on_device(samples, torch.device("cpu"), 5, 8))
    assert [batch.step for batch in found] == [5, 6, 7]
    assert [int(batch.labels[0, 0, 0]) for batch in found] == [0, 1, 2]
    assert [batch.present.nonzero().tolist() for batch in found] == [[[0, 0]], [[0, 1]], [[0, 2]]]


@pytest.mark.gpu
def test_batches_on_a_gpu_are_the_loaders_in_their_order():
    samples = [
        (torch.full((2, 3, 64, 64), i, dtype=torch.uint8), torch.full((2, 64, 64), i, dtype=torch.uint8), {}) for i in range(9)
    ]
    for i, batch in enumerate(batches.on_device(samples, torch.device("cuda"), 0, 9)):
        assert batch.step == i
        assert (batch.labels == i).all()
        torch.testing.assert_close(batch.images.mean().item(), i / 255)

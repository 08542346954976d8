"""`train.init`: a training that begins with the weights of another."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mfuser
from dgbench import results
from dgbench.engine import checkpoints
from dgbench.engine.train import train
from dgbench.errors import CheckpointError, RecipeError
from dgbench.needs import check_training
from dgbench.progress import Silent
from dgbench.recipe import Recipe, load_recipe, recipe_hash

SMALL = [
    *("data.size=[32, 64]", "data.crop=[32, 32]", "data.train_images=2", "data.rare_class_sampling=null", "train.batch_size=2"),
    *("train.steps=1", "optim.lr=1e-12", "optim.weight_decay=0", "optim.min_lr=0"),
]


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def recipe(*settings: str, name: str = "streets/source-only") -> Recipe:
    return load_recipe(name, [*SMALL, *settings])


def saved(folder: Path, size: int = 32, **options: object) -> Path:
    torch.manual_seed(5)
    return mfuser.save(mfuser.build("source-only", backbone="tiny", image_size=(size, size), weights="random", **options), folder)


def sha(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def fit(run: Path, *settings: str, resume: bool = False) -> results.Record:
    return train(recipe(*settings), run, progress=Silent(), device="cpu", resume=resume)


@pytest.mark.parametrize("of_run", [False, True], ids=["saved model", "run"])
def test_the_first_step_is_taken_from_those_weights_and_the_record_names_them(tmp_path, of_run):
    begun = tmp_path / "run" / "checkpoint" / "step-000001"
    saved(begun)
    record = fit(tmp_path / "next", f"train.init={tmp_path / 'run' if of_run else begun}")
    before, after = (
        load_file(begun / "model.safetensors"),
        load_file(checkpoints.folder_of(tmp_path / "next") / "model.safetensors"),
    )
    learned = [name for name in before if "running" not in name and "num_batches" not in name]
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in learned)
    assert results.read(record.path).extra["init"] == sha(begun)


def test_what_it_began_with_is_in_the_records_of_a_resumed_training_too(tmp_path):
    begun = saved(tmp_path / "model")
    setting = f"train.init={begun}"
    fit(tmp_path / "run", setting)
    next((tmp_path / "run").glob("record-*.json")).unlink()
    expected = sha(begun)
    (begun / "model.safetensors").unlink()  # the rest of a training needs it no more
    assert fit(tmp_path / "run", setting, resume=True).extra["init"] == expected


def test_where_it_begins_is_part_of_the_recipes_hash(tmp_path):
    assert len({recipe_hash(recipe(*settings)) for settings in ((), ("train.init=a",), ("train.init=b",))}) == 3


def test_another_method_is_refused(tmp_path):
    begun = saved(tmp_path / "model")
    with pytest.raises(CheckpointError, match="holds a model of `source-only`, not of `mfuser`"):
        train(recipe(f"train.init={begun}", name="streets/mfuser"), tmp_path / "run", progress=Silent(), device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"patch": 16}, r"tensors missing \(encoder.trunk.patch_embed.proj"),
        ({"size": 64}, r"encoder.trunk.pos_embed is \(1, \d+, \d+\), expected \(1, \d+, \d+\)"),
    ],
    ids=["names", "shapes"],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, other, said):
    begun = saved(tmp_path / "model", **other)
    with pytest.raises(CheckpointError, match=f"train.init: .* cannot be started from: .*{said}"):
        fit(tmp_path / "run", f"train.init={begun}", *(["method.patch=8"] if "patch" in other else []))


def test_a_missing_folder_is_told_before_anything_is_read(tmp_path):
    with pytest.raises(RecipeError, match="train.init: no folder .*absent"):
        check_training(recipe(f"train.init={tmp_path / 'absent'}"))
    with pytest.raises(CheckpointError, match="train.init: no folder .*absent"):
        fit(tmp_path / "run", f"train.init={tmp_path / 'absent'}", "data.source=gta5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="train.init: .*empty holds no checkpoint"):
        fit(tmp_path / "run", f"train.init={tmp_path / 'empty'}")


def test_published_weights_are_not_asked_for(tmp_path):
    full = load_recipe("streets/source-only", ["method.backbone=dinov2_l", f"train.init={tmp_path}"], check_method="names")
    check_training(full)


def test_trained_parts_of_sixteen_bits_are_trained_and_kept_in_thirty_two(tmp_path, monkeypatch):
    build = mfuser.build

    def narrow(*names, **given):
        model = build(*names, **given).to(torch.bfloat16)
        model.encoder.requires_grad_(False).float()
        return model

    monkeypatch.setattr(mfuser, "build", narrow)
    fit(tmp_path / "run", "train.precision=bf16")
    state = load_file(tmp_path / "run" / "checkpoint" / "step-000001" / "model.safetensors")
    assert {state["head.weight"].dtype, state["head.bias"].dtype} == {torch.float32}

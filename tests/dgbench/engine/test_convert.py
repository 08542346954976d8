"""The authors' checkpoint files: read without running their code, turned into runs, or refused with a reason."""

from __future__ import annotations

import json
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import VARIANTS, AuthorsWeights, description

import mfuser
from dgbench.engine import checkpoints
from dgbench.engine.convert import convert, read_token_ids
from dgbench.errors import CheckpointError
from dgbench.recipe import load_recipe
from mfuser.authors import read_authors, recognise

MARKS = ("backbone.class_embedding", "backbone.adapter.0.A_log")


class Hostile:
    """Unpickled by `pickle`, it makes the folder it was given."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


def test_what_a_trainer_keeps_beside_the_weights_is_passed_over(tmp_path, monkeypatch):
    # mmengine's checkpoints hold objects of its own classes and NumPy scalars
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self) -> None:
            self.values = np.arange(3.0)

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    state = {"contexts": torch.rand(1, 8, 768), "backbone.fpn1.1.num_batches_tracked": torch.tensor(7)}
    content = {"meta": {"iter": np.float64(3), "time": "now"}, "message_hub": {"loss": HistoryBuffer()}, "state_dict": state}
    torch.save(content, tmp_path / "iter_20000.pth")
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    read = read_authors(tmp_path / "iter_20000.pth")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], value) for key, value in state.items())


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path, legacy):
    mark = tmp_path / "was-run"
    content = {"state_dict": {"contexts": torch.rand(2)}, "meta": Hostile(mark)}
    torch.save(content, tmp_path / "bad.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="mkdir|cannot be read"):
        read_authors(tmp_path / "bad.pth")
    assert not mark.exists()


def test_a_bare_pickle_is_refused_and_runs_nothing(tmp_path):
    mark = tmp_path / "was-run"
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Hostile(mark), protocol=2))
    with pytest.raises(ValueError, match="cannot be read as a PyTorch checkpoint"):
        read_authors(tmp_path / "bad.pth")
    assert not mark.exists()


def test_a_truncated_file_is_refused(tmp_path):
    torch.save({"state_dict": {"contexts": torch.rand(2000)}}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:4000])
    with pytest.raises(CheckpointError, match=r"cut\.pth: cannot be read as a PyTorch checkpoint"):
        convert(tmp_path / "cut.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {"state_dict": {"backbone.layer1.weight": torch.rand(2)}},
            r"is not a checkpoint that the authors of .*`mfuser`",
        ),
        ({"state_dict": dict.fromkeys(MARKS, torch.rand(2))}, "tensors missing"),
        ({"epoch": 3}, "holds no `state_dict` of tensors"),
    ],
)
def test_another_models_checkpoint_is_refused(tmp_path, content, reason):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=reason):
        convert(tmp_path / "other.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_written_into(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        convert(tmp_path / "any.pth", tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{}", "[[1, 2]]", json.dumps([[1, 2, 3, 4, "5"]] * 19)])
def test_token_ids_of_another_form_are_refused(tmp_path, text):
    (tmp_path / "ids.json").write_text(text)
    with pytest.raises(CheckpointError, match="19 lists of 5"):
        read_token_ids(tmp_path / "ids.json")


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_the_tower_is_told_by_the_checkpoints_names(variant):
    ((method, release),) = recognise(AuthorsWeights(variant))
    assert (method, dict(release.options)) == ("mfuser", {"vfm": "dinov2_l", "vlm": VARIANTS[variant]})


@pytest.mark.full
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_full_checkpoint_becomes_a_run(tmp_path, variant):
    weights = AuthorsWeights(variant)
    torch.save({"meta": {}, "state_dict": {key: weights[key] for key in weights}}, tmp_path / "iter_20000.pth")
    ids = description(f"layout_{variant}")["tokens"]
    done = convert(tmp_path / "iter_20000.pth", tmp_path / "out", token_ids=ids)
    assert done.used + len(done.dead) == len(weights)
    model = checkpoints.load_for(load_recipe(str(tmp_path / "out" / "recipe.yaml")), tmp_path / "out")
    assert all(
        torch.equal(value, weights[key])
        for key, value in mfuser.to_authors_state_dict(model).items()
        if weights.keys_of[key]["named"]
    )

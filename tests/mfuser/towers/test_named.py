"""Frozen towers that a saved model names by the SHA-256 of their files: left out, read again bit for bit, or refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mfuser
from mfuser import methods
from mfuser.checkpoints import load_weights, towers_needed
from mfuser.segmentor import Segmentor
from mfuser.towers import named
from mfuser.towers.table import TOWERS, HubFile

SIZE = {"embed_dim": 64, "depth": 2, "num_heads": 2}
FILE = HubFile("made/small", "model.safetensors", 0.001, "MIT")
MINI = {"vfm": "mini_vfm", "vlm": "mini_vlm", "image_size": (96, 96)}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tower `made` of this file in the Hub cache: DINOv2-S's, made smaller."""
    from huggingface_hub import constants

    monkeypatch.setitem(TOWERS, "made", replace(TOWERS["dinov2_s"], options=SIZE, width=64, depth=2, weights=FILE))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    state = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=70, **SIZE).state_dict()
    commit = hashlib.sha1(b"any").hexdigest()
    folder = tmp_path / "cache" / "models--made--small"
    for needed in (folder / "snapshots" / commit, folder / "refs", folder / "blobs"):
        needed.mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    save_file(state, folder / "snapshots" / commit / FILE.file)
    return folder / "snapshots" / commit / FILE.file


def built(size: int = 84, **given: object) -> Segmentor:
    return mfuser.build("linear", vfm="made", image_size=(size, size), **given)


def stored(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


def trunk(model: Segmentor) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith("vfm.trunk.")}


def bits(model: Segmentor) -> dict[str, tuple[torch.dtype, bytes]]:
    state = model.state_dict()
    return {
        name: (value.dtype, value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) for name, value in state.items()
    }


def same(one: Segmentor, other: Segmentor) -> bool:
    size = one.image_size
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        return bits(one) == bits(other) and torch.equal(one(images), other(images))


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rewritten(folder: Path, change: Callable[[list[dict[str, object]]], None]) -> Path:
    """Change what a saved model says of its towers, as from a stranger: without a manifest."""
    path = folder / "model.safetensors"
    state = load_file(path)
    with safe_open(path, "numpy") as opened:
        rows = json.loads(opened.metadata()["towers"])
    change(rows)
    save_file(state, path, {"towers": json.dumps(rows)})
    (folder / "manifest.json").unlink(missing_ok=True)
    return folder


def test_mfuser_on_miniature_towers_is_smaller_and_the_same(tmp_path: Path) -> None:
    model = mfuser.build("mfuser", **MINI)
    whole, small = (mfuser.save(model, tmp_path / how, towers=how) for how in ("stored", "named"))
    assert (small / "model.safetensors").stat().st_size < 0.2 * (whole / "model.safetensors").stat().st_size
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    buffers = model.model_state().keys() - dict(model.named_parameters()).keys()
    positions = {"vfm.trunk.pos_embed", "vlm.trunk.pos_embed", "text.tower.positional_embedding"}  # of another grid and length
    assert stored(small) == trained | buffers | positions
    again = mfuser.load(small)
    assert same(model, again)
    assert same(model, mfuser.load(whole))
    assert {name for name, one in again.named_parameters() if one.requires_grad} == trained
    for option, one in zip(("vfm", "vlm"), named.in_file(small / "model.safetensors"), strict=True):
        row = TOWERS[MINI[option]].weights
        assert row is not None
        assert (one.tower, one.sha256) == (MINI[option], row.sha256())


@pytest.mark.parametrize("method", methods.names())
def test_every_method_on_its_tiny_towers_is_stored_whole_as_before(tmp_path: Path, method: str) -> None:
    model = mfuser.build(method, **methods.constants(method)["BACKBONES"][-1], image_size=(64, 64))
    whole, other = (mfuser.save(model, tmp_path / how, towers=how) for how in ("stored", "named"))
    for name in ("model.safetensors", "model.json", "manifest.json"):
        assert (whole / name).read_bytes() == (other / name).read_bytes()
    assert bits(model) == bits(mfuser.load(other))


def test_a_tower_on_the_hub_is_named_and_resampled_tables_are_stored(tmp_path: Path, place: Path) -> None:
    model = built()
    folder = mfuser.save(model, tmp_path / "model", towers="named")
    assert stored(folder) & trunk(model) == {"vfm.trunk.pos_embed"}
    (one,) = named.in_file(folder / "model.safetensors")
    assert (one.tower, one.file, one.sha256) == ("made", "made/small/model.safetensors", sha(place))
    assert one.values == sum(value.numel() for name, value in model.named_parameters() if name in one.tensors)
    assert json.loads((folder / "model.json").read_text())["format"] == 2
    assert same(model, mfuser.load(folder))


def test_at_the_published_grid_nothing_of_the_tower_is_stored(tmp_path: Path, place: Path) -> None:
    model = built(70)
    folder = mfuser.save(model, tmp_path / "model", towers="named")
    assert not stored(folder) & trunk(model)
    assert same(model, mfuser.load(folder))


def test_positions_of_as_many_cells_in_another_grid_are_stored(tmp_path: Path, place: Path) -> None:
    state = load_file(place)
    save_file(state | {"pos_embed": torch.randn(1, 37, 64)}, place)  # of 6 by 6 cells
    model = mfuser.build("linear", vfm="made", image_size=(56, 126))  # 4 by 9
    folder = mfuser.save(model, tmp_path / "model", towers="named")
    assert stored(folder) & trunk(model) == {"vfm.trunk.pos_embed"}
    assert same(model, mfuser.load(folder))


def test_a_file_of_sixteen_bits_gives_the_same_model(tmp_path: Path, place: Path) -> None:
    save_file({name: value.half() for name, value in load_file(place).items()}, place)
    model = built()
    assert same(model, mfuser.load(mfuser.save(model, tmp_path / "model", towers="named")))


def test_a_tower_that_is_frozen_in_sixteen_bits_comes_back_so(tmp_path: Path, place: Path) -> None:
    model = built()
    model.vfm.trunk.blocks.to(torch.bfloat16)
    folder = mfuser.save(model, tmp_path / "model", towers="named")
    assert stored(folder) & trunk(model) == {"vfm.trunk.pos_embed"}
    assert bits(model) == bits(mfuser.load(folder))


def _one_bit(weight: Tensor) -> None:
    weight.view(torch.int32)[0, 0] ^= 1


def _zeros_sign(weight: Tensor) -> None:
    weight[0, 0] = -0.0


@pytest.mark.parametrize("change", [_one_bit, _zeros_sign])
def test_a_tower_with_one_other_bit_is_stored_whole(tmp_path: Path, place: Path, change: Callable[[Tensor], None]) -> None:
    state = load_file(place)
    state["blocks.1.mlp.fc1.weight"][0, 0] = 0.0
    save_file(state, place)
    model = built()
    change(model.vfm.trunk.blocks[1].mlp.fc1.weight.data)
    folder = mfuser.save(model, tmp_path / "model", towers="named")
    assert trunk(model) <= stored(folder)
    assert json.loads((folder / "model.json").read_text())["format"] == 1
    assert bits(model) == bits(mfuser.load(folder))


def test_random_and_trained_towers_are_stored_whole(tmp_path: Path, place: Path) -> None:
    drawn, trained = built(weights="random"), built().requires_grad_(True)
    for name, model in {"drawn": drawn, "trained": trained}.items():
        assert trunk(model) <= stored(mfuser.save(model, tmp_path / name, towers="named"))


def test_of_a_partly_trained_tower_the_frozen_part_is_named(tmp_path: Path, place: Path) -> None:
    model = built()
    last = model.vfm.trunk.blocks[1]
    assert isinstance(last, nn.Module)
    last.requires_grad_(True)
    with torch.no_grad():
        last.mlp.fc1.weight.add_(1)
    folder = mfuser.save(model, tmp_path / "model", towers="named")
    kept = stored(folder) & trunk(model)
    assert kept == {"vfm.trunk.pos_embed"} | {f"vfm.trunk.blocks.1.{name}" for name, _ in last.named_parameters()}
    assert bits(model) == bits(mfuser.load(folder))


def test_without_the_file_a_tower_is_stored_whole(tmp_path: Path, place: Path) -> None:
    model = built()
    place.unlink()
    assert trunk(model) <= stored(mfuser.save(model, tmp_path / "gone", towers="named"))
    place.write_bytes(b"half a file")
    assert trunk(model) <= stored(mfuser.save(model, tmp_path / "damaged", towers="named"))


def test_the_hash_of_the_file_tells_towers_apart(tmp_path: Path, place: Path) -> None:
    model = built()
    first = mfuser.save(model, tmp_path / "first", towers="named")
    state = load_file(place)
    state["blocks.0.norm1.bias"] += 1
    save_file(state, place)
    with torch.no_grad():
        model.vfm.trunk.blocks[0].norm1.bias.add_(1)
    second = mfuser.save(model, tmp_path / "second", towers="named")
    assert stored(first) == stored(second)
    assert sha(first / "model.safetensors") != sha(second / "model.safetensors")


def test_a_missing_file_is_named_with_its_hash_and_the_command(tmp_path: Path, place: Path) -> None:
    folder = mfuser.save(built(), tmp_path / "model", towers="named")
    assert towers_needed(folder) == []
    digest = sha(place)
    place.unlink()
    assert towers_needed(folder) == ["made"]
    for load in (mfuser.load, lambda path: load_weights(built(weights="random"), path)):
        with pytest.raises(mfuser.WeightsNotFound) as caught:
            load(folder)
        assert (
            f"frozen tower `made`; they are those of made/small/model.safetensors with SHA-256 {digest}" in caught.value.message
        )
        assert "is not on this machine" in caught.value.message
        assert "dgbench download made" in caught.value.hint
        assert "dgbench export RUN OUT" in caught.value.hint


def test_another_file_of_that_name_is_refused_with_both_hashes(tmp_path: Path, place: Path) -> None:
    folder = mfuser.save(built(), tmp_path / "model", towers="named")
    before = sha(place)
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(content)
    with pytest.raises(mfuser.WeightsNotFound) as caught:
        mfuser.load(folder)
    assert before in caught.value.message
    assert f"{place} has {sha(place)}" in caught.value.message
    assert "hf download made/small model.safetensors --revision COMMIT" in caught.value.hint


def test_an_older_revision_in_the_cache_is_found_by_its_hash(tmp_path: Path, place: Path) -> None:
    model = built()
    folder = mfuser.save(model, tmp_path / "model", towers="named")
    shutil.copy(place, place.parents[2] / "blobs" / sha(place))
    save_file({name: value + 1 for name, value in load_file(place).items()}, place)
    assert same(model, mfuser.load(folder))


def test_weights_are_loaded_over_another_model_of_the_method(tmp_path: Path, place: Path) -> None:
    model, other = built(), built(weights="random")
    load_weights(other, mfuser.save(model, tmp_path / "model", towers="named"))
    assert bits(model) == bits(other)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows[0].update(tower="dinov2_b"), "names the tower `dinov2_b`, which the model has not"),
        (lambda rows: rows[0].update(tower=3), "is damaged"),
        (lambda rows: rows[0].pop("sha256"), "is damaged"),
        (lambda rows: rows[0].update(sha256="../../model.safetensors"), "not on this machine"),
        (lambda rows: rows.append("x"), "is damaged"),
        (lambda rows: rows[0]["tensors"].update(surplus={"keys": ["norm.bias"]}), "`surplus`, which the model has not"),
        (lambda rows: rows[0]["tensors"].pop("vfm.trunk.norm.bias"), r"1 tensors missing \(vfm.trunk.norm.bias\)"),
        (lambda rows: rows[0]["tensors"]["vfm.trunk.norm.bias"].update(keys=["nothing"]), "vfm.trunk.norm.bias is not in"),
        (lambda rows: rows[0]["tensors"]["vfm.trunk.norm.bias"].update(keys=["pos_embed"]), "vfm.trunk.norm.bias is not in"),
        (lambda rows: rows[0]["tensors"]["vfm.trunk.norm.bias"].update(keys=["norm.bias", "pos_embed"]), "norm.bias is not in"),
        (lambda rows: rows[0]["tensors"]["vfm.trunk.norm.bias"].update(keys=[]), "is damaged"),
        (lambda rows: rows[0]["tensors"]["vfm.trunk.norm.bias"].update(dtype="load"), "is damaged"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, place: Path, change: Callable[[list[dict[str, object]]], None], told: str
) -> None:
    folder = rewritten(mfuser.save(built(), tmp_path / "model", towers="named"), change)
    with pytest.raises(ValueError, match=told) as error:
        mfuser.load(folder)
    assert str(folder) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_weights_of_another_type_are_written_on_demand(tmp_path: Path, place: Path) -> None:
    model = built()
    folder = mfuser.save(model, tmp_path / "model", dtype=torch.bfloat16)
    again = mfuser.load(folder)
    state = model.state_dict()
    assert all(torch.equal(value, state[name].to(value.dtype)) for name, value in again.state_dict().items())
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16}

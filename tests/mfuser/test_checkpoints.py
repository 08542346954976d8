from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from golden_files import VARIANTS, AuthorsWeights, description, without_values
from safetensors.torch import load_file, save_file

import mfuser
from mfuser import methods
from mfuser.authors import load_authors_checkpoint, release_of, sources_of, to_authors_state_dict

TINY = {"vfm": "tiny", "vlm": "tiny", "image_size": (64, 64)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    model = mfuser.build("mfuser", **TINY).eval()
    mfuser.save(model, folder)
    return model, folder


def altered(saved, tmp_path, change):
    """A copy of the saved model whose tensors went through `change`."""
    _, folder = saved
    (tmp_path / "model.json").write_bytes((folder / "model.json").read_bytes())
    save_file(change(load_file(folder / "model.safetensors")), tmp_path / "model.safetensors")
    return tmp_path


def test_a_saved_model_comes_back_equal_and_needs_no_tokenizer(saved, monkeypatch):
    import open_clip

    monkeypatch.delattr(open_clip, "get_tokenizer")
    model, folder = saved
    before = torch.random.get_rng_state()
    again = mfuser.load(folder).eval()
    assert torch.equal(before, torch.random.get_rng_state())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), again(images))
    assert again.method == "mfuser"
    assert not any(p.is_meta for p in again.parameters())
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, p in again.named_parameters() if p.requires_grad}


def test_a_loaded_model_trains(saved):
    model = mfuser.load(saved[1]).train()
    batch = mfuser.Batch(torch.rand(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.long))
    torch.stack(list(model.loss(batch).values())).sum().backward()
    torch.optim.AdamW(model.groups(1e-3, 0.0)).step()


def test_built_and_loaded_models_are_in_evaluation_mode(saved):
    assert not any(module.training for module in mfuser.load(saved[1]).modules())
    for name in methods.names():
        built = mfuser.build(name, **methods.constants(name)["BACKBONES"][-1], image_size=(64, 64))
        assert not any(module.training for module in built.modules())


def test_a_run_is_loaded_from_its_newest_complete_checkpoint(saved, tmp_path):
    _, folder = saved
    for step in (999_999, 1_000_000):  # which a sort of names would turn round
        target = tmp_path / "checkpoint" / f"step-{step:06d}"
        target.mkdir(parents=True)
        (target / "model.json").write_bytes((folder / "model.json").read_bytes())
        state = load_file(folder / "model.safetensors")
        save_file(state | {"gamma": torch.full_like(state["gamma"], step)}, target / "model.safetensors")
    (tmp_path / "checkpoint" / ".partial-2000000").mkdir()
    (tmp_path / "checkpoint" / "step-old").mkdir()
    for path in (tmp_path, str(tmp_path)):
        assert (mfuser.load(path).gamma == 1_000_000).all()
    with pytest.raises(ValueError, match=r"no model.json and no checkpoint/step-\*; give a folder that mfuser"):
        mfuser.load(tmp_path / "checkpoint")


def test_saving_leaves_nothing_half_written(saved, tmp_path):
    mfuser.save(saved[0], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "model.json", "model.safetensors"]


def copied(saved, tmp_path):
    return Path(shutil.copytree(saved[1], tmp_path / "copy"))


def test_the_manifest_is_what_sha256sum_and_stat_say(saved):
    files = json.loads((saved[1] / "manifest.json").read_text())["files"]
    assert sorted(files) == ["model.json", "model.safetensors"]
    for name, row in files.items():
        content = (saved[1] / name).read_bytes()
        assert row == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "manifest.json"])
def test_a_flipped_bit_in_any_place_is_refused_by_name(saved, tmp_path, name):
    folder = copied(saved, tmp_path)
    content = (folder / name).read_bytes()
    # everywhere in the small files, at both ends and between in the large one
    step = max(1, len(content) // (60 if len(content) < 10_000 else 8))
    for number, place in enumerate([*range(0, len(content) - 1, step), len(content) - 1]):
        flipped = bytearray(content)
        flipped[place] ^= 1 << number % 8
        (folder / name).write_bytes(flipped)
        with pytest.raises(ValueError, match=re.escape(str(folder))):
            mfuser.load(folder)
    (folder / name).write_bytes(content)
    mfuser.load(folder)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("model.safetensors", lambda path: path.write_bytes(b""), "has 0 bytes"),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes() + b"more"), "is damaged: it has"),
        ("model.safetensors", Path.unlink, "holds no weights"),
        ("model.json", lambda path: path.write_bytes(b""), "has 0 bytes"),
        ("model.json", Path.unlink, "holds no model"),
        ("manifest.json", lambda path: path.write_bytes(b""), "is damaged"),
        ("manifest.json", lambda path: path.write_text("[" * 100_000), "is damaged"),
        ("manifest.json", lambda path: path.write_text('{"format": 1, "files": {}}'), "was put there later"),
    ],
)
def test_an_empty_a_longer_and_a_missing_file_are_refused_by_name(saved, tmp_path, name, change, told):
    folder = copied(saved, tmp_path)
    change(folder / name)
    with pytest.raises(ValueError, match=told):
        mfuser.load(folder)


def test_a_model_saved_before_there_were_manifests_loads_with_a_warning(saved, tmp_path, caplog):
    folder = copied(saved, tmp_path)
    (folder / "manifest.json").unlink()
    mfuser.load(folder)
    assert "damage to its files cannot be detected" in caplog.text


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(saved, tmp_path):
    def broken(state):
        state["gamma"].view(-1)[0] = float("nan")
        return state

    with pytest.raises(ValueError, match="gamma holds 1 values of .* not finite"):
        mfuser.load(altered(saved, tmp_path, broken))
    model = mfuser.load(saved[1])
    with torch.no_grad():
        model.gamma.view(-1)[0] = float("inf")
    with pytest.raises(ValueError, match="is not saved: gamma holds 1 values"):
        mfuser.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"method": "nonsense"},
        {"method": None},
        {"method": ["mfuser"]},
        {"method": "../../x"},
        {"options": []},
        {"options": {"vfm": 5}},
        {"options": {"vfm": "nonsense"}},
        {"options": {"image_size": 5}},
        {"options": {"image_size": [64]}},
        {"options": {"image_size": [10**30, 64]}},
        {"options": {"image_size": ["64", 64]}},
        {"options": {"image_size": [0, 0]}},
        {"options": {"decoder_dim": 10**9}},
        {"options": {"decoder_dim": -1}},
        {"options": {"decoder_dim": 2.5}},
        {"options": {"heads": 0}},
        {"options": {"dropout": 1e300}},
        {"options": {"dropout": 7}},
        {"options": {"dropout": float("nan")}},
        {"options": {"token_ids": [[1]]}},
        {"options": {"token_ids": "x"}},
        {"options": {"token_ids": [[10**12] * 5] * 19}},
        {"options": {"nonsense": 1}},
        {"format": True},
        {"format": [1]},
        {"format": 1.5},
        {"classes": ["road"]},
        {"classes": 3},
    ],
)
def test_odd_values_of_a_description_are_refused_in_one_line(saved, tmp_path, change):
    """Without a manifest, as from a stranger."""
    folder = copied(saved, tmp_path)
    (folder / "manifest.json").unlink()
    content = json.loads((folder / "model.json").read_text())
    if isinstance(change.get("options"), dict):
        change = {"options": content["options"] | change["options"]}
    (folder / "model.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=re.escape(str(folder))) as error:
        mfuser.load(folder)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "text", ["", "[]", "1", "null", "[" * 100_000, f'{{"format": {"9" * 5000}}}', "\ud800", "x" * (1 << 20) + "x"]
)
def test_a_description_that_is_none_is_refused_in_one_line(saved, tmp_path, text):
    folder = copied(saved, tmp_path)
    (folder / "manifest.json").unlink()
    (folder / "model.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"model\.json is damaged") as error:
        mfuser.load(folder)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("head", [(1 << 63).to_bytes(8, "little"), (90_000_000).to_bytes(8, "little"), b"\xff" * 8])
def test_a_header_of_absurd_size_is_refused(saved, tmp_path, head):
    folder = copied(saved, tmp_path)
    (folder / "manifest.json").unlink()
    (folder / "model.safetensors").write_bytes(head + b"{}" * 50)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        mfuser.load(folder)


def test_what_does_not_match_is_named(saved, tmp_path):
    with pytest.raises(ValueError, match=r"gamma is \(3,\), expected"):
        mfuser.load(altered(saved, tmp_path, lambda s: s | {"gamma": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"1 tensors missing \(gamma\)"):
        mfuser.load(altered(saved, tmp_path, lambda s: {k: v for k, v in s.items() if k != "gamma"}))
    with pytest.raises(ValueError, match=r"1 unknown \(surplus\)"):
        mfuser.load(altered(saved, tmp_path, lambda s: s | {"surplus": torch.zeros(3)}))


def test_damaged_and_missing_files_are_named(saved, tmp_path):
    with pytest.raises(ValueError, match=r"holds no model: there is no model\.json"):
        mfuser.load(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.json is damaged"):
        mfuser.load(tmp_path)
    text = (saved[1] / "model.json").read_text()
    (tmp_path / "model.json").write_text(json.dumps(json.loads(text) | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99; this version reads"):
        mfuser.load(tmp_path)
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ValueError, match="holds no weights"):
        mfuser.load(tmp_path)
    weights = (saved[1] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        mfuser.load(tmp_path)


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def full_size(request):
    """A full-size model without memory for its weights, and the authors' list of keys."""
    return request.param, without_values(VARIANTS[request.param]), description(f"layout_{request.param}")


def test_every_authors_tensor_is_used_once_or_dead_and_every_one_of_ours_is_filled(full_size):
    _, model, layout = full_size
    release = release_of(model)
    state = model.state_dict()
    sources = sources_of(model, release, state)
    assert set(state) - set(sources) == {"logit_scale", "logit_bias"}
    used = [key for source in sources.values() for key in source.keys]
    assert len(used) == len(set(used))
    assert all(release.is_dead(key) for key in set(layout["keys"]) - set(used))
    assert not [key for key in used if key not in layout["keys"] or release.is_dead(key)]
    for name, source in sources.items():
        shapes = [tuple(layout["keys"][key]["shape"]) for key in source.keys]
        theirs = (sum(s[0] for s in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
        theirs = theirs[::-1] if source.transposed else theirs
        assert [n for n in theirs if n != 1] == [n for n in state[name].shape if n != 1], name


def test_training_touches_what_the_authors_train_with_their_weight_decay(full_size):
    _, model, layout = full_size
    rows, names = layout["keys"], {id(p): n for n, p in model.named_parameters()}
    sources = sources_of(model, release_of(model), model.state_dict())
    trained = set()
    for group in model.groups(1e-4, layout["optimizer"]["weight_decay"]):
        for parameter in group["params"]:
            for key in sources[names[id(parameter)]].keys:
                assert rows[key]["weight_decay"] == group["weight_decay"], key
                assert rows[key]["lr"] == group["lr"], key
                trained.add(key)
    dead = {key for key in rows if release_of(model).is_dead(key)}
    assert trained == {key for key, row in rows.items() if row["trainable"]} - dead


def test_parameters_are_as_many_as_the_authors_without_the_dead(full_size):
    _, model, layout = full_size
    for kind, trainable in (("trainable", True), ("frozen", False)):
        dead = sum(
            torch.Size(row["shape"]).numel()
            for key, row in layout["keys"].items()
            if release_of(model).is_dead(key) and row["kind"] == "param" and row["trainable"] is trainable
        )
        ours = sum(p.numel() for p in model.parameters() if p.requires_grad is trainable)
        assert ours == layout["parameters"][kind] - dead


def test_every_component_has_as_many_parameters_as_the_authors(full_size):
    variant, model, layout = full_size
    parts = {
        "text.": "text_encoder",
        "vfm.": "dinov2",
        "vlm.": "vlm_image_encoder",
        "embedding.adapter": "adapter_proj",
        "embedding.": "vlm_image_encoder",
        "adapters.": "adapter",
        "adapter_proj": "adapter_proj",
        "fpn": "fpn",
        "context_decoder.": "context_decoder",
        "pixel_decoder.": "pixel_decoder",
        "contexts": "contexts",
        "gamma": "gamma",
        "mask_decoder.layers.": "transformer_decoder",
        "mask_decoder.post_norm.": "transformer_decoder",
        "mask_decoder.": "decode_head_other",
    }
    ours = dict.fromkeys(layout["components"], 0)
    for name, parameter in model.named_parameters():
        ours[next(part for prefix, part in parts.items() if name.startswith(prefix))] += parameter.numel()
    dead = dict.fromkeys(layout["components"], 0)
    if variant == "eva":
        dead["random_text"] = 14592
    if variant == "siglip":
        dead["adapter_proj"] = layout["components"]["adapter_proj"]["trainable"]
    dead["dinov2"] = 1024  # mask_token
    assert ours == {part: sum(count.values()) - dead[part] for part, count in layout["components"].items()}


def test_another_models_checkpoint_is_refused_and_changes_nothing(full_size):
    variant, model, _ = full_size
    other = AuthorsWeights("clip" if variant == "eva" else "eva")
    with pytest.raises(ValueError, match="not an authors' checkpoint of `mfuser` with dinov2_l"):
        load_authors_checkpoint(model, other)
    assert all(p.is_meta for p in model.parameters())


def test_another_fuser_has_no_weights_of_the_authors():
    model = mfuser.build("mfuser", **TINY, fuser="mvfuser_bidir")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match='not of `mvfuser_bidir`, .*; build the model with fuser="mvfuser"'):
        load_authors_checkpoint(model, AuthorsWeights("eva"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="not of `mvfuser_bidir`"):
        to_authors_state_dict(model)


def test_a_round_trip_through_the_authors_names_keeps_every_value(full_size):
    # the maps on tensors of a few numbers each: stacking, transposing and squeezing must undo themselves
    _, model, _ = full_size
    for name, source in sources_of(model, release_of(model), model.state_dict()).items():
        rows, columns = 6 * len(source.keys), 4
        value = torch.rand(rows, columns)
        written = source.write(value)
        assert set(written) == set(source.keys), name
        assert torch.equal(source.read(written), value), name


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_weights_can_be_read_by_whom_the_umask_lets_read(saved, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        folder = mfuser.save(saved[0], tmp_path / "model")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {mode}

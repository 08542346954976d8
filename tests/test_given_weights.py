"""A tower's file that is here already: told by its tensors, held against the Hub, and put where the tower is loaded from.

The oracle is timm's and open_clip's own models, whose state is in the files on the Hub; ours have their names and shapes.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, try_to_load_from_cache
from loopback_hub import Hub, serving
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from dgbench import cli
from mfuser.towers.files import HubFile
from mfuser.towers.given import difference
from mfuser.towers.loading import load_tower
from mfuser.towers.table import TOWERS
from mfuser.towers.vit import VisionEncoder
from mfuser.towers.weights import require

PUBLISHED = [name for name, row in TOWERS.items() if row.files]
Shapes = dict[str, tuple[int, ...]]


@functools.cache
def layout(name: str) -> Shapes:
    """Names and shapes of a tower's published file."""
    import open_clip
    import timm

    row = TOWERS[name]
    model = {"eva02_l_224": "EVA02-L-14"}.get(name, row.text.open_clip if row.text else None)
    with torch.device("meta"):
        if model is None:
            state = timm.create_model(row.timm, num_classes=0).state_dict()
        else:
            state = open_clip.create_model(model, pretrained=None, load_weights=False, device="meta").state_dict()
    return {key: tuple(value.shape) for key, value in state.items() if "attn_mask" not in key}


def written(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16", size: int = 2) -> Path:
    """Write a safetensors file of zeros that takes no room: a head, then a hole."""
    head, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + size * torch.Size(shape).numel()
        head[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return path


def weights(name: str) -> HubFile:
    row = TOWERS[name].weights
    assert row is not None
    return row


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving({}) as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("DGBENCH_OFFLINE", "1")
        yield server


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments], prog_name="dgbench")


def refused(*arguments: str | Path) -> str:
    done = run(*arguments)
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.stderr
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    return done.stderr


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_a_tower_is_in_its_published_file_and_no_other_is(name: str, tmp_path: Path) -> None:
    assert difference(name, weights(name), written(tmp_path / "model.safetensors", layout(name))) is None


@pytest.mark.parametrize(
    ("name", "other", "reason"),
    [
        ("dinov2_s", "dinov2_b", "`cls_token` is 768, the tower's is 384"),
        ("dinov2_l", "dinov2_l_reg4", "`pos_embed` is 1369x1024, the tower's is 1370x1024"),
        ("dinov2_l_reg4", "dinov2_l", "it has no tensor `reg_token`"),
        ("dinov2_l", "dinov3_l", "it has no tensor `pos_embed`"),
        ("eva02", "eva02_l_224", "`visual.trunk.pos_embed` is 257x1024, the tower's is 577x1024"),
        ("siglip", "siglip2", "the tower's is 576x1024"),
        ("clip_b", "eva02_b", "it has no tensor `visual.class_embedding`"),
    ],
)
def test_another_towers_file_is_told_by_what_differs(name: str, other: str, reason: str, tmp_path: Path) -> None:
    assert reason in (difference(name, weights(name), written(tmp_path / "model.safetensors", layout(other))) or "it fits")


def test_a_tensor_that_the_tower_has_not_is_named(tmp_path: Path) -> None:
    file = written(tmp_path / "model.safetensors", {**layout("dinov2_s"), "blocks.12.norm1.weight": (384,)})
    assert difference("dinov2_s", weights("dinov2_s"), file) == "`blocks.12.norm1.weight` is no tensor of the tower's"


def test_a_given_file_is_copied_to_where_the_tower_is_loaded_from(hub: Hub, tmp_path: Path) -> None:
    shapes = layout("dinov2_s")
    done = run("download", "dinov2_s", "--from", written(tmp_path / "mine.safetensors", shapes), "--json")
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)
    assert (row["name"], row["state"], row["checked"]) == ("dinov2_s", "copied", "names and shapes")
    file = weights("dinov2_s")
    assert row["path"] == try_to_load_from_cache(file.repo, file.file, cache_dir=constants.HF_HUB_CACHE) == str(file.where)
    assert Path(row["path"]).read_bytes() == (tmp_path / "mine.safetensors").read_bytes()
    tower = VisionEncoder("dinov2_s", (28, 28))
    load_tower("dinov2_s", require(["dinov2_s"])["dinov2_s"], {"trunk": tower.trunk})
    assert not any(parameter.is_meta for parameter in tower.parameters())
    assert not hub.requests
    (again,) = json.loads(run("download", "dinov2_s", "--json").stdout)
    assert again["state"] == "here"


def test_a_file_of_pytorch_is_kept_as_safetensors(hub: Hub, tmp_path: Path) -> None:
    state = {key: torch.zeros(shape, dtype=torch.float16) for key, shape in layout("dinov2_s").items()}
    state["norm.bias"] += 3
    torch.save({"state_dict": state}, tmp_path / "mine.pth")
    (row,) = json.loads(run("download", "dinov2_s", "--from", tmp_path / "mine.pth", "--json").stdout)
    assert row["state"] == "copied"
    loaded = load_file(row["path"])
    assert loaded.keys() == state.keys()
    assert torch.equal(loaded["norm.bias"], state["norm.bias"])


class Hostile:
    """Unpickled by `pickle`, it makes the folder it was given."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_a_file_of_pytorch_that_holds_more_than_tensors_is_refused_and_runs_nothing(hub: Hub, tmp_path: Path) -> None:
    torch.save({"state_dict": {"cls_token": torch.zeros(1)}, "meta": Hostile(tmp_path / "was-run")}, tmp_path / "bad.pth")
    said = refused("download", "dinov2_s", "--from", tmp_path / "bad.pth")
    assert f"{tmp_path}/bad.pth is not `dinov2_s`: it is damaged, or holds more than tensors" in said
    assert not (tmp_path / "was-run").exists()


def test_a_truncated_file_is_refused_by_name(hub: Hub, tmp_path: Path) -> None:
    file = written(tmp_path / "cut.safetensors", layout("dinov2_s"))
    os.truncate(file, file.stat().st_size // 2)
    said = refused("download", "dinov2_s", "--from", file)
    assert said.startswith(f"error: {file} is not `dinov2_s`: it cannot be read: ")


def test_a_file_that_fits_none_of_the_towers_says_how_it_differs_from_each(hub: Hub, tmp_path: Path) -> None:
    said = refused("download", "dinov2_s", "dinov3_s", "--from", written(tmp_path / "b.safetensors", layout("dinov2_b")))
    assert "b.safetensors is not `dinov2_s`: `cls_token` is 768, the tower's is 384; not `dinov3_s`: " in said
    assert "dgbench models" in said


def test_a_file_of_another_kind_is_refused_and_not_passed_over(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "weights.zip").write_bytes(b"PK")
    said = refused("download", "dinov2_s", "--from", tmp_path / "weights.zip")
    assert said.startswith(
        f"error: {tmp_path}/weights.zip is no file of a tower by its name\n\nhint: weights end in .safetensors, "
    )


def test_files_in_a_given_folder_go_to_the_towers_that_they_fit(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for number, name in enumerate(("dinov3_s", "dinov2_b", "dinov2_s")):
        written(folder / f"{number}.safetensors", layout(name))
    (folder / "notes.txt").write_text("not weights")
    planned = run("download", "dinov2_s", "dinov3_s", "--from", folder, "--dry-run", "--json")
    assert [need["state"] for need in json.loads(planned.stdout)["needs"]] == ["to copy", "to copy"]
    rows = json.loads(run("download", "dinov2_s", "dinov3_s", "--from", folder, "--json").stdout)
    assert [row["state"] for row in rows] == ["copied", "copied"]
    for row in rows:
        with safe_open(row["path"], framework="pt") as file:
            assert {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())} == layout(row["name"])


def test_the_published_hash_is_asked_for_where_there_is_a_network(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DGBENCH_OFFLINE")
    file, row = written(tmp_path / "mine.safetensors", layout("dinov2_s")), weights("dinov2_s")
    hub.files[f"{row.repo}/{row.file}"] = file.read_bytes()[:-1] + b"\1"
    said = refused("download", "dinov2_s", "--from", file)
    assert f"mine.safetensors is not the published file of `dinov2_s`, {row.repo}/{row.file}: its sha256 is " in said
    hub.files[f"{row.repo}/{row.file}"] = file.read_bytes()
    (taken,) = json.loads(run("download", "dinov2_s", "--from", file, "--json").stdout)
    assert (taken["state"], taken["checked"]) == ("copied", "size and sha256")
    assert not hub.bodies()


def test_a_copied_file_stays_when_the_rest_of_its_repository_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = written(tmp_path / "mine.safetensors", layout("siglip2_b"), "I8", 1)
    without = run("download", "siglip2_b", "--from", mine)
    assert without.exit_code == 1
    assert "not on this machine: timm/ViT-B-16-SigLIP2-512/tokenizer.json" in without.stderr
    monkeypatch.delenv("DGBENCH_OFFLINE")
    files = TOWERS["siglip2_b"].files
    hub.files |= {f"{files[0].repo}/{files[0].file}": mine.read_bytes(), f"{files[1].repo}/{files[1].file}": b"words"}
    assert run("download", "siglip2_b").exit_code == 0
    assert all(file.where for file in files)
    assert [path for path, _ in hub.bodies()] == [f"{files[1].repo}/{files[1].file}"]

"""Downloads as a user types them, from a Hub on the loopback that can be told to fail."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden_files import VARIANTS, description
from loopback_hub import Hub, serving
from typer.testing import CliRunner, Result

import mfuser
from dgbench import cli
from mfuser.towers.files import HubFile
from mfuser.towers.hub import download, models
from mfuser.towers.loading import load_tower, published
from mfuser.towers.table import TOWERS
from mfuser.towers.vit import VisionEncoder
from mfuser.towers.weights import WeightsNotFound, files, require

ROOT = Path(__file__).parents[1]
DINO = TOWERS["dinov2_l"].weights
assert DINO is not None
NAME = f"{DINO.repo}/{DINO.file}"
CONTENT = bytes(range(256)) * 4000
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    rows = [row for tower in TOWERS for row in files(tower)]
    with serving({f"{row.repo}/{row.file}": CONTENT for row in rows}) as server:
        yield server


@pytest.fixture
def near(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The same Hub for calls in this process."""
    from huggingface_hub import constants

    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "DGBENCH_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return hub


def program(*arguments: str, folder: Path, endpoint: str = "http://127.0.0.1:9", **more: str) -> subprocess.CompletedProcess[str]:
    """Run the program as a user does, with a cache of its own, no login and no Hub but the given one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DGBENCH_"))}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "home"),
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        **more,
    }
    command = [sys.executable, "-m", "dgbench", *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def refused(done: subprocess.CompletedProcess[str] | Result, cache: Path) -> tuple[str, str]:
    """The message and hint of a failed download, which left no part of a file behind."""
    code = done.exit_code if isinstance(done, Result) else done.returncode
    assert code == 1, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    kept = [path for path in cache.rglob("*") if path.is_file() and path.read_bytes()[:4] == CONTENT[:4]]
    assert not [*kept, *cache.rglob("*.incomplete"), *(path for path in cache.rglob("*") if path.is_symlink())]
    message, _, hint = done.stderr.partition("\n\nhint: ")
    return message[message.index("error: ") :], hint.rstrip()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), prog_name="dgbench")


def test_a_file_is_fetched_once_checked_and_then_already_here(hub: Hub, tmp_path: Path) -> None:
    done = program("download", "dinov2_l", "tiny", "--json", folder=tmp_path, endpoint=hub.url)
    assert done.returncode == 0, done.stderr
    first, scratch = json.loads(done.stdout)
    assert (first["state"], first["bytes"], first["checked"]) == ("downloaded", len(CONTENT), "size and sha256")
    assert Path(first["path"]).read_bytes() == CONTENT
    assert Path(first["path"]).is_relative_to(tmp_path / "cache")
    assert scratch == {**dict.fromkeys(first), "name": "tiny", "state": "nothing to fetch"}
    assert done.stderr == f"dinov2_l: {NAME} (1.2 GB), licence Apache-2.0\n"
    hub.requests.clear()
    again = program("download", "dinov2_l", folder=tmp_path, endpoint=hub.url)
    assert again.returncode == 0, again.stderr
    assert "already here" in again.stdout
    assert again.stderr == ""
    assert not hub.requests


def test_models_says_what_is_on_the_disk(near: Hub) -> None:
    (row,) = download(["dinov2_l"])
    listed = {model["name"]: model for model in json.loads(run("models", "--json").stdout)}
    assert listed["dinov2_l"]["path"] == row.path
    assert listed["siglip"]["path"] is None
    assert listed["siglip"]["missing"] == ["open_clip_model.safetensors", "tokenizer.json"]
    # on a narrow terminal the repositories stand in a second table below
    shown = run("models").stdout
    lines = {line.split()[0]: line for line in reversed(shown.splitlines())}
    assert lines["dinov2_l"].split()[1:6] == ["vfm", "1.2", "GB", "Apache-2.0", "here"]
    assert "not here" in lines["siglip"]
    assert any(line.startswith("tiny ") and line.endswith("trained from scratch") for line in shown.splitlines())


def test_a_cut_transfer_goes_on_where_it_stopped(near: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # what arrived since the last chunk is lost
    near.fault = "cut"
    (row,) = download(["dinov2_l"])
    assert row.checked == "size and sha256"
    assert near.bodies() == [(NAME, None), (NAME, f"bytes={len(CONTENT) // 2}-")]


def test_a_small_file_is_checked_by_gits_hash(near: Hub) -> None:
    near.fault = "small"
    (row,) = download(["dinov2_l"])
    assert row.checked == "size and git-sha1"


def test_siglip_brings_its_tokenizer(near: Hub) -> None:
    assert [row.file for row in download(["siglip"])] == ["open_clip_model.safetensors", "tokenizer.json"]
    assert next(row for row in models() if row.name == "siglip").missing == ()


def test_a_file_that_is_not_what_the_hub_states_is_refused_and_removed(hub: Hub, tmp_path: Path) -> None:
    hub.fault = "changed"
    message, hint = refused(program("download", "dinov2_l", folder=tmp_path, endpoint=hub.url), tmp_path / "cache")
    changed = hashlib.sha256(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])).hexdigest()
    assert message == f"error: {NAME} is damaged: its sha256 is {changed}, the Hub states {SHA}"
    assert hint.startswith("it is removed; run again: dgbench download dinov2_l")
    hub.fault = None
    done = program("download", "dinov2_l", folder=tmp_path, endpoint=hub.url)
    assert done.returncode == 0, done.stderr


def test_a_truncated_file_is_refused_and_removed(near: Hub, tmp_path: Path) -> None:
    near.fault = "short"
    message, hint = refused(run("download", "dinov2_l"), tmp_path / "cache")
    assert message.startswith(f"error: {NAME} did not arrive whole: file should be of size 1024000 but has size 512000")
    assert hint == "it is removed; run again: dgbench download dinov2_l"
    near.fault = None
    assert run("download", "dinov2_l").exit_code == 0


def test_a_file_damaged_in_the_cache_is_found_when_it_is_linked_again(near: Hub, tmp_path: Path) -> None:
    # a user who deletes the name of a damaged file leaves its blob, which huggingface_hub takes for whole
    path = Path(download(["dinov2_l"])[0].path or "")
    blob = path.resolve()
    path.unlink()
    blob.write_bytes(b"x" * len(CONTENT))
    message, _ = refused(run("download", "dinov2_l"), tmp_path / "cache")
    assert "is damaged: its sha256" in message
    assert run("download", "dinov2_l").exit_code == 0


def test_quiet_says_nothing_on_stderr(near: Hub) -> None:
    done = run("download", "dinov2_l", "--quiet")
    assert done.exit_code == 0
    assert done.stderr == ""


def test_what_was_downloaded_is_what_a_tower_is_filled_from(near: Hub) -> None:
    from safetensors.torch import save
    from timm.models.vision_transformer import VisionTransformer

    small = {"embed_dim": 64, "depth": 2, "num_heads": 2, "init_values": 1e-1}
    theirs = VisionTransformer(img_size=42, patch_size=14, num_classes=0, **small)
    near.files[NAME] = save(theirs.state_dict())
    assert run("download", "dinov2_l").exit_code == 0
    tower = VisionEncoder("dinov2_l", (42, 42), **small)
    load_tower("dinov2_l", require(["dinov2_l"])["dinov2_l"], {"trunk": tower.trunk})
    for name, value in theirs.state_dict().items():
        assert torch.equal(tower.trunk.state_dict()[name], value), name


@pytest.fixture(scope="module")
def published_dino() -> tuple[dict[str, torch.Tensor], bytes]:
    """The state of timm's own DINOv2 at its published size, and the file on the Hub."""
    import timm
    from safetensors.torch import save

    state = timm.create_model("vit_large_patch14_dinov2", num_classes=0).state_dict()  # 518 pixels, 37 x 37 positions
    return state, save(state)


@pytest.mark.full
def test_a_file_of_the_published_size_is_downloaded_and_built_from(
    near: Hub, published_dino: tuple[dict[str, torch.Tensor], bytes], tmp_path: Path
) -> None:
    theirs, near.files[NAME] = published_dino
    done = program("download", "dinov2_l", "--json", folder=tmp_path, endpoint=near.url)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["bytes"] > 1.2e9
    model = mfuser.build("source-only", backbone="dinov2_l", image_size=(112, 112))
    for name, value in theirs.items():
        if name != "pos_embed":
            assert torch.equal(model.encoder.trunk.state_dict()[name], value), name
    assert model.encoder.trunk.pos_embed.shape == (1, 65, 1024)
    assert model(torch.rand(1, 3, 112, 112)).shape == (1, 19, 112, 112)


@pytest.mark.full
@pytest.mark.parametrize("vlm", ["eva02", "clip", "siglip"])
def test_a_pair_of_towers_of_the_published_size_is_downloaded_and_built_from(
    vlm: str, near: Hub, published_dino: tuple[dict[str, torch.Tensor], bytes], tmp_path: Path
) -> None:
    import open_clip
    from safetensors.torch import save

    row, text = TOWERS[vlm].weights, TOWERS[vlm].text
    assert row is not None
    assert text is not None
    near.files[NAME] = published_dino[1]
    # the file on the Hub is the state of open_clip's own model
    state = open_clip.create_model(text.open_clip, pretrained=None, load_weights=False).state_dict()
    near.files[f"{row.repo}/{row.file}"] = save({name: value.contiguous() for name, value in state.items()})
    done = program("download", "dinov2_l", vlm, "--json", folder=tmp_path, endpoint=near.url)
    assert done.returncode == 0, done.stderr
    assert sum(part["bytes"] for part in json.loads(done.stdout)) > 2.8e9
    near.files.clear()
    variant = next(name for name, ours in VARIANTS.items() if ours == vlm)
    model = mfuser.build("mfuser", vlm=vlm, token_ids=description(f"layout_{variant}")["tokens"])
    for part, module in (("trunk", model.vlm.trunk), ("text", model.text.tower)):
        ours = module.state_dict()
        for name in [name for name in ours if ".11." in name or name.startswith("norm.")]:
            assert torch.equal(ours[name].squeeze(), published(vlm, part)(name).read(state).squeeze()), name
    expected = state["logit_scale"].exp() if vlm == "siglip" else torch.tensor(1 / 0.07)
    assert torch.allclose(model.logit_scale, expected)
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("status", "code", "message", "hint"),
    [
        (401, None, "it does not know you, or the repository is private or gone (401)", "hf auth login"),
        (401, "RepoNotFound", "it does not know you, or the repository is private or gone (401)", "hf auth login"),
        (403, None, "your login may not read it (403)", "settings/tokens"),
        (403, "GatedRepo", f"{NAME} is gated: its owner asks you to accept the licence", f"/{DINO.repo}, log in with: hf"),
        (404, "EntryNotFound", "it has no such file (404)", "HF_ENDPOINT"),
        (418, None, "it answers otherwise (418)", "status.huggingface.co"),
    ],
)
def test_a_refusal_says_what_to_do(status: int, code: str | None, message: str, hint: str, near: Hub, tmp_path: Path) -> None:
    near.fault, near.error_code = status, code
    error, advice = refused(run("download", "dinov2_l"), tmp_path / "cache")
    assert message in error
    assert NAME in error
    assert hint in advice
    assert advice.endswith("run again: dgbench download dinov2_l") or status == 404
    assert not near.bodies()


def test_a_login_in_the_address_of_a_hub_is_not_told(near: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    address = constants.ENDPOINT.replace("://", "://user:secret@")
    for endpoint, fault in ((address, 404), (address, "page"), ("http://user:secret@127.0.0.1:9", None)):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr("time.sleep", lambda _: None)
        near.fault = fault
        result = run("download", "dinov2_l")
        assert result.exit_code == 1
        assert endpoint.replace("user:secret@", "") in result.stderr
        assert "secret" not in result.stderr


@pytest.mark.parametrize("token", ["hf_tökén", "hf_abc def"])
def test_a_token_that_cannot_be_sent_is_told_but_not_shown(token: str, near: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    result = run("download", "dinov2_l")
    assert result.exit_code == 1
    assert "error: the token of the Hub holds characters that no token has" in result.stderr
    assert not [part for part in ("tök", "abc", "def ") if part in result.stderr]
    assert not near.requests


def test_one_tower_that_cannot_be_fetched_does_not_stop_the_others(near: Hub, tmp_path: Path) -> None:
    del near.files[next(name for name in near.files if DINO.repo in name)]
    result = run("download", "dinov2_l", "tiny", "--json")
    assert result.exit_code == 1
    assert [row["name"] for row in json.loads(result.stdout)] == ["tiny"]
    assert "it has no such file" in result.stderr


def test_a_hub_that_is_busy_is_asked_again(near: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    near.fault = 503

    def recover(_: float) -> None:
        near.fault = None

    monkeypatch.setattr("time.sleep", recover)
    (row,) = download(["dinov2_l"])
    assert row.checked == "size and sha256"


def test_no_network_is_known_at_once(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        message, hint = refused(program("download", "eva02", folder=tmp_path, endpoint=endpoint), tmp_path / "cache")
    assert message.startswith(f"error: no connection to {endpoint} for timm/eva02_large_patch14_clip_336")
    assert "HTTPS_PROXY" in hint
    assert "HF_HUB_CACHE" in hint


@pytest.mark.parametrize("switch", ["DGBENCH_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_names_the_files_and_asks_nobody(switch: str, near: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if switch == "DGBENCH_OFFLINE":
        monkeypatch.setenv(switch, "1")
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read when it is imported
    message, hint = refused(run("download", "clip", "siglip"), tmp_path / "cache")
    assert message.startswith(f"error: {switch}=1 forbids downloads; not on this machine: ")
    for tower in ("clip", "siglip"):
        for row in files(tower):
            assert f"{row.repo}/{row.file} ({row.size})" in message
    assert "where there is a network, run: dgbench download clip siglip" in hint
    assert f"the files go to {tmp_path / 'cache'}; copy that folder" in hint
    assert not near.requests


def test_offline_opens_no_socket(near: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    download(["dinov2_l"])

    def no_sockets(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", no_sockets)
    monkeypatch.setattr(socket, "create_connection", no_sockets)
    monkeypatch.setenv("DGBENCH_OFFLINE", "1")
    assert [row.state for row in download(["dinov2_l", "tiny"])] == ["here", "nothing to fetch"]
    models()
    with pytest.raises(WeightsNotFound, match="forbids downloads"):
        download(["dinov2_l", "eva02"])
    with pytest.raises(WeightsNotFound, match="dgbench download eva02"):
        require(["dinov2_l", "eva02"])


def test_a_full_disk_is_known_before_the_transfer(near: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(WeightsNotFound, match="no room for .*: it has 1,024,000 bytes, .* 5 free; .*HF_HUB_CACHE"):
        download(["dinov2_l"])
    assert not near.bodies()


def test_an_answer_of_something_else_than_a_hub_is_said(near: Hub, tmp_path: Path) -> None:
    near.fault = "page"
    message, hint = refused(run("download", "dinov2_l"), tmp_path / "cache")
    assert message.startswith(f"error: {near.url} does not answer as a Hub does: ")
    assert "HF_ENDPOINT" in hint


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("eva2", "unknown tower or domain `eva2`", "did you mean `eva02`?"),
        ("citiscapes", "unknown tower or domain `citiscapes`", "did you mean `cityscapes`?"),
        ("streets-fog@0.5", "`streets-fog@0.5` is rendered here: there is nothing to download", "dgbench data show streets-fog"),
    ],
)
def test_names_that_are_no_towers(name: str, message: str, hint: str, near: Hub, tmp_path: Path) -> None:
    error, advice = refused(run("download", "dinov2_l", name), tmp_path / "cache")
    assert message in error
    assert hint in advice
    assert not near.requests  # a typing mistake costs no download of the other names


def test_no_name_is_a_usage_error() -> None:
    assert run("download").exit_code == 2


def test_a_file_is_where_huggingface_hub_finds_it(near: Hub, tmp_path: Path) -> None:
    from huggingface_hub import try_to_load_from_cache

    download(["siglip"])
    for row in [file for tower in TOWERS.values() for file in tower.files]:
        theirs = try_to_load_from_cache(row.repo, row.file, cache_dir=tmp_path / "cache")
        assert row.where == (Path(theirs) if isinstance(theirs, str) else None)
    (row,) = files("siglip")[:1]
    assert row.where is not None
    row.where.resolve().unlink()  # the blob: a name that leads nowhere stays
    assert row.where is None
    (tmp_path / "cache" / f"models--{row.repo.replace('/', '--')}" / "refs" / "main").write_bytes(b"\xff")
    assert row.where is None


def test_every_published_tower_states_its_size_and_licence() -> None:
    for row in [file for tower in TOWERS.values() for file in tower.files]:
        assert row.gigabytes > 0
        assert row.licence != HubFile("", "", 0).licence, row
    assert {row.name: row.role for row in models()}.items() >= {"dinov2_l": "vfm", "siglip": "vlm", "tiny": "both"}.items()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_tiny_patch61_224", "timm has no model `vit_tiny_patch61_224`; did you mean"),
        ("timm:resnet18", "one of timm's `resnet` and cannot be stepped block by block"),
        ("timm:vit_base_patch16_gap_224", "timm has no weights of `vit_base_patch16_gap_224` on the Hub"),
    ],
)
def test_models_of_timms_that_are_no_towers(name: str, message: str, near: Hub, tmp_path: Path) -> None:
    error, _ = refused(run("download", "dinov2_l", name), tmp_path / "cache")
    assert message in error
    assert not near.requests


def test_a_model_of_timms_is_fetched_from_where_timm_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    (row,) = files("timm:vit_tiny_patch16_224")
    with serving({f"{row.repo}/{row.file}": CONTENT}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        result = run("download", "timm:vit_tiny_patch16_224")
    assert result.exit_code == 0
    assert require(["timm:vit_tiny_patch16_224"])["timm:vit_tiny_patch16_224"].read_bytes() == CONTENT

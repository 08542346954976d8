"""A run goes to a Hub and comes back: the same files, nothing that was not named, and nothing damaged."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from loopback_hub import Hub, serving
from typer.testing import CliRunner

from dgbench import cli, results, share
from dgbench.errors import DgbenchError

REPO = "me/tiny"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a trained and scored run, made once."""
    folder = tmp_path_factory.mktemp("trained")
    settings = ["train.steps=1", "train.checkpoint_every=1", "data.train_images=2", "data.val_images=2"]
    command = [
        sys.executable,
        "-m",
        "dgbench",
        "train",
        "streets/smoke",
        "--out",
        str(folder / "run"),
        "--quiet",
        "--set",
        *settings,
    ]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "run" / "photo-overlay.png").write_bytes(b"a picture of Cityscapes")
    return folder / "run"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    with serving({}) as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.delenv("DGBENCH_OFFLINE", raising=False)
        yield made


def called(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_run_comes_back(run: Path, hub: Hub, tmp_path: Path) -> None:
    done = called("push", str(run), REPO, "--yes")
    assert done.exit_code == 0, done.stderr
    assert hub.private == {REPO: True}
    assert "private repository" in done.stderr

    back = called("pull", REPO, "--out", str(tmp_path / "back"))
    assert back.exit_code == 0, back.stderr
    sent, came = content(run), content(tmp_path / "back")
    assert came.items() <= sent.items()
    assert {name for name in sent if name not in came} == {"photo-overlay.png", ".training.lock"} | {
        name for name in sent if name.endswith("optimizer.pt")
    }
    assert [record.id for record in results.query(tmp_path / "back")] == [record.id for record in results.query(run)]
    assert called("eval", str(tmp_path / "back"), "--targets", "streets-city", "--quiet").exit_code == 0


def test_the_card_has_the_scores_in_the_librarys_own_entries(run: Path, hub: Hub) -> None:
    from huggingface_hub import ModelCard

    assert called("push", str(run), REPO, "--yes").exit_code == 0
    card = ModelCard(hub.files[f"{REPO}/README.md"].decode())
    scores = {record.target: record.miou for record in results.query(run) if record.kind == "eval"}
    entries = card.data.eval_results
    assert {entry.dataset_name: entry.metric_value for entry in entries} == {
        name: pytest.approx(100 * miou, abs=0.01) for name, miou in scores.items() if miou is not None
    }
    assert yaml.safe_load(hub.files[f"{REPO}/README.md"].decode().split("---")[1])["library_name"] == "dgbench"


def test_pictures_go_only_where_asked(run: Path, hub: Hub) -> None:
    first = share.plan(run, REPO)
    assert first.left_out == ("photo-overlay.png",)
    assert "photo-overlay.png" not in [file.file for file in first.files]
    assert "photo-overlay.png" in [file.file for file in share.plan(run, REPO, images=True).files]


def test_what_would_be_uploaded_is_said_first(run: Path, hub: Hub) -> None:
    dry = called("push", str(run), REPO, "--dry-run")
    assert dry.exit_code == 0
    assert "model.safetensors" in dry.stdout
    assert "photo-overlay.png" in dry.stdout  # left out, by name
    asked = called("push", str(run), REPO)
    assert asked.exit_code == 2
    assert "--yes" in asked.stderr
    assert not hub.requests


def test_a_private_run_does_not_go_to_a_public_repository(run: Path, hub: Hub) -> None:
    hub.private[REPO] = False
    done = called("push", str(run), REPO, "--yes")
    assert done.exit_code == 1
    assert "is public" in done.stderr
    assert not hub.files
    assert called("push", str(run), REPO, "--yes", "--public").exit_code == 0


@pytest.mark.parametrize("name", ["record-", "confusion-", "model.safetensors", "recipe.yaml"])
def test_a_damaged_file_is_no_run(run: Path, hub: Hub, tmp_path: Path, name: str) -> None:
    assert called("push", str(run), REPO, "--yes").exit_code == 0
    place = next(path for path in hub.files if f"/{name}" in path)
    data = bytearray(hub.files[place])
    data[len(data) // 2] ^= 1
    hub.files[place] = bytes(data)
    with pytest.raises(DgbenchError, match=f"{REPO}: .*{name}") as told:
        share.pull(REPO, tmp_path / "back")
    assert str(tmp_path) not in told.value.message
    assert not [path for path in tmp_path.iterdir() if path.name != "hub-cache"]


@pytest.mark.parametrize(("status", "said"), [(401, "log in"), (403, "log in"), (404, "no repository"), (500, "500")])
def test_a_refusal_is_one_line(run: Path, hub: Hub, tmp_path: Path, status: int, said: str) -> None:
    hub.fault = status
    done = called("push", str(run), REPO, "--yes")
    assert done.exit_code == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "../x", "me/", "https://huggingface.co/me/x"])
def test_names_that_no_repository_has_are_refused_without_a_connection(run: Path, hub: Hub, name: str) -> None:
    assert called("push", str(run), name, "--yes").exit_code == 1
    assert called("pull", name).exit_code == 1
    assert not hub.requests


def test_a_run_that_is_there_is_not_overwritten(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    done = called("pull", REPO, "--out", str(tmp_path / "mine"))
    assert done.exit_code == 1
    assert "exists" in done.stderr

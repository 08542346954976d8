"""What a command lacks is named at once: every domain and every tower, with the command that fetches them, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dgbench import cli, names
from dgbench.recipe import dump, load_recipe
from mfuser.methods import names as method_names
from mfuser.ops import dispatch
from mfuser.towers.table import TOWERS, plain, with_text

ROOT = Path(__file__).parents[1]

# command -> a piece of what it says
WRONG = {
    "eval --targets cityscapes bdd mapillary": "dgbench download cityscapes bdd100k mapillary",
    "train --vlm eva02": "dgbench download dinov2_l eva02 gta5 cityscapes bdd100k mapillary",
    "train --device mps": "device `mps` is not supported",
    "train mfuser --vlm nosuch": "nosuch",
    "train nosuch": "unknown method",
    "train nosuch.yaml": "no recipe file nosuch.yaml",
    "train --resume nosuch": "no run `nosuch`",
    "train --source nosuch": "unknown domain `nosuch`",
    "eval": "no run with checkpoint in runs",
    "eval nosuchrun": "no run `nosuchrun`",
    "eval --checkpoint nosuch": "no run `nosuch`",
    "eval --targets nosuch": "unknown domain `nosuch`",
    "eval --protocol nosuch": "unknown protocol `nosuch`",
    "predict nosuch.jpg": "no run with checkpoint in runs",
    "data show nosuch": "unknown domain `nosuch`",
    "data stats nosuch": "unknown domain `nosuch`",
    "data verify nosuch": "unknown domain `nosuch`",
    "data export nosuch --as cityscapes --out x": "unknown domain `nosuch`",
    "data show streets-night --label-map nosuch": "unknown label map `nosuch`",
    "data show cityscapes": "`cityscapes` is not on this disk",
    "profile nosuch": "unknown method or recipe `nosuch`",
    "profile mfuser/nosuch": "unknown recipe `mfuser/nosuch`",
    "profile nosuch.yaml": "no recipe file nosuch.yaml",
    "profile --vlm nosuch": "vlm `nosuch` is unknown",
    "profile --vlm dinov2_l": "`dinov2_l` has no text tower",
    "profile --fusion --vfm nosuch": "vfm `nosuch` is unknown",
    "profile --device abacus": "unknown device `abacus`",
    "kernels bench --op nosuch": "unknown operator `nosuch`",
    "kernels bench --backend nosuch": "unknown backend `nosuch`",
    "convert nosuch.pth out": "no such checkpoint: nosuch.pth",
    "convert nosuch.pth out --token-ids nosuch": "nosuch cannot be read as JSON",
    "download nosuch": "unknown tower or domain `nosuch`",
    "protocols nosuch": "unknown protocol `nosuch`",
    "train --lr 3": "use --set optim.lr=NUMBER",
}


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, list(words), prog_name="dgbench")
    assert "Traceback" not in result.stderr
    return result.exit_code, result.stderr


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def test_what_is_wrong_or_missing_is_told_before_torch_is_imported(here: Path) -> None:
    code = f"""
import json, sys
from typer.testing import CliRunner
from dgbench.cli import app
told = {{}}
for command in {list(WRONG)!r}:
    result = CliRunner().invoke(app, command.split(), prog_name="dgbench")
    told[command] = [result.exit_code, result.stderr, sorted({{"torch", "timm", "datasets"}} & set(sys.modules))]
print(json.dumps(told))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(here / "hub")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    silent = {command: stderr for command, (_, stderr, _) in told.items() if WRONG[command] not in stderr}
    assert not silent
    assert {command: heavy for command, (_, _, heavy) in told.items() if heavy} == {}
    assert {code for code, _, _ in told.values()} == {1, 2}
    assert not list(here.iterdir())


def test_eval_names_every_missing_domain_and_that_there_is_no_run() -> None:
    for words in (
        ("cityscapes", "bdd", "mapillary"),
        ("cityscapes,bdd,mapillary",),
        ("cityscapes", "streets-city", "bdd,mapillary"),
    ):
        code, error = run("eval", "--targets", *words)
        assert code == 1
        assert error.startswith(
            "error: no run with checkpoint in runs\nand not on this disk: targets `cityscapes`, `bdd100k`, `mapillary`\n"
        )
        assert "\nrun: dgbench download cityscapes bdd100k mapillary;" in error


def test_eval_of_a_run_names_its_own_source_and_targets(here: Path) -> None:
    dump(load_recipe("mfuser/eva02-city"), here / "runs" / "a" / "recipe.yaml")
    (here / "runs" / "a" / "checkpoint").mkdir()
    code, error = run("eval")
    assert code == 1
    assert "error: not on this disk: source `cityscapes`; targets `bdd100k`, `mapillary`, `acdc`\n" in error
    assert "run: dgbench download cityscapes bdd100k mapillary acdc;" in error


def test_train_names_weights_source_and_targets_in_one_list(here: Path) -> None:
    code, error = run("train", "--vlm", "eva02")
    assert code == 1
    message, hint = error.split("\n\nhint: ")
    assert message.startswith("error: not on this disk: weights timm/vit_large_patch14_dinov2")
    assert "open_clip_model.safetensors (1.7 GB); source `gta5`; targets `cityscapes`, `bdd100k`, `mapillary`" in message
    assert hint.startswith(
        "run: dgbench download dinov2_l eva02 gta5 cityscapes bdd100k mapillary; data is looked for in data (--root"
    )
    assert str(here / "hub") in hint
    assert "targets" not in run("train", "--vlm", "eva02", "--no-eval")[1]
    assert not (here / "runs").exists()


def test_weights_that_are_here_are_not_asked_for(here: Path) -> None:
    for name in ("vit_large_patch14_dinov2.lvd142m/model", "eva02_large_patch14_clip_336.merged2b_s6b_b61k/open_clip_model"):
        repo, file = name.split("/")
        # as huggingface_hub lays its cache out
        folder = here / "hub" / f"models--timm--{repo}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        (folder / "snapshots" / ("0" * 40) / f"{file}.safetensors").touch()
    assert run("train", "--vlm", "eva02")[1].startswith("error: not on this disk: source `gta5`; targets")


@pytest.mark.parametrize("made", ["data/cityscapes", "data/cityscapes/.cache"])
def test_an_empty_folder_counts_as_missing(made: str, here: Path) -> None:
    (here / made).mkdir(parents=True)
    assert "not on this disk: target `cityscapes`\n" in run("eval", "--targets", "cityscapes")[1]


def test_a_folder_with_other_files_keeps_its_own_reason(here: Path) -> None:
    (here / "data" / "cityscapes" / "leftImg8bit").mkdir(parents=True)
    error = run("eval", "--targets", "cityscapes", "idd")[1]
    assert "and not on this disk: target `idd`\n" in error
    assert "and `cityscapes` val: no image matches data/cityscapes/leftImg8bit/val/" in error
    assert "run: dgbench download idd;" in error


def test_the_data_root_that_is_given_is_looked_at(here: Path) -> None:
    (here / "sets").mkdir()
    assert "data is looked for in sets (--root" in run("eval", "--targets", "idd", "--root", "sets")[1]


def test_nobody_is_sent_to_fetch_towers_that_do_not_fit(here: Path) -> None:
    code, error = run("train", "streets/smoke", "--set", "method.vfm=dinov2_l")
    assert code == 1
    assert "`dinov2_l` has 24 blocks and `tiny` 3; they must be equal" in error


# ---- names that are told without the models


def test_light_names_are_those_of_the_models() -> None:
    assert names.methods() == method_names()
    assert set(names.towers("vfm", "vlm")) == set(plain())
    assert set(names.towers("vfm", "vlm", "cnn", "mit")) == set(TOWERS)
    assert set(names.towers("vlm")) == set(with_text())
    assert (
        names.backends_as_written()
        == names.backends()
        == {op: [backend.name for backend in rows] for op, rows in dispatch.TABLE.items()}
    )


# ---- options


@pytest.mark.parametrize(
    ("typed", "instead"),
    [
        ("train --steps 3", "--set train.steps=NUMBER"),
        ("train --iters 3", "--set train.steps=NUMBER"),
        ("train --epochs 3", "--set train.steps=NUMBER (trainings are counted in steps"),
        ("train --lr 3", "--set optim.lr=NUMBER"),
        ("train --learning_rate=3", "--set optim.lr=NUMBER"),
        ("train --batch-size 3", "--set train.batch_size=COUNT"),
        ("profile --batch-size 3", "--batch COUNT"),
        ("train --gpu 1", "--device cuda:NUMBER"),
        ("train --output x", "--out PATH"),
        ("predict x.jpg --output-dir x", "--out PATH"),
        ("train --dataset x", "--source NAME and --targets NAME..."),
        ("eval --dataset x", "--targets NAME..."),
        ("eval --data-root x", "--root FOLDER"),
        ("train --encoder x", "--backbone NAME, or --vfm NAME and --vlm NAME"),
    ],
)
def test_options_of_other_programs_are_pointed_to_ours(typed: str, instead: str) -> None:
    code, error = run(*typed.split())
    assert code == 2
    assert error.startswith("error: no such option: --")
    assert f"\n\nhint: use {instead}" in error


def test_what_is_set_in_training_is_said_of_commands_that_do_not_train() -> None:
    assert (
        "hint: a training has it: dgbench train --set optim.lr=NUMBER; see `dgbench eval --help`" in run("eval", "--lr", "3")[1]
    )


def commands() -> list[tuple[str, ...]]:
    program = typer.main.get_command(cli.app)
    found: list[tuple[str, ...]] = [()]
    for name, command in program.commands.items():
        found += [(name,), *((name, inner) for inner in getattr(command, "commands", {}))]
    return found


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_has_h_and_o_and_flags_without_a_type(path: tuple[str, ...]) -> None:
    told = CliRunner().invoke(cli.app, [*path, "-h"], prog_name="dgbench")
    assert told.exit_code == 0
    assert "-h, --help" in told.stdout
    assert "bool" not in told.stdout
    assert "--out " not in told.stdout or "-o, --out " in told.stdout
    # what Rich puts behind an option on a terminal
    command, context = typer.main.get_command(cli.app), None
    for name in (None, *path):
        command = command.commands[name] if name else command
        context = typer.Context(command, parent=context, help_option_names=["-h", "--help"])
    drawn = [param.display_type_rich(context) for param in command.get_params(context) if getattr(param, "is_flag", False)]
    assert not any(drawn)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "mfuser", "--vlm", "convnext_l_clip"),
        ("train", "mfuser", "--vfm", "tiny_cnn"),
        ("train", "streets/mfuser", "--set", "method.vlm=tiny_cnn"),
        ("train", "streets/mfuser", "--set", "method.vfm=tiny_cnn"),
        ("profile", "mfuser", "--vfm", "tiny_cnn"),
    ],
)
def test_a_convolutional_tower_is_refused_where_a_transformer_is_needed(here: Path, arguments: tuple[str, ...]) -> None:
    code, error = run(*arguments)
    assert code == 1
    assert "is a convolutional network" in error

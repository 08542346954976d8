"""Completion, as a shell asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dgbench.runs import claim_run

ROOT = Path(__file__).parents[1]
DOMAINS = ["streets-game", "streets-city"]


def completed(words: str, shell: str = "bash") -> list[str]:
    """Return what a shell is offered for the last word of a line; a trailing space begins a new word."""
    typed = words.split(" ")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_DGBENCH_COMPLETE": f"complete_{shell}"}
    if shell == "bash":
        environment |= {"COMP_WORDS": words, "COMP_CWORD": str(len(typed) - 1)}
    else:
        environment |= {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    code = "from dgbench.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("before", ["", "streets-city ", "streets-city streets-fog "])
def test_every_value_of_targets_is_completed(before: str) -> None:
    offered = completed(f"dgbench eval --targets {before}")
    assert {"streets-world", "cityscapes"} <= set(offered)
    assert not set(before.split()) & set(offered), "what is there already is not offered again"


def test_a_begun_value_is_completed() -> None:
    assert completed("dgbench eval --targets streets-city streets-w") == ["streets-world"]
    assert completed("dgbench eval latest --targets streets-city --quiet --targets streets-w") == ["streets-world"]


def test_a_domain_for_pretraining_is_offered_where_it_is_shown_and_not_as_a_target() -> None:
    assert completed("dgbench data show streets-p") == ["streets-pretrain"]
    assert "streets-pretrain" not in completed("dgbench eval --targets streets-")


def test_other_shells_complete_as_well() -> None:
    assert "streets-world" in completed("dgbench eval --targets streets-city streets-w", "zsh")[-1]
    assert completed("dgbench eval --targets streets-city streets-w", "fish") == ["streets-world"]


def test_what_is_completed_is_of_the_tests_own_folder() -> None:
    assert not list(Path.cwd().iterdir())
    claim_run(Path("runs") / "mine").joinpath("recipe.yaml").touch()
    assert completed("dgbench train --resume ") == ["latest", "runs/mine"]


def test_values_end_at_the_next_flag() -> None:
    assert "streets-world" not in completed("dgbench eval --targets streets-city --device ")
    assert "streets-world" not in completed("dgbench eval --targets streets-city --device cpu ")
    assert completed("dgbench eval --targets streets-city --json ") == ["latest"]
    assert "--device" in completed("dgbench eval --targets streets-city --")


def test_commands_recipes_keys_and_domains_are_completed() -> None:
    assert completed("dgbench lea") == ["leaderboard"]
    assert "streets/mfuser" in completed("dgbench train str")
    assert completed("dgbench train --set train.steps=3 train.batch") == ["train.batch_size="]
    assert completed("dgbench data show streets-n") == ["streets-night"]
    assert completed("dgbench eval --protocol paper") == ["paper-full", "paper-half"]
    assert completed("dgbench protocols cl") == ["clouds"]


def test_towers_devices_and_backends_are_completed() -> None:
    assert completed("dgbench train --vlm s") == ["siglip_b", "siglip", "siglip2_b", "siglip2", "small"]
    assert completed("dgbench severity --corruptions mot") == ["motion_blur"]
    assert completed("dgbench profile --vfm dinov3") == ["dinov3_s", "dinov3_b", "dinov3_l"]
    assert completed("dgbench train --device c")[:2] == ["cpu", "cuda"]
    assert completed("dgbench kernels bench --op m") == ["ms_deform_attn", "mvfuser"]
    assert completed("dgbench kernels bench --backend t") == ["triton", "torch"]
    assert completed("dgbench download siglip2") == ["siglip2_b", "siglip2"]

"""The README's commands, run as they stand: in the README's order, in one folder, with trainings cut to seconds.

The first line of each command is typed into a shell; further lines of the same command run in forks of the test's process, which
has imported PyTorch already.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from loopback_hub import serving
from PIL import Image

from dgbench import results
from dgbench.runs import claim_run
from mfuser.towers.weights import files

sys.path.insert(0, str(Path(__file__).parent / "dgbench"))
from records import model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
LINES = [line for language, text in BLOCKS if not language for line in text.splitlines()]
INLINE = list(dict.fromkeys(re.findall(r"`(dgbench [a-z-][^`]*)`", README)))
SET_UP = [line for line in LINES if line.startswith("pip install")]
COMMANDS = [line for line in dict.fromkeys([*LINES, *INLINE]) if line.startswith("dgbench ")]
SMALL = (
    " --set data.size=[64,128] data.crop=[64,64] data.train_images=6 data.val_images=3 train.steps=2"
    " train.batch_size=2 train.log_every=1"
)
# what commands of models import: a fork has it already
PRELOADED = ["matplotlib.pyplot", "timm.layers", "dgbench.report.curves", "dgbench.cost.profile"]
PRELOADED += [f"dgbench.engine.{name}" for name in ("train", "evaluate", "predict")]
# commands that must end with 1 on a machine without weights and GPU, and what they say then
FAILS = {
    "dgbench train --vlm eva02": ("timm/eva02_large_patch14_clip_336", "dgbench download dinov2_l eva02"),
    "dgbench train streets/linear-dinov2_s-cpu": ("timm/vit_small_patch14_dinov2", "dgbench download dinov2_s"),
    "dgbench kernels build": ("hint: ",),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    pixels = np.random.default_rng(0).integers(256, size=(90, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    return folder


def environment(folder: Path, **more: str) -> dict[str, str]:
    """An own home, no network, nothing cached."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "DGBENCH_CACHE": str(folder / "cache"),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "SHELL": "/bin/bash",
        "CUDA_VISIBLE_DEVICES": "",
        **more,
    }


def shell(line: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a line as its user would, by the installed program."""
    # the shell stays, as a user's does: of one command alone it would become that command
    stays = f"{line}\nexit $?"
    words = ["bash", "-c", stays]
    return subprocess.run(words, cwd=folder, env=environment(folder, **more), capture_output=True, text=True, check=False)


def again(command: str) -> bool:
    """Whether an earlier line has typed this command into a shell, and this one has nothing that only a shell understands."""
    before = [line.split()[1] for line in COMMANDS[: COMMANDS.index(command)] if line not in FAILS]
    light = command.split()[1] not in ("train", "eval", "predict", "profile")  # and the others are typed
    return not (light or command in FAILS or re.search(r"[|&><;*$~`]", command)) and command.split()[1] in before


def forked(line: str, folder: Path, streams: Path) -> subprocess.CompletedProcess[str]:
    """Run a line in a fork of this process."""
    for name in PRELOADED:
        importlib.import_module(name)

    def action() -> None:
        os.chdir(folder)
        processes.command(*shlex.split(line)[1:])

    (ended,) = processes.wait([processes._fork(action, streams / "0", environment(folder))], streams, seconds=600)
    return subprocess.CompletedProcess(line, ended.status, ended.out, ended.err)


def test_two_commands_do_all_the_set_up() -> None:
    assert SET_UP == ["pip install -e . && dgbench train streets/mfuser", "pip install -e '.[test]' && pytest"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command: str, here: Path, tmp_path: Path) -> None:
    starts_training = command.startswith("dgbench train") and command not in FAILS and "--resume" not in command
    line = command + SMALL if starts_training else command
    if "--dry-run" in command:
        done = shell(command, here, DGBENCH_OFFLINE="1")  # else the sites are asked for sizes
    elif command.startswith("dgbench download"):
        # a Hub of our own, with small files; they go where the commands that need the real ones do not look
        rows = [row for tower in command.split()[2:] for row in files(tower)]
        with serving({f"{row.repo}/{row.file}": b"weights" for row in rows}) as hub:
            own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(here / "small")}
            done = shell(command, here, **own)
        assert done.stdout.count(" downloaded ") == len(rows)
    elif again(command) and not torch.cuda.is_available():  # a fork cannot have a GPU that its parent has used
        done = forked(line, here, tmp_path)
    else:
        done = shell(line, here)
    assert done.returncode == int(command in FAILS), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout if not done.returncode else done.stderr.startswith("error: ")
    assert all(text in done.stderr for text in FAILS.get(command, ()))
    for name in re.findall(r"--out (\S+\.(?:png|jpg))", command):
        with Image.open(here / name) as picture:
            picture.verify()


def test_the_python_of_the_readme_runs() -> None:
    for text in [text for language, text in BLOCKS if language == "python"]:
        scope = {"images": torch.rand(1, 3, 256, 512)}
        exec(text, scope)
        assert scope["scores"].shape == (1, 19, 256, 512)


def test_the_python_of_the_docs_on_results_runs() -> None:
    for number, miou in enumerate((0.4, 0.6)):
        folder = claim_run(Path("runs") / str(number))
        for record in model(0.5, miou, None):
            results.write(record, folder)
    (text,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), re.M | re.S)
    scope: dict[str, Any] = {}
    exec(text, scope)
    table = scope["scores"]
    assert list(table["streets-city"]) == [0.4, 0.6]
    assert list(table["streets-game"]) == [0.5, 0.5]
    assert [str(run) for _, _, run in table.index] == ["runs/0", "runs/1"]


def test_extras_are_named_as_a_clone_installs_them() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").iterdir()]
    texts += [path for package in ("dgbench", "mfuser") for path in (ROOT / package).rglob("*.py")]
    for path in texts:
        if path.is_file() and path.name != "CHANGELOG.md":
            text = path.read_text(encoding="utf-8")
            # the name alone would be looked for in a registry, where the project is not
            assert "dgbench[" not in text, path
            assert set(re.findall(r"-e '\.\[(\w+)\]'", text)) <= extras.keys(), path


def test_pictures_and_links_of_the_texts_are_there() -> None:
    for text in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]:
        targets = re.findall(r"\]\((?!https?:)([^)#]+)", text.read_text(encoding="utf-8"))
        targets += re.findall(r'src="([^"]+)"', text.read_text(encoding="utf-8"))
        assert not [target for target in targets if not (text.parent / target).exists()], text


@pytest.mark.full
def test_the_main_job_trains_scores_and_ranks(here: Path) -> None:
    done = shell(SET_UP[0].partition(" && ")[2] + " --json", here)
    assert done.returncode == 0, done.stderr
    scores = {record["target"]: record for record in json.loads(done.stdout) if record["kind"] == "eval"}
    assert list(scores) == ["streets-game", "streets-city", "streets-adverse", "streets-world"]
    assert all(record["n_images"] == record["n_available"] == 100 for record in scores.values())
    assert scores["streets-game"]["miou"] > 0.3
    assert max(record["miou"] for target, record in scores.items() if target != "streets-game") < scores["streets-game"]["miou"]

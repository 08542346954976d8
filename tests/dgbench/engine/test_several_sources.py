"""Several sources are one training: drawn by size or weight, resumed exactly, and named in every record and table."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dgbench import cli, results
from dgbench.data.export import export
from dgbench.engine import checkpoints
from dgbench.engine.train import train as fit
from dgbench.progress import Silent
from dgbench.recipe import load_recipe

SMALL = (
    "data.size=null",
    "data.crop=[32, 32]",
    "data.train_images=3",
    "train.batch_size=2",
    "train.workers=0",
    "train.steps=4",
    "train.log_every=1",
    "train.checkpoint_every=2",
)


def called(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], prog_name="dgbench")


def run(*arguments: str | Path) -> Result:
    result = called(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data root with three sources in three layouts, and a target."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("data")
        export("streets-game", "gta5", folder, n=4, size=(64, 128), splits=["train"])
        export("streets-city", "cityscapes", folder, n=3, size=(48, 96))
        export("streets-world", "urbansyn", folder, n=3, size=(64, 96))
        export("streets-night", "bdd100k", folder, n=2, size=(48, 96), splits=["val"])
        yield folder


def train(root: Path, out: Path, *settings: str, sources: tuple[str, ...] = ("gta5", "city")) -> Result:
    return called(
        "train",
        "source-only",
        "--source",
        *sources,
        "--targets",
        "bdd",
        "--set",
        *SMALL,
        *settings,
        "--root",
        root,
        "--out",
        out,
        "--device",
        "cpu",
        "--no-eval",
        "--quiet",
    )


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "a"
    assert (done := train(root, out)).exit_code == 0, done.output
    return out


def test_records_name_all_sources_sorted_and_sum_up_what_was_seen(root: Path, trained: Path) -> None:
    recipe = load_recipe(trained / "recipe.yaml", root=root)
    assert (recipe.data.source, recipe.data.sources) == ("cityscapes+gta5", ("cityscapes", "gta5"))
    (training,) = results.query(trained)
    assert (training.source, training.target, training.split) == ("cityscapes+gta5", "cityscapes+gta5", "train")
    assert (training.n_images, training.n_available) == (6, 2975 + 24966)
    assert (training.source_images, training.source_available, training.source_rendered) == (6, 2975 + 24966, True)
    seen = checkpoints.seen_by(checkpoints.folder_of(trained))
    assert seen is not None
    assert seen.each == {"cityscapes": (3, 2975, True), "gta5": (3, 24966, True)}


def test_scores_and_boards_name_them_and_none_is_a_target(root: Path, trained: Path) -> None:
    scored = json.loads(run("eval", trained, "--root", root, "--device", "cpu", "--json", "--quiet").stdout)
    assert [(row["source"], row["target"]) for row in scored] == [
        ("cityscapes+gta5", "cityscapes"),
        ("cityscapes+gta5", "bdd100k"),
    ]
    for source in (("gta", "cityscapes"), ("cityscapes,gta5",)):
        board = json.loads(run("leaderboard", "--runs", trained.parent, "--no-published", "--source", *source, "--json").stdout)
        (group,) = board["groups"]
        assert (group["source"], group["targets"]) == ("cityscapes+gta5", ["bdd100k"])
    none = json.loads(run("leaderboard", "--runs", trained.parent, "--no-published", "--source", "urbansyn", "--json").stdout)
    assert none["groups"] == []
    shown = run("eval", trained, "--root", root, "--device", "cpu", "--quiet").stdout
    assert "trained on cityscapes+gta5 (rendered)" in shown
    assert "cityscapes (source)" in shown


class Interrupt(Silent):
    """Press Ctrl-C when the second step is done."""

    steps = 0

    def advance(self, n: int = 1, **fields: float | str) -> None:
        self.steps += n
        if n and self.steps == 2:
            signal.raise_signal(signal.SIGINT)


def test_a_training_on_several_sources_is_resumed_exactly(root: Path, trained: Path, tmp_path: Path) -> None:
    recipe = load_recipe(trained / "recipe.yaml", root=root)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path / "b", progress=Interrupt(), device="cpu", root=root)
    assert [path.name for path in (tmp_path / "b/checkpoint").iterdir()] == ["step-000002"]
    run("train", "--resume", tmp_path / "b", "--root", root, "--device", "cpu", "--no-eval", "--quiet")
    assert (tmp_path / "b/log.jsonl").read_text() == (trained / "log.jsonl").read_text()
    weights = [checkpoints.sha256(checkpoints.folder_of(folder)) for folder in (trained, tmp_path / "b")]
    assert weights[0] == weights[1]


def test_a_source_that_changed_is_told_when_a_training_goes_on(root: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "data")
    shutil.copytree(trained, tmp_path / "run")
    for path in sorted((tmp_path / "data/gta5/images").glob("*.png"))[:2]:
        path.unlink()
    done = called("train", "--resume", tmp_path / "run", "--root", tmp_path / "data", "--device", "cpu", "--no-eval", "--quiet")
    assert done.exit_code == 1
    assert "was started on 3 rendered images of 2975 of `cityscapes` and 3 rendered images of 24966 of `gta5`" in done.output


@pytest.mark.parametrize(
    "settings",
    [
        ("data.source_weights=[3, 1, 1]", "data.rare_class_sampling=null"),
        ("data.rare_class_sampling=0.1",),
        (
            "data.sampling=class-uniform",
            "data.rare_class_sampling=null",
            "data.class_uniform.tile=32",
            "data.class_uniform.share=1.0",
            "data.train_images=null",
        ),
        ("data.resize.mode=short_edge", "data.resize.short_edge=[40, 64]", "data.photometric=robustnet"),
        ("data.resize.mode=fixed", "data.resize.size=[40, 64]", "data.photometric=san-saw"),
    ],
)
def test_every_way_of_sampling_and_resizing_trains_on_them(root: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    done = train(root, tmp_path / "run", *settings, "train.steps=1", sources=("urbansyn", "gta5", "cityscapes"))
    if "class-uniform" in settings[0]:
        assert done.exit_code == 1  # ten images for 19 classes
        assert "10 images are too few for class-uniform sampling" in done.output
        return
    assert done.exit_code == 0, done.output
    (training,) = results.query(tmp_path / "run")
    assert training.source == "cityscapes+gta5+urbansyn"
    load_recipe(tmp_path / "run/recipe.yaml", root=root)

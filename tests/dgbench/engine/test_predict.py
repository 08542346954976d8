"""Photographs to overlays: which files are taken, how they are turned, and what their overlays are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import mfuser
from dgbench import cli
from dgbench.engine.predict import predict
from dgbench.errors import DataError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    mfuser.save(mfuser.build("source-only", backbone="tiny", image_size=(32, 32), weights="random").eval(), folder)
    return folder


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (32, 48), **how: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(*size, 3), dtype=np.uint8)).save(path, **how)
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["predict", *map(str, arguments), "--device", "cpu"], prog_name="dgbench")


def names(model: Path, photos: list[Path], out: Path) -> list[str]:
    found = predict(photos, model, out, device="cpu")
    assert all(row.overlay.is_file() and row.overlay.parent == out for row in found)
    assert len({row.overlay for row in found}) == len(found)
    return [row.overlay.name for row in found]


def test_a_photograph_is_segmented_as_a_viewer_shows_it(model: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    sideways = photo(tmp_path / "sideways.png", exif=exif)
    with Image.open(sideways) as file:
        turned = np.rot90(np.asarray(file), -1)
    Image.fromarray(turned).save(tmp_path / "upright.png")
    a, b = predict([sideways, tmp_path / "upright.png"], model, tmp_path / "out", device="cpu")
    assert a.shares == b.shares
    assert a.overlay.read_bytes() == b.overlay.read_bytes()


def test_photographs_of_one_name_have_overlays_of_their_own(model: Path, tmp_path: Path) -> None:
    photos = [photo(tmp_path / "a/x.jpg", 1), photo(tmp_path / "b/x.jpg", 2), photo(tmp_path / "b/y.png", 3)]
    assert names(model, photos, tmp_path / "out") == ["a-x-overlay.png", "b-x-overlay.png", "y-overlay.png"]
    photos = [photo(tmp_path / "c/x.jpg", 1), photo(tmp_path / "c/x.png", 2)]
    assert names(model, photos, tmp_path / "out") == ["x-jpg-overlay.png", "x-png-overlay.png"]
    photos = [photo(tmp_path / "d/X.jpg", 1), photo(tmp_path / "e/x.jpg", 2), photo(tmp_path / "f/d-X.jpg", 2)]
    assert len(names(model, photos, tmp_path / "out")) == 3


def test_a_photograph_that_is_given_twice_is_segmented_once(model: Path, tmp_path: Path) -> None:
    given = photo(tmp_path / "x.jpg")
    assert names(model, [given, tmp_path / "." / "x.jpg", tmp_path], tmp_path / "out") == ["x-overlay.png"]


def test_a_folder_with_a_dot_in_its_name_is_a_folder(model: Path, tmp_path: Path) -> None:
    (tmp_path / "results.v2").mkdir()
    assert names(model, [photo(tmp_path / "x.jpg")], tmp_path / "results.v2") == ["x-overlay.png"]
    assert names(model, [photo(tmp_path / "x.jpg"), photo(tmp_path / "y.jpg")], tmp_path / "results.v2")


def test_a_folder_stands_for_its_images(model: Path, tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "c.webp", "notes.txt", ".hidden.png"):
        photo(tmp_path / "in" / name, format="PNG")
    (tmp_path / "in/deeper.png").mkdir()
    assert names(model, [tmp_path / "in"], tmp_path / "out") == ["a-overlay.png", "b-overlay.png", "c-overlay.png"]
    done = run(tmp_path / "in", "--checkpoint", model, "--out", tmp_path / "in")
    assert done.exit_code == 0, done.output
    # overlays beside their photographs are none
    assert len(names(model, [tmp_path / "in"], tmp_path / "again")) == 3


def test_every_unreadable_file_of_a_folder_is_named_before_any_overlay(model: Path, tmp_path: Path) -> None:
    photo(tmp_path / "in/a.png")
    (tmp_path / "in/b.png").write_bytes(b"no picture")
    (tmp_path / "in/c.jpg").write_bytes(b"")
    done = run(tmp_path / "in", "--checkpoint", model, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "2 of 3 photographs cannot be read" in done.stderr
    assert "b.png" in done.stderr
    assert "c.jpg" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_is_refused(model: Path, tmp_path: Path) -> None:
    a, b = photo(tmp_path / "a.jpg"), photo(tmp_path / "b.jpg")
    with pytest.raises(DataError, match="2 photographs cannot all be written to .*o.png"):
        predict([a, b], model, tmp_path / "o.png", device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image in .*empty"):
        predict([tmp_path / "empty"], model, tmp_path / "out", device="cpu")
    content = a.read_bytes()
    with pytest.raises(DataError, match=r"a.jpg is one of the photographs: its overlay would replace it"):
        predict([a], model, a, device="cpu")
    assert a.read_bytes() == content


def test_a_file_that_is_no_picture_is_not_replaced_by_one(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: mine")
    for options in ((), ("--as", "color"), ("--side-by-side",)):
        done = run(photo(tmp_path / "a.png"), "--checkpoint", model, "--out", recipe, *options)
        assert done.exit_code == 1
        assert done.stderr.startswith(f"error: {recipe} is to be a picture and must end in .png, .jpg")
    assert recipe.read_text() == "name: mine"
    with pytest.raises(DataError, match="must end in .png"):  # a lossy format that is not among those of photographs
        predict([tmp_path / "a.png"], model, tmp_path / "a.avif", device="cpu")


def test_a_folder_of_folders_is_told_which_of_them_hold_images(model: Path, tmp_path: Path) -> None:
    file = photo(tmp_path / "all/july/a.jpg")
    with pytest.raises(DataError, match="no image in .*all") as error:
        predict([tmp_path / "all"], model, tmp_path / "out", device="cpu")
    assert error.value.hint == f"subfolders are not searched: give those that hold images, as {file.parent}"

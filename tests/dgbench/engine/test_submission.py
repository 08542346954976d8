"""Archives for test servers: their names, ids and sizes, and what is refused."""

from __future__ import annotations

import json
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import mfuser
from dgbench import cli
from dgbench.engine.submission import SERVERS, images_of
from dgbench.errors import DataError

SIZE = (40, 72)  # no multiple of the window
CITYSCAPES = [f"leftImg8bit/test/{city}/{city}_000000_00001{n}_leftImg8bit.png" for n, city in enumerate(("berlin", "bonn"))]
ACDC = [f"rgb_anon/{weather}/test/GOPR0{n}/GOPR0{n}_frame_000001_rgb_anon.png" for n, weather in enumerate(("fog", "rain"), 475)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = mfuser.build("source-only", backbone="tiny", image_size=(32, 32), weights="random").eval()
    torch.nn.init.normal_(model.head.weight)
    mfuser.save(model, folder)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The test splits' images, and others that are none."""
    others = ["leftImg8bit/val/bonn/bonn_000000_000019_leftImg8bit.png"]
    reference = [ACDC[0].replace("test/", "test_ref/").replace("rgb_anon.png", "rgb_ref_anon.png")]
    for folder, names in (("cityscapes", [*CITYSCAPES, *others]), ("acdc", [*ACDC, *reference])):
        for seed, name in enumerate(names):
            path = tmp_path / "data" / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(seed).integers(256, size=(*SIZE, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
    return tmp_path / "data"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["predict", *map(str, arguments), "--device", "cpu"], prog_name="dgbench")


def submitted(server: str, model: Path, root: Path, out: Path) -> dict[str, np.ndarray]:
    """Make an archive and return its pictures by name."""
    done = run("--submission", server, "--checkpoint", model, "--root", root, "--partial", "--out", out)
    assert done.exit_code == 0, done.stderr
    return unpacked(out)


def unpacked(archive: Path) -> dict[str, np.ndarray]:
    found = {}
    with zipfile.ZipFile(archive) as content:
        for name in content.namelist():
            with content.open(name) as entry, Image.open(entry) as picture:
                assert (picture.format, picture.mode) == ("PNG", "L")
                found[name] = np.asarray(picture)
    return found


def seen(model: Path, image: Path) -> np.ndarray:
    """What the model sees in an image by windows of two thirds' stride, as the protocol `unified` says."""
    with Image.open(image) as file:
        given = torch.from_numpy(np.array(file)).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        return mfuser.slide(mfuser.load(model), given, crop=(32, 32), stride=(21, 21))[0].argmax(0).numpy()


def test_the_official_script_finds_each_prediction_and_its_ids(model: Path, root: Path, tmp_path: Path) -> None:
    evaluation = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    table = pytest.importorskip("cityscapesscripts.helpers.labels").trainId2label
    submitted("cityscapes", model, root, tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as content:
        assert len(content.namelist()) == 2
        content.extractall(tmp_path / "results")
    official = Namespace(predictionPath=str(tmp_path / "results"), predictionWalk=None)
    for name in CITYSCAPES:
        truth = name.replace("leftImg8bit.png", "gtFine_labelIds.png").replace("leftImg8bit/", "gtFine/")
        with Image.open(evaluation.getPrediction(official, truth)) as file:
            ids = np.asarray(file)
        expected = np.vectorize(lambda k: table[k].id)(seen(model, root / "cityscapes" / name))
        assert ids.shape == SIZE
        assert np.array_equal(ids, expected)


def test_acdc_gets_train_ids_under_the_images_names(model: Path, root: Path, tmp_path: Path) -> None:
    found = submitted("acdc", model, root, tmp_path / "a.zip")
    assert list(found) == [f"labelTrainIds/{Path(name).name}" for name in ACDC]
    for name, ids in zip(ACDC, found.values(), strict=True):
        assert np.array_equal(ids, seen(model, root / "acdc" / name))


def test_a_condition_of_acdc_has_an_archive_of_its_own(model: Path, root: Path, tmp_path: Path) -> None:
    assert list(submitted("acdc-rain", model, root, tmp_path / "a.zip")) == [f"labelTrainIds/{Path(ACDC[1]).name}"]


def test_the_same_images_and_model_make_the_same_bytes(model: Path, root: Path, tmp_path: Path) -> None:
    submitted("acdc", model, root, tmp_path / "a.zip")
    submitted("acdc", model, root, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_a_part_of_the_split_is_refused_before_any_work(root: Path, model: Path, tmp_path: Path) -> None:
    done = run("--submission", "cityscapes", "--checkpoint", model, "--root", root, "--out", tmp_path / "a.zip")
    assert done.exit_code == 1
    assert "2 of the 1525 test images of Cityscapes are in" in done.stderr
    assert "--partial" in done.stderr
    assert not (tmp_path / "a.zip").exists()


def test_an_archive_of_a_part_says_so(root: Path, model: Path, tmp_path: Path) -> None:
    words = ("--submission", "acdc-fog", "--checkpoint", model, "--root", root, "--partial", "--out", tmp_path / "a.zip")
    told = json.loads(run(*words, "--json").stdout)
    assert (told["n_images"], told["n_expected"], told["encoding"], told["protocol"]) == (1, 500, "train ids", "unified")
    done = run(*words)
    assert "1 of 500 test images" in done.stdout
    assert "1 of 40x72: the server wants the published size" in done.stderr


def test_a_whole_split_is_taken_and_one_more_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "acdc/rgb_anon/snow/test/GOPR0122"
    folder.mkdir(parents=True)
    for number in range(SERVERS["acdc-snow"].count):
        (folder / f"GOPR0122_frame_{number:06d}_rgb_anon.png").touch()
    assert len(images_of("acdc-snow", tmp_path)) == 500
    (folder / "GOPR0122_frame_000500_rgb_anon.png").touch()
    with pytest.raises(DataError, match="501 test images of ACDC, snow are in .*, the split has 500"):
        images_of("acdc-snow", tmp_path)


def test_the_images_may_lie_in_a_folder_of_any_kind(root: Path) -> None:
    folder = root / "cityscapes/leftImg8bit/test"
    assert [path.name for path in images_of("cityscapes", root / "nothing", folder, partial=True)] == [
        Path(name).name for name in CITYSCAPES
    ]
    with pytest.raises(DataError, match="no test image of Cityscapes in"):
        images_of("cityscapes", root / "nothing")


def test_two_images_of_one_name_are_refused(root: Path) -> None:
    twin = root / "cityscapes/leftImg8bit/test/copy" / Path(CITYSCAPES[0]).name
    twin.parent.mkdir()
    twin.touch()
    with pytest.raises(DataError, match="two images below .* are called berlin_000000_000010_leftImg8bit.png"):
        images_of("cityscapes", root, partial=True)


def test_an_image_that_cannot_be_read_leaves_no_archive(model: Path, root: Path, tmp_path: Path) -> None:
    (root / "acdc" / ACDC[1]).write_bytes(b"no picture")
    done = run("--submission", "acdc", "--checkpoint", model, "--root", root, "--partial", "--out", tmp_path / "a.zip")
    assert done.exit_code == 1
    assert "cannot be read as an image" in done.stderr
    assert not (tmp_path / "a.zip").exists()

"""What a repository's rows, card or description say of paths and addresses is never opened: a row is its bytes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset
from dgbench.download.hub_files import Listed
from dgbench.download.hub_rows import HubWish, convert, rows, wish_of
from dgbench.errors import DataError

COLUMNS = {"image": "image", "label": "mask"}
ROW = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(value: int, mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (8, 4), (value,) * 3 if mode == "RGB" else value).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path: Path, images: list[dict[str, object]], masks: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pa.array(images, ROW), "mask": pa.array(masks, ROW)}), path)


def converted(folder: Path, into: Path, wish: HubWish | None = None):
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    wish = wish or HubWish("someone/Set", "main", ("*.parquet",), COLUMNS)
    return convert("mine", Listed("someone/Set", "c0ffee", None, files, {}), wish, folder, into)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with files of the names that rows state."""
    (tmp_path / "desk/rgb").mkdir(parents=True)
    for name in ("0001.png", "rgb/rgb_0000.png", "rgb/ss_0000.png", "secret.png"):
        (tmp_path / "desk" / name).write_bytes(png(99))
    monkeypatch.chdir(tmp_path / "desk")
    monkeypatch.setenv("DGBENCH_DATA", str(tmp_path / "data"))
    return tmp_path


@pytest.mark.parametrize("path", ["0001.png", "{here}/desk/secret.png", "/etc/passwd", "https://example.invalid/a.png", None])
def test_a_row_is_its_bytes_whatever_path_it_states(path: str | None, here: Path):
    path = path and path.replace("{here}", str(here))
    stated = [{"bytes": png(7, "RGB"), "path": path}]
    parquet(here / "set/data/val-00000-of-00001.parquet", stated, [{"bytes": png(3), "path": path}])
    converted(here / "set", here / "data/mine")
    kept = rows(here / "data/mine", "val")[0]
    assert kept == {
        "id": "val/000000",
        "image": {"bytes": png(7, "RGB"), "path": None},
        "label": {"bytes": png(3), "path": None},
    }
    sample = SegDataset(lookup("mine"), "val")[0]
    assert (sample.image == 7).all()
    assert (sample.label == 3).all()


@pytest.mark.parametrize("row", [{"bytes": None, "path": "0001.png"}, {"bytes": None, "path": "/etc/passwd"}, None])
def test_a_row_without_bytes_is_refused_by_name(row: dict[str, object] | None, here: Path):
    good = {"bytes": png(7, "RGB"), "path": None}
    parquet(here / "set/data/train-00000-of-00001.parquet", [good, row], [{"bytes": png(3), "path": None}] * 2)
    with pytest.raises(DataError, match=r"row 1 of `train` \(data/train-.*parquet\) has no bytes in column `image`"):
        converted(here / "set", here / "data/mine")


def test_loose_files_are_not_taken_from_the_working_folder(here: Path):
    for name, content in (("rgb/rgb_0000.png", png(7, "RGB")), ("rgb/ss_0000.png", png(3))):
        (here / "set/rgb").mkdir(parents=True, exist_ok=True)
        (here / "set" / name).write_bytes(content)
    globs = {"image": "rgb/rgb_*.png", "label": "rgb/ss_*.png"}
    converted(here / "set", here / "data/mine", HubWish("someone/Set", "main", (), globs))
    sample = SegDataset(lookup("mine"), "val")[0]
    assert (sample.image == 7).all()
    assert (sample.label == 3).all()


@pytest.mark.parametrize("decoded", [True, False])
def test_a_stored_row_without_bytes_is_refused_and_its_path_left_alone(decoded: bool, here: Path):
    import datasets

    image = datasets.Image(decode=decoded)
    features = datasets.Features({"id": datasets.Value("string"), "image": image, "label": image})
    stated = {"path": str(here / "desk/secret.png"), "bytes": None}
    made = datasets.Dataset.from_dict({"id": ["val/000000"], "image": [stated], "label": [stated]}, features=features)
    table = made.data.table  # `save_to_disk` would put the file's bytes in
    made.save_to_disk(here / "data/mine/hub/val")
    arrow = next((here / "data/mine/hub/val").glob("*.arrow"))
    with pa.OSFile(str(arrow), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (here / "data/mine/hub/source.json").write_text(
        json.dumps(
            {
                "name": "mine",
                "repository": "a/b",
                "revision": "c",
                "columns": COLUMNS,
                "splits": {"val": 1},
                "encoding": "ids",
                "label_map": "train-ids",
                "licence": None,
            }
        )
    )
    with pytest.raises(DataError, match=r"row val/000000 has no bytes of its image"):
        SegDataset(lookup("mine"), "val")
    # a folder of the user's with such rows in it is no other matter
    (here / "data/domains").mkdir()
    (here / "data/domains/other.yaml").write_text("folder: mine\nsplits: {val: {images: '*.jpg', labels: {.jpg: .png}}}\n")
    with pytest.raises(DataError, match=r"row val/000000 has no bytes of its image"):
        SegDataset(lookup("other"), "val")


def test_splits_that_datasets_calls_alike_stay_apart(here: Path):
    for number, split in enumerate(("train", "val", "valid", "validation"), 1):
        many = [{"bytes": png(number, "RGB"), "path": None}] * number
        parquet(here / f"set/data/{split}-00000-of-00001.parquet", many, many)
    names = {
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*"} for split in ("train", "val", "valid", "validation")],
            }
        ]
    }
    (here / "set/README.md").write_text(f"---\n{json.dumps(names)}\n---\n")
    assert converted(here / "set", here / "data/mine").splits == {"train": 1, "val": 2, "valid": 3, "validation": 4}


@pytest.mark.parametrize(
    "path",
    [
        "{here}/other/*.parquet",
        "../other/*.parquet",
        "https://example.invalid/a.parquet",
        "zip://a.parquet::https://example.invalid/a.zip",
    ],
)
def test_a_card_leads_to_nothing_outside_of_its_repository(path: str, here: Path):
    one = [{"bytes": png(1, "RGB"), "path": None}]
    for folder in ("set/data", "other"):
        parquet(here / folder / "train.parquet", one, one)
    path = path.replace("{here}", str(here))
    card = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": path}]}]}
    (here / "set/README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    with pytest.raises(DataError, match="its card names `.*`, which is not a file of the repository"):
        converted(here / "set", here / "data/mine")


@pytest.mark.parametrize(
    "changed",
    [{"splits": {"../../other": 1}}, {"splits": {"val": "x"}}, {"splits": [1]}, {"encoding": 3}, {"encoding": "panoptic"}],
)
def test_a_description_that_leads_elsewhere_is_refused(changed: dict[str, object], here: Path):
    told = {"repository": "a/b", "revision": "c", "splits": {"val": 1}, "encoding": "ids", "label_map": "train-ids"}
    (here / "data/described/hub").mkdir(parents=True)
    (here / "data/described/hub/source.json").write_text(json.dumps(told | changed))
    with pytest.raises(DataError, match=r"source\.json"):
        lookup("described")


def test_labels_whose_table_lies_beside_them_are_not_fetched_as_rows():
    with pytest.raises(DataError, match="`panoptic` labels cannot be fetched as rows"):
        wish_of("a/b", ["image=i", "label=l"], None, None, encoding="panoptic", label_map="train-ids", split="val")


def test_a_listing_cannot_name_files_outside_of_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from huggingface_hub import constants
    from loopback_hub import serving

    from dgbench.download.hub_files import listing

    with serving({"datasets/someone/Set/../../../out.png": png(1)}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(DataError, match="which lies outside of it"):
            listing("someone/Set", "main", ["*"])


def test_pixels_of_rows_reach_workers(here: Path):
    import pickle

    one = [{"bytes": png(5, "RGB"), "path": "0001.png"}]
    parquet(here / "set/data/val-00000-of-00001.parquet", one, [{"bytes": png(3), "path": None}])
    converted(here / "set", here / "data/mine")
    assert np.array_equal(pickle.loads(pickle.dumps(SegDataset(lookup("mine"), "val")))[0].image, np.full((4, 8, 3), 5))

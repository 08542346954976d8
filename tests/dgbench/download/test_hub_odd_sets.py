"""Sets of the Hub as people make them: images as bare bytes, files of other names, empty splits, rows with holes, damage."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback_hub import Hub, serving
from small_sets import labels, picture
from typer.testing import CliRunner, Result

from dgbench import cli
from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset
from dgbench.data.index import require, rows_of
from dgbench.download.hub_rows import rows
from dgbench.errors import DataError

COLUMNS = ("--columns", "image=picture", "label=mask")
SET = "datasets/someone/Odd"


def parquet(images: list[Any], masks: list[Any], kind: pa.DataType | None = None) -> bytes:
    kind = kind or pa.binary()
    buffer = io.BytesIO()
    pq.write_table(pa.table({"picture": pa.array(images, kind), "mask": pa.array(masks, kind)}), buffer)
    return buffer.getvalue()


def bare(count: int) -> bytes:
    return parquet([picture(n, ".png") for n in range(count)], [labels(n) for n in range(count)])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    with serving({}) as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "DGBENCH_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def run(data: Path, *arguments: str) -> Result:
    command = ["download", "--hub", "someone/Odd", *(arguments or COLUMNS), "--yes", "--root", str(data)]
    return CliRunner().invoke(cli.app, command, prog_name="dgbench")


def refused(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    return result.stderr[result.stderr.index("error: ") :]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary())])], ids=str)
def test_columns_of_bytes_are_images(kind: pa.DataType, hub: Hub, data: Path) -> None:
    images, masks = [picture(n, ".png") for n in range(3)], [labels(n) for n in range(3)]
    stored = [[{"bytes": one} for one in part] if pa.types.is_struct(kind) else part for part in (images, masks)]
    hub.files[f"{SET}/data/train-0.parquet"] = parquet(*stored, kind)
    assert run(data).exit_code == 0
    assert [row["image"]["bytes"] for row in rows(data / "odd", "train")] == images
    assert [row["label"]["bytes"] for row in rows(data / "odd", "train")] == masks
    assert (SegDataset(lookup("odd", data), "train", root=data)[2].label == 2).all()


@pytest.mark.parametrize("end", [".pq", ".PARQUET", ".Parquet"])
def test_parquet_files_of_other_names_are_read(end: str, hub: Hub, data: Path) -> None:
    hub.files |= {f"{SET}/data/train-0.parquet": bare(2), f"{SET}/data/train-1{end}": bare(3), f"{SET}/data/test-0{end}": bare(1)}
    assert run(data).exit_code == 0
    assert {split: len(rows(data / "odd", split)) for split in ("train", "test")} == {"train": 5, "test": 1}
    assert sorted(path.name for path in data.iterdir()) == ["odd"]


def test_a_split_without_rows_is_left_out(hub: Hub, data: Path) -> None:
    hub.files |= {f"{SET}/data/train-0.parquet": bare(2), f"{SET}/data/test-0.parquet": bare(0)}
    assert run(data).exit_code == 0
    assert json.loads((data / "odd/hub/source.json").read_text())["splits"] == {"train": 2}
    assert len(SegDataset(lookup("odd", data), "train", root=data)) == 2


def test_a_set_without_rows_is_told(hub: Hub, data: Path) -> None:
    hub.files[f"{SET}/data/train-0.parquet"] = bare(0)
    assert "someone/Odd has no rows" in refused(run(data))
    assert not (data / "odd").exists()


@pytest.mark.parametrize(
    ("hole", "why"), [(None, "it is null"), ({"bytes": None, "path": "a.png"}, "an address alone"), ({"bytes": b""}, "alone")]
)
@pytest.mark.parametrize("part", ["picture", "mask"])
def test_a_row_with_a_hole_is_named(part: str, hole: Any, why: str, hub: Hub, data: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images, masks = ([{"bytes": make(n)} for n in range(3)] for make in (lambda n: picture(n, ".png"), labels))
    (images if part == "picture" else masks)[1] = hole
    hub.files[f"{SET}/data/train-0.parquet"] = parquet(images, masks, kind)
    message = refused(run(data))
    assert f"row 1 of `train` (data/train-0.parquet) has no bytes in column `{part}`" in message
    assert why in message


def test_one_column_is_not_both(hub: Hub, data: Path) -> None:
    for columns in (("image=picture", "label=picture"), ("image=a/*.png", "label=a/*.png")):
        assert "image and label are both `" in refused(run(data, "--columns", *columns))
    assert not hub.requests


@pytest.mark.parametrize(
    "labels_of",
    [pa.array([1, 2]), pa.array([[1], [2]]), pa.array(["a", "b"]), pa.array([None, None]), pa.array([{"bytes": "a"}] * 2)],
)
def test_labels_that_are_no_images_are_told(labels_of: pa.Array, hub: Hub, data: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"picture": pa.array([b"a", b"b"]), "mask": labels_of}), buffer)
    hub.files[f"{SET}/data/train-0.parquet"] = buffer.getvalue()
    message = refused(run(data))
    kind = str(labels_of.type).partition("<")[0]
    assert re.search(f"column `mask` holds {kind}(<.*>)?, not images", message)
    assert "choose the label from: picture" in message


def test_a_file_whose_columns_differ_from_the_firsts_is_told(hub: Hub, data: Path) -> None:
    other = io.BytesIO()
    pq.write_table(pa.table({"picture": pa.array([b"a"]), "label": pa.array([b"a"])}), other)
    hub.files |= {f"{SET}/data/train-0.parquet": bare(1), f"{SET}/data/train-1.parquet": other.getvalue()}
    assert "unknown column `mask`" in refused(run(data))


@pytest.mark.parametrize("where", ["footer", "page", "all"])
def test_a_damaged_parquet_file_is_named(where: str, hub: Hub, data: Path) -> None:
    content = bytearray(bare(30))
    if where == "footer":
        content[-60:-20] = bytes(40)
    elif where == "page":
        content[4:400] = b"\xff" * 396
    hub.files[f"{SET}/data/train-0.parquet"] = b"not Parquet" * 50 if where == "all" else bytes(content)
    message = refused(run(data))
    assert "train-0.parquet is no Parquet file, or damaged" in message
    assert len(message.splitlines()) == 3


def test_a_card_that_stands_for_millions_is_refused(hub: Hub, data: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    card = "\n".join(["---", *lines, "configs:", "- config_name: default", "  data_files: *a8", "---", ""])
    hub.files |= {f"{SET}/data/train-0.parquet": bare(1), f"{SET}/README.md": card.encode()}
    assert "its card names more than 10,000 files" in refused(run(data))


def test_a_file_name_that_is_no_text_is_told(hub: Hub, data: Path) -> None:
    hub.files[f"{SET}/rgb/caf\udce9.png"] = b"x"
    message = refused(run(data, "--columns", "image=rgb/*.png", "label=ss/*.png"))
    assert "a name that is no text in UTF-8" in message
    assert "caf\\udce9.png" in message


@pytest.mark.parametrize("token", ["hf_tökén", "hf_a b"])
def test_a_token_that_cannot_be_sent_is_told_but_not_shown(
    token: str, hub: Hub, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    message = refused(run(data))
    assert "the token of the Hub holds characters that no token has" in message
    assert token not in message


def test_a_login_in_the_address_of_a_hub_is_not_told(hub: Hub, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    for address in (hub.url, "http://127.0.0.1:9"):
        monkeypatch.setattr(constants, "ENDPOINT", address.replace("://", "://user:secret@"))
        message = refused(run(data))
        assert address in message
        assert "secret" not in message


def test_a_file_on_the_disk_whose_name_is_no_text_is_named(data: Path) -> None:

    for folder, end, make in (("images", ".png", lambda: picture(0, ".png")), ("labels", ".png", lambda: labels(7, "P"))):
        place = data / "gta5" / folder
        place.mkdir(parents=True)
        (place / f"caf\udce9{end}").write_bytes(make())
    with pytest.raises(DataError) as caught:
        rows_of(require(lookup("gta5"), "train", data))
    assert "caf\\udce9.png' is no name in UTF-8" in str(caught.value)

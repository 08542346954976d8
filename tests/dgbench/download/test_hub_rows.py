"""Sets from a Hub on the loopback: Parquet and loose files become domains of the user's, UrbanSyn its official folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kills
import numpy as np
import pytest
from loopback_hub import COMMIT, Hub, serving
from PIL import Image
from small_sets import labels, picture
from typer.testing import CliRunner, Result

from dgbench import cli
from dgbench.data.catalog import lookup
from dgbench.data.dataset import SegDataset
from dgbench.data.index import find
from dgbench.download.hub_rows import columns_of, read, rows
from dgbench.download.stage import read_manifest
from dgbench.errors import DataError

ROOT = Path(__file__).parents[3]
PAIRS = {
    split: [(picture(n, ".png"), labels(n, "P")) for n in range(count)] for split, count in (("train", 5), ("validation", 3))
}
COLUMNS = ("--columns", "image=picture", "label=mask")


def parquet(split: str) -> bytes:
    """As `datasets` writes one, palette and all."""
    import datasets

    images = [Image.open(io.BytesIO(image)) for image, _ in PAIRS[split]]
    masks = [Image.open(io.BytesIO(mask)) for _, mask in PAIRS[split]]
    features = datasets.Features({"picture": datasets.Image(), "mask": datasets.Image(), "city": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"picture": images, "mask": masks, "city": ["x"] * len(images)}, features=features)
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def packed() -> dict[str, bytes]:
    return {f"datasets/someone/Streets/data/{split}-00000-of-00001.parquet": parquet(split) for split in PAIRS}


LOOSE = {
    f"datasets/someone/Loose/{part}/{part}_{n:04d}{end}": make(n)
    for n in range(4)
    for part, end, make in (
        ("rgb", ".png", lambda n: picture(n, ".png")),
        ("ss", ".png", labels),
        ("depth", ".exr", lambda _: b"x"),
    )
}
URBAN = {name.replace("someone/Loose", "UrbanSyn/UrbanSyn"): content for name, content in LOOSE.items()}


@pytest.fixture
def hub(packed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    with serving({**packed, **LOOSE, **URBAN}) as server:
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
    return CliRunner().invoke(cli.app, ["download", *arguments, "--root", str(data)], prog_name="dgbench")


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    return result.stderr[result.stderr.index("error: ") :]


def bodies(hub: Hub) -> list[str]:
    return [path for path, _ in hub.bodies()]


def test_a_parquet_set_becomes_rows_with_their_bytes(hub: Hub, data: Path) -> None:
    row = json.loads(done(run(data, "--hub", "someone/Streets", *COLUMNS, "--yes", "--json")))[0]
    assert (row["name"], row["state"], row["revision"]) == ("streets", "downloaded", COMMIT)
    for split, pairs in (("train", PAIRS["train"]), ("val", PAIRS["validation"])):
        table = rows(data / "streets", split)
        assert table.column_names == ["id", "image", "label"]
        assert [r["id"] for r in table] == [f"{split}/{n:06d}" for n in range(len(pairs))]
        for got, (image, mask) in zip(table, pairs, strict=True):
            assert np.array_equal(Image.open(io.BytesIO(got["image"]["bytes"])), Image.open(io.BytesIO(image)))
            stored = Image.open(io.BytesIO(got["label"]["bytes"]))
            assert stored.mode == "P"
            assert np.array_equal(stored, Image.open(io.BytesIO(mask)))
    assert sorted(path.name for path in data.iterdir()) == ["streets"]
    hub.requests.clear()
    assert "already here" in done(run(data, "--hub", "someone/Streets", *COLUMNS))
    assert not hub.requests


def test_loose_files_are_paired_by_their_stars(hub: Hub, data: Path) -> None:
    done(run(data, "--hub", "someone/Loose", "--columns", "image=rgb/rgb_*.png", "label=ss/ss_*.png", "--as", "mine", "--yes"))
    table = rows(data / "mine", "val")
    assert [row["id"] for row in table] == [f"rgb/rgb_{n:04d}.png" for n in range(4)]
    assert table[2]["label"]["bytes"] == labels(2)
    assert not [path for path in bodies(hub) if "depth" in path]


def test_a_fetched_set_is_a_domain(hub: Hub, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGBENCH_DATA", str(data))
    done(run(data, "--hub", "someone/Streets", *COLUMNS, "--as", "mine", "--yes"))
    told = read(data / "mine")
    assert told is not None
    assert told.splits == {"train": 5, "val": 3}
    dataset = SegDataset(lookup("mine"), "val")
    assert len(dataset) == 3
    assert np.array_equal(dataset[1].image, Image.open(io.BytesIO(PAIRS["validation"][1][0])))
    assert (dataset[1].label == 1).all()
    assert COMMIT in dataset.revision


def test_urbansyn_comes_in_its_own_layout(hub: Hub, data: Path) -> None:
    row = json.loads(done(run(data, "urbansyn", "--json")))[0]  # its licence lets anybody use it: nothing to accept
    assert (row["state"], row["revision"]) == ("downloaded", COMMIT)
    assert len(find(lookup("urbansyn"), "train", data)) == 4
    manifest = read_manifest(data / "urbansyn")
    assert manifest is not None
    assert manifest.totals()[0] == 8
    assert not (data / "urbansyn" / ".cache").exists()
    hub.requests.clear()
    assert "already here" in done(run(data, "urbansyn"))
    assert not hub.requests
    (data / "urbansyn/ss/ss_0001.png").unlink()
    done(run(data, "urbansyn"))
    assert (data / "urbansyn/ss/ss_0001.png").read_bytes() == labels(1)


def test_a_branch_is_resolved_once_and_the_commit_is_what_is_fetched(hub: Hub, data: Path) -> None:
    done(run(data, "--hub", "someone/Streets", *COLUMNS, "--yes"))
    source = json.loads((data / "streets/hub/source.json").read_text())
    assert (source["repository"], source["revision"], source["columns"]) == (
        "someone/Streets",
        COMMIT,
        {"image": "picture", "label": "mask"},
    )
    hub.commit = "beef" * 10
    assert "already here" in done(run(data, "--hub", "someone/Streets", *COLUMNS))
    message = refused(run(data, "--hub", "someone/Streets", *COLUMNS, "--revision", "beef" * 10))
    assert f"holds someone/Streets at {COMMIT[:12]} already" in message


def test_a_cut_transfer_goes_on_at_the_commit_it_began_at(hub: Hub, data: Path) -> None:
    hub.fault = "changed"
    assert "is damaged: its sha256 is" in refused(run(data, "--hub", "someone/Streets", *COLUMNS, "--yes"))
    assert not (data / "streets").exists()
    hub.fault = None
    done(run(data, "--hub", "someone/Streets", *COLUMNS, "--yes"))
    assert len(rows(data / "streets", "train")) == 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("at", [".rows", "val"], ids=["before the rows are read", "between the splits"])
def test_a_kill_in_the_middle_is_taken_up(at: str, hub: Hub, data: Path) -> None:
    kills.kill_at(lambda: run(data, "--hub", "someone/Streets", *COLUMNS, "--yes"), data, at)
    assert list(data.rglob("*.parquet"))
    assert not (data / "streets").exists()
    done(run(data, "--hub", "someone/Streets", *COLUMNS, "--yes"))
    assert [len(rows(data / "streets", split)) for split in ("train", "val")] == [5, 3]


def test_the_plan_says_commit_and_size(hub: Hub, data: Path, packed: dict[str, bytes]) -> None:
    hub.licence = "cc-by-nc-4.0"
    plan = json.loads(done(run(data, "--hub", "someone/Streets", *COLUMNS, "--dry-run", "--json")))
    (need,) = plan["needs"]
    assert (need["name"], need["state"], need["files"]) == ("streets", "to fetch", 2)
    assert need["bytes"] == sum(map(len, packed.values()))
    assert need["licence"] == "cc-by-nc-4.0"
    assert COMMIT in need["note"]
    assert not data.exists()
    assert not bodies(hub)


def test_a_plan_is_told_without_a_hub_too(data: Path, tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DGBENCH_"))}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{nobody.getsockname()[1]}", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-m", "dgbench", "download", "urbansyn", "acdc", "--root", str(data)]
        runs = [
            subprocess.run(
                [*command, *more], env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
            )
            for more in (("--dry-run",), ())
        ]
    told, tried = runs
    assert told.returncode == 0, told.stderr
    assert "no connection to http://127.0.0.1" in told.stdout
    assert tried.returncode == 1
    # neither hides the other
    assert "no connection to http://127.0.0.1" in tried.stderr
    assert "`acdc` can only be downloaded in a browser" in tried.stderr


@pytest.mark.parametrize(("licence", "asked"), [(None, True), ("cc-by-nc-sa-4.0", True), ("cc-by-4.0", False), ("mit", False)])
def test_terms_that_limit_the_use_must_be_accepted(licence: str | None, asked: bool, hub: Hub, data: Path) -> None:
    hub.licence = licence
    result = run(data, "--hub", "someone/Streets", *COLUMNS)
    assert (result.exit_code == 1) is asked
    if asked:
        assert f"someone/Streets: licence {licence or 'not stated'}, see its page" in refused(result)
        assert not bodies(hub)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("someone/Nothing", *COLUMNS), "the Hub knows no dataset someone/Nothing, or it is private"),
        (("someone/Streets", *COLUMNS, "--revision", "v9"), "someone/Streets has no revision `v9`"),
        (
            ("someone/Streets", "--columns", "image=pictures", "label=mask"),
            "unknown column `pictures`\n\nhint: did you mean `picture`?",
        ),
        (("someone/Streets", "--columns", "image=picture", "label=city"), "column `city` holds string, not images"),
        (("someone/Loose", *COLUMNS), "someone/Loose has no Parquet files"),
        (("someone/Loose", "--columns", "image=img/*.png", "label=ss/*.png"), "someone/Loose: no file matches `img/*.png`"),
        (("someone/Loose", "--columns", "image=rgb/*.png", "label=ss/*.png"), "of rgb/rgb_0000.png it would be ss/rgb_0000.png"),
        (("someone/Streets", "--columns", "image=picture"), "needs to know which column is the image and which is the label"),
        (("someone/Streets", *COLUMNS, "--label-map", "gta5"), "unknown label map `gta5`"),
        (("someone/Streets", *COLUMNS, "--encoding", "color"), "unknown encoding `color`\n\nhint: did you mean `colors`?"),
        (("someone/Streets", *COLUMNS, "--as", "cityscapes"), "`cityscapes` cannot be the name of a new domain"),
        (("someone/Streets", *COLUMNS, "--as", "../up"), "`../up` cannot be the name of a new domain"),
        (("a/b/c", *COLUMNS), "`a/b/c` is no name of a repository"),
    ],
)
def test_what_cannot_be_is_told(arguments: tuple[str, ...], message: str, hub: Hub, data: Path) -> None:
    told = refused(run(data, "--hub", *arguments, "--yes"))
    assert message in told
    assert not [path for path in data.glob("*") if path.name != ".dgbench-download"]


def test_a_wrong_column_is_known_from_the_first_file(hub: Hub, data: Path) -> None:
    refused(run(data, "--hub", "someone/Streets", "--columns", "image=picture", "label=masks", "--yes"))
    assert len(set(bodies(hub))) == 1


def test_a_gated_set_comes_with_what_to_do(hub: Hub, data: Path) -> None:
    hub.fault, hub.error_code = 403, "GatedRepo"
    told = refused(run(data, "--hub", "someone/Streets", *COLUMNS, "--yes"))
    assert "someone/Streets is gated: its owner asks you to accept the licence first" in told
    assert f"accept it at {hub.url}/datasets/someone/Streets, log in with: hf auth login" in told


@pytest.mark.parametrize("switch", ["DGBENCH_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_says_what_to_run_elsewhere(switch: str, hub: Hub, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv(switch, "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", switch == "HF_HUB_OFFLINE")
    told = refused(run(data, "--hub", "someone/Streets", *COLUMNS, "--yes"))
    assert f"{switch}=1 forbids downloads; not on this machine: streets" in told
    assert "dgbench download --root" in told
    assert "--hub someone/Streets --columns image=picture label=mask" in told
    assert not hub.requests


def test_stars_must_pair() -> None:
    assert columns_of(["image=a/*/*.jpg", "label=b/*/*.png"]) == {"image": "a/*/*.jpg", "label": "b/*/*.png"}
    for pairs in (
        ["image=a/*", "label=b"],
        ["image=a/**", "label=b/**"],
        ["image=a", "image=b"],
        ["picture=a", "label=b"],
        ["image", "label=b"],
    ):
        with pytest.raises(DataError):
            columns_of(pairs)


def test_the_bytes_are_those_of_the_repository(hub: Hub, data: Path) -> None:
    done(run(data, "--hub", "someone/Loose", "--columns", "image=rgb/rgb_*.png", "label=ss/ss_*.png", "--yes", "--split", "test"))
    expected = {hashlib.sha256(content).hexdigest() for name, content in LOOSE.items() if "/rgb/" in name}
    assert {hashlib.sha256(row["image"]["bytes"]).hexdigest() for row in rows(data / "loose", "test")} == expected

"""Records survive the disk unchanged, are never half there, and runs are found."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from records import record

from dgbench import atomic, results
from dgbench.errors import ResultError


def test_a_record_comes_back_equal(tmp_path: Path) -> None:
    written = results.write(
        record(iou=(0.5, None), seconds={"data": 1.5}, backends={"selective_scan": "torch"}, commit="abc", dirty=True,
               environment=results.environment("cpu", 2)), tmp_path,
    )  # fmt: skip
    assert written.path is not None
    back = results.read(written.path)
    assert back == written
    assert back.path == written.path
    assert isinstance(back.iou, tuple)


def test_a_record_of_schema_1_is_read_and_what_it_lacks_is_unknown(tmp_path: Path) -> None:
    path = results.write(record(), tmp_path).path
    assert path is not None
    content = json.loads(path.read_text())
    for new in ("rendered", "n_extra", "source_images", "source_available", "source_rendered"):
        del content[new]
    path.write_text(json.dumps(content | {"schema": 1}))
    old = results.read(path)
    assert (old.complete, old.source_complete, old.rendered) == (True, None, False)


@pytest.mark.parametrize(
    ("fields", "complete"),
    [({}, True), ({"n_images": 99}, False), ({"n_extra": 1}, False), ({"n_images": 101}, False), ({"n_available": 0}, False)],
)
def test_a_score_is_complete_over_the_split_alone(fields: dict[str, int], complete: bool) -> None:
    assert record(**fields).complete is complete


@pytest.mark.parametrize(("images", "available", "complete"), [(6, 24966, False), (9, 9, True), (9, 6, False), (0, 0, None)])
def test_a_source_is_complete_partial_or_unknown(images: int, available: int, complete: bool | None) -> None:
    assert record(source_images=images, source_available=available).source_complete is complete


def test_numbers_that_are_none_are_stored_as_null(tmp_path: Path) -> None:
    nan = float("nan")
    given = record(miou=nan, iou=(nan, float("inf"), 0.25), interval=(nan, nan), seconds={"model": nan})
    path = results.write(given, tmp_path).path
    assert path is not None
    stored = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert stored["miou"] is None
    assert stored["iou"] == [None, None, 0.25]
    back = results.read(path)
    assert back.miou is None
    assert back.interval == (None, None)
    assert back.seconds == {"model": None}


def test_numpy_numbers_are_stored_as_numbers(tmp_path: Path) -> None:
    path = results.write(record(miou=np.float32(0.5), n_images=np.int64(3)), tmp_path).path
    assert path is not None
    assert results.read(path).n_images == 3


def test_records_are_never_overwritten(tmp_path: Path) -> None:
    results.write(record(), tmp_path)
    with pytest.raises(ResultError, match="never overwritten"):
        results.write(record(miou=0.9), tmp_path)


def test_records_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().miou = 1.0  # type: ignore[misc]


def test_matrices_lie_beside_their_record(tmp_path: Path) -> None:
    counts = np.arange(2 * 19 * 19, dtype=np.int64).reshape(2, 19, 19)
    written = results.write(record("streets-fog@0.6"), tmp_path, counts)
    assert written.confusion is not None
    assert (tmp_path / written.confusion).is_file()
    [found] = results.query(tmp_path)
    assert np.array_equal(results.read_confusion(found), counts)
    (tmp_path / written.confusion).write_bytes(b"PK damaged")
    with pytest.raises(ResultError, match="cannot be read"):
        results.read_confusion(found)
    with pytest.raises(ResultError, match="no per-image matrices"):
        results.read_confusion(record())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", "not a record"),
        ('{"schema": 0}', "record schema 0, this dgbench reads schemas 1 and 2"),
        ('{"schema": 99}', "record schema 99"),
        ('{"schema": 1, "id": "x"}', "kind: field required|created: field required"),
        ('{"schema": 1, "flavour": 1}', "flavour: unknown field"),
    ],
)
def test_a_broken_record_is_named(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "record-x.json"
    path.write_text(text)
    with pytest.raises(ResultError, match=problem) as caught:
        results.read(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_wrong_type_is_named_by_its_field(tmp_path: Path) -> None:
    path = results.write(record(), tmp_path).path
    assert path is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_images": "many"}))
    with pytest.raises(ResultError, match="n_images"):
        results.read(path)


def test_query_leaves_out_broken_files_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    results.write(record(sequence=2), tmp_path / "b")
    results.write(record(sequence=1), tmp_path / "a")
    (tmp_path / "a" / "record-broken.json").write_text("{")
    (tmp_path / "a" / ".record-half.json.123.tmp").write_text("{")
    (tmp_path / "a" / ".record-half.json").write_text("{")
    assert [r.created for r in results.query(tmp_path)] == ["2026-11-24T00:01:00.000Z", "2026-11-24T00:02:00.000Z"]
    assert len(caplog.messages) == 1
    assert "record-broken.json" in caplog.messages[0]
    assert results.query(tmp_path / "nowhere") == []


WRITER = """
import sys
from pathlib import Path
from dgbench import atomic
size = 200_000
for i in range(10**9):
    atomic.write(Path(sys.argv[1]) / "record-x.json", bytes([65 + i % 26]) * size)
"""


def test_a_killed_writer_leaves_the_old_bytes_or_the_new(tmp_path: Path) -> None:
    for _ in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
        while not (tmp_path / "record-x.json").exists():
            time.sleep(0.01)
        time.sleep(0.03)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        content = (tmp_path / "record-x.json").read_bytes()
        assert len(content) == 200_000
        assert len(set(content)) == 1
        visible = [path.name for path in tmp_path.glob("record-*")]
        assert visible == ["record-x.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_names_the_file_and_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "record-x.json"
    atomic.write(target, "old")
    # the hidden file of this process is a way into a device that is always full
    (tmp_path / f".record-x.json.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        atomic.write(target, "new")
    assert caught.value.filename == str(target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["record-x.json"]


def test_ids_sort_by_time() -> None:
    early = results.new_id(datetime(2026, 1, 2, 3, 4, 5, 6000, UTC))
    late = results.new_id(datetime(2026, 1, 2, 3, 4, 5, 7000, UTC))
    assert early.startswith("20260102T030405006Z-")
    assert early < late


def started_run(root: Path, name: str, *, checkpoint: bool = False) -> Path:
    run = root / name
    (run / "checkpoint").mkdir(parents=True) if checkpoint else run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: x\n")
    return run


def test_new_runs_never_share_a_folder(tmp_path: Path) -> None:
    first, second = results.new_run(tmp_path, "streets/mfuser"), results.new_run(tmp_path, "streets/mfuser")
    assert first != second
    assert first.name.endswith("-streets-mfuser")


def test_latest_is_the_newest_run_that_will_do(tmp_path: Path) -> None:
    older = started_run(tmp_path, "20260101T000000Z-a", checkpoint=True)
    newer = started_run(tmp_path, "20260301T000000Z-b")
    (tmp_path / "20260401T000000Z-empty").mkdir()
    assert results.find_run("latest", tmp_path) == newer
    assert results.find_run("latest", tmp_path, needs="checkpoint") == older
    named = started_run(tmp_path, "mine")
    assert results.find_run("latest", tmp_path) == named, "a name without a time counts from the folder's date"


def test_a_run_is_found_by_folder_name_and_record(tmp_path: Path) -> None:
    run = started_run(tmp_path, "20260101T000000Z-a")
    path = results.write(record(), run).path
    for text in (str(run), run.name, str(path)):
        assert results.find_run(text, tmp_path) == run


def test_a_missing_run_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no run with recipe.yaml") as caught:
        results.find_run("latest", tmp_path)
    assert "dgbench train" in (caught.value.hint or "")
    started_run(tmp_path, "20260101T000000Z-streets-mfuser")
    with pytest.raises(ResultError, match="no run `20260101T000000Z-streets-mfusr`") as caught:
        results.find_run("20260101T000000Z-streets-mfusr", tmp_path)
    assert caught.value.hint == "did you mean `20260101T000000Z-streets-mfuser`?"
    with pytest.raises(ResultError, match="is not a run: it has no recipe.yaml"):
        results.find_run(str(tmp_path), tmp_path)


def test_a_chosen_run_folder_must_be_new(tmp_path: Path) -> None:
    assert results.claim_run(tmp_path / "new").is_dir()
    run = started_run(tmp_path, "old")
    with pytest.raises(ResultError, match="holds a run already") as caught:
        results.claim_run(run)
    assert caught.value.hint == f"go on with it: dgbench train --resume {run}"
    with pytest.raises(ResultError, match="not empty"):
        results.claim_run(tmp_path)


def test_environment_names_versions_and_device() -> None:
    found = results.environment("NVIDIA H200", 8)
    assert found["device"] == "NVIDIA H200"
    assert found["threads"] == "8"
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["numpy"] == np.__version__


def test_commit_is_that_of_this_repository() -> None:
    here = Path(__file__).parents[2]
    git = subprocess.run(["git", "ls-files", "--error-unmatch", "dgbench/results.py"], cwd=here, capture_output=True, check=False)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    if git.returncode or head.returncode:
        pytest.skip("not a checkout")
    assert results.commit()[0] == head.stdout.strip()


def test_commit_of_an_installed_copy_is_not_that_of_the_folder_around_it(tmp_path: Path) -> None:
    """A copy of the package inside somebody's repository has no commit of ours."""
    import shutil

    source = Path(results.__file__).parent
    shutil.copytree(source, tmp_path / "env" / "dgbench", ignore=shutil.ignore_patterns("__pycache__", "data", "engine"))
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "env"), "HOME": str(tmp_path)}
    for command in (
        ["init", "-q"],
        ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, env=environment, check=True)
    code = "from dgbench.results import commit, __file__ as f; print(commit(), f)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("(None, None)")
    assert str(tmp_path) in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="needs a named pipe")
def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE)
    atomic.write(pipe, "through")
    assert reader.communicate(timeout=20)[0] == b"through"
    assert pipe.is_fifo()

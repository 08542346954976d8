"""Records survive the disk unchanged, are never half there, and runs are found."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from calls import calls
from records import record

from dgbench import results
from dgbench.environment import describe_environment
from dgbench.errors import ResultError


def test_a_record_comes_back_equal(tmp_path: Path) -> None:
    written = results.write(
        record(
            iou=(0.5, None),
            seconds={"data": 1.5},
            backends={"selective_scan": "torch"},
            commit="abc",
            dirty=True,
            environment=describe_environment("cpu", 2),
        ),
        tmp_path,
    )
    assert written.path is not None
    back = results.read(written.path)
    assert back == written
    assert back.path == written.path
    assert isinstance(back.iou, tuple)


def test_a_record_of_schema_1_is_read_and_what_it_lacks_is_unknown(tmp_path: Path) -> None:
    path = results.write(record(), tmp_path).path
    assert path is not None
    content = json.loads(path.read_text())
    later = ("digest", "confusion_sha256")
    for new in ("rendered", "n_extra", "source_images", "source_available", "source_rendered", *later):
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


def counts_of(*ids: str) -> np.ndarray:
    """Matrices by which an image is known again: its first letter's code."""
    return np.stack([np.full((19, 19), ord(name[0]), dtype=np.int64) for name in ids])


def test_matrices_say_which_images_they_belong_to(tmp_path: Path) -> None:
    ids = ("b/ü.png", "a.png")
    written = results.write(record(), tmp_path, counts_of(*ids), ids)
    found = results.read_matrices(written)
    assert found.ids == ids
    assert np.array_equal(found.counts, counts_of(*ids))
    assert written.path is not None
    assert written.confusion is not None
    with np.load(tmp_path / written.confusion, allow_pickle=False) as file:
        assert sorted(file) == ["confusion", "images"]
        assert file["images"].tolist() == list(ids)


def test_matrices_of_older_files_are_read_and_not_paired(tmp_path: Path) -> None:
    counts = counts_of("a", "b")
    new = results.write(record(id="new"), tmp_path, counts, ("a", "b"))
    old = results.write(record(id="old"), tmp_path, counts)
    assert old.confusion is not None
    np.savez_compressed(tmp_path / old.confusion, confusion=counts)  # as version 0.1 wrote it
    old = dataclasses.replace(old, confusion_sha256="")
    assert results.read_matrices(old).ids is None
    assert np.array_equal(results.read_confusion(old), counts)
    with pytest.raises(ResultError, match="records new and old cannot be paired: .* do not say which images"):
        results.paired(new, old)


def test_records_are_paired_by_the_images_ids_and_not_by_their_places(tmp_path: Path) -> None:
    a = results.write(record(id="a"), tmp_path, counts_of("x", "y", "z"), ("x", "y", "z"))
    b = results.write(record(id="b"), tmp_path, counts_of("z", "x", "y"), ("z", "x", "y"))
    one, other = results.paired(a, b)
    assert one[:, 0, 0].tolist() == [ord(name) for name in "xyz"]
    assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("ids", "fields", "said"),
    [
        (("x", "w"), {}, "2 images are in only one of them, the first is w"),
        (("x",), {}, "1 images are in only one of them, the first is y"),
        (("x", "x"), {}, "an image occurs twice"),
        (("x", "y"), {"protocol_hash": "another"}, "protocol_hash is hash-streets-city in one and another in the other"),
    ],
)
def test_records_of_other_images_are_not_paired(ids: tuple[str, ...], fields: dict[str, str], said: str, tmp_path: Path) -> None:
    a = results.write(record(id="a"), tmp_path, counts_of("x", "y"), ("x", "y"))
    b = results.write(record(id="b", **fields), tmp_path, counts_of(*ids), ids)
    with pytest.raises(ResultError, match=said):
        results.paired(a, b)


@pytest.mark.parametrize(
    "arrays",
    [
        {"confusion": np.zeros((2, 19))},
        {"confusion": np.full((1, 2, 2), -1)},
        {"confusion": np.zeros((1, 2, 2))},
        {"confusion": np.zeros((1, 2, 2), int), "images": np.array(["a", "b"])},
        {"confusion": np.zeros((1, 2, 2), int), "images": np.array([1])},
        {"confusion": np.array([None]), "images": np.array(["a"])},
        {"other": np.zeros((1, 2, 2), int)},
    ],
)
def test_a_file_that_holds_no_matrices_is_named(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    written = results.write(record(), tmp_path, counts_of("a"), ("a",))
    assert written.confusion is not None
    np.savez(tmp_path / written.confusion, **arrays)
    with pytest.raises(ResultError, match=f"{written.confusion} cannot be read: it is damaged or another file"):
        results.read_matrices(written)
    with pytest.raises(ResultError, match=f"{written.confusion} cannot be read: (?!it is damaged)"):
        results.read_matrices(dataclasses.replace(written, confusion_sha256=""))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", "not a record"),
        ('{"schema": 0}', "record schema 0, this dgbench reads schemas 1 and 2"),
        ('{"schema": 99}', "record schema 99"),
        ('{"schema": 1, "id": "x"}', "kind: is missing"),
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


def test_a_folder_of_runs_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert results.query() == [], "before the first run there is no such folder"
    with pytest.raises(ResultError, match="no runs in .*nowhere: there is no such folder"):
        results.query(tmp_path / "nowhere")
    path = results.write(record(), tmp_path).path
    assert path is not None
    with pytest.raises(ResultError, match="is not a folder"):
        results.query(path)


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def test_a_flipped_bit_anywhere_in_a_record_is_noticed(tmp_path: Path) -> None:
    path = results.write(record(iou=(0.1 + 0.2, 1e-05)), tmp_path, counts_of("a"), ("a",)).path
    assert path is not None
    data = path.read_bytes()
    read = []
    for bit in range(0, len(data) * 8, 9):  # one in each byte, each in turn
        path.write_bytes(flipped(data, bit))
        try:
            read.append((bit, results.read(path)))
        except ResultError:
            continue
    assert not read


def test_a_flipped_bit_anywhere_in_the_matrices_is_noticed(tmp_path: Path) -> None:
    written = results.write(record(), tmp_path, counts_of("a"), ("a",))
    assert written.confusion is not None
    path = tmp_path / written.confusion
    data = path.read_bytes()
    for bit in range(0, len(data) * 8, 9):  # one in each byte, each in turn
        path.write_bytes(flipped(data, bit))
        with pytest.raises(ResultError, match="cannot be read: it is damaged or another file"):
            results.read_confusion(written)


def test_a_flipped_record_is_left_out_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = results.write(record(miou=0.4), tmp_path).path
    assert path is not None
    path.write_text(path.read_text().replace('"miou": 0.4', '"miou": 0.6'))
    assert results.query(tmp_path) == []
    assert caplog.messages == [f"{path}: is damaged or was changed: its content does not match its digest; it is left out"]


def test_a_record_without_digests_is_read(tmp_path: Path) -> None:
    given = record()
    path = results.write(given, tmp_path).path
    assert path is not None
    content = json.loads(path.read_text())
    del content["digest"], content["confusion_sha256"]
    path.write_text(json.dumps(content))
    assert results.read(path) == given


def stored(folder: Path, **changed: str) -> Path:
    """A record's file in which fields have other JSON texts."""
    path = results.write(record(), folder).path
    assert path is not None
    content = {key: json.dumps(value) for key, value in json.loads(path.read_text()).items()} | changed
    path.write_bytes("{{{}}}".format(", ".join(f"{json.dumps(k)}: {v}" for k, v in content.items())).encode())
    return path


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [
        ("miou", "Infinity", "miou: inf is not a finite number"),
        ("miou", "NaN", "miou: nan is not a finite number"),
        ("miou", "1e999", "miou: inf is not a finite number"),
        ("miou", "5.0", "miou: 5.0 is not within 0 and 1"),
        ("miou", "-0.1", "miou: -0.1 is not within 0 and 1"),
        ("miou", "true", "miou: true is not a number"),
        ("miou", '"0.9"', 'miou: "0.9" is not a number'),
        ("iou", "[0.5, 1.5]", "iou: 1.5 is not within 0 and 1"),
        ("iou", '{"0": 1}', "iou: {.*} is not a list|iou: .* is not a list"),
        ("interval", "[0.9, 0.1]", "interval: its lower end 0.9 is above its upper end 0.1"),
        ("interval", "[-1, 0.5]", "interval: -1.0 is not within 0 and 1"),
        ("interval", "[0.1, 0.2, 0.3]", "interval"),
        ("interval", "[0.1]", "interval.1: is missing"),
        ("n_images", "-1", "n_images: -1 is not within 0 and"),
        ("n_images", "1.5", "n_images: 1.5 is not a whole number"),
        ("n_images", '"100"', 'n_images: "100" is not a whole number'),
        ("n_images", "9" * 4000, "n_images: 9999.* is not within 0 and"),
        ("n_available", "true", "n_available: true is not a whole number"),
        ("seconds", '{"total": -1}', "seconds.*total.*: -1.0 is not within 0 and"),
        ("seconds", '{"total": Infinity}', "seconds.total: inf is not a finite number"),
        ("extra", '{"miou16": 7}', "extra: 7.0 is not within 0 and 1"),
        ("extra", '{"miou16": [1]}', "extra.miou16"),
        ("rendered", '"no"', 'rendered: "no" is not true or false'),
        ("created", '"yesterday"', 'created: "yesterday" is not a time'),
        ("created", '"2026-11-24T99:00:00Z"', "created: .* is not a time"),
        ("created", '"2026-11-24"', "created: .* is not a time"),
        ("method", '"' + "m" * 2000 + '"', "method: has 2,000 characters, at most 1,000"),
        ("method", "7", "method: 7 is not text"),
        ("method", '"\\ud800"', "is not valid JSON"),
        ("kind", '"guess"', "kind: \"guess\" is not 'eval', 'train' or 'severity'"),
        ("confusion", '"../../secret.npz"', "confusion: .* is not the name of a file beside the record"),
        ("confusion", '"/dev/zero"', "confusion: .* is not the name of a file beside the record"),
        ("schema", "true", "record schema true"),
        ("extra", "[" * 100_000 + "]" * 100_000, "is not valid JSON: lists or objects within each other too deep"),
        ("variant", '"' + "v" * 2_000_000 + '"', "has 2,.* bytes, at most 1,048,576 are read"),
    ],
)
def test_a_record_that_no_measurement_can_have_given_is_left_out(
    field: str, text: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored(tmp_path / "bad", **{field: text})
    good = results.write(record(), tmp_path / "good")
    assert results.query(tmp_path) == [good]
    (warning,) = caplog.messages
    assert re.search(said, warning)
    assert len(warning) < 600
    assert "input" not in warning.lower(), "no words of a library's"


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and links to devices")
@pytest.mark.parametrize("kind", ["pipe", "endless", "folder", "nowhere", "loop", "not UTF-8"])
def test_what_is_no_file_of_a_bounded_size_is_left_out(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "record-x.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "not UTF-8":
        path.write_bytes(b'{"schema": 2, "id": "\xff"}')
    else:
        path.symlink_to({"endless": "/dev/zero", "nowhere": "nothing", "loop": path.name}[kind])
    good = results.write(record(), tmp_path / "good")
    assert results.query(tmp_path) == [good]
    assert len(caplog.messages) == (0 if kind == "folder" else 1)


def test_a_record_behind_a_link_is_read(tmp_path: Path) -> None:
    path = results.write(record(), tmp_path / "elsewhere").path
    assert path is not None
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / path.name).symlink_to(path)
    assert len(results.query(tmp_path / "runs")) == 1


def test_the_work_of_reading_grows_as_the_number_of_records(tmp_path: Path) -> None:
    def work(n: int) -> int:
        folder = tmp_path / f"{n}"
        path = results.write(record(environment=describe_environment("cpu", 2), seconds={"total": 1.0}), folder).path
        assert path is not None
        for number in range(1, n):
            shutil.copy(path, path.with_name(f"record-{number}.json"))

        def read() -> None:
            assert len(results.query(folder)) == n

        return calls(read)

    work(2)  # what is done once
    assert work(400) < 6 * work(100)


def test_ids_sort_by_time() -> None:
    early = results.new_id(datetime(2026, 1, 2, 3, 4, 5, 6000, UTC))
    late = results.new_id(datetime(2026, 1, 2, 3, 4, 5, 7000, UTC))
    assert early.startswith("20260102T030405006Z-")
    assert early < late

"""One file from a server that misbehaves: it arrives byte for byte, or it is said why not and what is kept."""

from __future__ import annotations

import base64
import email.utils
import hashlib
import random
import resource
import shutil
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import kills
import pytest
from loopback_files import Server, serving

from dgbench.download.transfer import FullDiskError, InterruptedTransfer, Patience, Transfer
from dgbench.errors import DataError

CONTENT = random.Random(0).randbytes(1_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
HURRIED = Patience(tries=3, first=0.01, longest=0.02, longest_asked=2, connect=20, read=20)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving({"set.zip": CONTENT}) as running:
        yield running


@pytest.fixture
def transfer() -> Iterator[Transfer]:
    moving = Transfer(HURRIED)
    yield moving
    moving.close()


def fetch(transfer: Transfer, server: Server, folder: Path, md5: str | None = None) -> bytes:
    received = transfer.fetch(f"{server.url}/set.zip", folder / "set.zip", md5=md5)
    assert received.sha256 == hashlib.sha256(received.path.read_bytes()).hexdigest()
    assert [path.name for path in folder.iterdir()] == ["set.zip"]
    return received.path.read_bytes()


def test_a_file_arrives_whole_and_is_not_asked_for_again(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    assert fetch(transfer, server, tmp_path, MD5) == CONTENT
    assert fetch(transfer, server, tmp_path, MD5) == CONTENT
    assert server.bodies() == [("set.zip", None)]


@pytest.mark.parametrize("fault", ["cut", "reset", "stall"])
def test_a_broken_line_is_taken_up_where_it_broke(fault: str, server: Server, transfer: Transfer, tmp_path: Path) -> None:
    server.faults = [fault, fault]  # type: ignore[list-item]
    transfer.patience = replace(HURRIED, read=1) if fault == "stall" else HURRIED
    told: list[str] = []
    transfer.tell = told.append
    assert fetch(transfer, server, tmp_path) == CONTENT
    assert server.bodies() == [("set.zip", None), ("set.zip", "bytes=500000-"), ("set.zip", "bytes=750000-")]
    assert "0.5 MB are kept" in told[0]


def test_a_line_that_breaks_often_but_brings_something_is_not_given_up(
    server: Server, transfer: Transfer, tmp_path: Path
) -> None:
    server.faults = ["cut"] * 12  # far more than the tries that may bring nothing
    assert fetch(transfer, server, tmp_path) == CONTENT


def test_a_line_that_brings_nothing_is_given_up_with_what_is_kept(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    server.faults = ["cut", *[(503, {})] * 9]
    with pytest.raises(DataError, match="cannot be fetched: 127.0.0.1:.* answers 503, 3 times in a row") as caught:
        fetch(transfer, server, tmp_path)
    assert "500,000 bytes of it are kept" in str(caught.value.hint)
    server.faults = []
    assert fetch(transfer, server, tmp_path) == CONTENT
    assert server.bodies()[-1] == ("set.zip", "bytes=500000-")


@pytest.mark.parametrize(("status", "form"), [(429, "seconds"), (503, "date")])
def test_the_wait_that_a_busy_server_asks_for_is_kept(
    status: int, form: str, server: Server, transfer: Transfer, tmp_path: Path
) -> None:
    # a date has whole seconds: between one and two from now
    after = "1" if form == "seconds" else email.utils.formatdate(int(time.time()) + 2, usegmt=True)
    server.faults = [(status, {"Retry-After": after})]
    due = time.time() + 1 if form == "seconds" else email.utils.parsedate_to_datetime(after).timestamp()
    assert fetch(transfer, server, tmp_path) == CONTENT
    # on a machine that is busy it may take longer; without the header it is asked for again after 0.01 s
    assert time.time() > due - 0.01


def test_a_server_that_asks_to_wait_for_long_is_told(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    server.faults = [(429, {"Retry-After": "7200"})]
    with pytest.raises(DataError, match="answers 429 and asks to come back in 120 minutes"):
        fetch(transfer, server, tmp_path)


def test_a_server_without_ranges_begins_anew(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    server.ranges, server.faults = False, ["cut"]
    counted: list[int] = []
    transfer.advance = lambda _name, n: counted.append(n)
    assert fetch(transfer, server, tmp_path) == CONTENT
    assert sum(counted) == len(CONTENT)


def test_a_server_without_ranges_that_always_breaks_is_given_up(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    server.ranges, server.every = False, "cut"
    with pytest.raises(DataError, match="times in a row"):
        fetch(transfer, server, tmp_path)
    assert len(server.bodies()) < 8


@pytest.mark.parametrize("validators", [True, False])
def test_a_file_that_changed_on_the_server_is_never_mixed_with_the_old_one(
    validators: bool, server: Server, transfer: Transfer, tmp_path: Path
) -> None:
    server.validators, server.faults = validators, ["cut", *[(503, {})] * 9]
    with pytest.raises(DataError):
        fetch(transfer, server, tmp_path)
    server.faults, server.files["set.zip"] = [], CONTENT[::-1] + b"more"
    assert fetch(transfer, server, tmp_path) == CONTENT[::-1] + b"more"


def test_bytes_of_unknown_origin_are_not_built_upon(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    (tmp_path / "set.zip.part").write_bytes(b"x" * 1000)
    assert fetch(transfer, server, tmp_path) == CONTENT
    (tmp_path / "set.zip").unlink()
    (tmp_path / "set.zip.part").write_bytes(b"x" * 1000)
    (tmp_path / "set.zip.part.json").write_text('{"url": "http://elsewhere/", "size": 9, "etag": null, "modified": null}')
    assert fetch(transfer, server, tmp_path) == CONTENT


def test_a_part_that_is_whole_needs_no_byte(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    server.faults = ["cut", *[(503, {})] * 9]
    with pytest.raises(DataError):
        fetch(transfer, server, tmp_path)
    (tmp_path / "set.zip.part").write_bytes(CONTENT)  # as if killed just before the rename
    server.faults = []
    assert fetch(transfer, server, tmp_path) == CONTENT


def test_a_wrong_checksum_is_refused_and_removed(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"set.zip is damaged, .*its md5 is {MD5}, stated is 0+;? *") as caught:
        fetch(transfer, server, tmp_path, "0" * 32)
    assert "it is removed" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("status", "reason"), [(401, "it wants a login"), (404, "it has no such file"), (418, "it answers otherwise")]
)
def test_a_refusal_is_told_at_once(status: int, reason: str, server: Server, transfer: Transfer, tmp_path: Path) -> None:
    server.faults = [(status, {})]
    with pytest.raises(DataError, match=rf"does not give out http.*set.zip: {reason}.* \({status}\)"):
        fetch(transfer, server, tmp_path)
    assert len(server.bodies()) == 1


def test_a_login_page_is_not_taken_for_the_archive(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    server.faults = ["page"]
    with pytest.raises(DataError, match="is a web page, not set.zip"):
        fetch(transfer, server, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_place_without_a_server_is_told(transfer: Transfer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="set.zip cannot be fetched: .*refused"):
        transfer.fetch("http://127.0.0.1:9/set.zip", tmp_path / "set.zip")
    with pytest.raises(DataError, match="is not a valid URL"):
        transfer.fetch("ftp:/somewhere/set.zip", tmp_path / "set.zip")


def test_stop_ends_a_transfer_and_keeps_what_came(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    server.bytes_per_second = 2e6
    transfer.advance = lambda _name, _n: transfer.stop.set()
    with pytest.raises(InterruptedTransfer):
        fetch(transfer, server, tmp_path)
    assert 0 < (tmp_path / "set.zip.part").stat().st_size < len(CONTENT)


def test_the_server_says_how_large_a_file_is(server: Server, transfer: Transfer) -> None:
    assert transfer.size(f"{server.url}/set.zip") == len(CONTENT)
    assert transfer.size(f"{server.url}/other.zip") is None
    assert transfer.size("http://127.0.0.1:9/set.zip") is None


def test_no_room_is_known_before_the_body(
    server: Server, transfer: Transfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(FullDiskError, match=r"no room for set.zip: 1,000,000 bytes are missing, .* has 5 free"):
        fetch(transfer, server, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.stat().st_size > 1000]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_disk_that_is_full_is_told(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    (tmp_path / "set.zip.part").symlink_to("/dev/full")
    with pytest.raises(FullDiskError, match="the disk is full: 0 of 1,000,000 bytes are kept") as caught:
        fetch(transfer, server, tmp_path)
    assert "it goes on from there" in str(caught.value.hint)


def test_a_disk_that_fills_up_keeps_what_came_and_goes_on_later(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    # a limit on the size of files stands for the disk: the system refuses the same call in the same place
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(FullDiskError, match="300,000 of 1,000,000 bytes are kept"):
            fetch(transfer, server, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert fetch(transfer, server, tmp_path) == CONTENT
    assert server.bodies()[-1] == ("set.zip", "bytes=300000-")


def test_a_kill_in_the_middle_is_taken_up(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    part = tmp_path / "set.zip.part"
    for least in (1, 300_000):
        server.bytes_until = least + 100_000  # and no more: the kill may take its time
        come = kills.kill_when(
            lambda: Transfer().fetch(f"{server.url}/set.zip", tmp_path / "set.zip"),
            lambda least=least: part.is_file() and part.stat().st_size > least,  # type: ignore[misc]
        )
        assert come == -signal.SIGKILL
    server.bytes_until = None
    kept = part.stat().st_size
    assert kept < len(CONTENT)
    assert fetch(transfer, server, tmp_path, MD5) == CONTENT
    assert server.bodies()[-1] == ("set.zip", f"bytes={kept}-")


def test_several_files_come_at_once(tmp_path: Path, transfer: Transfer) -> None:
    files = {f"{n}.zip": random.Random(n).randbytes(100_000) for n in range(4)}
    with serving(files) as server:
        server.together = threading.Barrier(len(files))
        threads = [threading.Thread(target=transfer.fetch, args=(f"{server.url}/{name}", tmp_path / name)) for name in files]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not server.together.broken  # nobody's body begins before all were asked for
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


# ---- hostile servers, and what must not be told


@pytest.mark.parametrize(
    "after",
    ["²", "٣", "-5", "1e3", "nan", "9" * 5000, "Thu, 99 Foo 9999 99:99:99 GMT", "Mon, 01 Jan 0001 00:00:00 +2359", ","],
)
def test_a_wait_that_is_no_number_of_seconds_is_told_or_passed_over(
    after: str, server: Server, transfer: Transfer, tmp_path: Path
) -> None:
    header = after.encode().decode("latin-1")  # as http.server sends it
    server.faults = [(503, {"Retry-After": header})]
    if after.startswith("999"):
        with pytest.raises(DataError, match="asks to come back in"):
            fetch(transfer, server, tmp_path)
    else:
        assert fetch(transfer, server, tmp_path) == CONTENT


def test_a_file_of_unknown_length_arrives_whole(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    server.lengths = False
    assert fetch(transfer, server, tmp_path) == CONTENT


def test_a_server_that_never_ends_is_left(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    server.faults = ["endless"]
    with pytest.raises(DataError, match=r"sends more than 69,108,864 bytes for set.zip and does not state how many"):
        transfer.fetch(f"{server.url}/set.zip", tmp_path / "set.zip", about=1_000_000)
    assert not list(tmp_path.iterdir())


def test_the_rest_of_a_file_may_come_without_a_length(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    server.faults = ["cut", None]
    assert fetch(transfer, server, tmp_path) == CONTENT
    (tmp_path / "set.zip").unlink()
    server.faults = ["cut"]
    transfer.patience = Patience(tries=1)
    with pytest.raises(DataError, match="1 times in a row"):
        fetch(transfer, server, tmp_path)
    server.lengths = False
    server.files["set.zip"] = CONTENT  # the rest, and Content-Range says how much
    assert fetch(transfer, server, tmp_path) == CONTENT


def test_a_line_that_drips_is_given_up(server: Server, tmp_path: Path) -> None:
    server.bytes_per_second = 500
    transfer = Transfer(Patience(tries=2, first=0.01, read=1, slowest=5000, window=0.2))
    with pytest.raises(
        DataError, match=r"set.zip cannot be fetched: only [\d,]+ bytes came in \d+ s, 2 times in a row"
    ) as caught:
        fetch(transfer, server, tmp_path)
    transfer.close()
    assert "are kept" in str(caught.value.hint)


def test_a_login_is_sent_and_never_told(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    told: list[str] = []
    transfer.tell = told.append
    server.faults = ["cut"]
    address = server.url.replace("://", "://us%40er:se%2Fcret@") + "/set.zip"
    received = transfer.fetch(address, tmp_path / "set.zip")
    assert {base64.b64decode(str(login).removeprefix("Basic ")) for login in server.logins} == {b"us@er:se/cret"}
    assert received.source == f"{server.url}/set.zip"
    server.files.clear()
    with pytest.raises(DataError) as caught:
        transfer.fetch(address, tmp_path / "gone.zip")
    assert not [text for text in (*told, str(caught.value)) if "cret" in text or "er:" in text]
    assert f"does not give out {server.url}/set.zip" in str(caught.value)


def test_what_is_kept_of_a_file_does_not_hold_its_login(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    server.every = "reset"
    address = server.url.replace("://", "://user:secret@") + "/set.zip?token=hidden"
    server.files["set.zip?token=hidden"] = CONTENT
    with pytest.raises(DataError) as caught:
        transfer.fetch(address, tmp_path / "set.zip")
    kept = (tmp_path / "set.zip.part.json").read_text()
    assert not [word for word in ("secret", "user", "hidden") if word in kept + str(caught.value)]
    server.every = None
    server.requests.clear()
    transfer.fetch(address.replace("secret", "newer"), tmp_path / "set.zip")
    assert server.bodies()[0][1] is not None  # it went on where it stopped


def test_a_login_does_not_follow_to_another_server(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    with serving({"far.zip": CONTENT}) as other:
        server.onward = {"set.zip": f"{other.url}/far.zip"}
        address = server.url.replace("://", "://user:secret@") + "/set.zip"
        assert transfer.size(address) == len(CONTENT)
        assert transfer.fetch(address, tmp_path / "set.zip").bytes == len(CONTENT)
        assert None not in server.logins
        assert set(other.logins) == {None}


def test_a_server_that_leads_in_circles_is_told(server: Server, transfer: Transfer, tmp_path: Path) -> None:
    server.onward = {"set.zip": "/set.zip?token=x", "set.zip?token=x": "/set.zip"}
    with pytest.raises(DataError, match=f"{server.url}/set.zip leads in circles"):
        fetch(transfer, server, tmp_path)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_an_encrypted_line_does_not_go_on_as_an_open_one(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    transfer = Transfer(HURRIED)
    with serving({"set.zip": CONTENT}, tls) as secure:
        assert fetch(transfer, secure, tmp_path / "first") == CONTENT
        secure.onward = {"set.zip": f"{server.url}/set.zip?token=hidden"}
        with pytest.raises(DataError, match="which is not encrypted") as caught:
            fetch(transfer, secure, tmp_path / "second")
        assert "hidden" not in str(caught.value)
        assert transfer.size(f"{secure.url}/set.zip") is None
        assert not server.requests
        # the other way round is no loss
        server.onward, secure.onward = {"set.zip": f"{secure.url}/set.zip"}, {}
        assert fetch(transfer, server, tmp_path / "third") == CONTENT
    transfer.close()

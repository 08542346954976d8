"""Cityscapes through cityscapesScripts' own downloader, which meets its site behind a proxy on the loopback."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from small_sets import cityscapes, zipped
from typer.testing import CliRunner, Result

from dgbench import cli
from dgbench.data.catalog import lookup
from dgbench.data.index import find

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, to make a certificate")
HOST = "www.cityscapes-dataset.com"
NAMES = ("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip")


@dataclass
class Site:
    """What the site has and what goes wrong with it."""

    packages: dict[str, bytes]
    password: str = "secret"
    cuts: int = 0  # bodies that end in the middle
    damaged: bool = False
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificate")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        f"/CN={HOST}",
        "-addext",
        f"subjectAltName=DNS:{HOST}",
        "-keyout",
        "key.pem",
        "-out",
        "cert.pem",
    ]
    subprocess.run(command, cwd=folder, capture_output=True, check=True)
    return folder


@pytest.fixture
def site(certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    told = Site(cityscapes())

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_CONNECT(self) -> None:
            assert self.path == f"{HOST}:443"
            self.send_response(200)
            self.end_headers()
            self.connection = context.wrap_socket(self.connection, server_side=True)
            self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)
            self.close_connection = False
            while not self.close_connection:
                self.handle_one_request()

        def do_GET(self) -> None:
            told.requests.append((self.path, self.headers.get("Range")))
            asked = urlsplit(self.path)
            which = parse_qs(asked.query).get("packageID", ["0"])[0]
            name = list(told.packages)[int(which)]
            if asked.path == "/login":
                self.answer(b"a form")
            elif asked.path == "/downloads/":
                listed = [{"name": n, "packageID": str(i), "size": "1KB", "thirdparty": "0"} for i, n in enumerate(told.packages)]
                self.answer(json.dumps(listed).encode())
            elif asked.path == "/md5-sum/":
                self.answer(f"{hashlib.md5(told.packages[name]).hexdigest()}  {name}".encode())
            else:
                content = told.packages[name]
                if told.damaged:
                    content = content[:100] + bytes([content[100] ^ 1]) + content[101:]
                start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
                if start >= len(content):
                    self.answer(b"", 416)
                else:
                    self.answer(content[start:], 206, cut=told.cuts > 0)
                    told.cuts -= 1

        def do_POST(self) -> None:
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.answer(b"", 302 if form["password"] == [told.password] else 200)

        def answer(self, content: bytes, status: int = 200, *, cut: bool = False) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if cut else content)
            self.close_connection = self.close_connection or cut

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    for name, value in {
        "HTTPS_PROXY": f"http://127.0.0.1:{server.server_port}",
        "REQUESTS_CA_BUNDLE": str(certificate / "cert.pem"),
        "XDG_DATA_HOME": str(tmp_path / "share"),
        "NO_PROXY": "",
    }.items():
        monkeypatch.setenv(name, value)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.delenv("DGBENCH_OFFLINE", raising=False)
    yield told
    server.shutdown()
    server.server_close()


@pytest.fixture
def login(tmp_path: Path, site: Site) -> Path:
    """A login that the downloader has stored."""
    path = tmp_path / "share/cityscapesscripts/credentials.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"username": "me", "password": site.password}))
    return path


def run(data: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["download", "cityscapes", "--yes", *arguments, "--root", str(data)], prog_name="dgbench")


def refused(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    return result.stderr[result.stderr.index("error: ") :]


def bodies(site: Site) -> list[str | None]:
    return [ranged for path, ranged in site.requests if path.startswith("/file-handling")]


def test_packages_come_through_the_downloader(site: Site, login: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    result = run(data, "--json")
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)[0]  # what the downloader prints is not among the results
    assert (row["name"], row["state"]) == ("cityscapes", "downloaded")
    assert [len(find(lookup("cityscapes"), split, data)) for split in ("train", "val")] == [1, 1]
    assert sorted(path.name for path in data.iterdir()) == ["cityscapes"]
    site.requests.clear()
    assert "already here" in run(data).stdout
    assert not site.requests


def test_a_broken_line_is_taken_up(site: Site, login: Path, tmp_path: Path) -> None:
    ids = [f"gtFine/{split}/a/{n}_gtFine_labelIds.png" for split in ("train", "val") for n in range(20)]
    site.packages["gtFine_trainvaltest.zip"] = zipped({name: random.Random(name).randbytes(2000) for name in ids})
    site.cuts = 1
    assert run(tmp_path / "data").exit_code == 0
    first, second, images = bodies(site)
    assert first == images == "bytes=0-"
    # it writes 1024 bytes at a time
    assert second == f"bytes={len(site.packages['gtFine_trainvaltest.zip']) // 2 // 1024 * 1024}-"


def test_a_package_that_was_whole_when_the_program_was_killed_is_not_asked_for(site: Site, login: Path, tmp_path: Path) -> None:
    # the downloader would ask for the bytes after the last one and fail
    there = tmp_path / "data/.dgbench-download/cityscapes/archives/csDownload/gtFine_trainvaltest.zip"
    there.parent.mkdir(parents=True)
    there.write_bytes(site.packages[there.name])
    assert run(tmp_path / "data").exit_code == 0
    assert bodies(site) == ["bytes=0-"]


def test_a_damaged_package_is_removed(site: Site, login: Path, tmp_path: Path) -> None:
    site.damaged = True
    message = refused(run(tmp_path / "data"))
    assert message.startswith("error: cityscapesScripts says: MD5 sum of downloaded file does not match.")
    site.damaged = False
    assert run(tmp_path / "data").exit_code == 0


def test_a_wrong_password_is_told(site: Site, login: Path, tmp_path: Path) -> None:
    site.password = "another"
    message = refused(run(tmp_path / "data"))
    assert message.startswith("error: cityscapesScripts says: Bad credentials.")
    assert "https://www.cityscapes-dataset.com/register/ gives accounts" in message
    assert not bodies(site)


def test_an_account_without_access_is_told(site: Site, login: Path, tmp_path: Path) -> None:
    del site.packages["leftImg8bit_trainvaltest.zip"]
    message = refused(run(tmp_path / "data"))
    assert "These packages do not exist or you don't have access: ['leftImg8bit_trainvaltest.zip']" in message
    assert "your account may wait for approval" in message


def test_without_a_login_and_a_terminal_it_is_said_what_to_do(site: Site, tmp_path: Path) -> None:
    message = refused(run(tmp_path / "data"))
    assert message.startswith("error: Cityscapes needs a login, and there is no terminal to ask on")
    assert "let it store the login" in message
    assert "dgbench download cityscapes --from FOLDER" in message
    assert not site.requests


def test_without_the_downloader_it_is_said_how_to_install_it(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cityscapesscripts.download", None)
    message = refused(run(tmp_path / "data"))
    assert message.startswith("error: Cityscapes is fetched with cityscapesScripts, which is not installed")
    assert "pip install -e '.[cityscapes]'" in message

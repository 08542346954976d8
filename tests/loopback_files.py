"""A file server on the loopback that can be told to behave as badly as those of data sets do."""

from __future__ import annotations

import email.utils
import hashlib
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal["cut", "reset", "stall", "page", "endless"]


@dataclass
class Server:
    """Files by path, what goes wrong, and the requests that came."""

    url: str
    files: dict[str, bytes | os.PathLike[str]]
    # what goes wrong with the next answers, one each: half a body and an end ("cut") or a reset, a body that stops coming
    # ("stall"), a body of unknown length that does not end ("endless"), a web page, or (status, headers)
    faults: list[Fault | tuple[int, dict[str, str]] | None] = field(default_factory=list)
    every: Fault | None = None  # goes wrong with all of them
    ranges: bool = True
    validators: bool = True  # ETag and Last-Modified
    bytes_per_second: float | None = None
    bytes_until: int | None = None  # of a file, after which nothing comes any more
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    logins: list[str | None] = field(default_factory=list)  # Authorization, of the same requests
    onward: dict[str, str] = field(default_factory=dict)  # path -> where it has moved to, with a body that never ends
    lengths: bool = True  # Content-Length; without it the end of the connection is the end of the file
    together: threading.Barrier | None = None  # bodies begin when so many were asked for
    release: threading.Event = field(default_factory=threading.Event)  # ends a stall

    def bodies(self, path: str | None = None) -> list[tuple[str, str | None]]:
        """The paths that were asked for with GET, and the range."""
        return [(asked, ranged) for method, asked, ranged in self.requests if method == "GET" and path in (None, asked)]


@contextmanager
def serving(files: Mapping[str, bytes | os.PathLike[str]], tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def content(self) -> bytes | None:
            found = server.files.get(self.path.lstrip("/"))
            return found if found is None or isinstance(found, bytes) else open(found, "rb").read()

        def answer(self, *, body: bool) -> None:
            server.requests.append((self.command, self.path.lstrip("/"), self.headers.get("Range")))
            fault = (server.faults.pop(0) if server.faults else server.every) if body else None
            server.logins.append(self.headers.get("Authorization"))
            if place := server.onward.get(self.path.lstrip("/")):
                self.send_response(302)
                self.send_header("Location", place)
                self.end_headers()
                if body:
                    self.endless()
                return
            content = self.content()
            if isinstance(fault, tuple) or content is None:
                self.send_response(fault[0] if isinstance(fault, tuple) else 404)
                for name, value in (fault[1] if isinstance(fault, tuple) else {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault == "endless":
                self.send_response(200)
                self.end_headers()
                self.endless()
                return
            if fault == "page":
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", "22")
                self.end_headers()
                self.wfile.write(b"<html>log in</html>   ")
                return
            etag = f'"{hashlib.md5(content).hexdigest()}"'
            ranged = self.headers.get("Range") if server.ranges else None
            if ranged and self.headers.get("If-Range", etag) != etag:
                ranged = None
            start = int(ranged.removeprefix("bytes=").rstrip("-")) if ranged else 0
            if start >= len(content) and ranged:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if ranged else 200)
            if server.validators:
                self.send_header("ETag", etag)
                self.send_header("Last-Modified", email.utils.formatdate(0, usegmt=True))
            if ranged:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            if server.lengths:
                self.send_header("Content-Length", str(len(content) - start))
            else:
                self.close_connection = True
            self.end_headers()
            if body and server.together is not None:
                with suppress(threading.BrokenBarrierError):
                    server.together.wait(20)
            if body:
                self.send(content[start:], fault, start)

        def send(self, content: bytes, fault: Fault | None, start: int) -> None:
            if fault is not None:
                self.write(content[: len(content) // 2])
                self.wfile.flush()
                self.close_connection = True
            if fault == "reset":
                time.sleep(0.05)  # what was sent has arrived
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            if fault == "stall":
                server.release.wait(20)
            if fault is None and server.bytes_until is not None:
                self.write(content[: max(0, server.bytes_until - start)])
                self.wfile.flush()
                self.close_connection = True
                server.release.wait()
            elif fault is None:
                self.write(content)

        def write(self, content: bytes) -> None:
            try:
                if server.bytes_per_second is None:
                    self.wfile.write(content)
                    return
                step = max(1, int(server.bytes_per_second / 50))
                for at in range(0, len(content), step):
                    self.wfile.write(content[at : at + step])
                    self.wfile.flush()
                    time.sleep(0.02)
            except OSError:  # the other side was killed
                self.close_connection = True

        def endless(self) -> None:
            self.close_connection = True
            while not server.release.is_set():
                try:
                    self.wfile.write(bytes(1 << 16))
                except OSError:
                    return

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Broken connections are what it is for."""

    listening = Quiet(("127.0.0.1", 0), Handler)
    if tls is not None:
        listening.socket = tls.wrap_socket(listening.socket, server_side=True)
    server = Server(f"{'https' if tls else 'http'}://127.0.0.1:{listening.server_port}", dict(files))
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        listening.shutdown()
        listening.server_close()
        thread.join()

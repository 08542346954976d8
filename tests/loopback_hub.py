"""A Hub on the loopback: enough of its HTTP face for huggingface_hub to download from and upload to, with faults to order."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """Files by `repo/file`, of a dataset `datasets/repo/file`; what is wrong with the next answers; the requests that came."""

    url: str
    files: dict[str, bytes]
    # "cut" breaks the first body off, "short" sends less than was stated and says so, "changed" alters a byte,
    # "small" gives git's object id as etag, "page" lacks what a Hub says of a file, an int is the status of every answer
    fault: str | int | None = None
    error_code: str | None = None  # the Hub's own word beside the status
    licence: str | None = None  # on the card of every dataset
    commit: str = COMMIT  # behind `main`
    private: dict[str, bool] = field(default_factory=dict)  # repositories of models that were made, and who may see them
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, `repo/file`, Range

    def bodies(self) -> list[tuple[str, str | None]]:
        """The files whose content was asked for; huggingface_hub has questions of its own besides."""
        return [(path, ranged) for method, path, ranged in self.requests if method == "GET" and path in self.files]


@functools.cache
def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def serving(files: Mapping[str, bytes]) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_POST(self) -> None:
            """Make a repository, ask how files are to be sent, and commit them."""
            given = self.rfile.read(int(self.headers["Content-Length"]))
            hub.requests.append(("POST", self.path, None))
            if isinstance(hub.fault, int):
                self.send_response(hub.fault)
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif self.path == "/api/repos/create":
                made = json.loads(given)
                repo = f"{made['organization']}/{made['name']}" if made.get("organization") else made["name"]
                exists = repo in hub.private
                hub.private.setdefault(repo, made.get("private") or made.get("visibility") == "private")
                self.tell({"url": f"{hub.url}/{repo}"}, 409 if exists else 200)
            elif self.path == "/api/validate-yaml":
                self.tell({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(given)["files"]]
                self.tell({"files": files})
            else:
                repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
                for line in map(json.loads, given.splitlines()):
                    if line["key"] == "file":
                        hub.files[f"{repo}/{line['value']['path']}"] = base64.b64decode(line["value"]["content"])
                self.tell({"commitUrl": f"{hub.url}/{repo}/commit/{hub.commit}", "commitOid": hub.commit})

        def tell(self, told: object, status: int = 200) -> None:
            body = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def answer(self, *, body: bool) -> None:
            asked = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
            path = "/".join(asked.groups()) if asked else self.path
            hub.requests.append((self.command, path, self.headers.get("Range")))
            if not isinstance(hub.fault, int) and path.startswith(("/api/datasets/", "/api/models/")):
                self.tell_of_repository(path)
                return
            if isinstance(hub.fault, int) or path not in hub.files:
                self.send_response(hub.fault if isinstance(hub.fault, int) else 404)
                code = hub.error_code if isinstance(hub.fault, int) else "EntryNotFound"
                if code:
                    self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = hub.files[path]
            size, etag = len(content), sha256(content)
            if hub.fault == "small":
                etag = hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
            if hub.fault == "changed":
                content = content[:-1] + bytes([content[-1] ^ 1])
            if hub.fault == "short":
                content = content[: size // 2]
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if "Range" in self.headers else 0
            self.send_response(206 if start else 200)
            for name, value in {
                "ETag": f'"{etag}"',
                "X-Linked-Etag": f'"{etag}"',
                "X-Linked-Size": size,
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
                "Content-Length": len(content) - start,
            }.items():
                if hub.fault != "page" or name == "Content-Length":
                    self.send_header(name, str(value))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if not body:
                return
            if hub.fault == "cut":
                hub.fault = None
                self.wfile.write(content[: size // 2])
                self.close_connection = True
                return
            self.wfile.write(content[start:])

        def tell_of_repository(self, path: str) -> None:
            """What a repository holds: its description, or its tree."""
            asked = re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/?]+)(?:/(revision|tree)/([^/?]+))?.*", path)
            assert asked is not None
            kind, repo, what, revision = asked.groups()
            prefix = f"datasets/{repo}/" if kind == "datasets" else f"{repo}/"
            files = {name.removeprefix(prefix): content for name, content in hub.files.items() if name.startswith(prefix)}
            if not (files or repo in hub.private) or revision not in (None, "main", hub.commit):
                self.send_response(404)
                self.send_header("X-Error-Code", "RevisionNotFound" if files else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            sums = {
                name: {"sha256": sha256(data), "oid": sha256(data), "size": len(data), "pointerSize": 130}
                for name, data in files.items()
            }
            told: object = [
                {"type": "file", "path": name, "oid": "0" * 40, "size": len(data), "lfs": sums[name]}
                for name, data in files.items()
            ]
            if what != "tree":
                siblings = [{"rfilename": n, "size": len(d), "blobId": "0" * 40, "lfs": sums[n]} for n, d in files.items()]
                card = {"license": hub.licence} if hub.licence else {}
                told = {
                    "id": repo,
                    "sha": hub.commit,
                    "siblings": siblings,
                    "cardData": card,
                    "private": hub.private.get(repo, False),
                    "gated": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                }
            self.tell(told)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}", dict(files))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

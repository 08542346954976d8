"""Transfer of one file over HTTP: retried, resumed after interruptions, checked, and put into place atomically.

Bytes go to `NAME.part`; `NAME.part.json` beside it records which file they belong to (URL, size, validators), so that
after a crash the rest is requested by Range and If-Range, and a file that has changed is transferred again. Only a complete
file that passed its check is renamed to `NAME`.
"""

from __future__ import annotations

import email.utils
import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dgbench import __version__, atomic
from dgbench.download.addresses import login_of, without_secrets
from dgbench.errors import DataError

if TYPE_CHECKING:
    import httpx2

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BLOCK = 1 << 20
_REDIRECTIONS = 20
_UNKNOWN = 64 << 30  # limit of bytes for a file of unknown size
# status codes after which a retry may help
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_REFUSALS = {
    401: "it wants a login",
    403: "it does not let everyone read this file",
    404: "it has no such file",
    410: "it no longer has this file",
}


@dataclass(frozen=True, slots=True)
class Patience:
    """Retries and time limits in seconds; `tries` counts consecutive tries without new bytes."""

    tries: int = 6
    first: float = 1.0  # the wait after the first failure, doubled after each further one
    longest: float = 30.0
    longest_asked: float = 300.0  # a longer Retry-After of a server is an error
    connect: float = 20.0
    read: float = 30.0
    slowest: float = 1000.0  # bytes per second, over `window`; a slower connection counts as broken
    window: float = 60.0


@dataclass(frozen=True, slots=True)
class Received:
    """A file that was transferred completely."""

    path: Path
    source: str  # its address, without its secrets
    bytes: int
    sha256: str
    md5: str | None  # where one was expected


class FullDiskError(DataError):
    """The disk is full; no other file needs to be tried."""


class InterruptedTransfer(Exception):
    """`stop` was set."""


class _Again(Exception):
    """A failure that may pass."""

    def __init__(self, reason: str, after: float | None = None, *, useless: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.after, self.useless = reason, after, useless


@dataclass(frozen=True, slots=True)
class _Started:
    """The file that the bytes of a `.part` file belong to."""

    url: str  # without its secrets
    size: int | None
    etag: str | None
    modified: str | None


@dataclass(slots=True)
class Transfer:
    """Transfers of one command; shared by its threads.

    Args:
        advance: called with each file's new bytes; a negative number if a transfer started again.
        tell: called with a line when something fails and is retried.
        stop: ends all transfers soon after it is set; their bytes are kept.
    """

    patience: Patience = field(default_factory=Patience)
    advance: Callable[[str, int], None] = lambda _name, _n: None
    tell: Callable[[str], None] = lambda _line: None
    stop: threading.Event = field(default_factory=threading.Event)
    _client: httpx2.Client | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def client(self) -> httpx2.Client:
        """Return the shared connection pool; its proxies are those of HTTPS_PROXY and similar variables."""
        import httpx2

        with self._lock:
            if self._client is None:
                timeout = httpx2.Timeout(self.patience.read, connect=self.patience.connect)
                # identity: a length and a range must mean the bytes of the file
                headers = {"User-Agent": f"dgbench/{__version__}", "Accept-Encoding": "identity"}
                self._client = httpx2.Client(timeout=timeout, headers=headers)
            return self._client

    @contextmanager
    def _answer(self, method: str, url: str, headers: dict[str, str] | None = None) -> Iterator[httpx2.Response]:
        """Request a URL and return the answer after all redirections, its body not yet read.

        A login is only sent to the server that it was given for, and a redirect from an encrypted to an unencrypted
        connection is refused.
        """
        address, login = login_of(url)
        request = self.client().build_request(method, address, headers=headers)
        for _ in range(_REDIRECTIONS):
            answer = self.client().send(request, auth=login, stream=True, follow_redirects=False)
            try:
                onward = answer.next_request
                if onward is None:
                    yield answer
                    return
            finally:
                answer.close()
            # the login is in the request's headers, or the request is for another server
            login = None
            if request.url.scheme == "https" and onward.url.scheme != "https":
                raise DataError(
                    f"{without_secrets(url)} leads to {without_secrets(str(onward.url))}, which is not encrypted",
                    "such a connection can be read and changed by others: download the file by other means and give its "
                    "folder with --from, or name a server that you trust with --mirror",
                )
            request = onward
        raise DataError(f"{without_secrets(url)} leads in circles", "see where a browser gets to; then give it with --from")

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()

    def size(self, url: str) -> int | None:
        """Return the file's size in bytes as the server states it; None if it does not, or cannot be reached."""
        import httpx2

        try:
            with self._answer("HEAD", url) as answer:
                return _number(answer.headers.get("Content-Length")) if answer.status_code == 200 else None
        except (httpx2.HTTPError, httpx2.InvalidURL, DataError, ValueError, OSError):
            return None

    def fetch(
        self, url: str, path: Path, *, md5: str | None = None, about: int | None = None, again: str = "run the same command again"
    ) -> Received:
        """Download `url` to `path`, resuming an earlier try. An existing file is only hashed.

        Args:
            md5: of the whole file, if its owner states one.    about: its published size in bytes: if a server
            states none, at most twice as much is read.    again: advice to a user after a failure.

        Raises: DataError saying what the server answered, or that the file is not the stated one (it is removed then);
            FullDiskError before or while the disk is full (received bytes are kept); InterruptedTransfer after `stop`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part, failures, furthest = _part(path), 0, -1
        most = _UNKNOWN if about is None else 2 * about + (64 << 20)
        while not path.is_file():
            try:
                self._once(url, path, most, again)
            except _Again as problem:
                have = part.stat().st_size if part.is_file() else 0
                # a connection that breaks every few MB is only slow
                failures = 1 if have > furthest and not problem.useless else failures + 1
                furthest = max(furthest, have)
                self._wait(problem, failures, path, have, again)
        return self._checked(path, url, md5, again)

    def _once(self, url: str, path: Path, most: int, again: str) -> None:
        import httpx2

        part = _part(path)
        started = _read_started(path, without_secrets(url))
        have = part.stat().st_size if started and part.is_file() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        if have and started and (validator := started.etag or started.modified):
            headers["If-Range"] = validator
        try:
            with self._answer("GET", url, headers) as answer:
                have, size = self._begin(answer, without_secrets(url), path, started, have, again)
                if size is not None:
                    _check_room(path, size, have, again)
                self._body(answer, path, have, size, most, again)
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise DataError(
                f"{without_secrets(url)} is not a valid URL: {without_secrets(str(error))}",
                "give one that begins with https://",
            ) from None
        except httpx2.TransportError as error:
            if _untrusted(error):
                raise DataError(
                    f"the certificate of {answer_host(url)} cannot be verified: {_reason(error)}",
                    "update the system's certificates (or point SSL_CERT_FILE at a bundle that has the missing one); or download "
                    f"{path.name} in a browser and give its folder with --from",
                ) from None
            raise _Again(_reason(error)) from None
        if size is not None and part.stat().st_size != size:
            raise _Again(f"it ended after {part.stat().st_size:,} of {size:,} bytes")
        _sync(part)
        os.replace(part, path)
        _note(path).unlink(missing_ok=True)

    def _begin(
        self, answer: httpx2.Response, url: str, path: Path, started: _Started | None, have: int, again: str
    ) -> tuple[int, int | None]:
        """Check an answer's headers; return how many bytes are kept and how many there will be."""
        status, host = answer.status_code, answer_host(url)
        if status in _BUSY:
            raise _Again(f"{host} answers {status}", _retry_after(answer.headers.get("Retry-After")))
        if status == 416 and started is not None:
            if have == started.size:
                return have, have  # nothing is missing
            _restart(path)
            raise _Again(f"{host} does not have the rest of {path.name}; the transfer starts again")
        if status not in (200, 206):
            reason = _REFUSALS.get(status, "it answers otherwise")
            hint = f"see whether a browser gets it; then give its folder with --from, or a mirror with --mirror; {again}"
            raise DataError(f"{host} does not give out {url}: {reason} ({status})", hint)
        if answer.headers.get("Content-Type", "").startswith("text/html") and not path.name.endswith(".html"):
            raise DataError(
                f"{url} is a web page, not {path.name}: the site may ask for a login there, or be down for repair",
                "open the page in a browser; then give the folder of what it downloads with --from",
            )
        if status == 206 and have and started is not None:
            first, size = _content_range(answer.headers.get("Content-Range", ""))
            if first == have and (started.size is None or size == started.size):
                return have, size
            _restart(path)
            raise _Again(f"{host} sends another part than the requested one; the transfer of {path.name} starts again")
        # the whole file: a first try, a server without ranges, or a file that has changed since
        if have:
            self.advance(path.name, -have)
        size = _number(answer.headers.get("Content-Length"))
        etag = answer.headers.get("ETag")
        strong = etag if etag and not etag.startswith("W/") else None  # a weak one is not allowed in If-Range
        _restart(path)
        note = _Started(url, size, strong, answer.headers.get("Last-Modified"))
        atomic.write(_note(path), json.dumps(asdict(note)))
        return 0, size

    def _body(self, answer: httpx2.Response, path: Path, have: int, size: int | None, most: int, again: str) -> None:
        if answer.status_code == 416:
            return
        part, pace = _part(path), _Pace(self.patience)
        most = most if size is None else size
        with full_disk(part, size, again), part.open("ab", buffering=0) as file:
            for block in answer.iter_raw():
                if self.stop.is_set():
                    raise InterruptedTransfer
                have += len(block)
                if have > most:
                    _restart(path)
                    told = f"states {size:,}" if size is not None else "does not state how many there are"
                    raise DataError(
                        f"{answer_host(without_secrets(str(answer.request.url)))} sends more than {most:,} bytes for {path.name} "
                        f"and {told}",
                        f"they are removed; see whether a browser gets the file and give its folder with --from, or {again}",
                    )
                rest = memoryview(block)
                while rest:
                    rest = rest[file.write(rest) :]
                self.advance(path.name, len(block))
                pace.check(len(block))

    def _checked(self, path: Path, url: str, md5: str | None, again: str) -> Received:
        sha256, found = hashes([path], self.stop)
        if md5 is not None and found != md5:
            path.unlink()
            raise DataError(
                f"{path.name} is damaged, or another file than its owner states: its md5 is {found}, stated is {md5}",
                f"it is removed; {again}. If it happens twice, a proxy or a mirror changes files",
            )
        return Received(path, without_secrets(url), path.stat().st_size, sha256, md5)

    def _wait(self, problem: _Again, failures: int, path: Path, have: int, again: str) -> None:
        kept = f"{have:,} bytes of it are kept; " if have else ""
        if failures >= self.patience.tries:
            raise DataError(
                f"{path.name} cannot be fetched: {problem.reason}, {failures} times in a row",
                f"{kept}check the network and HTTPS_PROXY, then {again}: it goes on where it stopped",
            )
        seconds = min(self.patience.longest, self.patience.first * 2 ** (failures - 1))
        if problem.after is not None:
            if problem.after > self.patience.longest_asked:
                raise DataError(
                    f"{path.name} cannot be fetched now: {problem.reason} and asks to come back in "
                    f"{problem.after / 60:.0f} minutes",
                    f"{kept}then {again}",
                )
            seconds = max(seconds, problem.after)
        self.tell(f"{path.name}: {problem.reason}; trying again in {seconds:.0f} s, {have / 1e6:,.1f} MB are kept")
        if self.stop.wait(seconds):
            raise InterruptedTransfer


def hashes(files: Sequence[Path], stop: threading.Event) -> tuple[str, str]:
    """Return the sha256 and the md5 of the concatenation of files, read once."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    for path in files:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                if stop.is_set():
                    raise InterruptedTransfer
                sha256.update(block)
                md5.update(block)
    return sha256.hexdigest(), md5.hexdigest()


@contextmanager
def full_disk(path: Path, size: int | None, again: str) -> Iterator[None]:
    """Report a full disk with what is kept of `path`, of `size` bytes, and how to continue."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        have = sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
        of = f" of {size:,}" if size is not None else ""
        why = "is full" if error.errno != errno.EFBIG else "takes no larger file (a limit of the file system or of `ulimit -f`)"
        raise FullDiskError(
            f"the disk {why}: {have:,}{of} bytes are kept in {path}",
            f"make room in {path.parent}, or point --root or DGBENCH_DATA at a larger disk; then {again}: it goes on from there",
        ) from None


class _Pace:
    """A check of a connection's rate: one byte before each timeout would never end."""

    def __init__(self, patience: Patience) -> None:
        self._patience, self._since, self._came = patience, time.monotonic(), 0

    def check(self, came: int) -> None:
        self._came += came
        seconds = time.monotonic() - self._since
        if seconds < self._patience.window:
            return
        if self._came < self._patience.slowest * seconds:
            raise _Again(f"only {self._came:,} bytes came in {seconds:.0f} s", useless=True)
        self._since, self._came = time.monotonic(), 0


def answer_host(url: str) -> str:
    """Return the server's name of a URL, for messages."""
    return login_of(url)[0].partition("://")[2].partition("/")[0] or without_secrets(url)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".part.json")


def _read_started(path: Path, url: str) -> _Started | None:
    try:
        found = _Started(**json.loads(_note(path).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.url == url else None


def _restart(path: Path) -> None:
    # the note is written first: bytes without one cannot be assigned to a file
    _note(path).unlink(missing_ok=True)
    part = _part(path)
    if part.is_file():
        part.unlink()


def _check_room(path: Path, size: int, have: int, again: str) -> None:
    free = shutil.disk_usage(path.parent).free
    if size - have > free:
        raise FullDiskError(
            f"no room for {path.name}: {size - have:,} bytes are missing, {path.parent} has {free:,} free",
            f"make room there, or point --root or DGBENCH_DATA at a larger disk; then {again}",
        )


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _content_range(text: str) -> tuple[int | None, int | None]:
    """Return first byte and whole size of `bytes 5-9/10`."""
    unit, _, rest = text.partition(" ")
    span, _, whole = rest.partition("/")
    first = span.partition("-")[0]
    return (_number(first), _number(whole)) if unit == "bytes" else (None, None)


def _number(text: str | None) -> int | None:
    """Return a number of a header; None for digits of other scripts and for numbers that no file size has."""
    return int(text) if text and len(text) <= 18 and text.isascii() and text.isdigit() else None


def _retry_after(text: str | None) -> float | None:
    """Return the seconds to wait by a Retry-After header: a number or a date (RFC 9110, 10.2.3)."""
    if not text:
        return None
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])  # up to 30,000 years
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError, OSError):
        return None


def _untrusted(error: BaseException | None) -> bool:
    while error is not None:
        if type(error).__name__ == "SSLCertVerificationError" or "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(error: Exception) -> str:
    text = without_secrets((str(error).strip().splitlines() or [""])[0])[:300]
    kind = {"ReadTimeout": "nothing was received for a while", "ConnectTimeout": "it cannot be reached in time"}
    return kind.get(type(error).__name__) or text or type(error).__name__

"""URLs with a password or a token: these are kept out of everything that is shown or stored."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit, urlunsplit

from dgbench.errors import DataError

_LOGIN = re.compile(r"(?<=://)[^/?#\s@]*(?:@[^/?#\s@]*)*@")
# a password that should have been percent-encoded: the text after the colon is not a port
_ODD_LOGIN = re.compile(r"(?<=://)[^/?#\s@:]*:(?!\d*(?:[/?#\s]|$))\S*@")
_QUERY = re.compile(r"(://[^\s?#'\"`]*)\?[^\s#'\"`]*")


def without_secrets(text: str) -> str:
    """Return a text whose URLs are without what is before `@` and after `?`."""
    if "://" not in text:
        return text
    return _QUERY.sub(r"\1?...", _ODD_LOGIN.sub("", _LOGIN.sub("", text)))


def login_of(url: str) -> tuple[str, tuple[str, str] | None]:
    """Return a URL without name and password, and these two."""
    found = _LOGIN.search(url)
    if found is None:
        return url, None
    name, _, password = found.group()[:-1].partition(":")
    return _LOGIN.sub("", url, count=1), (unquote(name), unquote(password))


def check_mirror(url: str) -> None:
    """Check that a URL is a valid mirror.

    Raises: DataError if it is not the URL of a web server.
    """
    try:
        parts = urlsplit(login_of(url)[0])
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or not url.isprintable() or " " in url:
        scheme, separator, rest = url.partition("://")
        raise DataError(
            f"{without_secrets(scheme + separator + rest.rpartition('@')[2])!r} is not the URL of a server",
            "--mirror takes a URL such as http://nas/sets or https://user:password@nas/sets, where other characters of the "
            "password than letters and digits are written as %2F, %40, ...; use --from for archives on this machine",
        )


def below(base: str, path: str) -> str:
    """Return the URL of a path below another URL, whose query string stays at the end."""
    parts = urlsplit(base)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{path}", fragment=""))

"""Addresses that may hold a password or a token: those stay out of everything that is shown, stored or typed again."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit, urlunsplit

from dgbench.errors import DataError

_LOGIN = re.compile(r"(?<=://)[^/?#\s@]*(?:@[^/?#\s@]*)*@")
# a password that should have been percent-encoded: what follows the colon is no port
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
    """See that an address can stand for a site's own.

    Raises: DataError if it is none of a web server.
    """
    try:
        parts = urlsplit(login_of(url)[0])
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or not url.isprintable() or " " in url:
        scheme, separator, rest = url.partition("://")
        raise DataError(
            f"{without_secrets(scheme + separator + rest.rpartition('@')[2])!r} is no address of a server",
            "--mirror takes one as http://nas/sets or https://user:password@nas/sets, where what is no letter or digit of a "
            "password is written as %2F, %40, ...; archives on this machine are given with --from",
        )


def below(base: str, path: str) -> str:
    """Return the URL of a path below another URL, whose query string stays at the end."""
    parts = urlsplit(base)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{path}", fragment=""))

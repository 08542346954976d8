"""Reading of JSON from untrusted sources: regular files of bounded size, with our own error texts.

Records and checkpoints' notes may come from anywhere. A pipe would make a reader hang, a link to an endless
device would fill its memory, and a file of 100,000 nested lists would crash Python.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_bytes(path: Path | str, limit: int) -> bytes:
    """Return the content of a regular file, or of one that a link leads to.

    Raises: FileNotFoundError, or ValueError saying what is wrong with it, if it is larger than `limit` bytes, cannot be
        read or is anything else than a file.
    """
    try:
        # not blocking: opening a pipe would wait for its writer
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("is not a file")
        if state.st_size > limit:
            raise ValueError(f"has {state.st_size:,} bytes, at most {limit:,} are read")
        # bytes that were added to the file since are not read
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def read_object(data: bytes) -> dict[str, Any] | None:
    """Return the JSON object in `data`; None if it is JSON but no object.

    Raises: ValueError, with the place where the text stops being JSON. NaN and Infinity come through as numbers.
    """
    from pydantic_core import from_json

    try:
        content = from_json(data)
    except ValueError as error:
        place = re.search(r"line (\d+) column (\d+)$", str(error))
        where = f" (line {place[1]}, column {place[2]})" if place else ""
        deep = ": lists or objects within each other too deep" if "recursion" in str(error) else ""
        raise ValueError(f"is not valid JSON{deep}{where}") from None
    return content if isinstance(content, dict) else None


_WANTED: Mapping[str, str] = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "an object",
    "too_long": "a list of that length",
}


def in_words(details: Mapping[str, Any]) -> str:
    """Return one error of a pydantic.ValidationError as `miou: "0.9" is not a number`."""
    where = ".".join(str(part) for part in details["loc"])
    if details["type"] == "missing":
        return f"{where}: is missing"
    if details["type"] == "json_invalid":
        return "it is not valid JSON"
    wanted = _WANTED.get(details["type"]) or str(details.get("ctx", {}).get("expected", "what belongs here"))
    return f"{where}: {shortened(details['input'])} is not {wanted}"


def shortened(value: Any, length: int = 40) -> str:
    """Return a JSON value as text of at most `length` characters."""
    words = {True: "true", False: "false", None: "null"}
    if value is None or isinstance(value, bool):
        return words[value]
    # a part of a list or text is enough: it may have a megabyte
    part = value[:length] if isinstance(value, str | list | tuple) else list(value)[:length] if isinstance(value, dict) else value
    text = f'"{part}"' if isinstance(part, str) else repr(part)
    return text if len(text) <= length else f"{text[: length - 3]}..."

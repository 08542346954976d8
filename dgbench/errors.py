"""Errors that the user can act on: a message and, if there is one, the next step.

The command line prints them without a traceback; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DgbenchError(Exception):
    """A mistake or a circumstance the user can act on.

    `message` says what was given and what is wrong with it, `hint` what to do next.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


class RecipeError(DgbenchError):
    """A recipe cannot be found, read or used; the message lists every problem in it."""


class DataError(DgbenchError):
    """A domain, image or label is missing, broken or not what its domain declares."""


class CheckpointError(DgbenchError):
    """A checkpoint is missing, damaged or belongs to another model."""


class ResultError(DgbenchError):
    """A run or a record is missing, broken or of another schema version."""


class StoppedError(DgbenchError):
    """The user or the system stopped a command that can go on later; the message says how, `code` is the exit status."""

    def __init__(self, message: str, hint: str | None = None, code: int = 130) -> None:
        super().__init__(message, hint)
        self.code = code


class Terminated(BaseException):
    """The process was told to end, by SIGTERM or SIGHUP; like KeyboardInterrupt, no `except Exception` stops it.

    `signum` is the signal's number; the program exits with 128 more.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def suggest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to `name`, or None if nothing is close."""
    names = list(known)
    folded = {candidate.lower(): candidate for candidate in names}
    match = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    if match:
        return folded[match[0]]
    # a part of the name, as in `mfuser` for `streets/mfuser`: too different for an edit distance
    pieces = [candidate for candidate in names if len(name) > 2 and name.lower() in candidate.lower()]
    return pieces[0] if len(pieces) == 1 else None


def spelled(name: str, known: Iterable[str]) -> str | None:
    """Return the known name equal to `name`, or the only one that differs from it in case only; None if there is none."""
    names = list(known)
    if name in names:
        return name
    alike = [candidate for candidate in names if candidate.casefold() == name.casefold()]
    return alike[0] if len(alike) == 1 else None


def unknown(kind: str, name: str, known: Iterable[str]) -> tuple[str, str]:
    """Return the (message, hint) of an unknown name, for `raise DataError(*unknown("domain", name, names()))`."""
    names = sorted(known)
    close = suggest(name, names)
    if close is not None:
        return f"unknown {kind} `{name}`", f"did you mean `{close}`?"
    if not names:
        return f"unknown {kind} `{name}`", f"there is no {kind} here yet"
    return f"unknown {kind} `{name}`", "choose from " + ", ".join(names)


def unknown_recipe(name: str, methods: Iterable[str], recipes: Iterable[str]) -> tuple[str, str]:
    """Return the (message, hint) of a name that is no method and no recipe: there are too many recipes to list them."""
    methods, recipes = sorted(methods), list(recipes)
    message, hint = unknown("recipe" if "/" in name else "method or recipe", name, [*methods, *recipes])
    if hint.startswith("choose"):
        hint = f"methods are {', '.join(methods)}; `dgbench methods METHOD` lists the recipes of one"
    return message, hint


def no_recipe_file(path: object) -> tuple[str, str]:
    """Return the (message, hint) of a recipe's file that is not there."""
    hint = "recipes of dgbench need no path or ending, as streets/mfuser; `dgbench methods METHOD` lists those of a method"
    return f"no recipe file {path}", hint

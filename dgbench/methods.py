"""The methods as `dgbench methods` lists them: where each is from, its towers and their licences, what trains it.

All of it is read from files without importing a method, and so without torch: literals and options from a method's source, the
towers from their table, recipes from their YAML. Only releases that a method makes in its own file need the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dgbench.errors import DgbenchError, spelled, unknown
from dgbench.recipe.files import by_method
from dgbench.recipe.method import SET_ELSEWHERE
from mfuser import methods
from mfuser.methods import Option
from mfuser.towers.table import TOWERS


@dataclass(frozen=True, slots=True)
class Method:
    """A method in one line."""

    name: str
    title: str
    paper: str  # "" where there is none
    fidelity: str  # "exact": by the authors' code; "reconstructed": by the paper alone; "" where there is no paper
    towers: tuple[str, ...]  # the first row of its backbones
    licences: tuple[str, ...]  # of these towers' weights; none for towers that are trained from scratch
    recipes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AuthorsRelease:
    """Checkpoints of the authors that `dgbench convert` takes."""

    options: Mapping[str, str]
    recipe: str
    absent: tuple[str, ...]  # options whose towers the file leaves out: their published weights are needed beside it


@dataclass(frozen=True, slots=True)
class MethodDetails:
    """All that is known of a method."""

    method: Method
    backbones: tuple[Mapping[str, str], ...]  # what it is tabulated with
    options: tuple[Option, ...]  # of a recipe's `method`
    releases: tuple[AuthorsRelease, ...]


def listing() -> list[Method]:
    """Every method by its public name."""
    recipes = by_method()
    return [_method(name, recipes.get(name, ())) for name in methods.names()]


def details(name: str) -> MethodDetails:
    """Return what is known of one method.

    Raises: DgbenchError for an unknown name.
    """
    known = spelled(name, methods.names())
    if known is None:
        raise DgbenchError(*unknown("method", name, methods.names()))
    return MethodDetails(
        _method(known, by_method().get(known, ())),
        tuple(methods.constants(known)["BACKBONES"]),
        tuple(option for option in methods.described_options(known) if option.name not in SET_ELSEWHERE),
        tuple(AuthorsRelease(dict(row.options), row.recipe, tuple(row.absent)) for row in methods.releases(known)),
    )


def _method(name: str, recipes: Sequence[str]) -> Method:
    facts = methods.constants(name)
    usual: Mapping[str, str] = next(iter(facts["BACKBONES"]), {})
    towers = tuple(dict.fromkeys(usual.values()))
    # a trunk of the method's own is in no table
    files = [TOWERS[tower].weights for tower in towers if tower in TOWERS]
    licences = tuple(dict.fromkeys(file.licence for file in files if file is not None))
    return Method(name, facts["TITLE"], facts["PAPER"], facts["FIDELITY"], towers, licences, tuple(recipes))

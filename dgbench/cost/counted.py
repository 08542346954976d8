"""Counts that are known already: those that ship with the package, and those that were made on this machine before.

A count is a fact of the code that builds a model and of the rules that count it, not of the machine; making one takes
seconds. So each is kept under a key of all the sources that decide it (`sources`): after an edit of a method, nothing of it that
was kept is found, and after one of what methods share, nothing at all; the model is counted again. Counts made here are kept
with the versions of the packages that take part, too.
Those that ship are not: which torch runs changes no shape, and a release of timm's or open_clip's that changed one would no
longer load the published weights. Where those two are other versions here, that is said beside the numbers.

`python benchmarks/counts.py` makes the shipped file anew; tests say when it must be, and count its rows again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import mfuser
from dgbench import atomic
from dgbench.cost.conventions import Cost, Counted
from dgbench.data.places import cache_root
from dgbench.errors import RecipeError
from dgbench.recipe import MethodSpec
from mfuser.methods import file as method_file
from mfuser.segmentor import Segmentor

SHIPPED = Path(__file__).with_name("counts.json.gz")
ITSELF = "(itself)"  # what a model does and holds outside of its parts
_RULES = ("conventions", "count", "counted", "shapes")  # files of this folder that decide counts
_TOWERS = ("timm", "open_clip_torch")  # packages that models are built of
_PACKAGES = ("torch", *_TOWERS, "fvcore")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to be profiled."""

    method: MethodSpec
    size: tuple[int, int]  # (H, W) that it is built for
    recipe: str = ""


@dataclass(frozen=True, slots=True)
class Held:
    """Parameters of a model's part, by its attribute's name."""

    name: str
    parameters: int
    trainable: int


@dataclass(frozen=True, slots=True)
class Tally:
    """What a model of one size holds, part by part in their order and `ITSELF` last, and what its forward pass costs."""

    held: tuple[Held, ...]
    counted: Counted
    elsewhere: str = ""  # the packages that it was made with, as `timm 1.0.20`, where other versions are here


def made_now(subject: Subject) -> Tally:
    """Count a model.

    Raises: RecipeError if it cannot be built; CountError if it cannot be counted.
    """
    from dgbench.cost.count import count

    # the kernels' own name: they would not take tensors without data; what is computed is the same
    model = built(subject, weights="meta", backend="torch").to("meta")
    # what training alone needs, a teacher or a memory bank, is no part of the model
    held = [_held(name, module.parameters()) for name, module in model.named_children() if name != "training_only"]
    model.merge()  # as it is scored; what it holds is counted as it is trained
    model.requires_grad_(False)  # torch's counter fails on a view of a parameter that is trained
    counted = count(model, torch.empty(1, 3, *subject.size, device="meta"))
    return Tally((*held, _held(ITSELF, model.parameters(recurse=False))), counted)


def _held(name: str, parameters: Iterable[nn.Parameter]) -> Held:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    return Held(name, sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained))


def built(subject: Subject, *, weights: Literal["random", "meta"] = "random", **forced: Any) -> Segmentor:
    """Build a model without published weights; `weights` as that of `mfuser.build`.

    Raises: RecipeError if its options do not fit each other or the size.
    """
    known = {f.name for f in dataclasses.fields(mfuser.options(subject.method.name))}
    options = subject.method.options | {key: value for key, value in forced.items() if key in known}
    if "token_ids" in known and options.get("token_ids") is None:
        # which words they are costs nothing, and a tokenizer may be a download
        options["token_ids"] = [[0] * 5 for _ in Segmentor.classes]
    try:
        return mfuser.build(subject.method.name, **options, image_size=subject.size, weights=weights)
    except ValueError as error:
        raise RecipeError(f"`{subject.method.name}` cannot be built: {error}", "change --set method.* or --size") from error


# ---- what decides a count


@functools.cache
def sources(method: str, models: Path = Path(mfuser.__file__).parent, rules: Path = Path(__file__).parent) -> str:
    """The hash of all that decides a method's counts: its file, what methods are built of, and the rules that count them."""
    its_file = method_file(method)
    inside = models / "methods" / its_file.name
    files = [path for path in models.rglob("*.py") if _is_shared(path.relative_to(models))]
    named = [(path.relative_to(models).as_posix(), path) for path in files]
    named += [("method", inside if inside.exists() else its_file)]
    named += [(f"rules/{name}", rules / f"{name}.py") for name in _RULES]
    digest = hashlib.sha256()
    for name, path in sorted(named):
        content = path.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _is_shared(path: Path) -> bool:
    """Whether a file of the models' package can decide what another method costs: a backend computes what its operator's rule
    counts, and no method imports another."""
    its_own = path.parent.as_posix() == "methods" and path.name != "__init__.py"
    return not its_own and not path.name.endswith("_backend.py")


def key(subject: Subject) -> str:
    """What tells one count from another under the same sources: the method with all its options, and the size."""
    options = {name: value for name, value in subject.method.options.items() if name not in ("backend", "token_ids")}
    return json.dumps([subject.method.name, options, subject.size], sort_keys=True, separators=(",", ":"))


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a checkout that is on the path alone
            found[package] = "unknown"
    return found


# ---- where counts are kept


def known(subject: Subject) -> Tally | None:
    """The count that ships, or that was kept here; None if there is none of these very sources."""
    shipped, method = _shipped(SHIPPED), subject.method.name
    if (row := shipped.get("rows", {}).get(key(subject))) is not None and shipped["sources"].get(method) == sources(method):
        made, here = shipped["made with"], _versions(_TOWERS)
        return _read(row, ", ".join(f"{name} {made[name]}" for name in _TOWERS) if made != here else "")
    try:
        stated, _, text = _kept_at(subject).read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return _read(json.loads(text)) if stated == _digest(text) else None  # a damaged file is no count


def keep(subject: Subject, tally: Tally) -> Tally:
    """Keep a count in the user's cache folder, if that can be written, and return it."""
    text = json.dumps(_written(tally))
    with contextlib.suppress(OSError):
        atomic.write(_kept_at(subject), f"{_digest(text)}\n{text}")
    return tally


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def ship(subjects: Iterable[Subject], path: Path = SHIPPED) -> Path:
    """Count models, and write the file that ships: the same bytes for the same counts."""
    unlike = {key(subject): subject for subject in subjects}
    rows = {name: _written(made_now(subject)) for name, subject in unlike.items()}
    content = {
        "sources": {name: sources(name) for name in sorted({s.method.name for s in unlike.values()})},
        "made with": _versions(_TOWERS),
        "rows": rows,
    }
    return atomic.write(path, gzip.compress(json.dumps(content, indent=0).encode(), mtime=0))


@functools.cache
def _shipped(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return found


def _kept_at(subject: Subject) -> Path:
    text = json.dumps([sources(subject.method.name), _versions(_PACKAGES), key(subject)])
    return cache_root() / "counts" / f"{_digest(text)[:32]}.json"


def _written(tally: Tally) -> dict[str, Any]:
    counted = tally.counted
    return {
        "held": [[part.name, part.parameters, part.trainable] for part in tally.held],
        "total": counted.total.parts,
        "by module": {name: cost.parts for name, cost in counted.by_module.items()},
        "by operator": {name: cost.parts for name, cost in counted.by_operator.items()},
    }


def _read(row: dict[str, Any], elsewhere: str = "") -> Tally:
    by_module, by_operator = (
        {name: Cost(*parts) for name, parts in row[f"by {what}"].items()} for what in ("module", "operator")
    )
    return Tally(tuple(Held(*part) for part in row["held"]), Counted(Cost(*row["total"]), by_module, by_operator), elsewhere)

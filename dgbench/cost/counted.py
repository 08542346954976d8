"""Stored counts: those that ship with the package, and those that were made on this machine before.

A count depends on the code that builds a model and on the rules of counting, not on the machine; making one takes
seconds. So each is stored under a key of all its source files (`sources`): after an edit of a method, its stored counts are not
found, and after an edit of shared code, none are; models are then counted again. The key of counts made here also has
the versions of the packages involved.
That of shipped counts does not: the version of torch changes no shape, and a release of timm or open_clip that changed one would
no longer load the published weights. If these two have other versions here, that is stated with the numbers.

`python benchmarks/counts.py` updates the shipped file; tests report when this is necessary, and count its rows again.
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
ITSELF = "(itself)"  # operations and parameters of a model outside of its parts
_RULES = ("conventions", "count", "counted", "operators", "shapes")  # files of this folder that affect counts
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
    """Parameters of a model of one size, by part in their order with `ITSELF` last, and the cost of its forward pass."""

    held: tuple[Held, ...]
    counted: Counted
    elsewhere: str = ""  # the packages that it was made with, as `timm 1.0.20`, if their versions differ here


def made_now(subject: Subject) -> Tally:
    """Count a model.

    Raises: RecipeError if it cannot be built; CountError if it cannot be counted.
    """
    from dgbench.cost.count import count

    # the torch backend, since kernels do not take tensors without data; the computation is the same
    model = built(subject, weights="meta", backend="torch").to("meta")
    counted = count(model, torch.empty(1, 3, *subject.size, device="meta"))
    # training-only state, such as a teacher or a memory bank, is not part of the model
    held = [_held(name, module.parameters()) for name, module in model.named_children() if name != "training_only"]
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
        # the ids do not affect the cost, and a tokenizer might have to be downloaded
        options["token_ids"] = [[0] * 5 for _ in Segmentor.classes]
    try:
        return mfuser.build(subject.method.name, **options, image_size=subject.size, weights=weights)
    except ValueError as error:
        raise RecipeError(f"`{subject.method.name}` cannot be built: {error}", "change --set method.* or --size") from error


# ---- keys of counts


@functools.cache
def sources(method: str, models: Path = Path(mfuser.__file__).parent, rules: Path = Path(__file__).parent) -> str:
    """Return the hash of all that decides a method's counts: its file, the code it is built of, and the rules of counting."""
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
    """Return whether a file of `mfuser` can affect the counts of several methods.

    A backend cannot, since its operator's rule counts for it, and no method imports another.
    """
    its_own = path.parent.as_posix() == "methods" and path.name != "__init__.py"
    return not its_own and not path.name.endswith("_backend.py")


def key(subject: Subject) -> str:
    """Return the key of a count under the same sources: the method with all its options, and the size."""
    options = {name: value for name, value in subject.method.options.items() if name not in ("backend", "token_ids")}
    return json.dumps([subject.method.name, options, subject.size], sort_keys=True, separators=(",", ":"))


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a checkout on the path that is not installed
            found[package] = "unknown"
    return found


# ---- where counts are kept


def known(subject: Subject) -> Tally | None:
    """Return the count that is shipped or cached; None if there is none of these exact sources."""
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
    """Store a count in the user's cache folder, if that can be written, and return it."""
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

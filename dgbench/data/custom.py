"""Domains that a user declares in a YAML file or in `data.domains` of a recipe; once read, they are rows like any other.

    title: My city
    folder: my-city                  # below the data root; default: the domain's name
    splits:
      val: {images: "photos/*.jpg", labels: {"photos/": "masks/", ".jpg": ".png"}}
    encoding: ids                    # see dgbench.data.decode
    label_map: {1: road, 2: car}     # or the name of a map that dgbench has
    ignored: [0]

The domain's name is that of the file, or its key `name`. Files are found in DGBENCH_DOMAINS (a file or a folder), in
`domains/` below the data root, or by their path.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator

from dgbench.data.domain import Domain, Layout, Role, Split, outside, replaced
from dgbench.data.domains import built_in
from dgbench.data.labels import IGNORE, LABEL_MAPS, NAMES, LabelMap
from dgbench.data.places import data_root
from dgbench.errors import DataError, suggest
from dgbench.spec import Count, Spec, own, problems_of, shown
from dgbench.yaml_text import parse

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def _stored(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise own(f"expected a stored value or the name of a label, got {shown(value)}")
    return value


def _numbers(given: Any) -> Any:
    if isinstance(given, str):
        return given
    if not isinstance(given, dict):
        raise own(f"expected the name of a label map, or one written out: {{1: road, 2: car}}, got {shown(given)}")
    numbered: dict[int | str, Any] = {}
    for key, value in given.items():
        # keys are text in JSON, in which a run stores its recipe
        number = int(key) if isinstance(key, str) and _WHOLE.fullmatch(key) else _stored(key)
        if number in numbered:
            raise own(f"{number} is given twice")
        numbered[number] = _stored(value)
    return numbered


_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")  # an integer as JSON writes it
Key = Annotated[int | str, BeforeValidator(_stored)]  # a stored value, or the name of a label in a file of polygons


class SplitSpec(Spec):
    """Location of the pairs of a split."""

    images: str  # glob below the folder; `*` does not cross a `/`
    labels: Annotated[dict[str, str], Field(min_length=1)]  # replacements that turn an image's path into its label's
    count: Count | None = None  # images in the complete split; None: as many as there are

    @field_validator("images")
    @classmethod
    def _inside(cls, glob: str) -> str:
        if PurePosixPath(glob).is_absolute() or ".." in PurePosixPath(glob).parts or "**" in glob or not glob:
            raise own(f"expected a glob below the domain's folder, without `..` and `**`, got {glob!r}")
        return glob

    @field_validator("labels")
    @classmethod
    def _stay_inside(cls, labels: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        glob = info.data.get("images", "")
        if outside(leads_to := replaced(glob, labels.items())):
            raise own(f"expected replacements that stay below the domain's folder, got {glob!r} -> {leads_to!r}")
        return labels


class UserDomain(Spec):
    """A declaration of a domain."""

    name: str | None = None
    title: str = ""
    folder: str = ""  # below the data root, or anywhere if absolute
    splits: Annotated[dict[str, SplitSpec], Field(min_length=1)]
    encoding: Literal["ids", "rgb16", "colors", "polygons", "panoptic"] = "ids"
    label_map: Annotated[str | dict[Key, Key], BeforeValidator(_numbers)] = "train-ids"
    ignored: tuple[Key, ...] = ()  # further values that files may hold
    size: str = "varies"
    licence: str = ""
    homepage: str = ""

    @field_validator("name")
    @classmethod
    def _speakable(cls, name: str | None) -> str | None:
        if name is not None and (problem := _unusable(name)):
            raise own(problem)
        return name

    @field_validator("folder")
    @classmethod
    def _can_be_found(cls, folder: str) -> str:
        try:
            path = Path(folder).expanduser()
        except RuntimeError:
            raise own(f"expected a folder, and this system knows no home folder for {folder!r}") from None
        if not path.is_absolute() and outside(folder):
            raise own(f"expected a folder below the data root, without `..`, or an absolute one, got {folder!r}")
        return folder

    @field_validator("splits")
    @classmethod
    def _plain(cls, splits: dict[str, SplitSpec]) -> dict[str, SplitSpec]:
        for name in splits:
            if not name or name.startswith(".") or set(name) & set("/\\\0"):
                raise own(f"expected names without `/` and a leading `.`, got {name!r}")
        return splits

    @field_validator("label_map")
    @classmethod
    def _leads_to_classes(cls, given: str | dict[Key, Key], info: ValidationInfo) -> str | dict[Key, Key]:
        if isinstance(given, str):
            if given not in LABEL_MAPS:
                close = suggest(given, LABEL_MAPS)
                raise own(
                    f"unknown label map `{given}`, "
                    + (
                        f"did you mean `{close}`?"
                        if close
                        else f"choose from {', '.join(LABEL_MAPS)}, or write it out: {{1: road, 2: car}}"
                    )
                )
            return given
        if info.data.get("encoding") == "colors":
            raise own("colours are read by Cityscapes' palette: leave it out")
        for key, value in given.items():
            _check_key(key, info)
            if value not in NAMES and value not in range(len(NAMES)):
                close = suggest(value, NAMES) if isinstance(value, str) else None
                raise own(
                    f"{key} leads to {value!r}: expected one of the 19 classes or 0..18, "
                    + (f"did you mean `{close}`?" if close else f"choose from {', '.join(NAMES)}")
                )
        return given

    @field_validator("ignored")
    @classmethod
    def _known_only_once(cls, given: tuple[Key, ...], info: ValidationInfo) -> tuple[Key, ...]:
        label_map = info.data.get("label_map", {})
        if given and isinstance(label_map, str):
            raise own(f"the label map `{label_map}` says itself what it ignores: leave it out, or write the map out")
        for key in given:
            _check_key(key, info)
            if key in label_map:
                raise own(f"{key} is in the label map, too")
        return given

    def digest(self) -> str:
        """Return a 12-digit hash of what determines pairs and labels: not of title, folder, licence and the like."""
        splits = {name: [split.images, list(split.labels.items())] for name, split in self.splits.items()}
        label_map = self.label_map if isinstance(self.label_map, str) else sorted(map(list, self.label_map.items()), key=str)
        content = [splits, self.encoding, label_map, sorted(self.ignored, key=str)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Declared:
    """A declaration and where it was read."""

    name: str
    spec: UserDomain
    origin: str


def check(declared: Declared, root: Path | None = None, others: Mapping[str, UserDomain] | None = None) -> None:
    """Raise a DataError unless a declaration's name is valid, and any other declaration of this name is the same.

    A score must not depend on which of two declarations comes first.

    Args:
        root: data root in whose `domains/` others are.    others: those of a recipe, by name.
    """
    if problem := _unusable(declared.name):
        raise DataError(problem)
    if declared.spec.name not in (None, declared.name):
        raise DataError(f"`{declared.name}` has another `name`, `{declared.spec.name}`", "leave the inner one out")
    found, twice = _discovered(root)
    if declared.name in twice:
        raise twice[declared.name]
    mine = (others or {}).get(declared.name)
    for before in (Declared(declared.name, mine, "the recipe") if mine else None, found.get(declared.name)):
        if before is not None and before.spec.digest() != declared.spec.digest():
            raise DataError(
                f"`{declared.name}` is declared twice, differently: by {before.origin} and by {declared.origin}",
                "give one of them another name, since scores are identified by it",
            )


def find(name: str, root: Path | None = None) -> Declared | None:
    """Return the declaration of this name, if there is one.

    Raises: DataError if the file of this name is wrong, or two files declare the name.
    """
    found, twice = _discovered(root)
    if name in twice:
        raise twice[name]
    if name in found:
        return found[name]
    for path in _files(root):
        if path.stem == name:
            read(path)  # raises what is wrong with it, or that it has another name
    return None


def discover(root: Path | None = None) -> dict[str, Declared]:
    """Return declarations in DGBENCH_DOMAINS and in `domains/` below the data root, by name.

    Wrong files, and names with two different declarations, only cause a warning, since they may not be needed.
    """
    found, twice = _discovered(root)
    for error in twice.values():
        _warn(f"left out: {error.message}")
    return found


def _discovered(root: Path | None) -> tuple[dict[str, Declared], dict[str, DataError]]:
    """Return the declarations, and the errors of names that are declared twice."""
    found: dict[str, Declared] = {}
    twice: dict[str, DataError] = {}
    for path in _files(root):
        try:
            declared = read(path)
        except DataError as error:
            _warn(f"left out: {error.message}")
            continue
        first = found.setdefault(declared.name, declared)
        if first.spec.digest() != declared.spec.digest():
            told = f"`{declared.name}` is declared twice, differently: by {first.origin} and by {path}"
            twice[declared.name] = DataError(told, "rename one")
    return {name: declared for name, declared in found.items() if name not in twice}, twice


@cache
def _warn(text: str) -> None:
    logging.getLogger(__name__).warning(text)


def _files(root: Path | None) -> list[Path]:
    folder = data_root(root) / "domains"
    paths = sorted(folder.glob("*.y*ml")) if folder.is_dir() else []
    if given := os.environ.get("DGBENCH_DOMAINS"):
        place = Path(given)
        if not place.exists():
            raise DataError(f"DGBENCH_DOMAINS names {place}, which does not exist", "set it to a YAML file or a folder of them")
        paths = (sorted(place.glob("*.y*ml")) if place.is_dir() else [place]) + paths
    return paths


def read(path: Path) -> Declared:
    """Read a declaration from a file.

    Raises: DataError listing every problem with its key path.
    """
    if not path.is_file():
        raise DataError(f"no file {path}", "a domain is declared in a YAML file (docs/data.md), or called by its name")
    return _read(path.resolve(), path.stat().st_mtime_ns)


@lru_cache(64)
def _read(path: Path, _changed: int) -> Declared:
    content = parse(path, DataError, "docs/data.md", UserDomain)
    try:
        spec = UserDomain.model_validate(content)
    except ValidationError as error:
        listed = "".join(f"\n  {problem}" for problem in dict.fromkeys(map(str, problems_of(error, UserDomain))))
        raise DataError(f"{path} does not declare a domain:{listed}", "docs/data.md has an example") from None
    name = spec.name or path.stem
    if problem := _unusable(name):
        raise DataError(f"{path}: {problem}", "rename the file, or give the domain a `name`")
    return Declared(name, spec, str(path))


def build(name: str, spec: UserDomain) -> Domain:
    """Return the row of a declared domain."""
    splits = {
        split: Split(rule.count, (Layout("declared", rule.images, tuple(rule.labels.items()), spec.encoding),))
        for split, rule in spec.splits.items()
    }
    own_map = None if isinstance(spec.label_map, str) else _label_map(name, spec.label_map, spec.ignored)
    role: Role = "both" if len(splits) > 1 else "source" if "train" in splits else "target"
    return Domain(
        name=name,
        title=spec.title or name,
        role=role,
        splits=splits,
        size=spec.size,
        label_map=own_map.name if own_map else str(spec.label_map),
        inline_map=own_map,
        licence=spec.licence,
        access="own",
        homepage=spec.homepage,
        folders=(str(Path(spec.folder or name).expanduser()),),
        digest=spec.digest(),
    )


def _label_map(name: str, given: Mapping[Key, Key], ignored: tuple[Key, ...]) -> LabelMap:
    # names get values in the order in which they are written; if "unlabeled" is not among them, the background is 255
    values = {key: key if isinstance(key, int) else place for place, key in enumerate((*given, *ignored))}
    classes = {values[key]: NAMES.index(value) if isinstance(value, str) else value for key, value in given.items()}
    names = {key: value for key, value in values.items() if isinstance(key, str)}
    return LabelMap(name, classes, frozenset(values[key] for key in ignored) | {IGNORE}, names)


def _check_key(key: Key, info: ValidationInfo) -> None:
    if info.data.get("encoding") == "polygons":
        if not isinstance(key, str):
            raise own(f"expected names of labels, as the polygons have them, got {key!r}")
    elif isinstance(key, str) or not 0 <= key < 65536:
        raise own(f"expected stored values 0..65535, got {key!r}")
    elif key == IGNORE:
        raise own("255 always counts as ignored: leave it out")


def _unusable(name: str) -> str | None:
    if not _NAME.fullmatch(name):
        return f"`{name}` is not a valid name of a domain: use lower-case letters, digits, `-` and `_`"
    if built_in(name) is not None:
        return f"`{name}` is a built-in domain: choose another name"
    return None

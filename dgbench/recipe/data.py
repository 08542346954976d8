"""A recipe's `data`: sources, targets, sampling and augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from dgbench.data import catalog
from dgbench.data.custom import Declared, UserDomain, check, read
from dgbench.data.custom import find as find_declared
from dgbench.data.domain import Domain
from dgbench.data.domains import built_in
from dgbench.errors import DgbenchError
from dgbench.spec import Count, Flag, Number, Spec, one_line, own, shown

SOURCES = "+"  # between the names of several sources, in recipes, records and on the command line
DAFORMERS_TEMPERATURE = 0.01


@dataclass
class Known:
    """The domains that names refer to while one recipe is read, passed to pydantic as the context of its validation."""

    root: Path | None = None  # data root in which declarations are looked for
    declared: dict[str, UserDomain] = field(default_factory=dict)  # the recipe's own; filled when `data.domains` is read


def known(info: ValidationInfo) -> Known:
    """Return the domains of this validation."""
    return info.context if isinstance(info.context, Known) else Known(declared=info.data.get("domains", {}))


def _known_domain(name: str, info: ValidationInfo) -> str:
    here = known(info)
    try:
        return catalog.benchmarked(catalog.lookup(name, here.root, here.declared)).name
    except DgbenchError as error:
        raise own(one_line(error)) from None


def _declare(given: dict[str, UserDomain], info: ValidationInfo) -> dict[str, UserDomain]:
    here = known(info)
    for name, spec in given.items():
        try:
            check(Declared(name, spec, "the recipe"), here.root)
        except DgbenchError as error:
            raise own(one_line(error)) from None
    here.declared.update(given)
    return given


def separate(given: str) -> list[str]:
    """Return the names in `a+b`, as records have several sources, or `a,b`; a file may have such signs in its name."""
    if given.endswith((".yaml", ".yml")) and Path(given).exists():
        return [given]
    return [name for part in given.split(SOURCES) for name in part.split(",")]


def _sources(given: Any) -> Any:
    """Return the names of one or more sources, still as the user wrote them."""
    names = separate(given) if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not names or any(not isinstance(name, str) or not name for name in names):
        raise own(f"expected the name of a domain, or a list of them, got {shown(given)}")
    return names


def _joined(given: Any, info: ValidationInfo) -> str:
    names = [_known_domain(name, info) for name in _sources(given)]
    if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
        raise own(f"`{repeated[0]}` is given twice")
    return SOURCES.join(names)


def _with_declarations(data: dict[str, Any], root: Path | None) -> dict[str, Any]:
    """Return a recipe's `data` with the declarations that it names in files, or that its domains have elsewhere, written out."""
    given, targets, source = data.get("domains", {}), data.get("targets"), data.get("source")
    sources = separate(source) if isinstance(source, str) else source
    used = [name for names in (sources, targets) if isinstance(names, list | tuple) for name in names]
    try:
        if isinstance(given, list | tuple):
            if strange := [path for path in given if not isinstance(path, str)]:
                raise own(f"domains: expected paths of files that declare some, got {shown(strange[0])}")
            read_ones = [read(Path(path)) for path in given]
            given = {declared.name: declared.spec for declared in read_ones}
        if not isinstance(given, dict):
            return data  # the field's own check reports it
        for name in (name for name in used if isinstance(name, str)):
            if name.endswith((".yaml", ".yml")):
                declared: Declared | None = read(Path(name))
            else:
                declared = None if name in given or built_in(name.partition("@")[0]) else find_declared(name, root)
            if declared is not None:
                given = {declared.name: declared.spec} | given  # one that differs is refused when its name is looked up
    except DgbenchError as error:
        raise own(one_line(error)) from None
    return data | {"domains": given} if given else data


def _called(name: str) -> str:
    if name.endswith((".yaml", ".yml")):
        return read(Path(name)).name
    base, at, severity = name.partition("@")
    row = built_in(base)
    return (row.name if row else base.lower()) + at + severity


def _in_order(data: dict[str, Any]) -> dict[str, Any]:
    """Return `data` with its sources (and their weights and splits) sorted by name, so that the order does not matter."""
    given = data.get("source")
    names = separate(given) if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or len(names) < 2 or any(not isinstance(name, str) for name in names):
        return data  # the field's own check reports what is wrong
    order = sorted(range(len(names)), key=lambda i: _called(names[i]))
    sorted_: dict[str, Any] = {"source": [names[i] for i in order]}
    for key in ("source_weights", "source_split"):
        if isinstance(given := data.get(key), list | tuple) and len(given) == len(names):
            sorted_[key] = [given[i] for i in order]
    return data | sorted_


_PRESETS = ("mmsegmentation", "robustnet", "san-saw", "self-supervised", "none")
_EXPECTED_PRESET = "expected mmsegmentation, robustnet, san-saw or self-supervised, or true or false, got "
Preset = Literal["mmsegmentation", "robustnet", "san-saw", "self-supervised", "none"]


def _preset(given: Any) -> Any:
    if isinstance(given, str) and given.lower() not in ("yes", "no", "on", "off"):
        if given.lower() not in _PRESETS:
            raise own(_EXPECTED_PRESET + shown(given))
        # the form in which recipes always had it, so that hashes stay the same
        return {"mmsegmentation": True, "none": False}.get(given.lower(), given.lower())
    if isinstance(given, str):
        return given.lower() in ("yes", "on")
    if not isinstance(given, bool):
        raise own(_EXPECTED_PRESET + shown(given))
    return given


Size = tuple[Count, Count]  # (H, W)
DomainName = Annotated[str, AfterValidator(_known_domain)]
Positive = Annotated[Number, Field(gt=0)]


def _several(given: Any) -> Any:
    return (given,) if isinstance(given, int) else given


class ResizeSpec(Spec):
    """How images are resized before a crop is taken; ratios are drawn from `data.scale`."""

    mode: Literal["ratio", "short_edge", "fixed"] = "ratio"
    short_edge: Annotated[tuple[Count, ...], BeforeValidator(_several)] = ()  # pixels; one of them is drawn each time
    sample: Literal["choice", "range"] = "choice"  # range: any whole number from the first of two to the second
    long_edge: Count | None = None  # upper limit, for which the short edge may become shorter
    size: Size | None = None  # (H, W) of every image; the aspect ratio is not kept

    @model_validator(mode="after")
    def _says_what_its_mode_needs(self) -> ResizeSpec:
        theirs = {"short_edge": "short_edge", "long_edge": "short_edge", "size": "fixed"}
        if odd := next((key for key, mode in theirs.items() if getattr(self, key) and mode != self.mode), None):
            raise own(f"{odd} goes with `mode: {theirs[odd]}`, got {self.mode}")
        if self.mode == "short_edge" and not self.short_edge:
            raise own("`mode: short_edge` needs short_edge: one number of pixels, or a list of them")
        if self.mode == "fixed" and self.size is None:
            raise own("`mode: fixed` needs size: [height, width]")
        if self.sample == "range" and not (len(self.short_edge) == 2 and self.short_edge[0] <= self.short_edge[1]):
            raise own(f"`sample: range` needs two values of short_edge that rise, got {list(self.short_edge)}")
        return self


class ClassUniformSpec(Spec):
    """Class-uniform sampling (Zhu et al., CVPR 2019, as RobustNet has it)."""

    share: Annotated[Number, Field(gt=0, le=1)] = 0.5  # of the images of an epoch; the others are drawn uniformly
    tile: Count = 1024  # side of the square tiles of which each class's centroid is known, in pixels of the label file


class DataSpec(Spec):
    """Sources, targets, sampling and augmentation. Sizes are (H, W)."""

    # domains that the user declares, by name, or files that do; a resolved recipe holds those that it needs
    domains: Annotated[dict[str, UserDomain], AfterValidator(_declare)] = Field(default_factory=dict)
    source: Annotated[str, BeforeValidator(_joined)]  # one name, or a list of them; several are kept sorted, as `a+b`
    source_split: str | tuple[str, ...] = "train"  # GTA5 has `official-train`, too; a list has one for each source
    source_weights: tuple[Positive, ...] | None = None  # shares of the draws, one for each source; null: by size
    targets: tuple[DomainName, ...] = Field(min_length=1)
    size: Size | None = None  # rendered or resized to this; null: as the files are
    crop: Size = (512, 512)  # training crop and test window
    train_images: Count | None = None  # only this many of each source, from the first on; null: all
    val_images: Count | None = None  # anything but null marks the records as partial
    scale: tuple[Positive, Positive] = (0.5, 2.0)  # random resize; other modes of `resize` do not use it
    resize: ResizeSpec | None = None  # null: by a ratio out of `scale`
    cat_max_ratio: Annotated[Number, Field(gt=0, le=1)] = 0.75  # a crop with a larger share of one class is drawn again
    sampling: Literal["uniform", "rare-class", "class-uniform"] | None = None  # null: as rare_class_sampling says
    rare_class_sampling: Positive | None = None  # temperature; null: uniform
    class_uniform: ClassUniformSpec | None = None
    flip: Annotated[Number, Field(ge=0, le=1)] = 0.5
    photometric: Annotated[Flag | Preset, BeforeValidator(_preset)] = True  # true: mmsegmentation's; false: none
    # further images that a method asks for, by stream: a folder, or a domain
    extra: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _in_its_one_form(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, dict):
            return given
        here = info.context if isinstance(info.context, Known) else Known()
        data = _in_order(_with_declarations(given, here.root))
        # values that equal the default are left out, so that an experiment has one form and one hash
        sampling, temperature = data.get("sampling"), data.get("rare_class_sampling")
        if sampling == "rare-class":
            data = data | {"rare_class_sampling": DAFORMERS_TEMPERATURE if temperature is None else temperature}
        if sampling in ("uniform", "class-uniform") and temperature is not None:
            raise own(f"sampling: {sampling} has no temperature: set rare_class_sampling to null, or sampling to rare-class")
        if sampling in ("uniform", "rare-class"):
            data = data | {"sampling": None}
        if sampling != "class-uniform" and data.get("class_uniform") is not None:
            raise own("class_uniform goes with `sampling: class-uniform`")
        if sampling == "class-uniform" and data.get("class_uniform") is None:
            data = data | {"class_uniform": {}}
        if data.get("resize") == {"mode": "ratio"}:
            data = data | {"resize": None}
        if isinstance(splits := data.get("source_split"), list | tuple) and splits and len(set(map(str, splits))) == 1:
            several = isinstance(data["source"], list | tuple) and len(splits) == len(data["source"])
            data = data | {"source_split": splits[0]} if several else data
        return data

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> DataSpec:
        if problem := self._misfit(info.context.root if isinstance(info.context, Known) else None):
            raise own(problem)
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """The domains that are trained on, sorted by name."""
        return tuple(self.source.split(SOURCES))

    @property
    def source_splits(self) -> tuple[str, ...]:
        """The split of each of them."""
        return (self.source_split,) * len(self.sources) if isinstance(self.source_split, str) else self.source_split

    @property
    def preset(self) -> Preset:
        """The photometric distortion by its name."""
        if isinstance(self.photometric, bool):
            return "mmsegmentation" if self.photometric else "none"
        return self.photometric

    def rows(self, names: Sequence[str | Domain], root: Path | None = None) -> tuple[Domain, ...]:
        """Return the rows of domains by name, the recipe's own declarations among them.

        Raises: DataError for an unknown name, or one that means two things.
        """
        return catalog.rows(names, root, self.domains)

    def _misfit(self, root: Path | None) -> str | None:
        if seen := [name for name in self.sources if name in self.targets]:
            return f"`{seen[0]}` is both source and target; targets must be unseen"
        if leaked := [name for name, place in self.extra.items() if place in self.targets]:
            return f"extra: `{leaked[0]}` is `{self.extra[leaked[0]]}`, one of the targets; targets must be unseen"
        if repeated := [name for i, name in enumerate(self.targets) if name in self.targets[:i]]:
            return f"`{repeated[0]}` is given twice in targets"
        for key in ("source_split", "source_weights"):
            given = getattr(self, key)
            if isinstance(given, tuple) and len(given) != len(self.sources):
                return f"{key} has {len(given)} values for {len(self.sources)} sources: {', '.join(self.sources)}"
        if self.source_weights is not None and (self.rare_class_sampling is not None or self.sampling is not None):
            return "source_weights go with uniform sampling: the others choose images by their classes"
        pairs = (*zip(self.sources, self.source_splits, strict=True), *((target, "val") for target in self.targets))
        for (name, split), row in zip(pairs, self.rows([name for name, _ in pairs], root), strict=True):
            if split not in row.splits:
                return f"`{name}` has no split `{split}`, only {', '.join(row.splits)}"
        if self.scale[0] > self.scale[1]:
            return f"scale must rise, got {list(self.scale)}"
        fixed = self.resize.size if self.resize is not None else None
        for key, size in (("size", self.size), ("resize.size", fixed)):
            if size is not None and (self.crop[0] > size[0] or self.crop[1] > size[1]):
                return f"crop {list(self.crop)} does not fit into {key} {list(size)}"
        return None

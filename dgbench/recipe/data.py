"""A recipe's `data`: what is trained on, what is scored, and how images reach the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from dgbench.data.custom import Declared, UserDomain, declare, read
from dgbench.data.custom import find as find_declared
from dgbench.data.domains import built_in
from dgbench.errors import DgbenchError
from dgbench.spec import Count, Flag, Number, Spec, one_line, own, shown


def _known_domain(name: str) -> str:
    from dgbench.data.domains import lookup

    try:
        return lookup(name).name
    except DgbenchError as error:
        raise own(one_line(error)) from None


def _declare(given: dict[str, UserDomain]) -> dict[str, UserDomain]:
    for name, spec in given.items():
        try:
            declare(Declared(name, spec, "the recipe"))
        except DgbenchError as error:
            raise own(one_line(error)) from None
    return given


def _with_declarations(data: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's `data` with the declarations that it names in files, or that its domains have elsewhere, written out."""
    given, targets = data.get("domains", {}), data.get("targets")
    used = [data.get("source"), *(targets if isinstance(targets, list | tuple) else [])]
    try:
        if isinstance(given, list | tuple):
            if strange := [path for path in given if not isinstance(path, str)]:
                raise own(f"domains: expected paths of files that declare some, got {shown(strange[0])}")
            read_ones = [read(Path(path)) for path in given]
            given = {declared.name: declared.spec for declared in read_ones}
        if not isinstance(given, dict):
            return data  # the field's own check says so
        for name in (name for name in used if isinstance(name, str)):
            if name.endswith((".yaml", ".yml")):
                declared: Declared | None = read(Path(name))
            else:
                declared = None if name in given or built_in(name.partition("@")[0]) else find_declared(name)
            if declared is not None:
                given = given | {declared.name: declared.spec}
    except DgbenchError as error:
        raise own(one_line(error)) from None
    return data | {"domains": given} if given else data


Size = tuple[Count, Count]  # (H, W)
DomainName = Annotated[str, AfterValidator(_known_domain)]


class DataSpec(Spec):
    """What is trained on, what is scored, and how images reach the model. Sizes are (H, W)."""

    # domains that the user declares, by name, or files that do; a resolved recipe holds those that it needs
    domains: Annotated[dict[str, UserDomain], AfterValidator(_declare)] = Field(default_factory=dict)
    source: DomainName
    source_split: str = "train"  # GTA5 has `official-train`, too
    targets: tuple[DomainName, ...] = Field(min_length=1)
    size: Size | None = None  # rendered or resized to this; null: as the files are
    crop: Size = (512, 512)  # training crop and test window
    train_images: Count | None = None  # the first so many; null: all
    val_images: Count | None = None  # anything but null marks the records as partial
    scale: tuple[Annotated[Number, Field(gt=0)], Annotated[Number, Field(gt=0)]] = (0.5, 2.0)  # random resize
    cat_max_ratio: Annotated[Number, Field(gt=0, le=1)] = 0.75  # a crop with a larger share of one class is drawn again
    rare_class_sampling: Annotated[Number, Field(gt=0)] | None = None  # temperature; null: uniform
    flip: Annotated[Number, Field(ge=0, le=1)] = 0.5
    photometric: Flag = True
    # further images that a method asks for, by stream: a folder, or a domain
    extra: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _declares_what_it_names(cls, given: Any) -> Any:
        return _with_declarations(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _fits_together(self) -> DataSpec:
        if problem := self._misfit():
            raise own(problem)
        return self

    def _misfit(self) -> str | None:
        from dgbench.data.domains import lookup

        if self.source in self.targets:
            return f"`{self.source}` is both source and target; targets must be unseen"
        if leaked := [name for name, place in self.extra.items() if place in self.targets]:
            return f"extra: `{leaked[0]}` is `{self.extra[leaked[0]]}`, one of the targets; targets must be unseen"
        if repeated := [name for i, name in enumerate(self.targets) if name in self.targets[:i]]:
            return f"`{repeated[0]}` is given twice in targets"
        for name, split in ((self.source, self.source_split), *((target, "val") for target in self.targets)):
            if split not in (splits := lookup(name).splits):
                return f"`{name}` has no split `{split}`, only {', '.join(splits)}"
        if self.scale[0] > self.scale[1]:
            return f"scale must rise, got {list(self.scale)}"
        if self.size is not None and (self.crop[0] > self.size[0] or self.crop[1] > self.size[1]):
            return f"crop {list(self.crop)} does not fit into size {list(self.size)}"
        return None

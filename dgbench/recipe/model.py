"""A recipe as a whole, and its `eval` and `expect`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

from dgbench.data.textures import NAME as TEXTURES
from dgbench.errors import DgbenchError
from dgbench.recipe.data import DataSpec, DomainName
from dgbench.recipe.method import MethodSpec
from dgbench.recipe.training import OptimSpec, TrainSpec
from dgbench.spec import Count, Number, Spec, one_line, own


def _known_protocol(name: str) -> str:
    from dgbench.protocol import lookup

    try:
        return lookup(name).name
    except DgbenchError as error:
        raise own(one_line(error)) from None


class EvalSpec(Spec):
    """How checkpoints are scored."""

    protocol: Annotated[str, AfterValidator(_known_protocol)] = "unified"
    batch_size: Count = 1  # windows at a time
    mode: Literal["exact", "fast"] = "exact"  # fp32 as trained, or bf16 and compiled: see docs/profile.md


class Expectation(Spec):
    """A reference result of this recipe; shown as such, never ranked with own results."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)
    target: DomainName  # the source means its validation split
    miou: Annotated[Number, Field(ge=0, le=1)]
    tolerance: Annotated[Number, Field(ge=0, le=1)]  # on either side, over training seeds
    seeds: Annotated[Count, Field(ge=2)] | None = None  # runs that the tolerance was measured from; null: it is an estimate
    # beginning of the sha256 of each tower's published weights, by option (vfm, vlm, backbone): it holds for no others
    weights: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{8,64}$")]] = Field(default_factory=dict)
    origin: str = Field(alias="from")  # the record or the paper it comes from


class Recipe(Spec):
    """One experiment: a method, trained on one source, scored on targets never seen."""

    name: str
    method: MethodSpec
    data: DataSpec
    train: TrainSpec
    optim: OptimSpec
    eval: EvalSpec = EvalSpec()
    expect: tuple[Expectation, ...] = ()

    @property
    def variant(self) -> str:
        """Towers, unusual options, and what took the place of images that the method trains with: the label of its records."""
        replaced = [f"{name}: {place}" for name, place in self.data.extra.items() if place == TEXTURES]
        return ", ".join(filter(None, [self.method.variant, *replaced]))

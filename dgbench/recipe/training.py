"""A recipe's `train` and `optim`: steps, batches, optimizer and schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dgbench.spec import Count, Flag, Number, Spec, Whole, own


class TrainSpec(Spec):
    """Settings of the training loop."""

    steps: Count
    batch_size: Count  # over all processes
    seed: Annotated[Whole, Field(ge=0, lt=2**31)] = 0
    workers: Annotated[Whole, Field(ge=0)] = 0  # loader processes
    precision: Literal["no", "bf16"] = "no"
    log_every: Count = 10
    checkpoint_every: Count = 1000
    clip_norm: Annotated[Number, Field(gt=0)] | None = None
    init: Annotated[str, Field(min_length=1)] | None = None  # a run or saved model to start from; null: published towers
    frozen: Literal["bf16"] | None = None  # how frozen weights of products are held; null: as the method builds them
    compile: Literal["blocks"] | None = None  # by torch.compile
    graphs: Flag = False  # the pass before the loss is replayed from CUDA graphs
    checkpoint_activations: Flag = False  # of the towers' blocks: computed again in the backward pass
    accumulate: Count = 1  # parts of a batch, one after the other
    ema: Annotated[Number, Field(gt=0, lt=1)] | None = None  # decay of the average of the trained weights that is scored

    @model_validator(mode="after")
    def _fits_together(self) -> TrainSpec:
        if self.frozen is not None and self.precision != self.frozen:
            raise own(f"frozen: {self.frozen} goes with `precision: {self.frozen}`, got {self.precision}")
        if self.compile is not None and self.checkpoint_activations:
            # what is computed again may be another graph, with other tensors, of which torch complains in the backward pass
            raise own("checkpoint_activations does not go with `compile: blocks`: leave one of the two out")
        if self.graphs and self.checkpoint_activations:
            # it would set generators back in the middle of a graph, which cannot be captured
            raise own("graphs does not go with `checkpoint_activations`: leave one of the two out")
        if self.graphs and self.accumulate > 1:
            # the gradients of a part are where the next part writes its own
            raise own(f"graphs goes with whole batches, got accumulate: {self.accumulate}; leave one of the two out")
        if self.batch_size % self.accumulate:
            raise own(f"accumulate: {self.accumulate} parts of equal size cannot be made of batch_size {self.batch_size}")
        return self


class GroupSpec(Spec):
    """Settings of the parameters below a key path; null: as all others."""

    lr_factor: Annotated[Number, Field(ge=0)] = 1.0  # on `lr`
    weight_decay: Annotated[Number, Field(ge=0)] | None = None
    min_lr: Annotated[Number, Field(ge=0)] | None = None


class WeightDecaySchedule(Spec):
    """How the weight decay of every group, also of those that begin at 0, changes until the last step."""

    to: Annotated[Number, Field(ge=0)]
    shape: Literal["cosine"] = "cosine"


Share = Annotated[Number, Field(ge=0, lt=1)]


class OptimSpec(Spec):
    """AdamW or SGD, with linear warm-up and then poly decay or a constant learning rate."""

    lr: Annotated[Number, Field(gt=0)]
    weight_decay: Annotated[Number, Field(ge=0)] = 0.05
    warmup_steps: Annotated[Whole, Field(ge=0)] = 0
    warmup_ratio: Annotated[Number, Field(ge=0, le=1)] = 1.0e-6  # of lr at step 0
    power: Annotated[Number, Field(gt=0)] = 0.9
    min_lr: Annotated[Number, Field(ge=0)] = 0.0  # absolute, of every group, as mmengine has it
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.999)  # AdamW's
    momentum: Share = 0.9  # SGD's
    nesterov: Flag = False  # SGD's
    schedule: Literal["poly", "constant"] = "poly"
    # which step warm-up and decay have ended at: the one behind their last, or their last, as in mmengine
    ends: Literal["after", "last"] = "after"
    weight_decay_schedule: WeightDecaySchedule | None = None  # null: constant
    # by key path, `backbone` or `backbone.patch_embed`; of several that hold a parameter the longest counts
    groups: dict[str, GroupSpec] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> OptimSpec:
        usual = {name: OptimSpec.model_fields[name].default for name in ("betas", "momentum", "nesterov")}
        for name in ("momentum", "nesterov") if self.optimizer == "adamw" else ("betas",):
            if getattr(self, name) != usual[name]:
                other = "sgd" if self.optimizer == "adamw" else "adamw"
                raise own(f"{name} is not used by `{self.optimizer}`: set optimizer={other}, or leave {name} out")
        if self.nesterov and not self.momentum:
            raise own("nesterov needs a momentum above 0")
        return self

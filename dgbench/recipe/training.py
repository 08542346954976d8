"""A recipe's `train` and `optim`: how long, with which batches, and by which optimizer and schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dgbench.spec import Count, Number, Spec, Whole


class TrainSpec(Spec):
    """How long and how the training loop runs."""

    steps: Count
    batch_size: Count  # over all processes
    seed: Annotated[Whole, Field(ge=0, lt=2**31)] = 0
    workers: Annotated[Whole, Field(ge=0)] = 0  # loader processes
    precision: Literal["no", "bf16"] = "no"
    log_every: Count = 10
    checkpoint_every: Count = 1000
    clip_norm: Annotated[Number, Field(gt=0)] | None = None


class OptimSpec(Spec):
    """AdamW with linear warm-up and poly decay."""

    lr: Annotated[Number, Field(gt=0)]
    weight_decay: Annotated[Number, Field(ge=0)] = 0.05
    warmup_steps: Annotated[Whole, Field(ge=0)] = 0
    warmup_ratio: Annotated[Number, Field(ge=0, le=1)] = 1.0e-6  # of lr at step 0
    power: Annotated[Number, Field(gt=0)] = 0.9
    min_lr: Annotated[Number, Field(ge=0)] = 0.0

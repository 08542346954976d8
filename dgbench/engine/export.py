"""Export of a run: a run folder that holds all weights, those of frozen towers included, perhaps in 16 bits."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

import mfuser
from dgbench import atomic, temporaries
from dgbench.engine import checkpoints
from dgbench.errors import CheckpointError, DgbenchError
from mfuser import manifest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# of a checkpoint; what a training is resumed with stays behind
_KEPT = ("source.json", "training.json")


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """A run that was written with all its weights."""

    source: str
    run: str
    dtype: str | None  # of the weights; None: as they were
    values_m: float  # parameters and buffers, in millions
    bytes: int  # of their file


def export(run: Path, out: Path, *, dtype: str | None = None) -> ExportedModel:
    """Write the newest checkpoint of a run, with all its weights and its recipe, as a run for `evaluate` and `predict`.

    Its records and what it would be resumed with stay behind: the file is another one, and its scores are its own.

    Args:
        out: the run folder to make.    dtype: fp32, bf16 or fp16, which rounds the weights; None: as they are.

    Raises: CheckpointError if there is something at `out`, the checkpoint cannot be loaded, or its weights do not fit the type;
        DgbenchError for an unknown type. Nothing is written then.
    """
    if dtype is not None and dtype not in DTYPES:
        raise DgbenchError(f"unknown dtype `{dtype}`", f"choose from {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already and not empty", "name a new folder")
    folder = checkpoints.folder_of(run)
    model = checkpoints.load_model(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = temporaries.beside(out)
    temporaries.clear(out.parent, of=out.name)
    shutil.rmtree(partial, ignore_errors=True)
    saved = partial / "checkpoint" / folder.name
    try:
        mfuser.save(model, saved, dtype=None if dtype is None else DTYPES[dtype])
        kept = [name for name in _KEPT if (folder / name).is_file()]
        for name in kept:
            atomic.write(saved / name, (folder / name).read_bytes())
        manifest.seal(saved, kept)
        atomic.write(partial / "recipe.yaml", (run / "recipe.yaml").read_bytes())
        weights = saved / "model.safetensors"
        done = ExportedModel(str(run), str(out), dtype, checkpoints.values(saved) / 1e6, weights.stat().st_size)
        os.replace(partial, out)
    except ValueError as error:
        narrower = " in fp16, whose largest number is 65,504" if dtype == "fp16" else ""
        raise CheckpointError(f"{run} is not exported{narrower}: {error}", "choose --dtype bf16 or fp32") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    atomic.sync_folder(out.parent)
    return done

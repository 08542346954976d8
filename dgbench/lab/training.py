"""One training of selective copying: a row and a seed, in a folder of its own that it can go on in.

The folder holds `log.jsonl` (loss and accuracy on fresh sequences, means over the steps since the line before), `checkpoint.pt`
with weights, moments and what was trained so far, and `result.json`. Batches are functions of seed and step, so that a training
that was killed and goes on repeats the uninterrupted one; on a CPU with the same number of threads, bit for bit.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from dgbench import atomic, results, untrusted
from dgbench.engine.checkpoints import Made
from dgbench.engine.device import device_name, peak_gib
from dgbench.engine.log import Log
from dgbench.engine.stops import Stops
from dgbench.environment import code_commit, describe_environment
from dgbench.errors import CheckpointError, DgbenchError, ResultError
from dgbench.lab.graphs import GraphedStep, Step, optimizer_of
from dgbench.lab.settings import Row, Settings
from dgbench.lab.task import Batches, held_out, mixed
from dgbench.progress import Progress
from mfuser import ops
from mfuser.ssm.network import Network

_CHECKPOINT, _RESULT, _LOG = "checkpoint.pt", "result.json", "log.jsonl"
_LARGEST = 1 << 22  # bytes of a result


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Means over the training batches since the point before."""

    step: int
    loss: float
    token_accuracy: float
    sequence_accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a training gave: accuracies on the held-out sequences, in 0..1, and its speed without evaluation."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True, "allow_inf_nan": False, "extra": "forbid"}

    architecture: str
    layer: str
    s4: str  # the form of S4, where the layer is S4
    glu: bool  # behind S4 without a gate
    seed: int
    length: int
    total: bool
    vocab: int
    memorize: int
    tokens: int  # of a sequence
    depth: int
    batch: int
    lr: float
    steps: int  # taken
    planned: int
    token_accuracy: float
    sequence_accuracy: float
    sequences: int
    loss: float | None  # the last one in the log; None: the training ended before the first
    parameters: int
    seconds: float  # of all parts of the training, without evaluation
    steps_per_second: float  # of the last part
    tokens_per_second: float
    peak_gib: float
    graph: bool  # the step was a CUDA graph
    backends: dict[str, str]
    environment: dict[str, str]
    commit: str | None
    dirty: bool | None
    created: str
    curve: tuple[CurvePoint, ...]

    @property
    def complete(self) -> bool:
        """Whether all planned steps were taken."""
        return self.steps == self.planned


def train(
    settings: Settings,
    row: Row,
    seed: int,
    folder: Path,
    *,
    device: torch.device,
    progress: Progress,
    seconds: float | None = None,
    backend: str = "auto",
    graphs: bool = True,
) -> Trained:
    """Train a row with a seed in `folder`, from its checkpoint if there is one, and return what was measured.

    Args:
        seconds: ends the training after so many, with evaluation, if it has not taken all steps; it can go on later.
        backend: of the selective scan.
        graphs: record the step as a CUDA graph on a GPU.

    Raises: CheckpointError, DgbenchError for what a user can fix; KeyboardInterrupt, Terminated.
    """
    begun = time.perf_counter()
    layer = settings.s4 if row.layer == "s4" else row.layer
    torch.manual_seed(mixed(seed, 0))
    network = Network(
        row.architecture,
        layer,
        vocab=settings.vocab,
        depth=settings.depth,
        length=settings.tokens,
        backend=backend,
        glu=None if settings.glu else False,
    ).to(device)
    optimizer = optimizer_of(network, settings.lr, device)
    folder.mkdir(parents=True, exist_ok=True)
    before, state = _read(folder, device)
    batches = Batches(settings, seed, device)
    graph = graphs and device.type == "cuda" and layer != "s4"  # S4 solves systems, which a graph cannot record
    ran = ops.tally()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step_of = GraphedStep(network, optimizer, device, *batches.at(0)) if graph else Step(network, optimizer, device)
    start, earlier = 0, 0.0
    if before is not None:
        start, earlier = before.step, before.seconds or 0.0
        try:
            step_of.restore(state["network"], state["optimizer"])
            step_of.sums.copy_(state["sums"])
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise _unusable(folder, f"it is of another network: {_first_line(error)}") from error
    log = Log(folder / _LOG, start, before)
    commit, dirty = code_commit()
    environment = describe_environment(device_name(device), torch.get_num_threads())
    since, done, saved = time.perf_counter(), start, start
    logged = start // settings.log_every * settings.log_every

    def keep() -> None:
        size, digest = log.sealed()
        made = Made(
            step=done,
            began=start,
            seconds=earlier + time.perf_counter() - since,
            loss=log.loss,
            peak_gib=peak_gib(device),
            backends=ops.ran_since(ran),
            environment=environment,
            processes=1,
            commit=commit,
            dirty=dirty,
            log_bytes=size,
            log_sha256=digest,
        )
        _write(folder, network, optimizer, step_of.sums, made)

    progress.start(f"{row.architecture} x {row.layer}, seed {seed}", settings.steps - start, "steps")
    with Stops() as stops:
        try:
            while done < settings.steps:
                stops.busy = True
                step_of(*batches.at(done))
                done += 1
                if done % settings.log_every == 0 or done == settings.steps:
                    loss, tokens, whole = (value / (done - logged) for value in step_of.sums.tolist())
                    if not math.isfinite(loss):
                        raise DgbenchError(f"the loss became {loss} until step {done}", "lower --lr")
                    log.write(done, {"loss": loss, "token_accuracy": tokens, "sequence_accuracy": whole})
                    step_of.sums.zero_()
                    logged = done
                    progress.advance(0, loss=loss)
                progress.advance(1)
                if done % settings.checkpoint_every == 0:
                    keep()
                    saved = done
                stops.busy = False
                stops.check()
                if seconds is not None and done % 10 == 0 and _spent(begun, device) > 0.97 * seconds:
                    break
        except BaseException:
            if stops.asked is not None and done > saved and not stops.hurried:
                stops.busy = True
                keep()
            raise
        finally:
            progress.stop()
        stops.busy = True
        took = _spent(since, device)
        if done > saved:
            keep()
        stops.busy = False
    token_accuracy, sequence_accuracy = accuracy(network, settings, device)
    curve = _curve(folder / _LOG)
    rate = (done - start) / took if done > start else 0.0
    found = Trained(
        architecture=row.architecture,
        layer=row.layer,
        s4=settings.s4,
        glu=settings.glu,
        seed=seed,
        **{name: getattr(settings, name) for name in ("length", "total", "vocab", "memorize", "tokens", "depth", "batch", "lr")},
        steps=done,
        planned=settings.steps,
        token_accuracy=token_accuracy,
        sequence_accuracy=sequence_accuracy,
        sequences=settings.sequences,
        loss=log.loss,
        parameters=sum(p.numel() for p in network.parameters()),
        seconds=earlier + took,
        steps_per_second=rate,
        tokens_per_second=rate * settings.batch * settings.tokens,
        peak_gib=peak_gib(device),
        graph=graph,
        backends=ops.ran_since(ran),
        environment=environment,
        commit=commit,
        dirty=dirty,
        created=results.now_iso(),
        curve=tuple(curve),
    )
    atomic.write(folder / _RESULT, json.dumps(asdict(found), indent=1) + "\n")
    return found


@torch.inference_mode()
def accuracy(network: Network, settings: Settings, device: torch.device) -> tuple[float, float]:
    """Return the shares of right tokens and of right sequences on the held-out set."""
    sequences, targets = held_out(settings, device)
    right: list[Tensor] = []
    for part, wanted in zip(sequences.split(settings.batch), targets.split(settings.batch), strict=True):
        right.append(network(part, read=settings.memorize).argmax(-1) == wanted)
    rows = torch.cat(right)
    return float(rows.double().mean()), float(rows.all(1).double().mean())


def result_in(folder: Path) -> Trained | None:
    """Return the result that a training left in its folder, None if it has none yet.

    Raises: ResultError if it is damaged.
    """
    path = folder / _RESULT
    try:
        return TypeAdapter(Trained).validate_json(untrusted.read_bytes(path, _LARGEST))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        problem = untrusted.in_words(error.errors(include_url=False)[0])
        raise ResultError(f"{path} is no result of selective copying: {problem}", "remove it and resume the run") from None
    except ValueError as error:
        raise ResultError(f"{path} {error}", "remove it and resume the run") from None


def _spent(since: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - since


def _write(folder: Path, network: Network, optimizer: torch.optim.Optimizer, sums: Tensor, made: Made) -> None:
    buffer = io.BytesIO()
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "sums": sums}
    torch.save({**state, "made": json.dumps(asdict(made))}, buffer)
    atomic.write(folder / _CHECKPOINT, buffer.getvalue())


def _read(folder: Path, device: torch.device) -> tuple[Made | None, dict[str, Any]]:
    """Return how far the folder's checkpoint is and its tensors; None if there is none. Nothing in the file is executed."""
    path = folder / _CHECKPOINT
    if not path.is_file():
        return None, {}
    try:
        # torch.load reads over a changed byte of a tensor; the archive has a checksum of each
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise _unusable(folder, f"{damaged} in it is damaged")
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        made = TypeAdapter(Made).validate_json(state["made"])
    except (RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise _unusable(folder, _first_line(error)) from error
    return made, state


def _unusable(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{folder / _CHECKPOINT} cannot be resumed from: {reason}", f"remove {folder} to train it again")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["it is empty"])[0]


def _curve(path: Path) -> list[CurvePoint]:
    return [CurvePoint(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]

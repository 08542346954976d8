"""How a model is run where it is only looked at: `exact`, in fp32 and operator by operator, or `fast`, see `mfuser.fast`.

The scores of both differ by rounding, so that they are never rows of one another: a record's variant names the mode, and its
environment has mode, compilation and type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgbench.data.places import cache_root
from dgbench.errors import DgbenchError, unknown
from dgbench.progress import Progress, Silent
from mfuser import fast
from mfuser.fast import Prepared
from mfuser.segmentor import Segmentor

EXACT, FAST = "exact", "fast"
MODES = (EXACT, FAST)
_TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}

Ready = Segmentor | Prepared  # what scores images


@dataclass(frozen=True, slots=True)
class Mode:
    """A mode by name, and of `fast` whether it compiles."""

    name: str = EXACT
    compiles: bool = True

    @property
    def label(self) -> str:
        """What a record's variant says of it; "" for `exact`."""
        return "" if self.name == EXACT else "fast bf16" if self.compiles else "fast bf16 not compiled"

    @property
    def described(self) -> dict[str, str]:
        """What a record's environment says of it; nothing for `exact`."""
        if self.name == EXACT:
            return {}
        return {"mode": self.name, "compile": "yes" if self.compiles else "no", "dtype": _TYPES[torch.bfloat16]}

    def made(self, environment: dict[str, str]) -> bool:
        """Return whether a record with this environment was made in this mode."""
        return {key: environment[key] for key in ("mode", "compile", "dtype") if key in environment} == self.described


def mode(name: str, *, compiles: bool | None = None) -> Mode:
    """Return a mode by name.

    Args:
        compiles: whether `fast` does; by default it does.

    Raises: DgbenchError for an unknown name, or `exact` that should be told whether to compile.
    """
    if name not in MODES:
        raise DgbenchError(*unknown("mode", name, MODES))
    if name == EXACT and compiles is not None:
        raise DgbenchError("mode `exact` is never compiled", "leave out --no-compile, or give --mode fast")
    return Mode(name, compiles is not False)


def ready(model: Segmentor, how: Mode, progress: Progress | None = None) -> Ready:
    """Return what scores images in a mode: of `exact` the model itself, whose class texts are computed once, to the same bits.

    Adapters are added to the weights that they adapt, where the method can.

    Args:
        model: in evaluation mode, on its device.

    Raises: DgbenchError for a method that has no fast inference.
    """
    if how.name == EXACT:
        with without_tf32(model):  # these products enter every score, too
            model.merge()
            fast.hold_texts(model)
        return model
    try:
        prepared = fast.prepare(model, compile=how.compiles, cache=cache_root() / "compiled" if how.compiles else None)
    except ValueError as error:
        raise DgbenchError(str(error), "leave out --mode fast, or set eval.mode=exact") from None
    if next(model.parameters()).device.type == "cpu":
        (progress or Silent()).note("fast mode on a CPU: bf16 without CUDA graphs, which may take longer than exact mode")
    return prepared


@contextmanager
def without_tf32(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Have a model in exact mode compute in fp32 as it says within the block; a fast one is left alone.

    On a GPU torch's convolutions round their inputs to TF32, 10 bits of a fraction, unless told otherwise, and so do matrix
    products where a container or a program has allowed it.
    """
    if isinstance(model, Prepared):
        yield
        return
    torchs: Any = torch.backends
    kinds = torchs.cuda.matmul, torchs.cudnn.conv, torchs.cudnn.rnn, torchs.mkldnn.matmul, torchs.mkldnn.conv
    allowed = [kind.fp32_precision for kind in kinds]
    older: tuple[str, bool] | None
    try:
        older = torch.get_float32_matmul_precision(), torchs.cudnn.allow_tf32
    except RuntimeError:
        older = None  # a program has set the newer names, after which torch refuses to read these
    if older is not None:
        _set_older("highest", False)  # for whoever reads these within the block
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        if older is not None:
            _set_older(*older)
        for kind, value in zip(kinds, allowed, strict=True):
            kind.fp32_precision = value


def _set_older(products: str, convolutions: bool) -> None:
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


@dataclass
class Compiling:
    """How long the compiler has taken since this was made, or was last asked."""

    how: Mode
    _before: float = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self._before = self._spent()

    def tell(self, progress: Progress) -> None:
        """Say how long, if it has taken any time."""
        now = self._spent()
        if now - self._before >= 0.05:
            progress.note(f"compiled in {now - self._before:.1f} s; the graphs are kept in {fast.keep_in()}")
        self._before = now

    def _spent(self) -> float:
        return fast.seconds() if self.how.name == FAST and self.how.compiles else 0.0

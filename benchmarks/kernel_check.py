"""`kernels.py --check`: every backend against fp64 and the torch backend, element by element where nothing cancels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from kernel_peers import FOREIGN
from torch import Tensor

from dgbench.cost.cases import DTYPES, Case, block_case, deform_case, scan_case
from dgbench.cost.kernels import candidates
from mfuser.fusion import MVFuser
from mfuser.ops import dispatch


def checks(tiny: bool) -> Iterator[tuple[str, list[str], Callable[..., Case]]]:
    """Yield cases to compare with fp64: operator, dtypes, how to make it; `steep_case`s element by element."""
    low = ["fp32", "bf16"] if tiny else ["fp32", "bf16", "fp16"]
    for length in (1, 2, 65) if tiny else (1, 2, 63, 64, 65, 577, 1000, 2049, 2594):
        yield "selective_scan", low, partial(scan_case, batch=2, length=length, dim=33 if tiny else 96, state=16)
    for length in (65,) if tiny else (65, 577, 2049):
        for shift in (-40.0, 30.0):
            yield "selective_scan", low, partial(scan_case, batch=1, length=length, dim=40, state=16, shift=shift)
        yield "selective_scan", low, partial(scan_case, batch=2, length=length, dim=72, state=16, gated=True)
    for length, state in ((21, 16),) if tiny else ((21, 8), (21, 16), (300, 8), (300, 16), (300, 64), (2594, 16)):
        yield "selective_scan", low, partial(steep_case, batch=2, length=length, dim=3 if tiny else 96, state=state)
    for dim, state in ((3, 5),) if tiny else ((1, 1), (3, 5), (64, 8), (130, 32), (512, 16)):
        yield "selective_scan", low, partial(scan_case, batch=3, length=70 if tiny else 300, dim=dim, state=state)
    spreads = ("near", "anywhere", "outside")
    for sides, heads, dim, points in (
        [((3, 1), 2, 8, 2)] if tiny else [((1,), 1, 1, 1), ((3, 5), 4, 33, 3), ((8, 16, 32), 8, 32, 4), ((18, 36), 8, 64, 4)]
    ):
        for spread in spreads:
            sizes: dict[str, Any] = {"sides": sides, "heads": heads, "dim": dim, "points": points}
            yield "ms_deform_attn", low, partial(deform_case, batch=2, spread=spread, **sizes)
    for length in (1, 65) if tiny else (1, 2, 63, 65, 577, 2594):
        yield "mvfuser", low[:2], partial(block_case, batch=2, length=length, width=32 if tiny else 256)
    if not tiny:
        yield "mvfuser", low[:2], partial(block_case, batch=2, length=577, width=1024)


def steep_case(dtype: torch.dtype, device: torch.device, *, batch: int, length: int, dim: int, state: int, seed: int = 0) -> Case:
    """Return a gated scan whose state n decays by about exp(-32 (n + 1) / N) in a step, and whose other inputs are positive.

    Nothing cancels in a gradient, and each of its elements has digits to compare, however much smaller than the others it is.
    """
    case = scan_case(dtype, device, batch=batch, length=length, dim=dim, state=state, gated=True, seed=seed)
    u, delta, A, B, C, D, bias, z, initial = (leaf.detach() for leaf in case.leaves)
    u, B, C, D, z, initial, dout = (0.5 + torch.sigmoid(tensor) for tensor in (u, B, C, D, z, initial, case.dout))
    dout = dout.to(dtype).to(case.dout)  # as y's gradient is rounded, for fp64 to start from the same
    size = 32 / state
    # softplus of it is `size`, but for a tenth
    delta = math.log(math.expm1(size)) + torch.tanh(delta) * size / 10
    A = -torch.arange(1, state + 1, device=device).to(A) * (1 + torch.tanh(A) / 10)
    leaves = (u, delta.to(dtype), A, B, C, D, torch.zeros_like(bias), z, initial)
    return case.remake(tuple(leaf.requires_grad_() for leaf in leaves), dout)


def check(
    device: torch.device,
    *,
    tiny: bool,
    tell: Callable[[str], None],
    only: Sequence[str] = (),
    backends: Sequence[str] = (),
    compare: bool = True,
) -> bool:
    """Check that every backend has at most twice the torch backend's error against fp64, and is deterministic; print failures.

    Where states decay within a step, every element of every gradient is compared with fp64 itself, also for torch, since it
    is only a valid reference as far as it has been checked.

    Args:
        only: operators; none means all.    backends: the same.    compare: False asks for the same bits only.
    """
    counts: dict[tuple[str, str], list[float]] = {}  # compared, failed, largest ratio
    refused: dict[tuple[str, str], str] = {}
    for op, dtypes, make in checks(tiny):
        if only and op not in only:
            continue
        rows = [row for row in candidates(op, device) if row.name not in FOREIGN and (not backends or row.name in backends)]
        for dtype in dtypes:
            draws = [make(DTYPES[dtype], device, seed=seed) for seed in range(_draws(op, make) if compare else 1)]
            case = draws[0]
            expected = _pooled(draw.precise().both("torch") for draw in draws) if compare else ()
            usual = _pooled(draw.both("torch") for draw in draws) if compare else ()
            alone = getattr(make, "func", None) is steep_case
            for row in rows:
                if (reason := dispatch.unusable(row, *case.probe)) is not None:
                    refused[op, row.name] = reason
                    continue
                tallied = counts.setdefault((op, row.name), [0, 0, 0.0])
                problems = []
                try:
                    found, again = (_pooled(draw.both(row.name) for draw in draws) for _ in range(2))
                except (ValueError, RuntimeError) as error:
                    found = again = ()
                    problems.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
                for name, *tensors in zip(result_names(case), found, usual, expected, strict=False):
                    if alone:
                        # the result comes in the last state's type, but most of it is rounded to the tokens' type
                        rounded = DTYPES[dtype] if name == "result" else tensors[0].dtype
                        ratio, text = _element_by_element(*tensors, DTYPES[dtype], rounded)
                    else:
                        ratio, text = _compared(*tensors, _rounding(case))
                    tallied[0] += 1
                    tallied[2] = max(tallied[2], ratio)
                    if ratio > 2 or math.isnan(ratio):
                        problems.append(f"{name}: {text}")
                if not all(torch.equal(a, b) for a, b in zip(found, again, strict=True)):
                    problems.append("a second run gives other bits")
                tallied[1] += len(problems)
                for problem in problems:
                    tell(f"FAILED {op} {row.name} {dtype}, {case.shape}: {problem}")
    for (op, name), reason in refused.items():
        tell(f"{op} {name}: refused some or all: {reason}")
    for (op, name), (compared, failed, ratio) in counts.items():
        text = f"{compared:.0f} tensors compared, {failed:.0f} problems, largest error {ratio / 2:.2f} of what is allowed"
        tell(f"{op} {name}: {text}")
    return not any(failed for _, failed, _ in counts.values())


def _draws(op: str, make: Callable[..., Case]) -> int:
    """Return how many draws of a case are compared together.

    A gradient of the block that is a single number, or a few, is a sum of terms that nearly cancel: under autocast the
    error of one draw is random, for torch as for the kernels, and only that of several shows which is more exact.
    """
    return 16 if op == "mvfuser" and getattr(make, "keywords", {})["length"] <= 65 else 1


def _pooled(results: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return the results of several draws, stacked."""
    return tuple(torch.stack(tensors) for tensors in zip(*results, strict=True))


def result_names(case: Case) -> list[str]:
    """Return what `Case.both` returns, in words."""
    names = {
        "selective_scan": ("u", "delta", "A", "B", "C", "D", "bias", "z", "initial"),
        "ms_deform_attn": ("value", "locations", "weights"),
        "mvfuser": ("joint", *dict(MVFuser(32).named_parameters())),
    }[case.op]
    return ["result", *(f"gradient of {name}" for name in names)]


def _rounding(case: Case) -> float:
    """Return the relative error that is always allowed.

    For bf16 and fp16 inputs, whose own rounding hides an exponential that is good to 2^-18, that is 1e-5 of what is summed
    in fp32. MVFuser's block under autocast rounds everything between its parts: torch's error of a single number is random.
    """
    dtype = case.leaves[0].dtype
    if dtype.itemsize > 2:
        return 1e-6
    return torch.finfo(dtype).eps / 2 if case.op == "mvfuser" else 1e-5


def _compared(found: Tensor, usual: Tensor, expected: Tensor, rounding: float) -> tuple[float, str]:
    """Return how many times the torch backend's error this one is, by norm, by maximum or by element, whichever is more.

    Twice is allowed, of what nine elements in ten are within four times: the kernels' exponentials are less exact by roundings.
    An error of `rounding` and one rounding of the result are always allowed.
    """
    rounding = max(rounding, torch.finfo(found.dtype).eps / 2)
    if problem := _other_kind(found, usual, expected):
        return math.nan, problem
    largest = (0.0, "")
    for measure, share in ((relative, 1.0), (by_maximum, 1.0), (by_element, 0.5)):
        mine, theirs = measure(found, expected), measure(usual, expected)
        if math.isnan(mine):
            return math.nan, "is not a number"
        ratio = share * mine / max(theirs, rounding)
        largest = max(largest, (ratio, f"error {mine:.1e}, torch's {theirs:.1e}"))
    return largest


def _element_by_element(
    found: Tensor, usual: Tensor, expected: Tensor, tokens: torch.dtype, rounded: torch.dtype
) -> tuple[float, str]:
    """Return the worst element's error, relative to that element, as 2 where it is as large as allowed.

    fp32 rounds the exponent of exp(-32) to 2e-6 of it; powers of 2, short inputs' functions and sums over time add to that.
    """
    if problem := _other_kind(found, usual, expected):
        return math.nan, problem
    allowed = (2e-4 if tokens.itemsize <= 2 else 3e-5) + torch.finfo(rounded).eps / 2
    worst = float(((found.detach().double() - expected.detach()) / expected.detach()).abs().max())
    return 2 * worst / allowed, f"error of an element {worst:.1e}, allowed are {allowed:.1e}"


def _other_kind(found: Tensor, usual: Tensor, expected: Tensor) -> str:
    if found.shape == expected.shape and found.dtype == usual.dtype:
        return ""
    return f"{found.dtype} {tuple(found.shape)}, expected {usual.dtype} {tuple(expected.shape)}"


def by_element(found: Tensor, expected: Tensor) -> float:
    """Return the 90th percentile of the elements' relative errors: a norm hides the errors of small elements.

    What fp32 has no digits for, such as e^-480, is left out.
    """
    found, expected = found.detach().double().flatten(), expected.detach().flatten()
    error = ((found - expected) / expected)[expected.abs() >= torch.finfo(torch.float32).tiny * 2**20].abs()
    return float(error.kthvalue(-(-9 * len(error) // 10)).values) if len(error) else 0.0


def by_maximum(found: Tensor, expected: Tensor) -> float:
    """Return the largest error over the largest number."""
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return || found - expected || / || expected ||."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm()) / (float(expected.norm()) or 1.0)

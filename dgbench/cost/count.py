"""What one forward pass costs, counted operator by operator on shapes alone: no weights, no GPU, the same on any machine.

fvcore counts, with a handle for every operator that costs something; torch's FlopCounterMode is the second opinion. Both
must find the same number to the last digit, and an operator that neither knows is an error, not a zero.

- A product is one multiply-accumulate (MAC) of a matrix product, a convolution or attention.
- Sampling costs a MAC per neighbour and channel, and deformable attention one more for the weight; RoIAlign samples several
  places of a cell.
- The selective scan costs 9 B L D N + B L D floating-point operations, and B L D more with a gate (state-spaces/mamba,
  issue 110, as VMamba counts it). It mixes multiplications and additions, so it is a column of its own.
- A Fourier transform of N complex numbers costs 5 N log2 N floating-point operations (FFTW's convention for every N; N of all
  transformed dimensions), one between N real numbers and their half spectrum half of that; two operations are a product.
- Activations, norms (instance norm included), softmax, pooling, sums and copies cost nothing, as in the literature.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dgbench.cost.conventions import CONVENTIONS, Cost, Counted
from dgbench.cost.operators import (
    GRID_NEIGHBOURS,
    NEIGHBOURS,
    CountError,
    Sizes,
    attention,
    costs_nothing,
    deformable,
    einsum,
    fourier,
    matmul,
    pooled_boxes,
    scan,
)
from dgbench.cost.shapes import on_shapes

with warnings.catch_warnings():
    # it scripts a function of its own as it is imported, which torch would have it leave
    warnings.simplefilter("ignore", FutureWarning)
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import addmm_flop_jit, bmm_flop_jit, conv_flop_jit, linear_flop_jit


def count(model: nn.Module, *inputs: Tensor) -> Counted:
    """Count one forward pass in evaluation mode; each module is left in the mode that it was in.

    Args:
        model: with its parameters and buffers on the meta device.    inputs: on the meta device, too.

    Raises: CountError naming an operator that is not counted, or both counters' numbers where they differ.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with _mha_in_parts():
            found = _by_fvcore(model, inputs)
            second = _by_torch(model, inputs)
    finally:
        for module, training in modes:
            module.training = training
    first = CONVENTIONS["flop"].total(found.total)
    if first != second:
        raise CountError(
            f"{type(model).__name__}: fvcore counts {first:,} FLOP and torch {second:,}",
            "an operator is counted by one of them alone (both tables are in dgbench/cost/count.py), or the model computes "
            "what it does not return",
        )
    return found


# ---- fvcore

_MAC, _SAMPLING, _SCAN, _SKIP = "products", "sampling", "scan", "skip"
# labels that our handles give to fvcore: operator and kind; fvcore's own handles count products
_KIND = {
    "interpolation": _SAMPLING,
    "grid sampling": _SAMPLING,
    "box pooling": _SAMPLING,
    "deformable attention": _SAMPLING,
    "scan": _SCAN,
    "scan skip": _SKIP,
}


def _unknown(where: str, operators: Iterable[str]) -> CountError:
    listed = ", ".join(f"`{operator}`" for operator in sorted(operators))
    return CountError(
        f"{where}: not counted: {listed}",
        "give it a formula in dgbench/cost/operators.py and a handle in dgbench/cost/count.py, or list it in operators.py if it "
        "costs nothing",
    )


def _by_fvcore(model: nn.Module, inputs: tuple[Tensor, ...]) -> Counted:
    with on_shapes():
        analysis = FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.tracer_warnings("none").clear_op_handles().set_op_handle(**_HANDLES)
        table = analysis.by_module_and_operator()
    if unknown := {operator for operator in analysis.unsupported_ops() if not costs_nothing(operator)}:
        owners = [name for name in table if unknown & analysis.unsupported_ops(name).keys()]
        raise _unknown(max(owners, key=len) or type(model).__name__, unknown)
    by_operator: dict[str, Cost] = {}
    for operator, number in table[""].items():
        kind = "scan" if operator == "scan skip" else operator
        by_operator[kind] = by_operator.get(kind, Cost()) + _cost({operator: number})
    return Counted(_cost(table[""]), {name: _cost(own) for name, own in table.items() if any(own.values())}, by_operator)


def _cost(by_operator: Mapping[str, float]) -> Cost:
    parts: Counter[str] = Counter()
    for operator, number in by_operator.items():
        parts[_KIND.get(operator, _MAC)] += round(number)
    # fvcore adds up all labels: the skip was taken out of the scan
    return Cost(parts[_MAC], parts[_SAMPLING], parts[_SCAN] + parts[_SKIP], parts[_SKIP])


def _shape(value: Any) -> Sizes:
    """Of a tensor of TorchScript's graph."""
    sizes = value.type().sizes()
    if sizes is None:
        raise CountError(f"`{value.debugName()}` has no shape in the trace", "count with inputs on the meta device")
    return tuple(sizes)


def _is_none(value: Any) -> bool:
    return bool(value.type().kind() == "NoneType" or value.node().mustBeNone())


def _sampled(name: str, neighbours: int) -> Callable[[Any, Any], Counter[str]]:
    return lambda _inputs, outputs: Counter({name: neighbours * math.prod(_shape(outputs[0]))})


def _given(value: Any) -> Any:
    """Return a constant of TorchScript's graph: a number, None, or a list of such."""
    node = value.node()
    return [item.toIValue() for item in node.inputs()] if node.kind() == "prim::ListConstruct" else value.toIValue()


def _transformed(name: str) -> Callable[[Any, Any], Counter[str]]:
    """Handle of `torch.fft.<name>(input, n or s, dim, norm)`."""
    real = name.startswith(("rfft", "irfft"))

    def handle(inputs: Any, outputs: Any) -> Counter[str]:
        sizes = list(_shape(outputs[0]))
        lengths, dims = _given(inputs[1]), _given(inputs[2])
        lengths = lengths if lengths is None or isinstance(lengths, list) else [lengths]
        if dims is None:
            dims = range(-len(lengths or sizes), 0)
        dims = [dims] if isinstance(dims, int) else list(dims)
        if name.startswith("rfft"):
            # the output is halved: it has not the length
            sizes = list(_shape(inputs[0]))
            for dim, length in zip(dims, lengths or [], strict=lengths is not None):
                if length is None:
                    raise CountError(f"the length of a `{name}` is computed", "give it as a number, or pad the input before")
                sizes[dim] = length
        return Counter({"fourier transform": fourier(tuple(sizes), dims, real=real)})

    return handle


_TRANSFORMS = ("fft", "ifft", "rfft", "irfft", "fft2", "ifft2", "rfft2", "irfft2", "fftn", "ifftn", "rfftn", "irfftn")

_HANDLES: dict[str, Any] = {
    **{f"aten::fft_{name}": _transformed(name) for name in _TRANSFORMS},
    "aten::addmm": addmm_flop_jit,
    "aten::bmm": bmm_flop_jit,
    "aten::mm": lambda inputs, _: Counter(matmul=matmul(*map(_shape, inputs))),
    "aten::matmul": lambda inputs, _: Counter(matmul=matmul(*map(_shape, inputs))),
    "aten::linear": linear_flop_jit,
    "aten::einsum": lambda inputs, _: Counter(einsum=einsum(inputs[0].toIValue(), [*map(_shape, inputs[1].node().inputs())])),
    "aten::_convolution": conv_flop_jit,
    "aten::scaled_dot_product_attention": lambda inputs, _: Counter(attention=attention(*map(_shape, inputs[:3]))),
    "aten::grid_sampler": lambda inputs, outputs: Counter(
        {"grid sampling": GRID_NEIGHBOURS[inputs[2].toIValue()] * math.prod(_shape(outputs[0]))}
    ),
    **{f"aten::{name}": _sampled("interpolation", neighbours) for name, neighbours in NEIGHBOURS.items()},
    "torchvision::roi_align": lambda inputs, outputs: Counter(
        {"box pooling": pooled_boxes(_shape(outputs[0]), inputs[5].toIValue())}
    ),
    "mfuser::selective_scan": lambda inputs, _: _scan_label(*scan(_shape(inputs[0]), _shape(inputs[2]), not _is_none(inputs[6]))),
    "mfuser::ms_deform_attn": lambda inputs, _: Counter(
        {"deformable attention": deformable(_shape(inputs[0]), _shape(inputs[3]))}
    ),
}


def _scan_label(total: int, skip: int) -> Counter[str]:
    return Counter({"scan": total - skip, "scan skip": skip})


# ---- torch


def _by_torch(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """FLOP as torch counts them."""
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    # below the counter, which takes composite operators apart
    with torch.no_grad(), _Watch(counter.flop_registry) as watch, counter:
        model(*inputs)
    if watch.unknown:
        raise _unknown(type(model).__name__, watch.unknown)
    return int(counter.get_total_flops())


class _Watch(TorchDispatchMode):
    """Sees every operator that reaches the device."""

    def __init__(self, counted: Mapping[Any, Any]) -> None:
        super().__init__()
        self.counted = counted
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet not in self.counted and func not in self.counted and not costs_nothing(func._schema.name):
            self.unknown.add(func._schema.name)
        return func(*args, **kwargs or {})


def _resized(neighbours: int) -> Callable[..., int]:
    return lambda *_args, out_shape, **_options: 2 * neighbours * math.prod(out_shape)


def _scan_formula(
    u: Sizes, delta: Sizes, A: Sizes, B: Sizes, C: Sizes, D: Sizes | None, z: Sizes | None, *_rest: Any, **_options: Any
) -> int:
    return scan(u, A, z is not None)[0]


def _grid_formula(_input: Sizes, _grid: Sizes, mode: int, *_rest: Any, out_shape: Sizes, **_options: Any) -> int:
    return 2 * GRID_NEIGHBOURS[mode] * math.prod(out_shape)


def _boxes_formula(
    _input: Sizes,
    _rois: Sizes,
    _scale: float,
    _rows: int,
    _columns: int,
    ratio: int,
    _aligned: bool,
    *,
    out_shape: Sizes,
    **_: Any,
) -> int:
    return 2 * pooled_boxes(out_shape, ratio)


def _r2c_formula(real: Sizes, dims: list[int], _norm: int, onesided: bool, **_options: Any) -> int:
    return 2 * fourier(real, dims, real=onesided)


def _formulas() -> dict[Any, Any]:
    aten = torch.ops.aten
    import torchvision.ops  # noqa: F401  these three register the operators

    import mfuser.ops.ms_deform_attn
    import mfuser.ops.selective_scan  # noqa: F401

    return {
        **{getattr(aten, name): _resized(neighbours) for name, neighbours in NEIGHBOURS.items()},
        aten.grid_sampler_2d: _grid_formula,
        aten._fft_c2c: lambda sizes, dims, *_, **__: 2 * fourier(sizes, dims, real=False),
        aten._fft_r2c: _r2c_formula,
        aten._fft_c2r: lambda _half, dims, *_, out_shape, **__: 2 * fourier(out_shape, dims, real=True),
        torch.ops.torchvision.roi_align: _boxes_formula,
        torch.ops.mfuser.selective_scan: _scan_formula,
        torch.ops.mfuser.ms_deform_attn: lambda value, _shapes, _places, weights, *_, **__: 2 * deformable(value, weights),
    }


_FORMULAS = _formulas()


@contextmanager
def _mha_in_parts() -> Iterator[None]:
    """Within, nn.MultiheadAttention runs as its parts: its fused path is one operator that no counter looks into."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)

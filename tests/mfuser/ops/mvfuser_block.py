"""MVFuser's block under test: the kernels that run it, and what their results are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from mfuser.fusion import MVFuser
from mfuser.ops import compiled

SCANS = {"cuda": "cuda", "triton": "torch"}  # torch's saves the interpreter's time; cuda's block has its own
GPU = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["emulated", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request, monkeypatch) -> Iterator[tuple[str, str]]:
    """The name of a backend with kernels and the device of its tensors; MVFuser runs it, with its scan."""
    name = "cuda" if request.param == "emulated" else request.param
    monkeypatch.setattr("mfuser.fusion.plan", lambda *_: (name, SCANS[name]))
    if request.param == "emulated":
        with compiled.use(request.getfixturevalue("emulated")):
            yield name, "cpu"
        return
    if name == "triton" and GPU == "cpu":
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        monkeypatch.setattr(interpreter, "_convert_float", nearest(interpreter._convert_float))
    yield name, GPU


# what is the operator's doing is the same whatever kernels it calls; the interpreter would take long
of_the_operator = pytest.mark.parametrize("kernels", ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


def nearest(convert: Callable) -> Callable:
    """The interpreter cuts fp32 to bf16; a GPU rounds."""

    def converted(value, source, target, mode):
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert(value, source, target, mode)
        bits = np.ascontiguousarray(value).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)

    return converted


def make(width: int, state: int, *, double_bias: bool = True, double_gate: bool = True, device: str = "cpu") -> MVFuser:
    fuser = MVFuser(width, state=state, double_bias=double_bias, double_gate=double_gate, backend="torch").eval()
    with torch.no_grad():
        for parameter in fuser.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        fuser.scale.fill_(0.7)
    return fuser.to(device)


def tokens(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device)


def run(fuser: MVFuser, function: Callable[[Tensor], Tensor], joint: Tensor) -> dict[str, Tensor]:
    """Output and every gradient, in fp64."""
    joint = joint.detach().requires_grad_()
    out = function(joint)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(out)
    names, leaves = zip(("joint", joint), *fuser.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, leaves, probe)
    assert all(grad.dtype == leaf.dtype for grad, leaf in zip(grads, leaves, strict=True))
    return {"out": out.detach().double()} | {name: grad.double() for name, grad in zip(names, grads, strict=True)}


def autocast(function: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.bfloat16) -> Callable[[Tensor], Tensor]:
    """`function` under autocast, whose backward is not."""

    def under(joint: Tensor) -> Tensor:
        with torch.autocast(joint.device.type, dtype):
            return function(joint)

    return under


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative, of the whole tensor; absolute where nothing is expected (a state before the first step)."""
    sizes = {name: float(tensor.norm()) or 1.0 for name, tensor in expected.items()}
    # one number, whose terms cancel: their size is that of out
    sizes["scale"] = max(sizes.get("scale", 0.0), sizes.get("out", 1.0))
    return {name: float((actual[name] - tensor).norm()) / sizes[name] for name, tensor in expected.items()}


def as_precise(actual: dict[str, float], composed: dict[str, float]) -> None:
    # the scale's gradient is one number, which may come out right by chance
    slack = {"scale": 1e-2}
    worse = {n: (actual[n], e) for n, e in composed.items() if actual[n] > 2 * e + slack.get(n, 1e-3)}
    assert not worse, worse


def truth(fuser: MVFuser, joint: Tensor) -> dict[str, Tensor]:
    wide = copy.deepcopy(fuser).double()
    return run(wide, wide.composed, joint.double())


def weights_of(fuser: MVFuser) -> list[Tensor]:
    return [
        fuser.in_proj.weight,
        fuser.conv1d_x.weight,
        fuser.conv1d_z.weight,
        fuser.x_proj.weight,
        fuser.dt_proj.weight,
        fuser.dt_proj.bias,
        fuser.A_log,
        fuser.D,
        fuser.norm.weight,
        fuser.out_proj.weight,
        fuser.scale,
    ]

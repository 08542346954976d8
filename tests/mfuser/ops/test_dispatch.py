from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mfuser.ops import BackendError, available, dispatch, explain, ms_deform_attn, ran_since, resolve, selective_scan, tally


def test_auto_takes_the_first_backend_that_accepts(monkeypatch):
    rows = (
        dispatch.Backend("broken", "mfuser.ops.no_such_module"),
        dispatch.Backend("picky", "mfuser.ops.dispatch", refuse=lambda *_: "no such tensors"),
        dispatch.Backend("fine", "mfuser.ops.dispatch"),
    )
    monkeypatch.setitem(dispatch.TABLE, "an_op", rows)
    assert resolve("an_op", "auto").name == "fine"
    assert available("an_op") == ["fine"]
    assert explain("an_op")["picky"] == "no such tensors"


def test_a_named_backend_never_falls_back(monkeypatch):
    rows = (dispatch.Backend("broken", "mfuser.ops.no_such_module"), dispatch.Backend("fine", "mfuser.ops.dispatch"))
    monkeypatch.setitem(dispatch.TABLE, "an_op", rows)
    with pytest.raises(BackendError, match=r"broken: No module named 'mfuser\.ops\.no_such_module'"):
        resolve("an_op", "broken")


def test_no_backend_lists_every_reason(monkeypatch):
    rows = tuple(
        dispatch.Backend(name, "mfuser.ops.dispatch", refuse=lambda *_, name=name: f"{name} is tired") for name in ("one", "two")
    )
    monkeypatch.setitem(dispatch.TABLE, "an_op", rows)
    with pytest.raises(BackendError, match="one: one is tired; two: two is tired"):
        resolve("an_op", "auto")


def test_auto_leaves_a_cpu_to_backends_that_are_meant_for_it(monkeypatch):
    rows = (dispatch.Backend("kernels", "mfuser.ops.dispatch", gpu=True), dispatch.Backend("fine", "mfuser.ops.dispatch"))
    monkeypatch.setitem(dispatch.TABLE, "an_op", rows)
    assert resolve("an_op", "auto", torch.zeros(1)).name == "fine"
    assert resolve("an_op", "auto", torch.zeros(1, device="meta")).name == "kernels"
    assert resolve("an_op", "kernels", torch.zeros(1)).name == "kernels"


def test_unknown_names_say_what_there_is():
    with pytest.raises(BackendError, match="has no backend `cudaa`; there are: .*torch, reference"):
        resolve("selective_scan", "cudaa")
    with pytest.raises(BackendError, match="unknown op `scan`"):
        resolve("scan", "auto")


def test_the_environment_names_the_backend_of_auto_alone(monkeypatch):
    monkeypatch.setenv("MFUSER_BACKEND", "reference")
    assert resolve("selective_scan", "auto").name == "reference"
    assert resolve("selective_scan", "torch").name == "torch"
    monkeypatch.setenv("MFUSER_BACKEND", "nonsense")
    u = torch.zeros(1, 3, 2)
    with pytest.raises(BackendError, match="nonsense"):
        selective_scan(u, u, torch.zeros(2, 1), torch.zeros(1, 3, 1), torch.zeros(1, 3, 1))


def test_auto_never_picks_a_backend_whose_gradient_may_be_noise():
    assert [backend.name for backend in dispatch.rows("selective_scan") if backend.auto] == ["cuda", "triton", "torch"]


def test_auto_never_picks_the_reference():
    assert resolve("selective_scan", "auto").name != "reference"
    assert resolve("ms_deform_attn", "auto").name != "reference"


def test_each_operator_can_have_a_backend_of_its_own(monkeypatch):
    names = "selective_scan=reference, ms_deform_attn=torch"
    assert resolve("selective_scan", names).name == "reference"
    assert resolve("ms_deform_attn", names).name == "torch"
    assert resolve("ms_deform_attn", "selective_scan=reference").name == resolve("ms_deform_attn", "auto").name
    monkeypatch.setenv("MFUSER_BACKEND", "ms_deform_attn=reference")
    assert resolve("ms_deform_attn", "selective_scan=reference").name == "reference"
    with pytest.raises(BackendError, match="unknown op `scan`; there are: selective_scan"):
        resolve("ms_deform_attn", "scan=torch")
    with pytest.raises(BackendError, match="`torch` has no operator, write op=name,op=name"):
        resolve("ms_deform_attn", "selective_scan=torch,torch")


def scan(backend: str, u: torch.Tensor) -> torch.Tensor:
    return selective_scan(u, u.exp(), -u.new_ones(2, 1), u[..., :1], u[..., :1], backend=backend)


def test_what_is_counted_is_what_ran(monkeypatch):
    before = tally()
    assert ran_since(before) == {}
    explain("selective_scan")
    resolve("selective_scan", "auto")
    with pytest.raises(BackendError):
        scan("nonsense", torch.zeros(1, 3, 2))
    assert ran_since(before) == {}, "asking is not running"
    scan("auto", torch.zeros(1, 3, 2))
    assert ran_since(before) == {"selective_scan": "torch"}
    # a first choice that takes one dtype only: the record must not promise it for the others
    path = "mfuser.ops.selective_scan.reference"
    rows = (
        dispatch.Backend("picky", path, refuse=lambda u, *_: None if u.is_cuda else "wants a GPU"),
        dispatch.Backend("narrow", path, refuse=lambda u, *_: None if u.dtype.itemsize < 8 else "no fp64"),
        *dispatch.TABLE["selective_scan"],
    )
    monkeypatch.setitem(dispatch.TABLE, "selective_scan", rows)
    before = tally()
    for dtype in (torch.float32, torch.float64):
        scan("auto", torch.zeros(1, 3, 2, dtype=dtype))
    assert ran_since(before) == {"selective_scan": "narrow+torch"}


def test_the_backward_is_counted_too():
    u = torch.zeros(1, 3, 2, requires_grad=True)
    y = scan("auto", u)
    before = tally()
    y.sum().backward()
    assert ran_since(before) == {"selective_scan": "torch"}


class Seen(TorchDispatchMode):
    """The operators of ours that the dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mfuser":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def attend(value: torch.Tensor) -> torch.Tensor:
    places = value.new_full((1, 2, 3, 1, 2, 2), 0.4)
    return ms_deform_attn(value[:, None].expand(1, 4, 3, 2), [(2, 2)], places, places[..., 0], backend="torch")


OPERATORS = {"selective_scan": lambda x: scan("torch", x), "ms_deform_attn": attend}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_mode_sees_operators_that_else_go_without_the_dispatcher(name):
    function, x = OPERATORS[name], torch.randn(1, 3, 2, requires_grad=True)
    (outside,) = torch.autograd.grad(function(x).sum(), x)
    with Seen() as seen:
        (inside,) = torch.autograd.grad(function(x).sum(), x)
    assert seen.names == [name, f"{name}_bwd"]
    assert torch.equal(inside, outside)
    with torch.no_grad():
        assert not function(x).requires_grad


class Call(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return OPERATORS[self.name](x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes are compared
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_tracer_sees_an_operator_as_one_node(name, grad, device):
    x = torch.randn(1, 3, 2, device=device, requires_grad=grad)
    graph = torch.jit._get_trace_graph(Call(name), (x,))[0]
    assert [node.kind() for node in graph.nodes()].count(f"mfuser::{name}") == 1
    # which is all that it computes
    assert not [
        node.kind() for node in graph.nodes() if node.kind() in ("aten::mul", "aten::sum", "aten::cumsum", "aten::matmul")
    ]


def test_a_first_derivative_alone_is_what_operators_have():
    u = torch.randn(1, 3, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(scan("torch", u).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match=r"mfuser.+selective_scan_bwd.+no autograd formula"):
        grad.sum().backward()


def test_the_choice_bears_the_mark_that_torchs_own_function_gives():
    def marked(): ...

    torch.compiler.assume_constant_result(marked)
    assert vars(marked)
    assert vars(dispatch.resolve) == vars(marked)


def test_what_triton_refuses_is_the_same_before_and_after_its_import():
    code = """
import torch
from mfuser.ops import dispatch
for op in dispatch.TABLE:
    (row,) = [row for row in dispatch.TABLE[op] if row.name == "triton"]
    for given in ((), (torch.zeros(1),), (torch.zeros(1, dtype=torch.float64), None)):
        early = row.early(*given)
        assert early == row.load().refuse(*given), (op, early, row.load().refuse(*given))
        assert bool(early) or torch.cuda.is_available()
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

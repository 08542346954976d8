from __future__ import annotations

import pytest
import torch

from mfuser.ops import BackendError, available, dispatch, explain, resolve, selective_scan


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


def test_auto_never_picks_the_reference():
    assert resolve("selective_scan", "auto").name != "reference"
    assert resolve("ms_deform_attn", "auto").name != "reference"

"""Which backend runs MVFuser's block, and why another does not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mfuser.ops import BackendError, available, compiled, dispatch, explain
from mfuser.ops.mvfuser import plan

from .mvfuser_block import GPU, make, tokens


def test_torch_has_no_kernels_and_composes(monkeypatch):
    fuser, joint = make(24, 3), tokens(1, 5, 24)
    monkeypatch.setattr("mfuser.fusion.mvfuser", None)
    for backend in ("torch", "reference"):
        assert plan(backend, fuser.in_proj.weight, fuser.A_log) is None
        fuser.backend = backend
        assert torch.equal(fuser.mix(joint), fuser.composed(joint))
    assert "torch" in available("mvfuser", fuser.in_proj.weight)


def test_a_named_backend_runs_or_raises(monkeypatch):
    fuser, joint = make(24, 3), tokens(1, 5, 24)
    fuser.backend = "nonsense"
    with pytest.raises(BackendError, match="mvfuser has no backend `nonsense`; there are: cuda, triton, torch, reference"):
        fuser.mix(joint)
    fuser.backend = "cuda"
    if GPU == "cpu":
        with pytest.raises(BackendError, match="no backend for mvfuser: cuda: torch finds no usable CUDA GPU"):
            fuser.mix(joint)
    # the scan's kernels of that name are part of it
    accepting = dispatch.Backend("triton", "mfuser.ops.dispatch")
    refusing = dispatch.Backend("triton", "mfuser.ops.dispatch", refuse=lambda *_: "is tired")
    monkeypatch.setitem(dispatch.TABLE, "mvfuser", (accepting,))
    monkeypatch.setitem(dispatch.TABLE, "selective_scan", (refusing,))
    fuser.backend = "triton"
    with pytest.raises(BackendError, match="no backend for selective_scan: triton: is tired"):
        fuser.mix(joint)


def test_the_scan_of_cudas_block_is_its_own(emulated, monkeypatch):
    fuser = make(24, 4)
    rows = tuple(dataclasses.replace(row, auto=True, gpu=False) for row in dispatch.TABLE["mvfuser"])
    monkeypatch.setitem(dispatch.TABLE, "mvfuser", rows)
    with compiled.use(emulated):
        for requested in ("cuda", "auto", "mvfuser=cuda", "mvfuser=cuda,selective_scan=cuda"):
            assert plan(requested, fuser.in_proj.weight, fuser.A_log) == ("cuda", "cuda")
        # a scan that was named runs, in the composition, but not under a block that was named
        assert plan("selective_scan=torch", fuser.in_proj.weight, fuser.A_log) is None
        with pytest.raises(BackendError, match="no backend for mvfuser: cuda: its scan is cuda, too, not torch"):
            plan("mvfuser=cuda,selective_scan=torch", fuser.in_proj.weight, fuser.A_log)


def test_kernels_refuse_what_they_cannot_take(emulated):
    fuser = make(24, 3)
    with compiled.use(emulated):
        assert explain("mvfuser", fuser.in_proj.weight)["cuda"] is None
        assert explain("mvfuser", fuser.in_proj.weight.double())["cuda"] == "takes fp32, bf16 and fp16, not torch.float64"
        assert explain("mvfuser", fuser.in_proj.weight.to("meta"))["cuda"] == "takes cpu tensors, not meta"
        for width, state, reason in (
            (24, 3, "takes 4, 8, ... 64 states, not 3"),
            (24, 68, "takes 4, 8, ... 64 states, not 68"),
            (12, 4, "takes a multiple of 4 scanned channels, not 6"),
            (24, 4, None),
        ):
            fuser = make(width, state)
            assert explain("mvfuser", fuser.in_proj.weight, fuser.A_log)["cuda"] == reason

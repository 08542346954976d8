"""Stages count every moment of a call once, for the part that runs; a trace names what a call runs."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from dgbench.cost.stages import OTHER, Stages, kind_of, traced

CPU = torch.device("cpu")


class Slow(nn.Module):
    """Takes a while, and has a part that takes a while, too."""

    def __init__(self, seconds: float, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.seconds, self.inner = seconds, inner

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return x * 2 if self.inner is None else self.inner(x)


def test_moments_count_for_the_innermost_part_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # a clock that only sleeping moves: a real one also counts who else runs
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    inner, last = Slow(0.5), Slow(0.25)
    outer = Slow(0.125, inner)
    stages = Stages(CPU)

    def call() -> None:
        time.sleep(1)
        last(outer(torch.ones(1)))
        time.sleep(2)

    with stages.watching({"outer": [outer], "inner": [inner], "last": [last]}, then={"last": "the end"}):
        found = stages.times(call, first="the beginning", repeats=3)
    assert list(found) == ["the beginning", "outer", "inner", "last", "the end"]
    assert found == {"the beginning": 1000, "outer": 125, "inner": 500, "last": 250, "the end": 2000}


def test_the_backward_pass_counts_for_the_part_it_is_in() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    stages = Stages(CPU)

    def step() -> None:
        loss = second(first(torch.ones(2, 4))).square().sum()
        stages.begin("backward")
        loss.backward()
        stages.begin("optimizer")

    with stages.watching({"first": [first], "second": [second]}, backward=True):
        found = stages.times(step, first="forward", repeats=2)
    assert list(found) == ["forward", "first", "second", "backward", "backward of second", "backward of first", "optimizer"]


def test_a_compiled_part_is_watched_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    # hooks on it would be compiled: they run once, and later calls count for what ran before it
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    first.compile(backend="eager")
    whole = first._compiled_call_impl
    stages = Stages(CPU)

    def call() -> None:
        second(first(torch.ones(2, 4)))

    first.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 1))
    call()
    with stages.watching({"first": [first], "second": [second]}):
        found = stages.times(call, first="the beginning", repeats=2)
    assert found == {"the beginning": 0, "first": 1000, "second": 0}
    assert first._compiled_call_impl is whole


def test_nothing_is_watched_afterwards_and_gradients_stay_the_same() -> None:
    layer, x = nn.Linear(3, 3), torch.ones(1, 3)
    layer(x).sum().backward()
    before = layer.weight.grad
    layer.weight.grad = None
    stages = Stages(CPU)
    with stages.watching({"layer": [layer]}, backward=True):
        layer(x).sum().backward()
    assert before is not None
    assert torch.equal(layer.weight.grad, before)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_a_part_that_raises_is_left() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("broken")

    broken, fine = Broken(), Slow(0.0)
    stages = Stages(CPU)

    def call() -> None:
        with pytest.raises(ValueError, match="broken"):
            broken(torch.ones(1))
        fine(torch.ones(1))

    with stages.watching({"broken": [broken], "fine": [fine]}):
        assert list(stages.times(call, first="first", repeats=1)) == ["first", "broken", "fine"]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x64_64x8_4x1_v_bz_TNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("void (anonymous namespace)::scan_forward<float>((anonymous namespace)::ScanParams)", "MVFuser and scans"),
        ("void norm_forward<float>(MvfuserNormParams)", "MVFuser and scans"),
        ("void sample<__nv_bfloat16, 4>(Params, Maps)", "deformable attention"),
        ("void cudnn::bn_fw_inf_1C11_kernel_NCHW<float>", OTHER),
        ("sm80_xmma_dgrad_implicit_gemm_indexed_bf16", "convolutions"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", "norms"),
        ("void cunn_SoftMaxForward<4, float>", "softmax"),
        ("triton_poi_fused_add_mul_0", "compiled and fused"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4>", "element by element"),
        ("something new", OTHER),
    ],
)
def test_kernels_are_counted_by_what_they_compute(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_a_trace_names_what_a_call_runs() -> None:
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    found = traced(lambda: (a @ b).softmax(-1), CPU, calls=4)
    by_name = {kernel.name: kernel for kernel in found.kernels}
    assert by_name["aten::mm"].launches == 1
    assert by_name["aten::mm"].kind == "products"
    assert by_name["aten::_softmax"].kind == "softmax"
    assert list(found.by_kind().values()) == sorted(found.by_kind().values(), reverse=True)
    assert sum(found.by_kind().values()) == pytest.approx(found.busy_ms)
    assert found.wall_ms > 0

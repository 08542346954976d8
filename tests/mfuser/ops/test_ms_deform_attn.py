from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from golden_files import noise, numbers, relative_error
from named_weights import named_tensor
from torch import Tensor
from torch.nn import functional as F

from mfuser.deformable import DeformableAttention
from mfuser.ops import BackendError, compiled, explain, ms_deform_attn

from .emulation import fenced
from .tolerances import TOL

KERNELS = ["cuda", "triton"]  # emulated and interpreted where there is no GPU
GPU = torch.cuda.is_available()
# batch, queries, heads, dim, points, maps
TINY = (2, 3, 2, 2, 2, [(3, 4), (6, 7)])
SHAPES = [
    (1, 1, 1, 1, 1, [(1, 1)]),
    (2, 5, 2, 3, 3, [(3, 4), (6, 7)]),
    (2, 9, 3, 33, 2, [(1, 9), (5, 1)]),
    (1, 21, 2, 32, 4, [(1, 1), (2, 2), (4, 4)]),  # as many queries as cells
    (1, 130, 4, 16, 4, [(4, 5), (8, 10), (16, 20)]),
]
# what the interpreter has no time for
MORE_SHAPES = [
    (1, 420, 2, 32, 4, [(4, 5), (8, 10), (16, 20)]),
    (2, 40, 1, 128, 20, [(9, 17), (2, 2)]),
    (1, 65, 2, 48, 9, [(9, 17)]),
]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend's name, while it can run; on a machine with a GPU, kernels run there."""
    name = request.param
    if name == "cuda" and not GPU:
        with compiled.use(request.getfixturevalue("emulated")):
            yield name
        return
    if reason := explain("ms_deform_attn")[name]:
        pytest.skip(f"{name}: {reason}")
    yield name


def by_backend(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("backend", names, indirect=True)


def inputs(batch, queries, heads, dim, points, maps, dtype=torch.float64, backend="reference") -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    cells = sum(h * w for h, w in maps)
    value = torch.randn(batch, cells, heads, dim, generator=generator, dtype=torch.float64)
    # well beyond the edges, too
    places = torch.rand(batch, queries, heads, len(maps), points, 2, generator=generator, dtype=torch.float64) * 2 - 0.5
    weights = torch.randn(batch, queries, heads, len(maps), points, generator=generator, dtype=torch.float64)
    # places of 16 bits would be other places
    types = (dtype, torch.promote_types(dtype, torch.float32), dtype)
    device = "cuda" if GPU and backend in KERNELS else "cpu"
    return tuple(t.to(device, d).requires_grad_() for t, d in zip((value, places, weights), types, strict=True))


def precise(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.detach().cpu().double().requires_grad_() for t in given)


def by_grid_sample(value: Tensor, maps: list[tuple[int, int]], places: Tensor, weights: Tensor) -> Tensor:
    """The same by torch's own bilinear sampling."""
    total = torch.zeros(())
    parts = value.split([h * w for h, w in maps], 1)
    for scale, ((height, width), part) in enumerate(zip(maps, parts, strict=True)):
        image = part.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (height, width))  # (B M, D, H, W)
        grid = 2 * places[:, :, :, scale].transpose(1, 2).flatten(0, 1) - 1  # (B M, Q, P, 2)
        sampled = F.grid_sample(image, grid, align_corners=False)  # (B M, D, Q, P)
        weight = weights[:, :, :, scale].transpose(1, 2).flatten(0, 1)[:, None]
        total = total + (sampled * weight).sum(-1)
    batch, heads = value.shape[0], value.shape[2]
    return total.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


def run(function, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    out = function(*arguments)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # rounded once, so that all backends get the same
    probe = probe.bfloat16().to(out)
    return [out.detach(), *torch.autograd.grad(out, arguments, probe)]


def attend(backend: str, maps: list[tuple[int, int]]):
    return lambda v, p, w: ms_deform_attn(v, maps, p, w, backend=backend)


def close(actual: list[Tensor], expected: list[Tensor], dtype: str) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        rtol, atol = TOL[dtype][min(i, 1)]
        torch.testing.assert_close(a.cpu().double(), e, rtol=rtol, atol=atol)


CASES = [(backend, shape, dtype) for backend in ("reference", "torch") for shape in SHAPES for dtype in ("float64", "float32")]
CASES += [("cuda", shape, dtype) for shape in SHAPES + MORE_SHAPES for dtype in ("float32", "bfloat16", "float16")]
CASES += [("triton", shape, "float32") for shape in SHAPES[:-1]]
CASES += [("triton", shape, dtype) for shape in SHAPES[1:2] for dtype in ("bfloat16", "float16")]


@pytest.mark.parametrize(
    ("backend", "shape", "dtype"),
    CASES,
    ids=lambda s: s if isinstance(s, str) else "x".join(map(str, s[:5])),
    indirect=["backend"],
)
def test_value_and_every_gradient_equal_grid_sampling(backend, shape, dtype):
    given = inputs(*shape, dtype=getattr(torch, dtype), backend=backend)
    maps = shape[5]
    expected = run(lambda v, p, w: by_grid_sample(v, maps, p, w), precise(given))
    close(run(attend(backend, maps), given), expected, dtype)


@by_backend("cuda")
def test_a_map_of_more_cells_than_two_bytes_count(backend):
    maps = [(256, 256)]
    value, places, weights = inputs(1, 60, 1, 4, 3, maps, dtype=torch.float32, backend=backend)
    with torch.no_grad():
        places.mul_(4096).round_().add_(0.5).div_(4096)  # fp32 finds the way between the cells exactly, and never a border
    expected = run(attend("reference", maps), precise((value, places, weights)))
    close(run(attend(backend, maps), (value, places, weights)), expected, "float32")


@by_backend(*KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_are_as_exact_as_plain_torch(backend, dtype):
    shape = SHAPES[3 if GPU or backend == "cuda" else 1]  # the interpreter has little time
    given = inputs(*shape, dtype=dtype, backend=backend)
    expected = run(attend("reference", shape[5]), precise(given))
    plain = run(attend("torch", shape[5]), tuple(t.detach().cpu().requires_grad_() for t in given))
    # Triton's interpreter cuts fp32 off where a GPU rounds to bf16
    factor = 2 if GPU or backend != "triton" or dtype != torch.bfloat16 else 4
    for a, p, e in zip(run(attend(backend, shape[5]), given), plain, expected, strict=True):
        error, allowed = (a.cpu().double() - e).abs().max(), (p.double() - e).abs().max()
        assert error <= factor * allowed + 1e-6


def test_a_backward_under_autocast_rounds_nothing():
    maps = [(3, 4), (6, 7)]
    given = inputs(1, 5, 2, 8, 2, maps, dtype=torch.float32)
    expected = run(attend("torch", maps), given)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(attend("torch", maps), given)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@by_backend(*KERNELS)
def test_the_same_bits_every_time(backend, monkeypatch):
    maps = [(4, 4), (2, 3)]
    value, places, weights = inputs(1, 40 if backend == "cuda" else 5, 2, 8, 4, maps, dtype=torch.float32, backend=backend)
    with torch.no_grad():
        places[:, ::2] = 0.4  # many points in one cell
    first = run(attend(backend, maps), (value, places, weights))
    for _ in range(3 if GPU or backend == "cuda" else 1):
        for a, b in zip(run(attend(backend, maps), (value, places, weights)), first, strict=True):
            assert torch.equal(a, b)


TUNING = [
    {"repeat": 2},
    {"cell_tile": 3, "gather_threads": 64},
    {"cell_tile": 11, "gather_channels": 8, "gather_threads": 256},
    {"cell_tile": 1, "gather_channels": 8, "gather_threads": 32},
    {"sort_threads": 32, "window": 37},
    {"sort_threads": 512},
    {"query_bits": 1, "threads": 32},
    {"processors": 7, "threads": 1024},
]


@by_backend("cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changed", TUNING, ids=str)
def test_tuning_does_not_change_the_results_of_cuda(backend, dtype, changed, monkeypatch):
    tuning = import_module("mfuser.ops.ms_deform_attn.cuda_backend")._TUNING
    for queries in (420, 133):
        maps = [(4, 5), (8, 10), (16, 20)]
        given = inputs(1, queries, 2, 32, 4, maps, dtype=dtype, backend=backend)
        expected = run(attend(backend, maps), given)
        with monkeypatch.context() as patched:
            for size, row in tuning.items():
                patched.setitem(tuning, size, row | changed)
            actual = run(attend(backend, maps), given)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@by_backend("cuda")
@pytest.mark.parametrize(("segment", "segments"), [(100, 99), (1, 7), (2000, 1)])
@pytest.mark.parametrize("window", [1, 7, 999])
def test_segments_and_windows_give_the_same_bits(backend, segment, segments, window, monkeypatch):
    module = import_module("mfuser.ops.ms_deform_attn.cuda_backend")
    maps = [(1, 1), (3, 5)]
    given = inputs(2, 150, 2, 8, 3, maps, dtype=torch.float32, backend=backend)
    expected = run(attend(backend, maps), given)
    monkeypatch.setattr(module, "_SEGMENT", segment)
    monkeypatch.setattr(module, "_SEGMENTS", segments)
    monkeypatch.setitem(module._TUNING, 4, module._TUNING[4] | {"window": window, "sort_threads": 64})
    assert all(torch.equal(a, e) for a, e in zip(run(attend(backend, maps), given), expected, strict=True))


@by_backend("cuda")
@pytest.mark.parametrize("dim", [4, 5, 32, 70])
@pytest.mark.parametrize("shape", [(1, 1), (9, 17), (3, 30)], ids=str)
def test_many_points_of_a_few_cells(backend, dim, shape):
    """Lists that many lanes share, beside empty ones."""
    value, places, weights = inputs(1, 300, 1, dim, 4, [shape], dtype=torch.float32, backend=backend)
    with torch.no_grad():
        places[:, :200] = torch.rand(200, 1, 1, 4, 2, generator=torch.Generator().manual_seed(2)) * 0.01 + 0.495
        places[:, 200:290, ..., 0] = 0.52
    expected = run(attend("reference", [shape]), precise((value, places, weights)))
    for a, e in zip(run(attend(backend, [shape]), (value, places, weights)), expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), e, rtol=1e-5, atol=1e-4)


@by_backend("cuda")
@pytest.mark.parametrize("queries", [16383, 16384])
def test_as_many_points_of_one_cell_as_a_segment_can_count(backend, queries, monkeypatch):
    module = import_module("mfuser.ops.ms_deform_attn.cuda_backend")
    monkeypatch.setattr(module, "_SEGMENT", module._MAX_SEGMENT)
    maps = [(2, 2)]
    value, places, weights = inputs(1, queries, 1, 4, 4, maps, dtype=torch.float32, backend=backend)
    with torch.no_grad():
        places.fill_(0.5)
        places[0, -1] = 0.1
    expected = run(attend("torch", maps), precise((value, places, weights)))
    for a, e in zip(run(attend(backend, maps), (value, places, weights)), expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), e, rtol=1e-4, atol=1e-2)


@by_backend("triton")
def test_tuning_does_not_change_the_results_of_triton(backend, monkeypatch):
    module = import_module("mfuser.ops.ms_deform_attn.triton_backend")
    maps = [(1, 2), (3, 4)]
    given = inputs(1, 14, 1, 4, 2, maps, dtype=torch.float32, backend=backend)
    expected = run(attend(backend, maps), given)
    for name, setting in {"_TILE": 16, "_SUMS": 8, "_BLOCK": 64}.items():
        monkeypatch.setattr(module, name, setting)
    monkeypatch.setitem(module._GATHER, 4, {"cells": 2, "entries": 2, "warps": 2})
    for a, e in zip(run(attend(backend, maps), given), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@by_backend("reference", "torch")
def test_gradients_by_finite_differences(backend):
    given = inputs(*TINY)
    assert torch.autograd.gradcheck(attend(backend, TINY[5]), given)


@by_backend("reference", "torch", *KERNELS)
def test_the_operator_is_well_formed(backend):
    dtype = torch.float32 if backend in KERNELS else torch.float64
    value, places, weights = inputs(1, 2, 1, 4, 2, [(2, 3)], dtype=dtype, backend=backend)
    arguments = (value, [2, 3], places, weights, backend)
    torch.library.opcheck(torch.ops.mfuser.ms_deform_attn.default, arguments)
    detached = (value.detach(), [2, 3], places.detach(), weights.detach(), backend)
    out = torch.ops.mfuser.ms_deform_attn(*detached)
    torch.library.opcheck(torch.ops.mfuser.ms_deform_attn_bwd.default, (torch.ones_like(out), *detached))


@by_backend("torch", *KERNELS)
@pytest.mark.parametrize("layout", ["cells first", "channels apart", "part of a larger one", "shared by the batch"])
def test_strided_inputs_give_the_same(backend, layout):
    dtype = torch.float32 if backend in KERNELS else torch.float64
    given = inputs(2, 5, 2, 4, 2, [(3, 4)], dtype=dtype, backend=backend)

    def laid_out(t: Tensor) -> Tensor:
        t = t.detach()
        if layout == "cells first":
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "channels apart":
            return t.transpose(1, -1).contiguous().transpose(1, -1)
        if layout == "shared by the batch":
            return t[:1].expand(t.shape)
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 1), float("nan"))
        wide[..., 1:] = t
        return wide[..., 1:]

    if layout == "shared by the batch":
        given = tuple(t.detach()[:1].repeat(2, *[1] * (t.dim() - 1)).requires_grad_() for t in given)
    strided = tuple(laid_out(t).requires_grad_() for t in given)
    expected = run(attend("reference", [(3, 4)]), precise(given))
    for a, e in zip(run(attend(backend, [(3, 4)]), strided), expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), e, rtol=1e-5, atol=1e-5)


@by_backend(*KERNELS)
@pytest.mark.parametrize("places", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weighting", [torch.float32, torch.float16], ids=str)
def test_types_may_differ(backend, places, weighting):
    value, where, weights = (t.detach() for t in inputs(1, 3, 2, 8, 2, [(3, 4)], dtype=torch.bfloat16, backend=backend))
    given = (value.requires_grad_(), where.to(places).requires_grad_(), weights.to(weighting).requires_grad_())
    actual = run(attend(backend, [(3, 4)]), given)
    assert [t.dtype for t in actual] == [torch.bfloat16, torch.bfloat16, places, weighting]
    close(actual, run(attend("reference", [(3, 4)]), precise(given)), "bfloat16")


@by_backend("torch", *KERNELS)
@pytest.mark.parametrize("place", [1.0, 0.0, 0.5])
def test_border_places_equal_the_reference(backend, place):
    maps = [(3, 4)]
    value, places, weights = (t.detach() for t in inputs(1, 2, 1, 2, 1, maps, dtype=torch.float32, backend=backend))
    places = torch.full_like(places, place)
    expected = ms_deform_attn(value, maps, places, weights, backend="reference")
    torch.testing.assert_close(ms_deform_attn(value, maps, places, weights, backend=backend), expected)


OFF = [-1e9, 1e9, 3e38, -3e38, float("inf"), -float("inf"), float("nan")]


NOWHERE = [(backend, place, axis) for backend in ("reference", "torch", "cuda") for place in OFF for axis in ("x", "y", "xy")]
NOWHERE += [("triton", place, "y") for place in (1e9, float("inf"), float("nan"))]


@pytest.mark.parametrize(("backend", "place", "axis"), NOWHERE, indirect=["backend"])
def test_a_point_off_the_map_or_nowhere_adds_nothing_and_has_no_gradient(backend, place, axis):
    maps = [(3, 4), (2, 2)]
    dtype = torch.float32 if backend in KERNELS else torch.float64
    value, places, weights = inputs(1, 2, 1, 2, 3, maps, dtype=dtype, backend=backend)
    with torch.no_grad():
        places[0, 0, 0, 0, 1, ["xy".index(name) for name in axis]] = place
    # the same sum without that point, by torch's own sampling
    bare = [t.detach().cpu().double().clone() for t in (value, places, weights)]
    bare[1][0, 0, 0, 0, 1], bare[2][0, 0, 0, 0, 1] = 0.5, 0.0
    expected = run(lambda v, p, w: by_grid_sample(v, maps, p, w), tuple(t.requires_grad_() for t in bare))
    expected[3][0, 0, 0, 0, 1] = 0  # it has a weight, but nothing is there
    close(run(attend(backend, maps), (value, places, weights)), expected, str(dtype).removeprefix("torch."))


@by_backend(*KERNELS)
def test_a_place_that_is_not_a_number_counts_as_far_away(backend):
    maps = [(3, 4)]
    given = inputs(1, 3, 1, 2, 2, maps, dtype=torch.float32, backend=backend)
    far = tuple(t.detach().clone() for t in given)
    far[1][:, 1, :, :, 0] = 9.0
    lost = tuple(t.clone() for t in far)
    lost[1][:, 1, :, :, 0] = float("nan")
    expected, actual = (run(attend(backend, maps), tuple(t.requires_grad_() for t in g)) for g in (far, lost))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.skipif(GPU, reason="the emulation watches the borders of memory")
@by_backend("cuda")
@pytest.mark.parametrize("dim", [32, 33])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("place", [-0.01, 1.01, float("nan"), 1e30])
def test_nothing_outside_the_tensors_is_touched(backend, dim, before, place):
    module = import_module("mfuser.ops.ms_deform_attn.cuda_backend")
    maps = [(3, 4), (1, 1)]
    given = tuple(t.detach() for t in inputs(1, 13, 1, dim, 3, maps, dtype=torch.float32))
    given[1][:, ::2] = place
    value, places, weights = (fenced(t, before=before) for t in given)
    out = module.forward(value, [3, 4, 1, 1], places, weights)
    module.backward(fenced(torch.ones_like(out), before=before), value, [3, 4, 1, 1], places, weights)


@by_backend(*KERNELS)
def test_kernels_refuse_double_precision(backend):
    value, places, weights = inputs(*TINY, backend=backend)
    with pytest.raises(BackendError, match=f"{backend}: takes fp32, bf16 and fp16, not torch.float64"):
        ms_deform_attn(value, TINY[5], places, weights, backend=backend)


@by_backend(*KERNELS)
def test_no_points_give_zeros(backend):
    value, places, weights = inputs(1, 3, 2, 4, 0, [(3, 4)], dtype=torch.float32, backend=backend)
    out, dvalue, *_ = run(attend(backend, [(3, 4)]), (value, places, weights))
    assert out.shape == (1, 3, 8)
    assert not out.any()
    assert not dvalue.any()


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_triton_compiles_for_a_gpu(dtype, tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_compile.py")
    done = subprocess.run(
        [sys.executable, str(script), "ms_deform_attn", dtype],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {line.partition(":")[0] for line in done.stdout.splitlines()} == {"_sample", "_bins", "_collect", "_gather", "_add"}


def check_golden(backend: str) -> None:
    """The deformable attention of tests/goldens, as in tests/mfuser/test_decoder.py."""
    goldens = numbers("units")
    device = "cuda" if GPU else "cpu"
    attention = DeformableAttention(256, 8, 3, 4, backend=backend)
    for name, parameter in attention.named_parameters():
        parameter.data = torch.from_numpy(named_tensor(f"unit_msda.{name}", tuple(parameter.shape)))
    attention.to(device)
    shapes = [(4, 5), (8, 10), (16, 20)]
    query, position = (noise(f"unit_msda/{n}", 420, 2, 256).to(device).requires_grad_() for n in ("query", "query_pos"))
    centres = [
        torch.stack(torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy"), -1)
        for h, w in shapes
    ]
    reference = torch.cat([c.flatten(0, 1) for c in centres]).to(device)
    tokens, places = query.transpose(0, 1), position.transpose(0, 1)
    y = attention(tokens + places, tokens, reference, shapes).transpose(0, 1) + query
    assert relative_error(goldens, "unit_msda/y", y) < 1e-5
    (y * noise("unit_msda/probe", 420, 2, 256).to(device)).sum().backward()
    for name, parameter in attention.named_parameters():
        assert relative_error(goldens, f"unit_msda/grad/{name}", parameter.grad) < 1e-4, name
    assert relative_error(goldens, "unit_msda/grad/query", query.grad) < 1e-5
    assert relative_error(goldens, "unit_msda/grad/query_pos", position.grad) < 1e-5


@by_backend("cuda")
def test_the_authors_numbers_by_cuda(backend):
    check_golden(backend)


@pytest.mark.full  # minutes of interpretation
@by_backend("triton")
def test_the_authors_numbers_by_triton(backend):
    check_golden(backend)


def test_wrong_shapes_are_named():
    value, places, weights = inputs(1, 2, 1, 2, 1, [(3, 4)])
    with pytest.raises(ValueError, match=r"expected \(B, 6, M, D\)"):
        ms_deform_attn(value, [(2, 3)], places, weights)
    with pytest.raises(ValueError, match="weights are"):
        ms_deform_attn(value, [(3, 4)], places, weights[:, :1])
    with pytest.raises(ValueError, match=r"locations are \(1, 2, 1, 1, 1\), expected \(1, 'Q', 1, 1, 'P', 2\)"):
        ms_deform_attn(value, [(3, 4)], places[..., 0], weights)
    with pytest.raises(TypeError, match="float"):
        ms_deform_attn(value, [(3.5, 4)], places, weights)
    with pytest.raises(ValueError, match="none of them empty"):
        ms_deform_attn(value, [(3, 4), (0, 5)], places, weights)

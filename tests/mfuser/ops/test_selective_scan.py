from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mfuser.ops import BackendError, compiled, explain, selective_scan

from .tolerances import TOL

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
OPTIONAL = NAMES[5:]
KERNELS = ["cuda", "triton"]  # emulated and interpreted where there is no GPU
EXACT = ["reference", "torch"]  # compute in fp64, too
BACKENDS = [*KERNELS, "torch"]
GPU = torch.cuda.is_available()
# batch, length, dim, state
SHAPES = [(2, 1, 3, 4), (1, 2, 5, 1), (1, 63, 4, 5), (1, 64, 7, 16), (1, 65, 3, 8), (1, 5, 70, 8), (1, 6, 11, 64)]
# what the interpreter has no time for
LONG_SHAPES = [(2, 577, 3, 5), (1, 1000, 33, 4), (1, 2049, 2, 3), (1, 2594, 2, 16)]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend's name, while it can run; on a machine with a GPU, kernels run there."""
    name = request.param
    if name == "cuda" and not GPU:
        with compiled.use(request.getfixturevalue("emulated")):
            yield name
        return
    if reason := explain("selective_scan")[name]:
        pytest.skip(f"{name}: {reason}")
    yield name


def by_backend(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("backend", names, indirect=True)


def finest(backend: str) -> str:
    """The most precise type that a backend takes."""
    return "float64" if backend in EXACT else "float32"


def id_of(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def inputs(batch, length, dim, state, dtype="float64", *, on="reference") -> dict[str, Tensor]:
    """Every input of the op, where the backend `on` runs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = {
        "u": draw(batch, length, dim),
        "delta": draw(batch, length, dim) - 2,
        "A": -draw(dim, state).exp(),
        "B": draw(batch, length, state),
        "C": draw(batch, length, state),
        "D": draw(dim),
        "z": draw(batch, length, dim),
        "delta_bias": draw(dim) - 1,
        "initial_state": draw(batch, dim, state),
    }
    device = "cuda" if GPU and on in KERNELS else "cpu"
    return {name: tensor.to(device, getattr(torch, dtype)).requires_grad_() for name, tensor in made.items()}


def precise(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in given.items()}


def scan(given: Mapping[str, Tensor], backend: str, *, softplus: bool = True) -> tuple[Tensor, Tensor]:
    return selective_scan(**given, delta_softplus=softplus, return_final_state=True, backend=backend)


def run(given: Mapping[str, Tensor], backend: str, *, softplus: bool = True) -> dict[str, Tensor]:
    """Both results and every gradient."""
    y, state = scan(given, backend, softplus=softplus)
    probes = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for t in (y, state)]
    # rounded once, so that all backends get the same
    probes = [probe.bfloat16().to(t) for probe, t in zip(probes, (y, state), strict=True)]
    grads = torch.autograd.grad((y, state), list(given.values()), probes)
    return {"y": y.detach(), "state": state.detach()} | dict(zip(given, grads, strict=True))


def close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: str) -> None:
    for name, value in actual.items():
        kind = 0 if name in ("y", "state") else 2 if name in ("A", "D", "delta_bias") else 1
        rtol, atol = TOL[dtype][kind]
        # sums over B and L: the tolerance is of their size, not of their cancelled rest
        scale = max(1.0, float(expected[name].abs().max())) if kind else 1.0
        torch.testing.assert_close(
            value.cpu().double(),
            expected[name].cpu().double(),
            rtol=rtol,
            atol=atol * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to that of what is expected."""
    return float((actual.cpu().double() - expected).norm() / expected.norm())


def usual_error(actual: Tensor, expected: Tensor) -> float:
    """What nine elements in ten are within, relative to each: small ones count as much as large ones."""
    return float(((actual.cpu().double() - expected) / expected).detach().abs().flatten().quantile(0.9))


def test_the_reference_is_the_recurrence_written_out():
    # one channel, one state, constant inputs: h[t] = a h[t-1] + d b u, a geometric series
    length, d, a, b, c, skip, u = 6, 0.5, -0.7, 1.3, 0.9, 2.0, 0.4
    full = torch.full((1, length, 1), u, dtype=torch.float64)
    y = selective_scan(
        full,
        torch.full_like(full, d),
        torch.tensor([[a]]).double(),
        torch.full_like(full, b),
        torch.full_like(full, c),
        torch.tensor([skip]).double(),
        backend="reference",
    )
    decay = torch.exp(torch.tensor(d * a, dtype=torch.float64))
    t = torch.arange(1, length + 1)
    torch.testing.assert_close(y[0, :, 0], c * d * b * u * (1 - decay**t) / (1 - decay) + skip * u)


@by_backend(*EXACT)
def test_gradients_by_finite_differences(backend):
    given = inputs(2, 5, 3, 2)
    assert torch.autograd.gradcheck(lambda *a: scan(dict(zip(NAMES, a, strict=True)), backend), tuple(given.values()))


@by_backend(*KERNELS)
def test_gradients_along_a_direction_by_a_finite_difference(backend):
    given = inputs(1, 6, 3, 2, "float32", on=backend)
    generator = torch.Generator().manual_seed(2)
    along = {n: torch.randn(t.shape, generator=generator).to(t) for n, t in given.items()}

    def loss(step: float) -> Tensor:
        moved = {n: t.detach() + step * along[n] for n, t in given.items()}
        return sum(part.double().sum() for part in scan(moved, backend))

    grads = torch.autograd.grad([part.sum() for part in scan(given, backend)], list(given.values()))
    slope = sum((g.double() * along[n]).sum() for n, g in zip(given, grads, strict=True))
    torch.testing.assert_close((loss(0.01) - loss(-0.01)) / 0.02, slope, rtol=2e-3, atol=0)


@by_backend(*BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=id_of)
def test_value_and_every_gradient_equal_the_reference(backend, shape):
    given = inputs(*shape, finest(backend), on=backend)
    close(run(given, backend), run(precise(given), "reference"), finest(backend))


@pytest.mark.parametrize(
    "backend", [pytest.param(n, marks=() if GPU or n != "triton" else pytest.mark.full) for n in BACKENDS], indirect=True
)
@pytest.mark.parametrize("shape", LONG_SHAPES, ids=id_of)
def test_long_sequences_equal_the_reference(backend, shape):
    given = inputs(*shape, "float32", on=backend)
    close(run(given, backend), run(precise(given), "reference"), "float32")


@by_backend(*BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_no_result_is_off_by_more_than_rounding(backend, dtype):
    given = inputs(1, 21, 5, 16, dtype, on=backend)
    expected, actual = run(precise(given), "reference"), run(given, backend)
    close(actual, expected, dtype)
    assert {t.dtype for n, t in actual.items() if n != "state"} == {getattr(torch, dtype)}
    plain = run({n: t.detach().cpu().requires_grad_() for n, t in given.items()}, "torch")
    # Triton's interpreter cuts bf16 off where a GPU rounds, which doubles the error
    cut = 2 if backend == "triton" and dtype == "bfloat16" and not GPU else 1
    for name in actual:
        # by element, short inputs may hide an exponential that is good to 2^-18 (docs/kernels.md)
        eps = torch.finfo(torch.float32).eps
        for measure, slack in ((error, 4 * eps), (usual_error, 4 * eps if dtype == "float32" else 1e-5)):
            allowed = 2 * cut * measure(plain[name], expected[name]) + slack
            assert measure(actual[name], expected[name]) < allowed, (name, measure)


@by_backend(*BACKENDS)
def test_inputs_of_several_types(backend):
    given = inputs(1, 9, 5, 4, "bfloat16", on=backend)
    mixed = {n: (t.detach().float() if n in ("A", "D", "delta_bias", "initial_state") else t.detach()) for n, t in given.items()}
    mixed = {n: t.requires_grad_() for n, t in mixed.items()}
    actual = run(mixed, backend)
    close(actual, run(precise(mixed), "reference"), "bfloat16")
    assert {n: t.dtype for n, t in actual.items() if n in mixed} == {n: t.dtype for n, t in mixed.items()}


@by_backend("cuda", "torch")
def test_a_backward_under_autocast_rounds_nothing(backend):
    given = inputs(1, 9, 5, 4, "float32", on=backend)
    expected = run(given, backend)
    with torch.autocast(given["u"].device.type, torch.bfloat16):
        actual = run(given, backend)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@by_backend(*BACKENDS)
def test_the_same_inputs_give_the_same_bits(backend):
    given = inputs(2, 10, 5, 16, "float32", on=backend)
    first, second = run(given, backend), run(given, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_blocks_and_segments_of_the_torch_backend_do_not_show(monkeypatch):
    module = import_module("mfuser.ops.selective_scan.torch_backend")
    given = inputs(2, 131, 3, 4)
    expected = run(given, "reference")
    monkeypatch.setattr(module, "_CPU_BLOCK", 2 * 3 * 4 * 20)
    close(run(given, "torch"), expected, "float64")
    # what other devices than a CPU run
    a, s = (torch.rand(131, 2, 4, 3, dtype=torch.float64) for _ in range(2))
    h = torch.rand(2, 4, 3, dtype=torch.float64)
    segments, one = module._scan_segments(a, s, h), []
    for t in range(131):
        h = a[t] * h + s[t]
        one.append(h)
    torch.testing.assert_close(segments, torch.stack(one))


@by_backend("triton")
@pytest.mark.parametrize(("chunk", "piece"), [(16, 16), (24, 8), (32, 4), (1000, 20)])
def test_chunks_and_pieces_of_the_triton_backend_do_not_show(backend, chunk, piece, monkeypatch):
    module = import_module("mfuser.ops.selective_scan.triton_backend")
    monkeypatch.setattr(module, "_chunk", lambda *_: chunk)
    monkeypatch.setattr(module, "_PIECE", piece)
    given = inputs(1, 37, 3, 4, "float32", on=backend)
    close(run(given, backend), run(precise(given), "reference"), "float32")


@pytest.mark.parametrize(
    ("programs", "length", "most"),
    [(1, 1, 1), (1, 15, 1), (32, 2594, 64), (288, 2594, 64), (10_000, 2594, 1), (1, 10**6, 1000)],
)
def test_a_gpu_is_filled_by_chunks_of_the_triton_backend(programs, length, most):
    triton_backend = pytest.importorskip("mfuser.ops.selective_scan.triton_backend")
    chunk = triton_backend._chunk(programs, length, 132)
    chunks = -(-length // chunk)
    assert chunk % triton_backend._PIECE == 0
    assert 1 <= chunks <= most
    # no more, if the batch alone fills it; else enough for a warp on every scheduler
    assert chunks == 1 or programs * chunks >= min(4 * 132, 300 * programs)


@by_backend(*BACKENDS)
def test_strided_inputs_give_the_same(backend):
    given = inputs(2, 10, 6, 3, finest(backend), on=backend)
    strided = {n: t.detach() for n, t in given.items()}
    for name in ("u", "B", "C"):
        # as modules hand them over: a slice of something wider
        wide = torch.full((2, 10, 2 * strided[name].shape[2]), float("nan")).to(strided[name])
        part = wide[:, :, : strided[name].shape[2]]
        strided[name] = part.copy_(strided[name])
    for name in ("delta", "z", "A", "initial_state"):
        strided[name] = strided[name].mT.contiguous().mT  # as Mamba has them: (B, D, L) in memory
    for name in ("D", "delta_bias"):
        strided[name] = strided[name].repeat_interleave(2)[::2]
    strided = {n: t.requires_grad_() for n, t in strided.items()}
    close(run(strided, backend), run(precise(given), "reference"), finest(backend))


@by_backend(*BACKENDS)
@pytest.mark.parametrize("shift", [-40.0, 30.0], ids=["tiny steps", "huge steps"])
def test_extreme_steps_stay_finite(backend, shift):
    given = inputs(1, 21, 3, 4, "float32", on=backend)
    with torch.no_grad():
        given["delta"] += shift
    actual = run(given, backend)
    assert all(torch.isfinite(v).all() for v in actual.values())
    close(actual, run(precise(given), "reference"), "float32")


@by_backend("reference", *BACKENDS)
@pytest.mark.parametrize("missing", OPTIONAL)
def test_an_absent_input_is_one_that_does_nothing(backend, missing):
    given = inputs(1, 5, 3, 2, finest(backend), on=backend)
    # silu(z) = 1 at this z
    neutral = torch.full_like(given["z"], 1.2784645427610738) if missing == "z" else torch.zeros_like(given[missing])
    full = run({**given, missing: neutral.requires_grad_()}, backend)
    bare = run({name: tensor for name, tensor in given.items() if name != missing}, backend)
    close(bare, {name: full[name] for name in bare}, finest(backend))


@by_backend("reference", *BACKENDS)
def test_steps_without_softplus(backend):
    given = inputs(2, 5, 3, 2, finest(backend), on=backend)
    positive = {
        **given,
        "delta": given["delta"].detach().exp().requires_grad_(),
        "delta_bias": torch.zeros_like(given["delta_bias"]).requires_grad_(),
    }
    close(run(positive, backend, softplus=False), run(precise(positive), "reference", softplus=False), finest(backend))


@by_backend("reference", *BACKENDS)
def test_a_sequence_in_two_pieces_is_the_sequence(backend):
    given = {name: tensor.detach() for name, tensor in inputs(2, 21, 3, 2, finest(backend), on=backend).items()}
    whole, end = scan(given, backend)
    state, parts = given["initial_state"], []
    for piece in (slice(0, 8), slice(8, 21)):
        here = {n: t[:, piece] if n in ("u", "delta", "B", "C", "z") else t for n, t in given.items()}
        y, state = scan({**here, "initial_state": state}, backend)
        parts.append(y)
    close({"y": torch.cat(parts, 1), "state": state}, {"y": whole, "state": end}, finest(backend))


@by_backend(*BACKENDS)
@pytest.mark.parametrize("used", ["y", "state"])
def test_either_result_alone_has_gradients(backend, used):
    given = inputs(1, 5, 3, 2, finest(backend), on=backend)

    def grads(given: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        result = scan(given, name)[used == "state"].sum()
        found = torch.autograd.grad(result, list(given.values()), allow_unused=True)
        return {n: g for n, g in zip(given, found, strict=True) if g is not None}

    actual, expected = grads(given, backend), grads(precise(given), "reference")
    assert actual.keys() == expected.keys()
    close(actual, expected, finest(backend))


@by_backend("reference", *BACKENDS)
@pytest.mark.parametrize("optional", [True, False])
def test_the_operator_is_well_formed(backend, optional):
    given = inputs(1, 2, 3, 2, finest(backend), on=backend)
    arguments = (*(given[n] if optional or n not in OPTIONAL else None for n in NAMES), optional, True, backend)
    torch.library.opcheck(torch.ops.mfuser.selective_scan.default, arguments)
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    y, state, saved = torch.ops.mfuser.selective_scan(*detached)
    torch.library.opcheck(
        torch.ops.mfuser.selective_scan_bwd.default,
        (torch.ones_like(y), torch.ones_like(state), *detached[:-2], saved, backend),
    )


@by_backend(*BACKENDS)
def test_only_a_few_states_are_kept_for_the_backward(backend):
    given = inputs(1, 48, 8, 4, "float32", on=backend)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        scan(given, backend)
    # every (B, L, D, N) intermediate is four times u
    assert sum(kept) - sum(t.numel() for t in given.values()) < given["u"].numel() / 2


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_triton_compiles_for_a_gpu(dtype, tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_compile.py")
    done = subprocess.run(
        [sys.executable, str(script), "selective_scan", dtype],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kernels = {line.partition(":")[0] for line in done.stdout.splitlines()}
    assert kernels == {"_forward_ends", "_forward", "_backward_ends", "_backward", "_add"}


@by_backend("triton")
def test_what_the_triton_backend_refuses(backend):
    with pytest.raises(BackendError, match="triton: takes fp32, bf16 and fp16, not torch.float64"):
        scan(inputs(1, 2, 3, 2, on=backend), backend)
    with pytest.raises(BackendError, match="triton: takes at most 64 states, not 65"):
        scan(inputs(1, 2, 3, 65, "float32", on=backend), backend)
    with pytest.raises(BackendError, match=f"triton: takes cuda{'' if GPU else ' and cpu'} tensors, not meta"):
        scan({n: t.to("meta") for n, t in inputs(1, 2, 3, 2, "float32").items()}, backend)


def test_wrong_shapes_are_named():
    given = inputs(2, 9, 3, 2)
    with pytest.raises(ValueError, match=r"B is \(2, 8, 2\), expected \(2, 9, 2\)"):
        selective_scan(given["u"], given["delta"], given["A"], given["B"][:, :8], given["C"])
    with pytest.raises(ValueError, match="initial_state is"):
        selective_scan(*(given[n] for n in NAMES[:5]), initial_state=given["initial_state"].mT)
    with pytest.raises(ValueError, match=r"A \(D, N\) with a state at least, got \(2, 9, 3\) and \(3, 0\)"):
        selective_scan(given["u"], given["delta"], given["A"][:, :0], given["B"][..., :0], given["C"][..., :0])
    with pytest.raises(TypeError, match="A must be real"):
        selective_scan(given["u"], given["delta"], given["A"].to(torch.complex64), given["B"], given["C"])

"""Test kernels on a GPU and in the emulation that needs none: what they compute, and which mistakes end with a message."""

from __future__ import annotations

import ctypes
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from mfuser.ops import compiled

from .emulation import HEADERS, ROOT, compile_on_cpu, fenced

CASES = re.search(r"enum Case \{(.*?)\};", (HEADERS / "semantics.cu").read_text(), re.DOTALL)[1]
CASES = [name for name in re.sub(r"kUndefined,|= kUndefined|[\s]", "", CASES).split(",") if name]


class Probe(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("row_stride", ctypes.c_longlong),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("is_bf16", ctypes.c_int),
    )


class Semantics(ctypes.Structure):
    _fields_ = (
        ("input", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("count", ctypes.c_int),
        ("which", ctypes.c_int),
    )


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def probes_path(request, tmp_path_factory):
    """The test kernels, compiled by g++ or by nvcc: what holds for the emulation holds for a GPU."""
    folder = tmp_path_factory.mktemp("probes")
    kernels = [HEADERS / "probe.cu", HEADERS / "semantics.cu"]
    if request.param == "cpu":
        return compile_on_cpu(kernels, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MFUSER_KERNELS", str(folder))
        return compiled.build(sources=gather(folder / "sources", ROOT / "cuda" / "device.cuh", *kernels))


@pytest.fixture
def probes(probes_path):
    with compiled.use(probes_path) as library:
        yield library


def gather(folder: Path, *sources: Path) -> Path:
    folder.mkdir(parents=True)
    for path in sources:
        shutil.copy(path, folder)
    return folder


def run_case(library, name, values, out):
    values = values.to(library.device)
    params = Semantics(values.data_ptr(), out.data_ptr(), values.numel(), CASES.index(name))
    library.run("mfuser_semantics", params, like=values)


def probe(library, x, scale=0.5):
    out = x.new_full((x.shape[0],), float("nan"))
    params = Probe(x.data_ptr(), out.data_ptr(), x.stride(0), *x.shape, scale, x.dtype == torch.bfloat16)
    library.run("mfuser_probe", params, like=x)
    return out


@pytest.mark.parametrize("columns", [1, 31, 128, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_agrees_with_torch(probes, dtype, columns):
    x = torch.randn(5, columns + 3).to(dtype).to(probes.device)[:, 1:-2]
    torch.testing.assert_close(probe(probes, x), (0.5 * x.float().square().sum(1)).to(dtype))


def test_shuffles_move_values_as_cuda_says(probes):
    values = torch.arange(64.0) + 1
    out = torch.full((12, 64), float("nan"), device=probes.device)
    run_case(probes, "kShuffles", values, out)

    def moved(source, width=32):
        # `source` of a lane within its segment; out of the segment, a lane keeps its own value
        lanes = range(64)
        first = [lane - lane % width for lane in lanes]
        wanted = [source(lane % width) for lane in lanes]
        inside = [0 <= s < width for s in wanted]
        return [1.0 + (f + s if ok else lane) for f, s, ok, lane in zip(first, wanted, inside, lanes, strict=True)]

    expected = [
        moved(lambda lane: lane ^ 5),
        moved(lambda lane: lane ^ 3, 8),
        moved(lambda lane: lane - 3),
        moved(lambda lane: lane - 3, 8),
        moved(lambda lane: lane + 3),
        moved(lambda lane: lane + 3, 8),
        moved(lambda lane: 7),
        moved(lambda lane: (lane + 1) % 32),
        moved(lambda lane: (lane + 1) % 16, 16),
        moved(lambda lane: lane ^ 3 if lane < 16 else lane ^ 4),
        moved(lambda lane: lane ^ 1),
        moved(lambda lane: lane ^ 1),
    ]
    assert out.tolist() == expected


@pytest.mark.parametrize("threads", [64, 50])
def test_votes_count_the_lanes_that_are_there(probes, threads):
    values = torch.randn(threads)
    values[32:] = 1.0
    out = torch.full((6, threads), -1, dtype=torch.int32, device=probes.device)
    run_case(probes, "kVotes", values, out)
    expected = torch.zeros(6, threads, dtype=torch.int64)
    for t in range(threads):
        warp = range(t // 32 * 32, min(t // 32 * 32 + 32, threads))
        ballot = sum(1 << (i % 32) for i in warp if values[i] > 0)
        total = sum(i % 32 for i in warp if i % 32 != 3)
        same = sum(1 << (i % 32) for i in warp if i % 7 == t % 7)
        expected[:, t] = torch.tensor([ballot, 1, t >= 32, ballot & 0xAAAAAAAA if t % 2 else 0, same, total])
        if t % 32 == 3:
            expected[5, t] = 0xFFFFFFFF
    assert (out.cpu().long() & 0xFFFFFFFF).equal(expected)


def test_rounding_to_bf16_and_fp16_is_that_of_torch(probes):
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    ties = (torch.randint(0, 2**16, (20_000,)) << 16 | 0x8000).to(torch.int32)  # halfway between two bf16
    halves = torch.randn(20_000).half()
    between = (halves.float() + torch.nextafter(halves, halves * 2).float()) / 2  # and between two fp16
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, 65519.9, 65520.0, 6e-8, 3e-8, 3.4e38, 1e-45])
    values = torch.cat([bits.view(torch.float32), ties.view(torch.float32), between, special])
    out = torch.full((2, len(values)), 7.0, device=probes.device)
    run_case(probes, "kRounding", values, out)
    expected = torch.stack([values.bfloat16().float(), values.half().float()])
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert out.cpu().signbit()[~expected.isnan()].equal(expected.signbit()[~expected.isnan()])


def test_every_thread_of_a_grid_knows_its_place(probes):
    out = torch.full((12, 24), -1, dtype=torch.int32, device=probes.device)
    run_case(probes, "kIndices", torch.zeros(1), out)
    assert out.cpu().equal((torch.arange(12)[:, None] * 1000 + torch.arange(24).flip(0)).int())


def test_the_last_block_sees_what_all_wrote(probes):
    out = torch.zeros(3, dtype=torch.int32, device=probes.device)
    run_case(probes, "kLastBlock", torch.arange(1000.0), out)
    assert out.tolist() == [32, 499_500, 499_500]


def test_more_than_48_kb_of_shared_memory_is_asked_for(probes):
    values = torch.randn(20_000)
    out = torch.full_like(values, torch.nan, device=probes.device)
    run_case(probes, "kLargeShared", values, out)
    assert out.cpu().equal(values.flip(0))


@pytest.mark.parametrize(
    ("case", "text"),
    [("kTooManyThreads", "invalid"), ("kTooMuchShared", "invalid argument"), ("kNoBlocks", "invalid")],
)
def test_a_failed_launch_raises_with_cudas_text(probes, case, text):
    out = torch.zeros(1, device=probes.device)
    with pytest.raises(RuntimeError, match=f"mfuser_semantics: CUDA error [0-9]+: {text}"):
        run_case(probes, case, torch.zeros(1), out)
    run_case(probes, "kIndices", torch.zeros(1), torch.zeros(12, 24, device=probes.device))


def test_a_library_that_does_not_fit_the_python_side_is_refused(probes):
    like = torch.zeros(1, device=probes.device)

    class Short(ctypes.Structure):
        _fields_ = (("x", ctypes.c_void_p),)

    fresh = compiled.Library(probes.path)
    with pytest.raises(RuntimeError, match=f"Short has 8 bytes in Python and {ctypes.sizeof(Probe)} in"):
        fresh.run("mfuser_probe", Short(), like=like)
    with pytest.raises(RuntimeError, match="has no mfuser_nothing"):
        fresh.run("mfuser_nothing", Short(), like=like)
    with pytest.raises(RuntimeError, match=f"takes {probes.device} tensors, got one on meta"):
        fresh.run("mfuser_probe", Probe(), like=like.to("meta"))


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return compile_on_cpu([HEADERS / "semantics.cu"], tmp_path_factory.mktemp("semantics"))


def mistake(path: Path, name: str) -> subprocess.CompletedProcess:
    """Run a case in a process of its own, with plain ctypes: it may not survive."""
    code = textwrap.dedent(f"""
        import ctypes
        values, out = (ctypes.c_float * 64)(), (ctypes.c_float * 256)()
        class Params(ctypes.Structure):
            _fields_ = (("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("n", ctypes.c_int), ("w", ctypes.c_int))
        params = Params(ctypes.addressof(values), ctypes.addressof(out), 64, {CASES.index(name)})
        ctypes.CDLL({str(path)!r}).mfuser_semantics(ctypes.byref(params), None)
    """)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("kSomeSkipBarrier", r"thread \(\d+, 0, 0\): divergent barrier: waits in __syncthreads .*has returned"),
        ("kSomeReturn", r"divergent barrier: .*while thread \(3, 0, 0\) has returned"),
        ("kTwoBarriers", r"divergent barrier: .*semantics.cu:\d+\), while another thread waits at .*semantics.cu:\d+"),
        ("kBehindShared", r"mistake, block \(0, 0, 0\): wrote behind its 256 bytes of dynamic shared memory"),
        ("kBeforeShared", r"wrote before its 256 bytes of dynamic shared memory"),
        ("kMaskWithoutCaller", r"calls a warp primitive whose mask leaves it out \(.*semantics.cu"),
        ("kTwoPrimitives", r"(a shuffle|__any_sync) .*another lane of its warp is in (a shuffle|__any_sync)"),
        ("kLaneAtBarrier", r"__syncwarp .*waits for lanes 0x00000020 of its warp, which have gone elsewhere"),
        ("kMisaligned", r"misaligned address .* 'struct float4', which requires 16 byte alignment"),
    ],
    ids=lambda value: value if value.startswith("k") else "",
)
def test_what_a_gpu_leaves_undefined_ends_the_process_with_a_message(on_cpu, case, text):
    done = mistake(on_cpu, case)
    assert done.returncode in (-signal.SIGABRT, 1)
    assert re.search(text, done.stderr), done.stderr


def permissions(address: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if begin <= address < end:
            return line.split()[1]
    return "none"


@pytest.mark.parametrize("before", [False, True])
def test_beyond_a_fenced_tensor_nothing_can_be_touched(before):
    tensor = fenced(torch.arange(15.0).view(3, 5), before=before)
    assert tensor.equal(torch.arange(15.0).view(3, 5))
    first, last = tensor.data_ptr(), tensor.data_ptr() + 59
    assert [permissions(address)[:2] for address in (first, last)] == ["rw", "rw"]
    assert permissions(first - 1 if before else last + 1)[:3] == "---"


def test_shared_memory_starts_as_nan(on_cpu):
    out = torch.zeros(3, 32)
    with compiled.use(on_cpu) as library:
        run_case(library, "kStaleShared", torch.zeros(1), torch.zeros(96))
        run_case(library, "kStaleShared", torch.zeros(1), out)
    assert out[:, 0].equal(torch.ones(3))
    assert out[:, 1:].isnan().all()


@pytest.mark.parametrize("case", ["kMissingBarrier", "kMissingWarpBarrier"])
def test_a_missing_barrier_shows_up(on_cpu, case):
    values, out = torch.randn(64), torch.zeros(64)
    with compiled.use(on_cpu) as library:
        run_case(library, case, values, out)
    assert out.isnan().any()
    assert not out.isnan().all()


def test_the_plain_context_switch_gives_the_same(tmp_path):
    path = compile_on_cpu([HEADERS / "semantics.cu"], tmp_path, "-DMFUSER_CPU_UCONTEXT")
    out = torch.full((12, 24), -1, dtype=torch.int32)
    with compiled.use(path) as library:
        run_case(library, "kIndices", torch.zeros(1), out)
    assert out.equal((torch.arange(12)[:, None] * 1000 + torch.arange(24).flip(0)).int())

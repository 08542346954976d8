"""The kernels' library: compiling, finding and calling it; and the emulation that runs kernels without a GPU."""

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

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
GENERATIONS = ["sm_80", "sm_90", "sm_100"]

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


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MFUSER_KERNELS", str(tmp_path / "kernels"))


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


def probe_sources(tmp_path: Path) -> Path:
    return gather(tmp_path / "sources", ROOT / "cuda" / "device.cuh", HEADERS / "probe.cu")


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


@pytest.mark.full
@needs_nvcc
def test_all_kernels_compile_for_three_generations(tmp_path):
    lines = []
    sources = gather(tmp_path / "sources", *(ROOT / "cuda").iterdir(), HEADERS / "probe.cu")
    path = compiled.build(GENERATIONS, sources=sources, on_line=lines.append)
    assert path.name.startswith("sm_80+sm_90+sm_100-cuda")
    assert [path] == list(path.parent.iterdir())
    launchers = re.findall(r"MFUSER_EXPORT\((\w+),", "".join(file.read_text() for file in sources.glob("*.cu")))
    library = ctypes.CDLL(str(path))
    assert [hasattr(library, name) for name in launchers] == [True] * len(launchers)
    assert compiled.Library(path).device == "cuda"
    assert "compiled probe.cu" in lines

    lines.clear()
    assert compiled.build(reversed(GENERATIONS), sources=sources, on_line=lines.append) == path
    assert not lines


@needs_nvcc
def test_a_failed_build_shows_the_command_and_the_compilers_lines(tmp_path):
    sources = probe_sources(tmp_path)
    (sources / "wrong.cu").write_text('#include "device.cuh"\nint f() { return nonsense; }\n')
    with pytest.raises(compiled.BuildError, match=r'nvcc .*wrong\.cu(.|\n)*identifier "nonsense" is undefined'):
        compiled.build(["sm_90"], sources=sources)
    assert not [path for path in (tmp_path / "kernels").rglob("*") if path.is_file()]
    with pytest.raises(compiled.BuildError, match=r"nvcc .*sm_10(.|\n)*nsupported gpu architecture"):
        compiled.build(["sm_10"], sources=sources)


@needs_nvcc
def test_processes_that_build_at_once_leave_one_whole_library(tmp_path):
    sources = probe_sources(tmp_path)
    command = (
        "import sys, pathlib; from mfuser.ops import compiled as c; print(c.build(['sm_90'], sources=pathlib.Path(sys.argv[1])))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", command, str(sources)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    (path,) = map(Path, printed)
    assert [path] == list(path.parent.iterdir())
    assert compiled.Library(path).device == "cuda"


def test_a_build_needs_sources_a_compiler_and_an_architecture(tmp_path, monkeypatch):
    with pytest.raises(compiled.BuildError, match="there are no kernel sources in"):
        compiled.build(sources=tmp_path)
    (tmp_path / "empty.cu").touch()
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(compiled.BuildError, match="nvcc is missing: install the CUDA toolkit, or set CUDA_HOME"):
        compiled.build(["sm_90"], sources=tmp_path)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: "nvcc")
    with pytest.raises(ValueError, match="`hopper` is no architecture: write sm_80"):
        compiled.build(["hopper"], sources=tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(compiled.BuildError, match="name the architectures to build for, such as sm_90"):
        compiled.build(sources=tmp_path)


def reason() -> str:
    compiled.forget()
    with pytest.raises(ImportError) as raised:
        compiled.library()
    assert compiled.status().reason == str(raised.value)
    return str(raised.value)


def test_without_sources_or_a_gpu_there_is_no_library(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "sources_dir", lambda: tmp_path)
    assert reason() == f"there are no kernel sources in {tmp_path}"
    (tmp_path / "a.cu").touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert reason() == "this torch build has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason() == "torch finds no usable CUDA GPU"
    assert compiled.status().architecture is None


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A machine whose GPU is an H100 and that has nvcc, as far as anyone can tell; gives its folder of sources."""
    sources = probe_sources(tmp_path)
    monkeypatch.setattr(compiled, "sources_dir", lambda: sources)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(compiled, "_nvcc", lambda: "nvcc")
    monkeypatch.setattr(compiled, "_version", lambda _: "13.0.88")
    yield sources
    compiled.forget()


def test_a_library_that_is_missing_or_for_another_gpu_is_not_loaded(hopper, on_cpu, monkeypatch):
    assert reason() == "not built for sm_90: run `dgbench kernels build`"
    folder = compiled.status().folder
    folder.mkdir(parents=True)
    shutil.copy(on_cpu, folder / "sm_80+sm_100-cuda13.0.88.so")
    shutil.copy(on_cpu, folder / "sm_90a-cuda13.0.88.so")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 1))
    expected = "built for sm_80, sm_90a, sm_100, but this GPU is sm_91"
    assert reason() == f"{expected}: run `dgbench kernels build`"
    monkeypatch.setattr(compiled, "_nvcc", lambda: None)
    assert reason() == f"{expected}, and nvcc is missing: install the CUDA toolkit, then run `dgbench kernels build`"
    assert len(compiled.status().built) == 2


def test_a_library_that_does_not_load_says_what_the_loader_said(hopper, on_cpu):
    folder = compiled.status().folder
    folder.mkdir(parents=True)
    broken = folder / "sm_90-cuda13.0.88.so"
    broken.write_text("no library")
    assert re.search(rf"^{broken} does not load: .*{broken.name}: file too short; delete it and run", reason())
    broken.write_bytes(Path(ctypes.__file__).read_bytes())
    assert "invalid ELF header" in reason()


@pytest.mark.parametrize(("gpu", "built"), [((9, 0), "sm_80+sm_90"), ((8, 9), "sm_80+sm_90"), ((9, 0), "sm_90a")])
def test_the_library_for_this_gpu_is_loaded_once(hopper, on_cpu, monkeypatch, gpu, built):
    compiled.forget()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: gpu)
    with pytest.raises(ImportError, match="not built"):
        compiled.library()
    path = compiled.status().folder / f"{built}-cuda13.0.88.so"
    path.parent.mkdir(parents=True)
    shutil.copy(on_cpu, path)
    # a build tells `library` to look again
    assert compiled.build(built.split("+")) == path
    assert compiled.library().path == path
    assert compiled.library() is compiled.library()
    assert compiled.status().reason is None
    with compiled.use(on_cpu) as library:
        assert compiled.library() is library
        assert library.path == on_cpu
    assert compiled.library().path == path


def test_a_changed_source_or_header_is_another_library(hopper):
    folders = {compiled.status().folder}
    for name in ("probe.cu", "device.cuh"):
        (hopper / name).write_text((hopper / name).read_text() + "\n")
        folders.add(compiled.status().folder)
    for name in ("more.cuh", "more.h"):
        (hopper / name).touch()
        folders.add(compiled.status().folder)
    (hopper / "README.md").write_text("read by no compiler")
    folders.add(compiled.status().folder)
    assert len(folders) == 5


def test_libraries_are_kept_in_the_users_cache_folder(monkeypatch):
    monkeypatch.delenv("MFUSER_KERNELS")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert compiled.kernels_dir() == Path("/somewhere/mfuser/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiled.kernels_dir() == Path.home() / ".cache" / "mfuser" / "kernels"

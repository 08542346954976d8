"""The kernels' library: compiling, keeping and finding it."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mfuser.ops import compiled

from .emulation import HEADERS, ROOT
from .test_emulation import gather, on_cpu

__all__ = ["on_cpu"]  # a fixture

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
GENERATIONS = ["sm_80", "sm_90", "sm_100"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MFUSER_KERNELS", str(tmp_path / "kernels"))


def probe_sources(tmp_path: Path) -> Path:
    return gather(tmp_path / "sources", ROOT / "cuda" / "device.cuh", HEADERS / "probe.cu")


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

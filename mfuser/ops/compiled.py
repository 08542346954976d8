"""The CUDA kernels of `cuda/` as one shared library: compiled by nvcc ahead of time, called through ctypes.

The library has a C interface and its own CUDA runtime, so it depends on neither torch's nor Python's version. It is
kept as `<folder>/<hash of sources and flags>/<architectures>-cuda<version>.so`, where `<folder>` is MFUSER_KERNELS or
else `mfuser/kernels` in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mfuser.ops import kernel_files
from mfuser.ops.dispatch import mismatch
from mfuser.ops.kernel_files import PlaceError, kernels_dir

_FLAGS = ("-O3", "-std=c++17", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden")
_LAST_LINES = 30
BUILD_COMMAND = "dgbench kernels build"
# of cublas_api.h
_CUBLAS_STATUS = {
    1: "not initialized",
    3: "allocation failed",
    7: "invalid value",
    8: "architecture mismatch",
    11: "mapping error",
    13: "execution failed",
    14: "internal error",
    15: "not supported",
}


def _public_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# the functions that torch.cuda's call internally, without creating objects and checking whether CUDA is initialized
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream)


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message holds the command and the compiler's last lines."""


class Library:
    """A loaded library; `device` is the type of the tensors that its kernels take, "cuda" or (under test) "cpu"."""

    def __init__(self, path: Path) -> None:
        """Load `path`.

        Raises: OSError with the loader's text.
        """
        self.path = path
        self._dll = ctypes.CDLL(str(path))
        try:
            for function in (self._dll.mfuser_device_type, self._dll.mfuser_error_string):
                function.restype = ctypes.c_char_p
            self._use_device = self._dll.mfuser_use_device
        except AttributeError as error:
            raise OSError(str(error)) from error
        self.device = self._dll.mfuser_device_type().decode()
        self._on_gpu = self.device == "cuda"
        self._functions: dict[str, Callable[..., int]] = {}
        self._thread = threading.local()  # `index`: the device that the runtime has in this thread

    def run(self, name: str, params: ctypes.Structure, *, like: Tensor) -> None:
        """Call the launcher `name` with `params`, on the device and the current stream of `like`.

        Raises: RuntimeError with CUDA's text when the launch fails, or for a library that does not fit this Python code.
        """
        function = self._functions.get(name) or self._checked(name, type(params))
        if not (like.is_cuda if self._on_gpu else like.is_cpu):
            raise RuntimeError(f"{name} of {self.path} takes {self.device} tensors, got one on {like.device}")
        if not self._on_gpu:
            error = function(ctypes.byref(params), None)
        elif (index := like.get_device()) == current_device():
            error = self._launch(function, params, index)
        else:
            # the guard puts the caller's device back
            with torch.cuda.device(index):
                error = self._launch(function, params, index)
        if error:
            self.check(name, error)

    def address(self, name: str) -> int:
        """Return the address of the function `name`, to pass it to a launcher."""
        return ctypes.cast(self._dll[name], ctypes.c_void_p).value or 0

    def check(self, what: str, error: int) -> None:
        """Raise RuntimeError with CUDA's text unless `error` is 0; a negative one is cuBLAS's status."""
        if error < 0:
            raise RuntimeError(f"{what}: cuBLAS status {-error}: {_CUBLAS_STATUS.get(-error, 'unknown')}")
        if error:
            raise RuntimeError(f"{what}: CUDA error {error}: {self._dll.mfuser_error_string(error).decode()}")

    def use_device(self, index: int) -> None:
        """Make the GPU `index` current in the library's own CUDA runtime, for this thread.

        Raises: RuntimeError with CUDA's text, such as that of a driver older than the runtime.
        """
        self.check(f"GPU {index}", self._use_device(index))
        self._thread.index = index

    def _launch(self, function: Callable[..., int], params: ctypes.Structure, index: int) -> int:
        if getattr(self._thread, "index", None) != index:
            self.use_device(index)
        return function(ctypes.byref(params), _raw_stream(index))

    def _checked(self, name: str, kind: type[ctypes.Structure]) -> Callable[..., int]:
        try:
            function, size = self._dll[name], self._dll[f"{name}_size"]()
        except AttributeError as error:
            raise RuntimeError(f"{self.path} has no {name}: {error}") from error
        if size != ctypes.sizeof(kind):
            raise RuntimeError(f"{name}: {kind.__name__} has {ctypes.sizeof(kind)} bytes in Python and {size} in {self.path}")
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self._functions[name] = function
        return function


@dataclass(frozen=True)
class Status:
    """State of the compiled kernels; `reason` says why they do not run, None when they do."""

    sources: tuple[Path, ...]  # the .cu files
    nvcc: str | None  # its path and version
    architecture: str | None  # of the current GPU
    folder: Path | None  # holds the libraries of these sources; None where there is no place for any
    built: tuple[Path, ...]
    reason: str | None


_used: Library | None = None  # by `use`
_found: Library | None = None  # by `library`


def library() -> Library:
    """Return the library that was built from the present sources for the current GPU.

    Once found, it is kept until `build` succeeds in this process, and so is the reason of a failure, unless the
    variables of the environment that say where libraries are change.

    Raises: ImportError with the reason, and the command that helps.
    """
    return _used or _found or _look()


def _look() -> Library:
    global _found
    found = _installed(os.environ.get("MFUSER_KERNELS"), os.environ.get("XDG_CACHE_HOME"))
    if isinstance(found, str):
        raise ImportError(found)
    _found = found
    return found


def forget() -> None:
    """Let `library` search again."""
    global _found
    _found = None
    _installed.cache_clear()


def refuse(tensors: Sequence[Tensor | None]) -> str | None:
    """Say why the library's kernels cannot take `tensors`, or, without any, run at all; None when they can."""
    try:
        return mismatch(tensors, library().device)
    except ImportError as error:
        return str(error)


@contextmanager
def use(path: Path) -> Iterator[Library]:
    """Let `library` return the one at `path` within the context, whatever is built.

    Raises: OSError if it does not load.
    """
    global _used
    before = _used
    _used = Library(path)
    try:
        yield _used
    finally:
        _used = before


def status() -> Status:
    """Check sources, compiler, GPU and library; changes nothing."""
    sources = sources_dir()
    nvcc = _nvcc()
    architecture = _architecture()
    folder: Path | None = None
    built: list[Path] = []
    reason: str | None = None
    try:
        folder, built = _folder(sources), _built(sources)
        library()
    except (ImportError, PlaceError) as error:
        reason = str(error)
    return Status(
        sources=tuple(_kernels(sources)),
        nvcc=nvcc and f"{nvcc} {_version(nvcc)}",
        architecture=architecture if architecture.startswith("sm_") else None,
        folder=folder,
        built=tuple(built),
        reason=reason,
    )


def build(
    architectures: Sequence[str] | None = None,
    *,
    sources: Path | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Path:
    """Compile all kernels into one library, unless it is there already, and return its path.

    Needs nvcc, but no GPU when `architectures` are given. Safe when several processes build at once.

    Args:
        architectures: such as ["sm_80", "sm_90"]; by default those of the GPUs present.
        sources: the folder of the .cu files; by default the shipped one.
        on_line: takes each line of progress and of the compiler's output.

    Raises:
        BuildError: no sources, no nvcc, no GPU to take the architecture from, no place to build in, or the compiler failed.
        ValueError: for a malformed architecture.
    """
    sources = sources or sources_dir()
    tell = on_line or (lambda _: None)
    kernels = _kernels(sources)
    if not kernels:
        raise BuildError(f"there are no kernel sources in {sources}")
    nvcc = _nvcc()
    if nvcc is None:
        raise BuildError("nvcc is missing: install the CUDA toolkit, or set CUDA_HOME to its folder")
    names = sorted(set(architectures or _present()), key=_parsed)
    try:
        target = _folder(sources) / f"{'+'.join(names)}-cuda{_version(nvcc)}.so"
    except PlaceError as error:
        raise BuildError(str(error)) from error
    if not target.exists():
        kernel_files.make_folder(target.parent)
        kernel_files.clear_builds(target.parent)
        # in the same folder, so that the finished library can be renamed into place
        with tempfile.TemporaryDirectory(prefix=kernel_files.build_prefix(), dir=target.parent) as temporary:
            built = _compile(nvcc, kernels, names, Path(temporary), tell)
            built.chmod(0o755)  # not writable by others, whatever the umask
            os.replace(built, target)
    forget()
    return target


def sources_dir() -> Path:
    """Return the folder of the kernel sources: at the repository's top level, and inside the package in a wheel."""
    package = Path(__file__).parents[1]
    packaged = package / "cuda"
    return packaged if packaged.is_dir() else package.parent / "cuda"


@functools.cache
def _installed(_kernels_dir: str | None, _cache: str | None) -> Library | str:
    """Return the library, or why there is none. The arguments are the environment variables that decide its path."""
    sources = sources_dir()
    if not _kernels(sources):
        return f"there are no kernel sources in {sources}"
    architecture = _architecture()
    if not architecture.startswith("sm_"):
        return architecture
    try:
        built = _built(sources)
    except PlaceError as error:
        return str(error)
    path = next((path for path in built if any(_runs(name, architecture) for name in _names(path))), None)
    if path is None:
        if built:
            there = ", ".join(sorted({name for path in built for name in _names(path)}, key=_parsed))
            problem = f"built for {there}, but this GPU is {architecture}"
        else:
            problem = f"not built for {architecture}"
        if _nvcc() is None:
            return f"{problem}, and nvcc is missing: install the CUDA toolkit, then run `{BUILD_COMMAND}`"
        return f"{problem}: run `{BUILD_COMMAND}`"
    try:
        if distrust := kernel_files.distrusted(path):
            return f"{path} is not loaded: {distrust}"
        loaded = Library(path)
        loaded.use_device(torch.cuda.current_device())
    except OSError as error:
        return f"{path} does not load: {error}; delete it and run `{BUILD_COMMAND}`"
    except RuntimeError as error:
        return f"{path} does not run: {error}"
    return loaded


def _architecture() -> str:
    """Return the current GPU's "sm_<number>", or why there is none."""
    if torch.version.cuda is None:
        return "this torch build has no CUDA"
    if not torch.cuda.is_available():
        return "torch finds no usable CUDA GPU"
    try:
        major, minor = torch.cuda.get_device_capability()
    except RuntimeError as error:  # in a forked process
        return str(error)
    return f"sm_{major}{minor}"


def _present() -> list[str]:
    if not torch.cuda.is_available():
        raise BuildError("torch finds no CUDA GPU: name the architectures to build for, such as sm_90")
    capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return [f"sm_{major}{minor}" for major, minor in capabilities]


def _parsed(architecture: str) -> tuple[int, int, str]:
    found = re.fullmatch(r"sm_(\d+)(\d)([af]?)", architecture)
    if not found:
        raise ValueError(f"`{architecture}` is no architecture: write sm_80, sm_90, sm_100 or the like")
    return int(found[1]), int(found[2]), found[3]


def _runs(built: str, present: str) -> bool:
    """Return whether machine code runs: also on later minor versions of its architecture, but that of sm_90a on its own only."""
    (major, minor, special), (gpu_major, gpu_minor, _) = _parsed(built), _parsed(present)
    return major == gpu_major and (minor == gpu_minor if special else minor <= gpu_minor)


def _kernels(sources: Path) -> list[Path]:
    return sorted(sources.glob("*.cu"))


def _folder(sources: Path) -> Path:
    digest = hashlib.sha256(repr(_FLAGS).encode())
    for path in sorted((*_kernels(sources), *sources.glob("*.cuh"), *sources.glob("*.h"))):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return kernels_dir() / digest.hexdigest()[:16]


def _built(sources: Path) -> list[Path]:
    """Return the libraries of these sources, the newest first."""
    return sorted(_folder(sources).glob("sm_*-cuda*.so"), key=lambda path: path.stat().st_mtime, reverse=True)


def _names(library: Path) -> list[str]:
    return library.name.partition("-cuda")[0].split("+")


def _nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    named, path, usual = ([str(Path(home, "bin"))] if home else [] for home in homes)
    return shutil.which("nvcc", path=os.pathsep.join([*named, *path, os.environ.get("PATH", os.defpath), *usual]))


def _version(nvcc: str) -> str:
    try:
        found = re.search(r"\bV(\d+(?:\.\d+)+)", _output([nvcc, "--version"]))
    except BuildError:  # nvcc does not even print its version: a build will report why
        return "unknown"
    return found[1] if found else "unknown"


def _compile(nvcc: str, kernels: list[Path], architectures: list[str], folder: Path, tell: Callable[[str], None]) -> Path:
    targets = [f"-gencode=arch={name.replace('sm_', 'compute_')},code={name}" for name in architectures]
    objects = [folder / f"{path.stem}.o" for path in kernels]
    commands = {
        path.name: [nvcc, *_FLAGS, *targets, "-c", str(path), "-o", str(obj)] for path, obj in zip(kernels, objects, strict=True)
    }
    library = folder / "library.so"
    with _tether() as (line, cut), ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            running = {pool.submit(_output, command, line): name for name, command in commands.items()}
            tell(f"compiling {', '.join(commands)} for {', '.join(architectures)}")
            for done in as_completed(running):
                for text in [*done.result().splitlines(), f"compiled {running[done]}"]:
                    tell(text)
            link = [nvcc, *targets, "-shared", "-cudart=static", *map(str, objects), "-o", str(library)]
            # in a thread as well: an interrupted `run` would only kill the command that it has started itself
            for text in pool.submit(_output, link, line).result().splitlines():
                tell(text)
        except BaseException:
            cut()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return library


@contextmanager
def _tether() -> Iterator[tuple[int, Callable[[], None]]]:
    """Yield a standard input for `child.py`, and a function that kills all commands with it; so does the end of this process."""
    line, held = os.pipe()
    with os.fdopen(line, "rb", 0), os.fdopen(held, "wb", 0) as end:
        yield line, end.close


def _output(command: list[str], line: int | None = None) -> str:
    """Run `command` and return all that it prints; with a pipe of `_tether`, it is killed when that is closed.

    Raises: BuildError with the command and the last lines if it fails.
    """
    started = command if line is None else [sys.executable, "-I", "-S", str(Path(__file__).with_name("child.py")), *command]
    try:
        done = subprocess.run(
            started,
            stdin=subprocess.DEVNULL if line is None else line,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            start_new_session=line is not None,
        )
    except OSError as error:
        raise BuildError(f"{shlex.join(command)}: {error}") from error
    if done.returncode:
        lines = "\n".join(done.stdout.splitlines()[-_LAST_LINES:])
        raise BuildError(f"failed with exit status {done.returncode}: {shlex.join(command)}\n{lines}")
    return done.stdout

"""The rules of the house: which room may import which, and what no file is called.

Only imports that run at import time count: the module body, with `if TYPE_CHECKING:` left out. A function's own imports
are how a light room reaches a heavy one.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ("dgbench", "mfuser") for path in (ROOT / package).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}

HEAVY = ("torch", "torchvision", "timm", "open_clip", "accelerate", "datasets", "huggingface_hub", "mfuser")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def types_only(node: ast.If) -> bool:
    """Whether only a type checker reads it."""
    return "TYPE_CHECKING" in ast.unparse(node.test)


def head_imports(path: Path) -> set[str]:
    """Return the absolute names of the modules that a file imports when it is imported."""

    def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(node, ast.If) and types_only(node):
                yield from statements(node.orelse)
                continue
            yield node
            for part in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body)

    package = path.parent.relative_to(ROOT).parts
    found = set()
    for node in statements(parsed(path).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *(node.module or "").split(".")]).strip(".")
            base = base if node.level else node.module or ""
            found.add(base)
            found |= {f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in MODULES}
    return found


IMPORTS = {name: head_imports(path) for name, path in MODULES.items()}


def within(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def offences(room: str | tuple[str, ...], *forbidden: str, but: tuple[str, ...] = ()) -> list[str]:
    rooms = (room,) if isinstance(room, str) else room
    return [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        if within(module, *rooms) and not within(module, *but)
        for name in sorted(names)
        if within(name, *forbidden)
    ]


def test_the_walk_sees_imports() -> None:
    assert "yaml" in IMPORTS["dgbench.yaml_text"]
    assert "dgbench.errors" in IMPORTS["dgbench.recipe.load"]
    assert not within("mfusers", "mfuser")


def test_mfuser_never_imports_dgbench() -> None:
    assert not offences("mfuser", "dgbench")


def test_ops_import_torch_the_standard_library_and_themselves() -> None:
    allowed = {*sys.stdlib_module_names, "torch"}
    strangers = [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        if within(module, "mfuser.ops")
        for name in names
        if name.partition(".")[0] not in allowed and not within(name, "mfuser.ops") and name != "mfuser"
    ]
    assert not [s for s in strangers if not re.fullmatch(r"mfuser\.ops\.\w+\.triton_(\w+_)?backend imports triton(\.\w+)*", s)]


def test_lower_rooms_of_mfuser_do_not_reach_up() -> None:
    assert not offences("mfuser.ssm", "mfuser.fusion", "mfuser.segmentor", "mfuser.decoder", "mfuser.methods")
    assert not offences("mfuser.deformable", "mfuser.fusion", "mfuser.segmentor", "mfuser.decoder", "mfuser.methods")
    assert not offences("mfuser.fusion", "mfuser.segmentor", "mfuser.decoder", "mfuser.methods")
    assert not offences(("mfuser.ops", "mfuser.ssm", "mfuser.deformable", "mfuser.fusion"), "timm", "open_clip")
    assert not offences(("mfuser.segmentor", "mfuser.decoder", "mfuser.towers.vit", "mfuser.towers.text"), "mfuser.methods")


def test_methods_do_not_import_each_other() -> None:
    methods = [name for name in MODULES if within(name, "mfuser.methods") and name != "mfuser.methods"]
    for method in methods:
        assert not offences(method, *(other for other in methods if other != method))


def test_results_and_recipes_need_neither_torch_nor_models() -> None:
    light = (
        "dgbench.recipe",
        "dgbench.yaml_text",
        "dgbench.protocol",
        "dgbench.results",
        "dgbench.report",
        "dgbench.metrics",
        "dgbench.errors",
        "dgbench.progress",
        "dgbench.render",
        "dgbench.doctor",
        "dgbench.spec",
        "dgbench.download",
        "dgbench.data.domain",
        "dgbench.data.domains",
        "dgbench.data.labels",
        "dgbench.data.custom",
        "dgbench.data.hub_sets",
        "dgbench.data.index",
        "dgbench.data.verify",
        "dgbench.data.listing",
        "dgbench.needs",
        "dgbench.names",
        "dgbench.engine.device",
        "dgbench.lab.settings",
        "dgbench.untrusted",
        "dgbench.bounds",
        "dgbench.matrices",
        "dgbench.locks",
        "dgbench.runs",
        "dgbench.environment",
    )
    assert not offences(light, *HEAVY)


def test_reading_data_needs_no_downloads_and_streets_no_data() -> None:
    assert not offences("dgbench.data", "dgbench.download")
    used = {name for module in MODULES if within(module, "dgbench.streets") for name in IMPORTS[module]}
    assert not {name for name in used if within(name, "dgbench") and not within(name, "dgbench.streets", "dgbench.errors")}


def test_archives_are_unpacked_without_anything_of_ours_but_errors() -> None:
    allowed = {"dgbench.errors", "dgbench.download.volumes", "dgbench.download.tars"}
    for module in ("dgbench.download.volumes", "dgbench.download.tars", "dgbench.download.archives"):
        strangers = {name for name in IMPORTS[module] - allowed if name.partition(".")[0] not in sys.stdlib_module_names}
        assert not strangers


def test_metrics_need_numpy_alone() -> None:
    third_party = {name.partition(".")[0] for name in IMPORTS["dgbench.metrics"]} - set(sys.stdlib_module_names)
    assert third_party == {"numpy"}


def test_the_command_line_imports_typer_and_errors_alone() -> None:
    allowed = {*sys.stdlib_module_names, "typer", "dgbench"}
    imported = {name for module, names in IMPORTS.items() if within(module, "dgbench.cli") for name in names}
    assert {name.partition(".")[0] for name in imported} <= allowed
    ours = {name for name in imported if within(name, "dgbench") and not within(name, "dgbench.cli")}
    assert ours <= {"dgbench", "dgbench.errors"}
    assert not IMPORTS["dgbench"]


def test_nothing_but_the_program_imports_the_command_line() -> None:
    assert not offences(("dgbench", "mfuser"), "dgbench.cli", but=("dgbench.__main__", "dgbench.cli"))


def test_each_heavy_helper_stays_in_its_room() -> None:
    both = ("dgbench", "mfuser")
    assert not offences(both, "rich", but=("dgbench.render",))
    assert not offences(both, "yaml", but=("dgbench.yaml_text", "dgbench.report"))
    assert not offences(both, "accelerate", but=("dgbench.engine",))
    assert not offences(both, "fvcore", but=("dgbench.cost",))
    assert not offences(both, "datasets", "huggingface_hub", "matplotlib", "pandas", "pynvml")


def anywhere(*packages: str) -> set[str]:
    """The modules that import a package at any time, in their functions too; what only a type checker reads is left out."""

    def statements(body: list[ast.stmt]) -> Iterator[ast.AST]:
        for node in body:
            if isinstance(node, ast.If) and types_only(node):
                continue
            yield node
            for part in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body)

    found = set()
    for module, path in MODULES.items():
        for node in statements(parsed(path).body):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {module for name in names if within(name, *packages)}
    return found


def every_import(path: Path) -> set[str]:
    """The modules of ours that a file imports at any time, in its functions too; what only a type checker reads is left out."""
    package = path.parent.relative_to(ROOT).parts
    found = set()
    pending: list[ast.AST] = [parsed(path)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and types_only(node):
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = [*package[: len(package) - node.level + 1], node.module or ""] if node.level else [node.module or ""]
            base = ".".join(filter(None, parts))
            inner = {f"{base}.{alias.name}" for alias in node.names}
            # `from package import module` needs the module; what the package holds itself needs the package
            found |= {name for name in inner if name in MODULES}
            found |= {base} if any(name not in MODULES for name in inner) else set()
    return found & MODULES.keys()


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that lead to each other (Tarjan's strongly connected components of more than one)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            found.extend([sorted(group)] if len(group) > 1 else [])

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_a_circle_is_seen() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}}
    assert circles(graph) == [["b", "c"]]
    assert "dgbench.data.custom" in every_import(MODULES["dgbench.data.catalog"])  # in a function
    assert "dgbench.recipe" not in every_import(MODULES["dgbench.data.sampling"])  # for a type checker alone


def test_no_modules_import_each_other_not_even_in_functions() -> None:
    assert circles({name: every_import(path) for name, path in MODULES.items()}) == []


def test_what_draws_writes_tables_and_asks_the_gpu_is_imported_in_one_place_each() -> None:
    assert anywhere("matplotlib") == {"dgbench.render.pictures"}
    assert anywhere("pynvml") == {"dgbench.cost.timing"}
    assert anywhere("fvcore") == {"dgbench.cost.count"}
    assert anywhere("tabulate") == {"dgbench.render.texts"}
    assert anywhere("jinja2") == {"dgbench.render.pages"}
    assert not anywhere("pandas")


def test_sockets_are_opened_in_named_places() -> None:
    callers = {
        "hf_hub_download",
        "snapshot_download",
        "get_hf_file_metadata",
        "HfApi",
        "load_dataset",
        "urlopen",
        "urlretrieve",
        "httpx",
        "httpx2",
        "requests",
        "downloader",
        "socket",
    }
    named = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Import | ast.ImportFrom) and callers & {alias.name for alias in node.names}
    }
    assert named == {
        "dgbench.cli.launcher",  # a free port of this machine
        "dgbench.share",
        "mfuser.towers.hub",
        "dgbench.download.transfer",
        "dgbench.download.hub_files",
        "dgbench.download.csdownload",
    }


def test_data_and_results_do_not_reach_into_the_engine() -> None:
    below = (
        "dgbench.data",
        "dgbench.download",
        "dgbench.streets",
        "dgbench.recipe",
        "dgbench.results",
        "dgbench.metrics",
        "dgbench.protocol",
        "dgbench.report",
    )
    assert not offences(below, "dgbench.engine", "dgbench.cli", "dgbench.render")


def test_compiled_backends_are_imported_in_backend_files_only() -> None:
    backends = tuple(name for name in MODULES if name.endswith("_backend"))
    assert not offences(("dgbench", "mfuser"), "triton", "mamba_ssm", but=backends)
    # foreign memory is handed over where the kernels are called, and nowhere else
    assert not offences(("dgbench", "mfuser"), "ctypes", but=(*backends, "mfuser.ops.compiled", "mfuser.ops.blas"))


def test_no_file_is_a_drawer_for_anything() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}
    named = [path for path in FILES if path.stem in drawers or drawers & {part.lower() for part in path.parts[-3:-1]}]
    assert not named


def test_no_file_is_longer_than_450_lines() -> None:
    paths = [*FILES, *(path for folder in ("benchmarks", "tests") for path in (ROOT / folder).rglob("*.py"))]
    lengths = {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in paths}
    assert not {name: lines for name, lines in lengths.items() if lines > 450}, "split it by concern"


def test_every_file_says_what_it_is_for() -> None:
    silent = [str(path.relative_to(ROOT)) for path in FILES if not ast.get_docstring(parsed(path))]
    assert not silent


def test_no_path_or_marker_of_a_developers_machine() -> None:
    texts = {path: path.read_text() for path in [*FILES, *(ROOT / "recipes").rglob("*.yaml")]}
    marks = ("/home/", "/root/", "/wo" + "rk/", "TO" + "DO", "FIX" + "ME")
    assert not [f"{path.relative_to(ROOT)}: {mark}" for path, text in texts.items() for mark in marks if mark in text]


@pytest.mark.parametrize(
    "module",
    [
        "dgbench",
        "dgbench.cli",
        "dgbench.results",
        "dgbench.report.leaderboard",
        "dgbench.report.expected",
        "dgbench.report.ablation",
        "dgbench.render",
        "dgbench.methods",
        "dgbench.download.given_weights",
        "mfuser",
        "mfuser.keys",
        "mfuser.releases.mfuser",
        "mfuser.releases.tqdm",
        "mfuser.towers.given",
        "mfuser.towers.hub",
        "mfuser.towers.weights",
    ],
)
def test_light_modules_import_without_torch(module: str) -> None:
    code = f"import sys; sys.modules |= dict.fromkeys(('torch', 'matplotlib', 'pandas', 'fvcore', 'pynvml')); import {module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""

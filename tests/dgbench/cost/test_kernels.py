"""`dgbench kernels`: what is listed, built and timed, on a machine with or without GPU and compiler."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from dgbench import cli, render
from dgbench.cost import kernels
from mfuser.ops import compiled, dispatch, ran_since, tally

CPU = torch.device("cpu")
OPS = [op for op in dispatch.TABLE if op in kernels._CASES]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFUSER_KERNELS", str(tmp_path / "kernels"))
    monkeypatch.delenv("MFUSER_BACKEND", raising=False)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["kernels", *arguments], prog_name="dgbench")


def fails(*arguments: str, code: int = 1) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return str(result.stderr)


# ---- list


def test_every_backend_is_listed_in_the_order_of_auto() -> None:
    listed = json.loads(run("list", "--json").stdout)
    assert [(row["op"], row["backend"]) for row in listed["backends"]] == [
        (op, row.name) for op, rows in dispatch.TABLE.items() for row in rows
    ]
    for op in dispatch.TABLE:
        rows = [row for row in listed["backends"] if row["op"] == op]
        for name in kernels.DTYPES:
            [picked] = [row for row in rows if name in row["auto"]]
            assert not picked["named_only"]
            if name == "fp32":
                # interpreted or emulated, a GPU's kernels run on a CPU, too, but only when named
                here = [row for row in rows if torch.cuda.is_available() or not dispatch.lookup(op, row["backend"]).gpu]
                first = next(row for row in here if row["reason"] is None and not row["named_only"])
                assert picked == first


def test_the_list_tells_library_hash_and_compiler(tmp_path: Path) -> None:
    text = run("list").stdout
    state = compiled.status()
    assert re.search(rf"^folder +{tmp_path}/kernels/[0-9a-f]{{16}}$", text, re.M)
    assert re.search(rf"^their hash +{state.folder.name}$", text, re.M)
    assert re.search(rf"^nvcc +{state.nvcc or 'not found'}$", text, re.M)
    assert state.reason is None or state.reason in text


def test_the_list_shows_what_the_environment_puts_in_place_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFUSER_BACKEND", "selective_scan=reference")
    assert re.search(r"^selective_scan +reference +fp32, bf16, fp16, fp64\b", run("list").stdout, re.M)
    monkeypatch.setenv("MFUSER_BACKEND", "nonsense")
    assert "MFUSER_BACKEND=nonsense stands for `auto`." in run("list").stdout


def test_auto_is_told_by_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        dispatch.Backend(
            "low", "mfuser.ops.dispatch", refuse=lambda *t: "no fp64" if t and t[0].dtype == torch.float64 else None
        ),
        *dispatch.TABLE["selective_scan"],
    )
    monkeypatch.setitem(dispatch.TABLE, "selective_scan", rows)
    picks = {row.backend: row.auto for row in kernels.listing().backends if row.op == "selective_scan"}
    assert picks["low"] == ("fp32", "bf16", "fp16")
    assert "fp64" in {dtype for name, auto in picks.items() if name != "low" for dtype in auto}


# ---- build


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "one.cu").touch()
    monkeypatch.setattr(compiled, "sources_dir", lambda: folder)
    return folder


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler of a few milliseconds, first in line: fails on what it finds the word `nonsense` in."""
    program = tmp_path / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0;; esac\n'
        'for word; do case "$word" in *.cu) source=$word;; esac; target=$word; done\n'
        'if [ -n "$source" ] && grep -q nonsense "$source"; then\n'
        '  for i in $(seq 40); do echo "line $i"; done; echo "error: nonsense"; exit 1\nfi\necho code > "$target"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return program


def test_build_tells_each_source_and_where_the_library_is(sources: Path, compiler: Path) -> None:
    (sources / "two.cu").write_text("")
    result = run("build", "--arch", "sm_90", "sm_80", "--arch", "sm_100")
    assert result.exit_code == 0, result.output
    path = compiled.status().folder / "sm_80+sm_90+sm_100-cuda13.0.88.so"
    assert path.exists()
    assert re.fullmatch(rf"{re.escape(str(path))}: 0\.0 MB for sm_80, sm_90, sm_100, compiled in \d+ s\n", result.stdout)
    assert "compiling one.cu, two.cu for sm_80, sm_90, sm_100: 2 files" in result.stderr
    assert {"compiled one.cu", "compiled two.cu"} <= set(result.stderr.splitlines())
    again = json.loads(run("build", "--arch", "sm_80", "sm_90", "sm_100", "--json").stdout)
    assert (again["path"], again["new"], again["bytes"]) == (str(path), False, 5)
    assert run("list").stdout.count(str(path)) == 1


def test_a_failing_compiler_is_shown_by_its_last_lines(sources: Path, compiler: Path) -> None:
    (sources / "wrong.cu").write_text("nonsense")
    error = fails("build", "--arch", "sm_90", "--quiet")
    assert error.startswith("error: failed with exit status 1: ")
    assert error.endswith("line 40\nerror: nonsense\n")
    assert "line 5\n" not in error


def test_without_a_compiler_it_says_how_to_get_one(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_nvcc", lambda: None)
    error = fails("build", "--arch", "sm_90")
    assert error.startswith("error: nvcc is missing")
    assert "hint: CUDA's compiler comes with the toolkit" in error
    assert "Triton's kernels are used" in error


def test_without_a_gpu_it_says_to_name_one(sources: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fails("build").endswith("hint: dgbench kernels build --arch sm_90\n")


def test_a_malformed_architecture_is_a_usage_error(sources: Path, compiler: Path) -> None:
    assert "invalid value for '--arch': `hopper` is no architecture: write sm_80" in fails("build", "--arch", "hopper", code=2)
    assert "needs at least one value" in fails("build", "--arch", code=2)


# ---- cases

SMALL = {
    "selective_scan": {"batch": 2, "length": 9, "dim": 8, "state": 4},
    "ms_deform_attn": {"batch": 2, "sides": (2, 3), "heads": 2, "dim": 4, "points": 2},
    "mvfuser": {"batch": 2, "length": 9, "width": 16},
}


@pytest.mark.parametrize("op", SMALL)
@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_a_case_is_a_call_with_gradients_of_all_its_leaves(op: str, dtype: str) -> None:
    case = kernels._CASES[op](kernels.DTYPES[dtype], CPU, **SMALL[op])
    out, *grads = case.both("torch")
    assert out.dtype == kernels.DTYPES[dtype]
    assert out.shape == case.dout.shape
    assert [g.shape for g in grads] == [leaf.shape for leaf in case.leaves]
    assert all(float(g.abs().sum()) > 0 for g in grads)
    assert torch.equal(case.forward("torch"), out)


def test_a_case_runs_the_backend_it_is_asked_for() -> None:
    for op in OPS:
        case = kernels._CASES[op](torch.float32, CPU, **SMALL[op])
        before = tally()
        case.forward("reference")
        assert set(ran_since(before).values()) == {"reference"}


def test_cases_are_the_same_again_and_others_with_another_seed() -> None:
    for op, size in SMALL.items():
        one, same, other = (kernels._CASES[op](torch.float32, CPU, **size, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one.forward("torch"), same.forward("torch"))
        assert not torch.equal(one.forward("torch"), other.forward("torch"))


def test_points_start_near_their_query_or_lie_anywhere() -> None:
    near, anywhere = (
        kernels.deform_case(torch.float32, CPU, batch=1, sides=(16,), heads=8, dim=4, points=4, spread=s).leaves[1].detach()
        for s in ("near", "anywhere")
    )
    own = torch.stack(torch.meshgrid(*2 * [(torch.arange(16) + 0.5) / 16], indexing="xy"), -1).flatten(0, 1)  # (Q, 2)
    cells = [16 * (places - own[None, :, None, None, None]).abs().amax(-1).mean() for places in (near, anywhere)]
    assert 2 < cells[0] < 3.5
    assert cells[1] > 6


# ---- bench


def test_floors_are_bytes_over_bandwidth_or_exponentials_over_their_units() -> None:
    case = kernels.scan_case(torch.float32, CPU, batch=1, length=100, dim=32, state=16)
    # forward: u, delta, y and B, C; backward: dy, u, delta, du, ddelta and B, C, dB, dC
    forward, backward = 4 * (3 * 3200 + 2 * 1600), 4 * (5 * 3200 + 4 * 1600)
    slow = kernels.Machine("a CPU", gb_per_s=1.0)
    assert slow.floor_ms(case, backward=False) == (pytest.approx(1e3 * forward / 1e9), "memory")
    assert slow.floor_ms(case, backward=True) == (pytest.approx(1e3 * (forward + backward) / 1e9), "memory")
    # 51200 exponentials on one multiprocessor, 16 a clock
    fast = kernels.Machine("a GPU", gb_per_s=1e3, multiprocessors=1, ghz=1.0)
    assert fast.floor_ms(case, backward=False) == (pytest.approx(1e3 * 51200 / 16e9), "exp")
    assert fast.floor_ms(case, backward=True) == (pytest.approx(2e3 * 51200 / 16e9), "exp")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is meant for a CPU, whatever interpreter or emulation other tests have set up."""
    rows = {op: tuple(r for r in rows if r.name in ("torch", "reference")) for op, rows in dispatch.TABLE.items()}
    monkeypatch.setattr(dispatch, "TABLE", rows)


def called_once(call: Callable[[], object], device: torch.device, **_: object) -> float:
    call()
    return 2.0


def test_bench_compares_backends_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_ON_CPU", SMALL)
    monkeypatch.setattr(kernels, "median_ms", called_once)
    result = run("bench", "--backend", "torch", "reference", "--device", "cpu", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for op in OPS:
        assert f"{op}, " in result.stdout
    assert len(re.findall(r"^torch +2\.000 +2\.000 +1\.00 +1\.00$", result.stdout, re.M)) == len(OPS)
    assert "speed: times as fast as torch" in result.stdout


def test_bench_of_one_shape(plain: None) -> None:
    bench = json.loads(run("bench", "--shape", "1", "8", "16", "4", "--dtype", "bf16", "--device", "cpu", "--json").stdout)
    [case] = bench["cases"]
    assert (case["op"], case["shape"], case["dtype"]) == ("selective_scan", "B 1, L 8, D 16, N 4", "bf16")
    assert {row["backend"] for row in case["timings"]} >= {"torch"}
    assert all(row["both_ms"] > row["forward_ms"] > 0 for row in case["timings"])
    assert bench["machine"]["gb_per_s"] > 0


def test_bench_says_why_a_backend_does_not_run(plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (dispatch.Backend("broken", "mfuser.ops.no_such_module"), *dispatch.TABLE["selective_scan"])
    monkeypatch.setitem(dispatch.TABLE, "selective_scan", rows)
    monkeypatch.setattr(kernels, "_ON_CPU", SMALL)
    monkeypatch.setattr(kernels, "median_ms", called_once)
    text = run("bench", "--op", "selective_scan", "--device", "cpu").stdout
    assert "broken: No module named 'mfuser.ops.no_such_module'" in text
    error = fails("bench", "--backend", "broken", "--device", "cpu", "--quiet")
    assert error.startswith("error: broken: No module named 'mfuser.ops.no_such_module'")
    assert "hint: `dgbench kernels list`" in error


@pytest.mark.parametrize(
    ("typed", "code", "message"),
    [
        ("--op selective_scam", 1, "did you mean `selective_scan`?"),
        ("--backend tritn", 1, "unknown backend `tritn`"),
        ("--dtype fp3", 1, "did you mean `fp32`?"),
        ("--shape 1 2 3", 2, "requires 4 arguments"),
        ("--shape 1 2 3 0", 2, "invalid value for '--shape'"),
        ("--op ms_deform_attn --shape 1 2 3 4", 2, "is the selective scan's: give it without --op"),
    ],
)
def test_mistakes_are_one_message(typed: str, code: int, message: str) -> None:
    assert message in fails("bench", *typed.split(), code=code)


def test_tables_are_narrow(capsys: pytest.CaptureFixture[str]) -> None:
    timing = kernels.Timing("mamba_ssm", 123.4, 0.0123, 1.5, 22.25)
    shape, causes = "B 18, L 2594, D 512, N 16", ("exp", "memory")
    case = kernels.TimedCase("selective_scan", shape, "bf16", (timing,), (0.01, 0.02), causes, {})
    render.show(kernels.Bench(kernels.Machine("a GPU", 3000.0), (case,)))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "floor: what exp and memory alone would take." in text

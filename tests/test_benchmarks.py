"""`benchmarks/kernels.py` on a CPU: every path, with stand-ins for the peers that compute the same by our own operators."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dgbench.cost import kernels
from mfuser.ops import dispatch, ms_deform_attn, selective_scan

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kernels.py"
CPU = torch.device("cpu")
TABLE = dispatch.TABLE


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the shapes are too small to share
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield importlib.import_module("kernels")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _plain_backends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU only what is meant for one, whatever interpreter or emulation other tests have set up."""
    if request.node.get_closest_marker("gpu") is None:
        plain = {op: tuple(r for r in rows if r.name in ("torch", "reference")) for op, rows in dispatch.TABLE.items()}
        monkeypatch.setattr(dispatch, "TABLE", plain)


@pytest.fixture
def main(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cpu", "--tiny", *arguments])
        code: int = script.main()
        return code

    return run


def scanned(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """A peer's scan: channels before tokens."""
    y = selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, delta_bias=bias, delta_softplus=True, backend="torch")
    return y.mT


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules with the peers' names and interfaces."""

    def scan_fwd(u, delta, A, B, C, D, z, bias, softplus):
        assert all(t.is_contiguous() for t in (u, delta, B, C))
        assert z is None
        assert softplus
        return scanned(u, delta, A, B[:, 0], C[:, 0], D, bias), "states"

    def scan_bwd(u, delta, A, B, C, D, z, bias, dout, states, out, dz, softplus, recompute):
        assert states == "states"
        leaves = [t.detach().requires_grad_() for t in (u, delta, A, B, C, D, bias)]
        with torch.enable_grad():
            y = scanned(*leaves[:3], leaves[3][:, 0], leaves[4][:, 0], *leaves[5:])
        return torch.autograd.grad(y, leaves, dout)

    def scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        assert delta_softplus
        return scanned(u, delta, A, B, C, D, delta_bias)

    def norm_fn(x, weight, bias, z=None, eps=1e-6):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight * F.silu(z)

    def attended(value, shapes, starts, locations, weights):
        sizes = [tuple(s) for s in shapes.tolist()]
        assert starts.tolist() == [sum(h * w for h, w in sizes[:i]) for i in range(len(sizes))]
        return ms_deform_attn(value, sizes, locations, weights, backend="torch")

    def attend_bwd(value, shapes, starts, locations, weights, dout, step):
        leaves = [t.detach().requires_grad_() for t in (value, locations, weights)]
        with torch.enable_grad():
            out = attended(leaves[0], shapes, starts, *leaves[1:])
        return list(torch.autograd.grad(out, leaves, dout))

    modules: dict[str, dict[str, object]] = {
        "selective_scan_cuda": {"fwd": scan_fwd, "bwd": scan_bwd},
        "MultiScaleDeformableAttention": {
            "ms_deform_attn_forward": lambda *a: attended(*a[:-1]),
            "ms_deform_attn_backward": attend_bwd,
        },
        "mamba_ssm": {},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": scan_fn},
        "mamba_ssm.ops.triton.layernorm_gated": {"rmsnorm_fn": norm_fn},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def test_a_run_with_all_peers_times_all_and_finds_no_error(
    main: Callable[..., int], peers: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("--out", str(tmp_path)) == 0
    report = json.loads((tmp_path / "kernels-cpu.json").read_text())
    assert report["about"]["torch"] == torch.__version__
    assert report["about"]["commit"]
    rows = report["rows"]
    assert {row["part"] for row in rows} == {"scan", "deform", "block", "loops"}
    assert {"torch", "mamba-ssm, raw", "mamba-ssm, autograd", "Deformable-DETR", "the same, mamba-ssm's norm"} <= {
        row["contender"] for row in rows
    }
    for row in rows:
        assert not row["note"]
        assert row["forward_ms"] > 0
        assert row["both_ms"] > 0
        assert row["floor_ms"][1] > row["floor_ms"][0] > 0
        if row["part"] != "loops":
            assert row["error"] < 1e-5, row
            assert row["gradient_error"] < 1e-4, row
    text = (tmp_path / "kernels-cpu.md").read_text()
    assert text == capsys.readouterr().out.removesuffix("\n")
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def written() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in SCRIPT.parent.glob("*.*")}


def test_without_peers_it_says_so_and_writes_nothing(main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    before = written()
    assert main("--only", "deform") == 0
    assert "- Deformable-DETR: no peer: No module named 'MultiScaleDeformableAttention'" in capsys.readouterr().out
    assert written() == before


def test_on_a_gpu_every_backend_is_timed_and_checked_whether_auto_takes_it_or_not(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "TABLE", TABLE)
    gpu = torch.device("cuda")
    plans = script.plans(gpu, quick=False, tiny=False)
    for part, op in (("scan", "selective_scan"), ("deform", "ms_deform_attn"), ("block", "mvfuser")):
        names = [row.name for row in TABLE[op] if row.name != "reference"]
        assert {"cuda", "triton", "torch"} <= set(names)
        assert [contender.name for contender in plans[part].contenders][: len(names)] == names
        assert [row.name for row in kernels.candidates(op, gpu)] == names
        assert [row.name for row in kernels.candidates(op, CPU)] == ["torch"]


def test_the_loops_are_the_scan(script: ModuleType) -> None:
    case = kernels.scan_case(torch.float64, CPU, batch=2, length=6, dim=3, state=4)
    expected = case.both("torch")
    for pick in (script.indexed, script.unbound):
        for found, tensor in zip(script.plain_loop(pick, case).both(), expected, strict=True):
            torch.testing.assert_close(found, tensor)


def test_the_composition_is_the_block(script: ModuleType) -> None:
    kernel_peers = importlib.import_module("kernel_peers")
    case = kernels.block_case(torch.float32, CPU, batch=2, length=6, width=32)

    def scan(u, delta, A, B, C, D, *, delta_bias, delta_softplus):
        return scanned(u, delta, A, B, C, D, delta_bias)

    expected = case.both("torch")
    for found, tensor in zip(kernel_peers.composition(scan, kernel_peers.plain_norm, case).both(), expected, strict=True):
        torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-5)


def test_check_passes_here(main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--check") == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("FAILED")]
    for op in dispatch.TABLE:
        assert [line for line in lines if line.startswith(f"{op} torch: ") and ", 0 problems, " in line]


def test_check_finds_a_wrong_gradient_and_other_bits(
    main: Callable[..., int], script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("a_wrong_backend")
    reference = dispatch.lookup("selective_scan", "reference").load()
    vars(module).update({name: value for name, value in vars(reference).items() if not name.startswith("__")})
    calls = []

    def backward(*arguments):
        du, ddelta, dA, *rest = reference.backward(*arguments)
        calls.append(du)
        return du, ddelta * 1.01, dA + 1e-9 * len(calls), *rest

    module.backward = backward
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(
        dispatch.TABLE, "selective_scan", (dispatch.Backend("wrong", module.__name__), *dispatch.TABLE["selective_scan"])
    )
    case = [c for c in script.kernel_check.checks(True) if c[0] == "selective_scan"][1]
    monkeypatch.setattr(script.kernel_check, "checks", lambda tiny: [("selective_scan", ["fp64"], case[2])])
    assert main("--check") == 1
    text = capsys.readouterr().out
    assert "FAILED selective_scan wrong fp64, B 2, L 2, D 33, N 16: gradient of delta: error 1.0e-02, torch's " in text
    assert "a second run gives other bits" in text
    assert "gradient of u" not in text
    assert "selective_scan torch: 8 tensors compared, 0 problems" in text


def test_check_finds_a_wrong_element_that_a_norm_hides(
    main: Callable[..., int], script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("a_backend_that_forgets_fast_states")
    plain = dispatch.lookup("selective_scan", "torch").load()
    vars(module).update({name: value for name, value in vars(plain).items() if not name.startswith("__")})

    def backward(*arguments):
        du, ddelta, dA, *rest = plain.backward(*arguments)
        return du, ddelta, dA * (dA.abs() > 1e-6 * dA.abs().max()), *rest

    module.backward = backward
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(
        dispatch.TABLE, "selective_scan", (dispatch.Backend("forgets", module.__name__), *dispatch.TABLE["selective_scan"])
    )
    steep = [c for c in script.kernel_check.checks(True) if getattr(c[2], "func", None) is script.kernel_check.steep_case]
    monkeypatch.setattr(script.kernel_check, "checks", lambda tiny: steep)
    assert main("--check") == 1
    text = capsys.readouterr().out
    assert "FAILED selective_scan forgets fp32, B 2, L 21, D 3, N 16: gradient of A: error of an element 1.0e+00" in text
    assert "gradient of delta" not in text
    assert "selective_scan torch: 20 tensors compared, 0 problems" in text


@pytest.mark.gpu
def test_every_path_runs_on_a_gpu(
    main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main("--device", "cuda", "--out", str(tmp_path)) == 0
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    ours = {row.name for rows in dispatch.TABLE.values() for row in rows}
    timed = [row for row in rows if row["contender"] in ours and not row["note"]]
    assert timed
    assert all(row["both_ms"] > 0 for row in timed)
    assert all(row["both_graph_ms"] > 0 for row in timed if row["contender"] != "torch")
    assert all(row["gradient_error"] < (0.1 if row["dtype"] == "bf16" else 1e-3) for row in timed)
    capsys.readouterr()
    assert main("--device", "cuda", "--check") == 0, capsys.readouterr().out


def test_sanitize_prints_its_command_where_there_is_no_sanitizer(
    main: Callable[..., int], script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.shutil, "which", lambda _: "nowhere/compute-sanitizer")
    assert main("--sanitize") == 1
    text = capsys.readouterr().out
    assert "+ PYTORCH_NO_CUDA_MEMORY_CACHING=1 nowhere/compute-sanitizer --tool memcheck" in text
    assert "nowhere/compute-sanitizer does not exist" in text

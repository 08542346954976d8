"""`benchmarks/fusion_share.py`: its parts make up the layer, and kernels are counted as what they are."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mfuser.fusion import MVFuser

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fusion_share.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fusion_share", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_parts_one_after_the_other_are_the_layer(script: ModuleType) -> None:
    torch.manual_seed(0)
    fuser, joint = MVFuser(32, state=4, dropout=0.0, backend="torch"), torch.randn(2, 9, 32)
    *_, (name, (_, (last, given, _))), (whole, _) = script.parts(fuser, joint).items()
    assert name.startswith("out_proj")
    assert whole == script.LAYER
    torch.testing.assert_close(last(*given) * fuser.scale, fuser.mix(joint))


def test_shares_of_the_parts_add_up(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "share.json"
    given = ["--device", "cpu", "--size", "56", "--width", "32", "--seconds", "0.01", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["fusion_share.py", *given])
    script.main()
    found, text = json.loads(out.read_text(encoding="utf-8")), capsys.readouterr().out
    assert found["shape"] == [2, 34, 32]
    assert found["forward_ms"].keys() == found["both_ms"].keys()
    kinds = [line.split("|") for line in text.splitlines() if line.startswith("| **")]
    assert [row[1].strip("* ") for row in kinds] == [script.SCAN, script.PROJECTIONS, script.REST]
    assert sum(int(row[3].strip(" %")) for row in kinds) == pytest.approx(100, abs=2)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void (anonymous namespace)::scan_forward<float>(Params)", "scan"),
        ("nvjet_tst_128x64_64x8_4x1_v_bz_TNT", "projections"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "projections"),
        ("void at::native::vectorized_elementwise_kernel<4>", "convolutions, gate, norm"),
        ("norm_forward", "convolutions, gate, norm"),
    ],
)
def test_kernels_are_counted_by_what_they_compute(script: ModuleType, kernel: str, kind: str) -> None:
    assert script.kind_of(kernel) == kind

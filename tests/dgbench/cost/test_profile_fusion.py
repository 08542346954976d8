"""What `dgbench profile --fusion` is made of: parameters, costs and times of fusion layers."""

from __future__ import annotations

import pytest
from counting import _no_weights  # noqa: F401 - a fixture

from dgbench.cost.fusion import FusionProfile, profile_fusion
from dgbench.errors import RecipeError
from dgbench.progress import Silent


@pytest.fixture(scope="module")
def fusion() -> FusionProfile:
    return profile_fusion(Silent(), timed=False, convention="paper", sweep=((256, 256),))


def test_the_papers_table(fusion: FusionProfile) -> None:
    printed = {row.fuser: (f"{row.parameters / 1e6:.2f}", f"{row.total:.2f}") for row in fusion.rows}
    del printed["mvfuser_bidir"], printed["mvfuser_no_gate"]  # not in the paper
    assert printed == {
        "mvfuser": ("1.67", "17.21"),
        "selfattn_concat": ("4.20", "98.64"),
        "selfattn_separate": ("8.40", "71.08"),
        "bi_deform_attn": ("3.35", "34.65"),
    }
    assert {row.fuser: row.parameters for row in fusion.rows if row.fuser in printed} == {
        "mvfuser": 1_667_585,
        "selfattn_concat": 4_198_400,
        "selfattn_separate": 8_396_800,
        "bi_deform_attn": 3_345_600,
    }
    assert (fusion.dim, fusion.tokens, fusion.size) == (1024, (1297, 1297), (512, 512))


def test_costs_over_token_counts_are_linear_for_scans_and_not_for_attention(fusion: FusionProfile) -> None:
    small, large = fusion.sweep
    assert (small.tokens, large.tokens) == ((18 * 18 + 1,) * 2, (1297,) * 2)  # sizes in order
    assert large.rows == fusion.rows
    few, many = ({row.fuser: row.cost for row in point.rows} for point in (small, large))
    growth = sum(large.tokens) / sum(small.tokens)
    assert many["mvfuser"].products / few["mvfuser"].products == pytest.approx(growth)
    assert many["mvfuser"].scan / few["mvfuser"].scan == pytest.approx(growth)
    for name, lengths in (("selfattn_concat", (650, 2594)), ("selfattn_separate", (325, 1297))):
        quadratic = [4 * n * 1024**2 + 2 * n**2 * 1024 for n in lengths]
        assert many[name].products / few[name].products == pytest.approx(quadratic[1] / quadratic[0])


def test_gflop_of_a_fuser_has_the_scan_in_it(fusion: FusionProfile) -> None:
    row = next(row for row in fusion.rows if row.fuser == "mvfuser")
    scan = 9 * 2594 * 512 * 16 + 2594 * 512
    assert row.gflop == pytest.approx((2 * 1_657_856 * 2594 + scan) / 1e9)


def test_fusers_between_other_towers() -> None:
    found = profile_fusion(Silent(), vfm="tiny", vlm="tiny", size=(64, 64), sweep=(), timed=False)
    assert (found.dim, found.tokens, [point.size for point in found.sweep]) == (64, (65, 65), [(64, 64)])
    registers = profile_fusion(Silent(), vfm="dinov3_l", vlm="siglip", size=(64, 64), sweep=(), timed=False)
    assert registers.tokens == (1 + 4 + 16, 16)
    with pytest.raises(RecipeError, match="`small` is 256 wide and `tiny` 64"):
        profile_fusion(Silent(), vfm="small", vlm="tiny", timed=False)
    with pytest.raises(RecipeError, match="nope"):
        profile_fusion(Silent(), vfm="nope", timed=False)
    with pytest.raises(RecipeError, match="images of 4x4 hold no patch"):
        profile_fusion(Silent(), vfm="tiny", vlm="tiny", size=(4, 4), sweep=(), timed=False)


def test_fusers_are_timed_on_a_cpu() -> None:
    found = profile_fusion(Silent(), vfm="tiny", vlm="tiny", size=(32, 32), sweep=(), device="cpu", batch=1)
    assert (found.batch, found.dtype) == (1, "fp32")
    for row in found.rows:
        assert row.forward is not None
        assert row.both is not None
        assert 0 < row.forward.median < row.both.median
        assert row.gib is None
    assert set(found.backends.values()) == {"torch"}

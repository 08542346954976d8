"""Backbone tables: our counts against what is printed, what ships against counting now, and the trunks' growth."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from dgbench.cost import backbone_counts
from dgbench.cost.backbone_counts import SHIPPED, all_nets, known, ship, source_hash, table_net
from dgbench.cost.backbone_nets import Net, NetCount, count_net
from dgbench.cost.backbone_tables import TABLES, Printed
from dgbench.cost.backbones import Taken, backbone_table
from dgbench.cost.count import count
from dgbench.errors import DgbenchError
from dgbench.progress import Silent

ANEW = "python benchmarks/backbones.py --counts"
ROWS = [(name, row) for name, table in TABLES.items() for row in table.rows]

# parameters and G of VMamba's analyze/flops.py, as its comments have them
COUNTER = {
    ("ade20k", "resnet50_deep"): (66_516_108, 952.616667136),
    ("ade20k", "resnet101_deep"): (85_508_236, 1030.4084234239997),
    ("ade20k", "vmamba_t"): (61_902_572, 948.7801896960001),
    ("ade20k", "vmamba_s"): (81_801_260, 1028.404888464),
    ("ade20k", "vmamba_b"): (122_069_292, 1170.3442882240001),
    # of 640x640, which changes no parameter
    ("ade20k", "swin_s"): (81_259_766, None),
    ("ade20k", "convnext_s"): (81_877_196, None),
    # torchvision's heads have an output for the background: 4,357 parameters more
    ("maskrcnn", "vmamba_t"): (49_755_000 + 4_357, 271.163376640),
    ("maskrcnn", "vmamba_s"): (69_654_000 + 4_357, 348.921708640),
    ("maskrcnn", "resnet50"): (44_396_000 + 4_357, 260.152304640),
}


def shipped(table: str, trunk: str) -> NetCount:
    found = known(table_net(table, trunk))
    assert found is not None, f"a source that decides counts was edited: run {ANEW}"
    return found


# ---- what is printed


@pytest.mark.parametrize(("table", "row"), ROWS, ids=[f"{table}-{row.trunk}" for table, row in ROWS])
def test_parameters_are_the_printed_ones_to_the_digit(table: str, row: Printed) -> None:
    found = shipped(table, row.trunk)
    parameters = found.parameters - (found.auxiliary if row.without_auxiliary else 0)
    if row.trunk == "vim_s":
        assert row.cause
        parameters += 384 * 1000 + 1000  # the classifier
    assert round(parameters / 1e6) == row.parameters


@pytest.mark.parametrize(("table", "row"), ROWS, ids=[f"{table}-{row.trunk}" for table, row in ROWS])
def test_multiply_accumulates_are_the_printed_ones_or_the_cause_is_said(table: str, row: Printed) -> None:
    if row.operations is None:
        pytest.skip("the table has none")
    off = abs(shipped(table, row.trunk).operations / 1e9 / row.operations - 1)
    assert off < TABLES[table].tolerance / 100 or (row.cause and row.trunk in ("swin_s", "swin_b"))


def test_swin_s_in_mask_rcnn_costs_what_its_own_repository_prints() -> None:
    assert round(shipped("maskrcnn", "swin_s").operations / 1e9) == 359


@pytest.mark.parametrize(("table", "trunk"), COUNTER)
def test_with_norms_counts_are_those_of_the_tables_own_counter(table: str, trunk: str) -> None:
    parameters, operations = COUNTER[table, trunk]
    found = shipped(table, trunk)
    assert found.parameters == pytest.approx(parameters, abs=600 if table == "maskrcnn" else 0)
    if operations is not None:
        assert (found.operations + found.norms) / 1e9 == pytest.approx(operations, rel=1.2e-3 if table == "maskrcnn" else 1e-5)


# ---- what ships


def test_the_shipped_counts_are_of_the_sources_as_they_are_now() -> None:
    content = json.loads(gzip.decompress(SHIPPED.read_bytes()))
    assert content["sources"] == source_hash(), f"a source that decides counts was edited: run {ANEW}"
    assert list(content["rows"]) == [net.key for net in all_nets()]


@pytest.mark.parametrize("chosen", [slice(1), *(pytest.param(slice(part, None, 3), marks=pytest.mark.full) for part in range(3))])
def test_what_ships_is_what_counting_finds(chosen: slice) -> None:
    for net in all_nets()[chosen]:
        assert known(net) == count_net(net)


def test_counts_of_other_sources_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net("", "tiny_convnext", (64, 64))
    own = ship([net], tmp_path / "own.gz")
    monkeypatch.setattr(backbone_counts, "SHIPPED", own)
    assert known(net) == count_net(net)
    content = json.loads(gzip.decompress(own.read_bytes())) | {"sources": "0" * 64}
    old = tmp_path / "old.gz"
    old.write_bytes(gzip.compress(json.dumps(content).encode()))
    monkeypatch.setattr(backbone_counts, "SHIPPED", old)
    assert known(net) is None


# ---- the table


def test_trunks_grow_linearly_with_the_image_but_for_global_attention() -> None:
    found = backbone_table("ade20k", Silent(), timed=False)
    growth = {line.trunk: line.growth for line in found.sweep}
    assert growth.pop("deit_s_mln") > 3
    assert growth.pop("swin_t") == pytest.approx(1, abs=0.07)  # its windows' padding
    assert list(growth.values()) == pytest.approx([1] * 5, abs=1e-3)


def test_an_unknown_table_is_refused_with_those_there_are() -> None:
    with pytest.raises(DgbenchError, match="ade2k"):
        backbone_table("ade2k", Silent(), timed=False)


# ---- rules of counting


def test_pooling_of_boxes_costs_four_neighbours_of_every_sample() -> None:
    class Pooled(nn.Module):
        def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
            return roi_align(x, [boxes], 7, sampling_ratio=2)

    found = count(Pooled(), torch.empty(1, 8, 16, 16, device="meta"), torch.empty(5, 4, device="meta"))
    assert found.total.sampling == 4 * 2**2 * 5 * 8 * 7 * 7
    assert found.total.products == 0


def test_a_cross_scan_costs_the_documented_formula_four_times() -> None:
    found = count_net(Net("", "tiny_vmamba", (64, 64)))
    per_token = {24: 16 * 16, 48: 8 * 8, 96: 4 * 4, 192: 2 * 2}
    inner = {width: int(1.75 * width) for width in per_token}
    assert found.cost.scan == sum(2 * 4 * tokens * inner[width] * (9 + 1) for width, tokens in per_token.items())


# ---- times


def test_a_visit_measures_the_network_and_its_trunk() -> None:
    taken = Taken()
    taken.visit(Net("ade20k", "tiny_convnext", (64, 64), dim=8), torch.device("cpu"), torch.float32)
    whole, trunk = taken.measured("net"), taken.measured("trunk")
    assert whole is not None
    assert trunk is not None
    assert whole.ms.median > trunk.ms.median > 0
    assert whole.gib is None


@pytest.mark.gpu
@pytest.mark.parametrize("net", [Net("ade20k", "vmamba_t", (128, 256)), Net("maskrcnn", "nat_t", (256, 320))])
def test_a_visit_of_a_gpu_measures_its_memory(net: Net) -> None:
    taken = Taken()
    taken.visit(net, torch.device("cuda"), torch.bfloat16)
    whole, trunk = taken.measured("net"), taken.measured("trunk")
    assert whole is not None
    assert trunk is not None
    assert whole.ms.median > 0
    assert whole.gib is not None
    assert trunk.gib is not None

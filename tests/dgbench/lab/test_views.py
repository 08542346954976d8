"""What `dgbench lab` shows and measures, on a CPU, small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dgbench import cli
from dgbench.lab.fusing import fusion_view
from dgbench.lab.matrices import convolved_view, discretized_view, hippo_view
from dgbench.lab.scanning import scans_view
from dgbench.lab.speeds import Size, sized, speeds
from dgbench.progress import Silent

CPU = torch.device("cpu")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["lab", *arguments], prog_name="dgbench")


def test_hippo_shows_the_positive_matrix_and_the_eigenvalues_of_its_negative() -> None:
    done = json.loads(run("hippo", "--n", "3", "--json").stdout)
    np.testing.assert_allclose(done["matrix"], [[1, 0, 0], [3**0.5, 2, 0], [5**0.5, 15**0.5, 3]], rtol=1e-12)
    np.testing.assert_allclose(done["eigenvalues"], [-1, -2, -3], rtol=1e-9)


def test_hippo_explains_both_signs() -> None:
    text = run("hippo", "--n", "3").stdout
    assert "Positive form, as on slides" in text
    assert "takes -A" in text


def test_a_single_state_is_normal() -> None:
    assert "is not normal" in run("hippo", "--n", "2").stdout
    assert "is not normal" not in run("hippo", "--n", "1").stdout


def test_a_step_at_which_a_rule_explodes_is_told() -> None:
    titles = [line for line in run("discretize", "--n", "3", "--step", "1").stdout.splitlines() if ", step 1:" in line]
    assert [line.split(",")[0] for line in titles if "explodes" in line] == ["euler"]


def test_more_states_remember_more() -> None:
    errors = [one.error for one in hippo_view(3).memories]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


def test_errors_fall_with_the_step_as_the_order_of_each_rule_says() -> None:
    first, second = discretized_view(3, 0.1).errors[-2:]
    ratios = {name: first.errors[name] / second.errors[name] for name in ("bilinear", "euler", "mamba")}
    assert ratios == pytest.approx({"bilinear": 4, "euler": 2, "mamba": 2}, rel=0.1)
    assert second.errors["zoh"] < 1e-12


def test_recurrence_and_convolution_stand_side_by_side_and_agree() -> None:
    found = convolved_view(4, 20, 0.1)
    assert found.error < 1e-13
    np.testing.assert_allclose(found.by_recurrence, np.convolve(found.u, found.kernel)[:20], atol=1e-12)


@pytest.mark.parametrize("elements", [2, 4, 5])
def test_each_scan_ends_with_all_that_came_before_in_every_element(elements: int) -> None:
    found = scans_view([4], elements=elements, device=CPU)
    last = {one.scan: one.holds for one in found.rounds}
    expected = ("0", *(f"0..{t}" for t in range(1, elements)))
    assert last == dict.fromkeys(("sequential", "blelloch", "chunked"), expected)


def test_work_and_depth_are_counted_at_every_length() -> None:
    found = scans_view([8, 16], chunk=4, device=CPU)
    counted = {(one.scan, one.length): (one.work, one.depth) for one in found.timed}
    assert counted["sequential", 16] == (15, 15)
    assert counted["blelloch", 16] == (15 + 15 + 16, 4 + 4 + 1)
    assert counted["chunked", 16] == (12 + 2 + 12, 3 + 2 + 1)


def test_the_fused_scan_moves_less_and_computes_the_same() -> None:
    tree, chunks, fused = fusion_view((1, 32, 8, 4), device=CPU).forms
    assert fused.bytes < tree.bytes == chunks.bytes
    assert max(chunks.error, fused.error) < 1e-5


def test_a_scan_that_is_no_fused_kernel_is_not_called_one() -> None:
    assert [one.name for one in fusion_view((1, 8, 2, 2), device=CPU, backend="torch").forms][-1] == "in blocks, torch"


def test_what_exceeds_the_memory_is_told_with_what_makes_less() -> None:
    done = run("fusion", "--shape", "1000", "1000000", "1000", "1", "--device", "cpu")
    assert done.exit_code == 1
    assert "out of memory" in done.stderr
    assert "give a smaller --shape" in done.stderr


def test_the_memory_of_mamba_is_constant_and_a_cache_grows_with_the_length() -> None:
    size = Size(lengths=(8,), generated=(4, 8), dim=64, depth=2, tokens=8, batch=1, dtype="fp32")
    found = speeds(size, device=CPU, progress=Silent(), seconds=1e-3)
    memory = {(one.model, one.length): one.memory_mib for one in found.generation}
    assert memory["Mamba", 8] == memory["Mamba", 4]
    assert memory["Transformer", 8] == 2 * memory["Transformer", 4]
    assert len({one.layer for one in found.training}) == 4


def test_at_full_width_the_generating_models_differ_by_a_few_percent() -> None:
    from dgbench.lab.speeds import _MambaStack, _Transformer

    with torch.device("meta"):
        counts = [sum(p.numel() for p in model.parameters()) for model in (_MambaStack(1024, 2), _Transformer(1024, 1))]
    assert counts[0] == pytest.approx(counts[1], rel=0.06)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"dim": 100}, "no heads of 64"), ({"depth": 3}, "no Transformer of equal size"), ({"dtype": "int8"}, "int8")],
)
def test_sizes_that_cannot_be_timed_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        sized(CPU, given)


@pytest.mark.parametrize(
    "command",
    [
        "hippo --n 2",
        "hippo --n 20",
        "discretize --n 2",
        "conv --length 4",
        "conv --length 100",
        "scan --length 4 8",
        "speed --length 8 --behind 4 --dim 64 --depth 2 --tokens 8 --batch 1 --seconds 0.001 --device cpu --quiet",
    ],
)
def test_a_command_draws_its_picture(command: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.svg"
    done = run(*command.split(), "--plot", str(picture))
    assert done.exit_code == 0, done.stderr
    assert picture.read_text().count("<path") > 10


def test_a_picture_of_another_kind_is_refused_before_the_work() -> None:
    done = run("hippo", "--plot", "memory.gif")
    assert done.exit_code == 2
    assert "must end in .png, .svg, .pdf" in done.stderr

"""Layers against numbers recorded from the authors' code (tests/goldens/README.md, `state_spaces`)."""

from __future__ import annotations

import math

import pytest
import torch
from golden_files import noise, numbers
from named_weights import named_tensor
from torch import Tensor

from mfuser.ops import selective_scan
from mfuser.ssm import hippo
from mfuser.ssm.hyena import HyenaOperator
from mfuser.ssm.s4d import S4D
from mfuser.ssm.ungated import Ungated

GOLDEN = numbers("state_spaces")


def named(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(named_tensor(name, shape))


def error(actual: Tensor, name: str) -> float:
    expected = GOLDEN[name].double()
    assert actual.shape == expected.shape
    return float((actual.detach().double() - expected).norm() / expected.norm())


@pytest.fixture
def s4d() -> S4D:
    layer = S4D(4, 16, "lin")
    layer.log_dt.data = 0.5 * noise("s4d.log_dt", 4) + math.log(0.01)
    layer.C.data, layer.D.data = noise("s4d.C", 4, 8, 2), noise("s4d.D", 4)
    return layer


def test_legs_is_the_authors_matrix() -> None:
    A, B = hippo.legs(8)
    assert error(A, "legs.A") < 1e-14
    assert error(B, "legs.B") < 1e-14
    assert error(hippo.low_rank(8), "legs.P") < 1e-14


def test_its_normal_part_has_the_authors_eigenvalues() -> None:
    found = hippo.diagonalized(8).eigenvalues
    assert torch.equal(found.real, torch.full((4,), -0.5, dtype=torch.float64))
    expected = GOLDEN["legs.nplr_imag"].sort().values
    torch.testing.assert_close(found.imag, expected, rtol=1e-12, atol=0)


def test_s4d_has_the_authors_kernel_and_convolution(s4d: S4D) -> None:
    u = noise("s4d.u", 2, 4, 64).mT
    assert error(s4d.kernel(64), "s4d.kernel") < 2e-6
    assert error((s4d(u) - s4d.D * u).mT, "s4d.ssm_out") < 2e-6


def test_the_block_without_a_gate_is_the_authors_s4d_layer(s4d: S4D) -> None:
    block = Ungated(4, s4d, glu=True)
    block.output_linear.weight.data = named("output_linear.0.weight", 8, 4, 1)[..., 0]
    block.output_linear.bias.data = named("output_linear.0.bias", 8)
    assert error(block(noise("s4d.u", 2, 4, 64).mT).mT, "s4d.out") < 2e-6


def test_the_selective_scan_is_that_of_mambas_reference() -> None:
    y, state = selective_scan(
        noise("scan.u", 2, 6, 24).mT,
        (0.5 * noise("scan.delta", 2, 6, 24) + 3).mT,
        -torch.exp(named("A_log", 6, 4)),
        noise("scan.B", 2, 4, 24).mT,
        noise("scan.C", 2, 4, 24).mT,
        named("D", 6),
        z=noise("scan.z", 2, 6, 24).mT,
        delta_bias=named("dt_proj.bias", 6),
        delta_softplus=True,
        return_final_state=True,
    )
    assert error(y.mT, "scan.out") < 1e-6
    assert error(state, "scan.last_state") < 1e-6


def test_hyena_has_the_authors_filter_and_output() -> None:
    operator = HyenaOperator(8, 64, 16)
    for key, parameter in operator.named_parameters():
        values = torch.ones(1) if key.endswith("freq") else named(key, *parameter.shape)
        parameter.data = values.expand_as(parameter).clone()
    assert error(operator.filter_fn.kernel(64).mT[None], "hyena.filter") < 1e-6
    assert error(operator(noise("hyena.x", 2, 64, 8)), "hyena.out") < 1e-6

"""Each layer in its forms: as a recurrence and as a convolution, as a loop and as a tree, token by token and at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, signal, special
from torch import Tensor

from mfuser.ssm import hippo, scans
from mfuser.ssm.convolution import convolve, kernel, recurrence
from mfuser.ssm.discretize import diagonal, discretized
from mfuser.ssm.h3 import Shift
from mfuser.ssm.hyena import LongConvolution
from mfuser.ssm.mamba import Mamba, from_mamba_ssm, to_mamba_ssm
from mfuser.ssm.network import ARCHITECTURES, LAYERS, Network
from mfuser.ssm.s4 import S4
from mfuser.ssm.s4d import INITS, S4D, spectrum
from mfuser.ssm.s6 import S6


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=rtol, atol=rtol)


# ---- HiPPO


def test_the_slides_matrix_for_three_states_is_minus_ours() -> None:
    A, B = hippo.legs(3)
    expected = [[1, 0, 0], [3**0.5, 2, 0], [5**0.5, 15**0.5, 3]]
    close(-A, torch.tensor(expected, dtype=torch.float64))
    close(B, torch.tensor([1, 3**0.5, 5**0.5], dtype=torch.float64))


def test_the_diagonal_form_gives_the_matrix_back() -> None:
    A, B = hippo.legs(12)
    eigenvalues, P, into, V = hippo.diagonalized(12)
    half = V @ (torch.diag(eigenvalues) - P[:, None] * P.conj()) @ V.mH
    eigenvalues, P, V, into = (torch.cat([x, x.conj()], -1) for x in (eigenvalues, P, V, into))
    whole = V @ (torch.diag(eigenvalues) - P[:, None] * P.conj()) @ V.mH
    assert half.shape == whole.shape
    close(whole.real, A)
    close((V @ into).real, B)


def test_the_state_holds_the_legendre_coefficients_of_what_was_heard() -> None:
    def heard(x: float) -> float:
        return float(np.exp(-x) * np.sin(5 * x))

    length = 4000
    places = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    state = hippo.remembered(torch.tensor([heard(float(x)) for x in places], dtype=torch.float64), 6)[-1]
    for n, found in enumerate(state):
        product = integrate.quad(lambda x, n=n: heard(x) * special.eval_legendre(n, 2 * x - 1), 0, 1)[0]
        assert float(found) == pytest.approx((2 * n + 1) ** 0.5 * product, abs=2e-3)


def test_a_polynomial_is_reconstructed_from_as_many_coefficients() -> None:
    found = hippo.reconstructed(torch.tensor([0.5, 0.0, 0.2], dtype=torch.float64), 9)
    x = np.linspace(-1, 1, 9)
    expected = 0.5 + 0.2 * 5**0.5 * special.eval_legendre(2, x)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


# ---- discretisation


@pytest.mark.parametrize("rule", ["zoh", "bilinear", "euler"])
def test_a_dense_system_is_discretised_as_by_scipy(rule: str) -> None:
    A, B = hippo.legs(5)
    system = (A.numpy(), B.numpy()[:, None], np.ones((1, 5)), np.zeros((1, 1)))
    expected = signal.cont2discrete(system, 0.05, rule)
    A_bar, B_bar = discretized(A, B, 0.05, rule)
    np.testing.assert_allclose(A_bar, expected[0], atol=1e-12)
    np.testing.assert_allclose(B_bar, expected[1][:, 0], atol=1e-12)


@pytest.mark.parametrize("rule", ["zoh", "bilinear", "euler", "mamba"])
def test_a_diagonal_system_is_discretised_as_a_dense_one(rule: str) -> None:
    poles = torch.tensor([-0.5, -2.0, -3.5], dtype=torch.float64)
    B = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    A_bar, B_bar = discretized(torch.diag(poles), B, 0.1, rule)
    decay, factor = diagonal(poles, torch.tensor(0.1, dtype=torch.float64), rule)
    close(torch.diag(decay), A_bar)
    close(factor * B, B_bar)


# ---- recurrence and convolution


def test_a_systems_recurrence_is_its_convolution() -> None:
    A, B = discretized(*hippo.legs(4), 0.1)
    C, u = torch.randn(4, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    by_kernel = np.convolve(u, kernel(A, B, C, 50))[:50]
    close(recurrence(A, B, C, u), torch.from_numpy(by_kernel))
    close(convolve(u[None, :, None], kernel(A, B, C, 50)[None])[0, :, 0], torch.from_numpy(by_kernel))


@pytest.mark.parametrize("init", INITS)
def test_s4d_is_the_same_as_convolution_and_as_recurrence(init: str) -> None:
    layer, u = S4D(3, 8, init).double(), torch.randn(2, 37, 3, dtype=torch.float64)
    close(layer(u), layer.recurrent(u))


def test_s4d_in_single_precision_agrees_with_itself_to_2e_6() -> None:
    layer, u = S4D(8, 64), torch.randn(2, 128, 8)
    by_convolution, by_recurrence = layer(u), layer.recurrent(u)
    assert float((by_convolution - by_recurrence).detach().norm() / by_recurrence.detach().norm()) < 2e-6


@pytest.mark.parametrize("length", [1, 31, 64])
def test_s4_is_the_same_as_convolution_and_as_recurrence(length: int) -> None:
    layer, u = S4(3, 8).double(), torch.randn(2, length, 3, dtype=torch.float64)
    close(layer(u), layer.recurrent(u))


def test_the_shift_of_h3_is_a_filter_of_few_taps() -> None:
    layer, u = Shift(1, 5).double(), torch.randn(1, 20, 1, dtype=torch.float64)
    taps = layer.C.detach()[0].numpy()
    expected = signal.lfilter(taps, [1.0], u[0, :, 0]) + layer.D.item() * u[0, :, 0].numpy()
    np.testing.assert_allclose(layer(u).detach()[0, :, 0], expected, atol=1e-12)


@pytest.mark.parametrize(("init", "first", "second"), [("lin", 0.0, np.pi), ("inv", 64 / np.pi * 63, 64 / np.pi * (64 / 3 - 1))])
def test_the_spectrum_of_s4d_has_the_papers_frequencies(init: str, first: float, second: float) -> None:
    found = spectrum(init, 64)
    assert found[:2].imag.tolist() == pytest.approx([first, second])
    assert found.real.unique().tolist() == [-0.5]


def test_a_sequence_longer_than_hyenas_filter_is_refused() -> None:
    with pytest.raises(ValueError, match="a sequence of 9 tokens, but the filter was made for 8"):
        LongConvolution(2, 8)(torch.zeros(1, 9, 2))


# ---- scans


def scanned(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients, inputs, and what SciPy's filter of changing coefficients would be: a loop in Python floats."""
    a, b = torch.rand(length, 2, dtype=torch.float64), torch.randn(length, 2, dtype=torch.float64)
    rows = np.zeros((length, 2))
    for t in range(length):
        rows[t] = a[t].numpy() * (rows[t - 1] if t else 0) + b[t].numpy()
    return a, b, torch.from_numpy(rows)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 33])
def test_scans_in_order_as_a_tree_and_in_chunks_agree(length: int) -> None:
    a, b, expected = scanned(length)
    close(scans.sequential(a, b), expected)
    close(scans.blelloch(a, b), expected)
    for chunk in (1, 4, 64):
        close(scans.chunked(a, b, chunk), expected)


def test_a_tree_of_four_combines_these_steps() -> None:
    a, b, _ = scanned(4)
    tally = scans.Tally(traced=True)
    scans.blelloch(a, b, tally)
    assert tally.rounds[:3] == [[("up", 0, 1), ("up", 2, 3)], [("up", 1, 3)], [("down", 1, 3)]]
    assert (tally.work, tally.depth) == (3 + 3 + 4, 2 + 2 + 1)


def test_a_tree_is_shallow_and_a_loop_does_least() -> None:
    a, b, _ = scanned(256)
    loop, tree, chunks = (scans.Tally() for _ in range(3))
    scans.sequential(a, b, loop)
    scans.blelloch(a, b, tree)
    scans.chunked(a, b, 16, chunks)
    assert (loop.work, loop.depth) == (255, 255)
    assert (tree.work, tree.depth) == (2 * 255 + 256, 2 * 8 + 1)
    assert tree.depth < chunks.depth == 15 + 14 + 1 < loop.depth


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_s6_is_the_same_fused_as_a_loop_and_as_a_tree(mode: str) -> None:
    layer, u = S6(6, 4).double(), torch.randn(2, 21, 6, dtype=torch.float64, requires_grad=True)
    expected = layer(u)
    (of_fused,) = torch.autograd.grad(expected.square().sum(), u)
    layer.mode = mode
    found = layer(u)
    close(found, expected)
    close(torch.autograd.grad(found.square().sum(), u)[0], of_fused)


# ---- blocks


def test_a_mamba_block_generates_what_it_computes_at_once() -> None:
    block, u = Mamba(8, S6(16, 4, 1)).double(), torch.randn(2, 11, 8, dtype=torch.float64)
    memory, found = block.first_state(2), []
    memory = tuple(part.double() for part in memory)  # type: ignore[assignment]
    for token in u.unbind(1):
        out, memory = block.step(token, memory)
        found.append(out)
    close(torch.stack(found, 1), block(u))


def test_mamba_ssms_layer_loads_into_ours_and_back() -> None:
    # names and shapes of mamba_ssm.Mamba(d_model=64, d_state=16, d_conv=4, expand=2)
    shapes = {
        "A_log": (128, 16),
        "D": (128,),
        "in_proj.weight": (256, 64),
        "conv1d.weight": (128, 1, 4),
        "conv1d.bias": (128,),
        "x_proj.weight": (36, 128),
        "dt_proj.weight": (128, 4),
        "dt_proj.bias": (128,),
        "out_proj.weight": (64, 128),
    }
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    back = to_mamba_ssm(from_mamba_ssm(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert sum(value.numel() for value in state.values()) == 32_640


def test_a_mamba_ssm_layer_with_other_tensors_is_refused_by_their_names() -> None:
    state = to_mamba_ssm(Mamba(8, S6(16, 4, 1))) | {"in_proj.bias": torch.zeros(32)}
    with pytest.raises(ValueError, match=r"in_proj\.bias missing or unknown"):
        from_mamba_ssm(state)


@pytest.mark.gpu
def test_a_mamba_block_is_mamba_ssms() -> None:
    theirs = pytest.importorskip("mamba_ssm").Mamba(64).cuda()
    ours, u = from_mamba_ssm(theirs.state_dict()).cuda(), torch.randn(2, 100, 64, device="cuda")
    torch.testing.assert_close(ours(u), theirs(u), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer", LAYERS)
def test_no_network_reads_the_future(architecture: str, layer: str) -> None:
    network = Network(architecture, layer, vocab=8, dim=8, length=24).eval()
    tokens = torch.randint(8, (1, 24))
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % 8
    before, after = network(tokens), network(changed)
    close(after[:, :15], before[:, :15], 1e-4)
    assert not torch.allclose(after[:, 15:], before[:, 15:], atol=1e-4)
    assert torch.equal(network(tokens, read=3), before[:, -3:])


def test_the_network_of_mamba_has_the_tasks_size() -> None:
    assert sum(p.numel() for p in Network("mamba", "s6").parameters()) == 67_520


def test_the_steps_of_a_new_network_are_those_that_mamba_starts_with() -> None:
    for block in Network("mamba", "s6").mixers:
        steps = torch.nn.functional.softplus(block.layer.dt_proj.bias.detach())
        assert float(steps.min()) >= 1e-4
        assert float(steps.max()) <= 0.1001

"""Counts of operators against formulas written by hand, and operators that are not counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from counting import Calls, counted, meta, only
from torch import Tensor, nn
from torch.nn import functional as F

from dgbench.cost.count import CONVENTIONS, Cost, CountError, count
from mfuser.ops import ms_deform_attn, selective_scan

# ---- operators, by hand


@pytest.mark.parametrize(
    ("module", "shape", "products"),
    [
        (nn.Linear(8, 5), (8,), 8 * 5),
        (nn.Linear(8, 5, bias=False), (2, 3, 4, 8), 24 * 8 * 5),
        (nn.Conv1d(6, 6, 3, padding=1, groups=6, bias=False), (2, 6, 10), 2 * 10 * 6 * 3),
        (nn.Conv1d(6, 4, 5), (2, 6, 10), 2 * 6 * 4 * 6 * 5),  # six places are left of ten
        (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 11, 12), 2 * (6 * 6) * 8 * 6 * 9),
        (nn.Conv2d(6, 8, (3, 4), padding="same", dilation=2), (2, 6, 10, 12), 2 * (10 * 12) * 8 * 6 * 12),
        (nn.Conv2d(6, 8, 3, padding="valid"), (2, 6, 10, 12), 2 * (8 * 10) * 8 * 6 * 9),
        (nn.Conv2d(6, 8, 3, groups=2), (1, 6, 5, 5), (3 * 3) * 8 * 3 * 9),
        (nn.Conv3d(2, 3, 3), (1, 2, 4, 5, 6), (2 * 3 * 4) * 3 * 2 * 27),
        # a transposed convolution multiplies every input place with the whole kernel
        (nn.ConvTranspose1d(6, 8, 3, stride=2, padding=1), (2, 6, 10), 2 * 10 * 6 * 8 * 3),
        (nn.ConvTranspose2d(6, 8, 2, 2), (1, 6, 5, 7), (5 * 7) * 6 * 8 * 4),
        (nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 6, 5, 7), 2 * (5 * 7) * 3 * 8 * 9),
        (nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.Softmax(-1), nn.Dropout(), nn.RMSNorm(8)), (3, 8), 0),
        (nn.Sequential(nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.MaxPool2d(2), nn.ReLU()), (1, 8, 4, 4), 0),
        # q, k, v and output, and two products of nine tokens with nine, although torch would fuse them all
        (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (2, 9, 16), 2 * (9 * 16 * (4 * 16 + 2 * 32) + 2 * 9 * 9 * 16)),
    ],
)
def test_modules_cost_what_their_sizes_say(module: nn.Module, shape: tuple[int, ...], products: int) -> None:
    assert only(module, *shape) == Cost(products)


@pytest.mark.parametrize(
    ("equation", "shapes", "products"),
    [
        ("ab,bc->ac", [(3, 5), (5, 7)], 3 * 5 * 7),
        ("bkd,bdhw->bkhw", [(2, 19, 256), (2, 256, 36, 35)], 2 * 19 * 256 * 36 * 35),
        ("bqk,bqhw->bkhw", [(2, 19, 20), (2, 19, 144, 144)], 2 * 19 * 20 * 144 * 144),
        ("b l d, b k d -> b k l", [(2, 1296, 768), (2, 19, 768)], 2 * 1296 * 19 * 768),
        ("abx,bc->ac", [(3, 5, 9), (5, 7)], 3 * 5 * 7),  # x is summed before
        ("bd,bd->b", [(4, 1000), (4, 1000)], 4 * 1000),
        ("ab->ba", [(3, 5)], 0),
        ("ab->a", [(3, 5)], 0),
    ],
)
def test_einsum_is_exact(equation: str, shapes: list[tuple[int, ...]], products: int) -> None:
    assert counted(lambda *x: torch.einsum(equation, *x), *(meta(*shape) for shape in shapes)) == Cost(products)


def test_matrix_products_are_exact_also_where_they_are_repeated() -> None:
    assert counted(torch.matmul, meta(3, 5), meta(5, 7)) == Cost(3 * 5 * 7)
    assert counted(torch.bmm, meta(4, 3, 5), meta(4, 5, 7)) == Cost(4 * 3 * 5 * 7)
    assert counted(torch.matmul, meta(4, 3, 5), meta(5, 7)) == Cost(4 * 3 * 5 * 7)
    assert counted(torch.matmul, meta(5, 1, 3, 8), meta(2, 8, 4)) == Cost(5 * 2 * 3 * 8 * 4)
    assert counted(torch.addmm, meta(7), meta(3, 5), meta(5, 7)) == Cost(3 * 5 * 7)


def test_attention_is_two_products_of_tokens_with_tokens() -> None:
    batch, heads, queries, keys, dim, out = 2, 4, 9, 7, 16, 24
    expected = Cost(batch * heads * queries * keys * (dim + out))
    shapes = (meta(batch, heads, queries, dim), meta(batch, heads, keys, dim), meta(batch, heads, keys, out))
    assert counted(F.scaled_dot_product_attention, *shapes) == expected
    assert counted(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, *shapes) == expected
    masked = counted(
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask), *shapes, meta(batch, heads, queries, keys)
    )
    assert masked == expected


@pytest.mark.parametrize(
    ("mode", "shape", "size", "neighbours"),
    [
        ("nearest", (2, 3, 5, 6), (7, 9), 0),
        ("linear", (2, 3, 5), (9,), 2),
        ("bilinear", (2, 3, 5, 6), (7, 9), 4),
        ("bicubic", (2, 3, 5, 6), (7, 9), 16),
        ("trilinear", (2, 3, 5, 5, 5), (7, 8, 9), 8),
    ],
)
def test_interpolation_costs_its_neighbours(mode: str, shape: tuple[int, ...], size: tuple[int, ...], neighbours: int) -> None:
    out = torch.Size((2, 3, *size)).numel()
    assert counted(lambda x: F.interpolate(x, size, mode=mode), meta(*shape)) == Cost(sampling=neighbours * out)


@pytest.mark.parametrize(("mode", "neighbours"), [("nearest", 0), ("bilinear", 4), ("bicubic", 16)])
def test_grid_sampling_costs_its_neighbours(mode: str, neighbours: int) -> None:
    cost = counted(lambda x, grid: F.grid_sample(x, grid, mode=mode, align_corners=False), meta(2, 3, 5, 6), meta(2, 4, 7, 2))
    assert cost == Cost(sampling=neighbours * 2 * 3 * 4 * 7)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_the_scan_is_a_number_of_its_own(gated: bool, skip: bool) -> None:
    batch, length, dim, state = 2, 30, 12, 16
    wide, narrow = meta(batch, length, dim), meta(batch, length, state)

    def scan(u: Tensor, B: Tensor) -> Tensor:
        return selective_scan(
            u,
            u,
            torch.empty(dim, state, device="meta"),
            B,
            B,
            torch.empty(dim, device="meta") if skip else None,
            z=u if gated else None,
            delta_softplus=True,
            backend="torch",
        )

    cost = counted(scan, wide, narrow)
    tokens = batch * length * dim
    assert (cost.products, cost.sampling) == (0, 0)
    # 9 B L D N + B L D, as mamba's issue 110 and VMamba have it, and one B L D more with a gate
    assert cost.scan == 9 * tokens * state + tokens + gated * tokens
    assert cost.skip == tokens
    assert CONVENTIONS["mac"].total(cost) == 0
    assert CONVENTIONS["flop"].total(cost) == cost.scan


def test_deformable_attention_is_four_neighbours_and_a_weight_of_each_sampled_channel() -> None:
    batch, heads, width, queries, points = 2, 8, 32, 50, 4
    sizes = [(8, 10), (4, 5), (2, 2)]
    value = meta(batch, sum(h * w for h, w in sizes), heads, width)
    places = meta(batch, queries, heads, len(sizes), points, 2)
    weights = meta(batch, queries, heads, len(sizes), points)
    cost = counted(lambda v, p, w: ms_deform_attn(v, sizes, p, w, backend="torch"), value, places, weights)
    assert cost == Cost(sampling=(4 + 1) * batch * queries * heads * len(sizes) * points * width)


# ---- what cannot be counted


@torch.library.custom_op("dgbench_tests::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x @ x


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.ReLU(), Calls(mystery))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x))


def test_an_operator_that_is_not_counted_is_named_with_its_module() -> None:
    with pytest.raises(CountError, match="inner.1: not counted: `dgbench_tests::mystery`") as error:
        count(Deep().to("meta"), meta(4, 4))
    assert "dgbench/cost/count.py" in error.value.hint


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return 2 * x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


def test_an_autograd_function_is_not_a_silent_zero() -> None:
    with pytest.raises(CountError, match="Doubled"):
        counted(Doubled.apply, meta(4, 4), meta(4, 4))


@pytest.mark.parametrize(
    ("function", "shapes", "named"),
    [
        (torch.mv, [(3, 4), (4,)], "aten::mv"),
        (torch.matmul, [(3, 4), (4,)], "aten::mv"),
        (torch.matmul, [(4,), (4,)], "aten::dot"),
        (torch.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)], "aten::baddbmm"),
        (torch.outer, [(3,), (4,)], "aten::outer"),
        (torch.cdist, [(3, 4), (3, 4)], "aten::cdist"),
        (torch.linalg.inv, [(4, 4)], "aten::linalg_inv"),
        (lambda x: torch.fft.hfft(x), [(3, 8)], "aten::fft_hfft"),
        (lambda x: F.unfold(x, 3), [(1, 3, 8, 8)], "aten::im2col"),
        (torch.tensordot, [(3, 4, 5), (4, 5, 6)], "aten::tensordot"),
        (lambda a, b: torch.einsum("...ab,bc->...ac", a, b), [(2, 3, 4), (4, 5)], "...ab,bc->...ac"),
        (lambda a, b, c: torch.einsum("ab,bc,cd->ad", a, b, c), [(2, 3), (3, 4), (4, 5)], "ab,bc,cd->ad"),
    ],
)
def test_what_has_no_formula_is_an_error_and_not_a_zero(
    function: Callable[..., Any], shapes: list[tuple[int, ...]], named: str
) -> None:
    # beside something that is counted, which must not hide it
    with pytest.raises(CountError) as error:
        counted(lambda *x: (function(*x[:-1]), x[-1] @ x[-1]), *(meta(*shape) for shape in shapes), meta(2, 2))
    assert f"`{named}`" in error.value.message


@pytest.mark.parametrize("module", [nn.LSTM(8, 5), nn.GRUCell(8, 5), nn.Bilinear(4, 5, 6)])
def test_layers_without_a_formula_are_errors(module: nn.Module) -> None:
    shapes = [(3, 4), (3, 5)] if isinstance(module, nn.Bilinear) else [(3, 8)]
    with pytest.raises(CountError, match="parts.0: not counted: `aten::"):
        counted(lambda *x: x[-1](*x[:-1]), *(meta(*shape) for shape in shapes), parts=(module,))


def test_what_is_computed_and_not_returned_is_an_error_with_both_numbers() -> None:
    def wasteful(x: Tensor, used: nn.Module, unused: nn.Module) -> Tensor:
        unused(x)
        return used(x)

    # twice a product: 2 * 3 * 8 * 5, and 2 * 3 * 8 * 100 more
    with pytest.raises(CountError, match="Calls: fvcore counts 240 FLOP and torch 5,040") as error:
        counted(wasteful, meta(3, 8), parts=(nn.Linear(8, 5), nn.Linear(8, 100)))
    assert "does not return" in error.value.hint


# ---- Fourier transforms: 5 N log2 N operations of N complex numbers, half of that between real numbers and a half spectrum

FULL_FFT = 2 * 3 * int(2.5 * (8 * 16) * 7)  # products: 128 numbers in each of 2 x 3 planes


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (torch.fft.fft2, FULL_FFT),
        (lambda x: torch.fft.ifft2(torch.complex(x, x)), FULL_FFT),
        (lambda x: torch.fft.fft2(x, s=(4, 4)), 2 * 3 * int(2.5 * 16 * 4)),
        (torch.fft.rfft2, FULL_FFT // 2),
        (lambda x: torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho"), s=x.shape[-2:]), FULL_FFT),
        (lambda x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2), FULL_FFT),
        (lambda x: torch.fft.fft(x, dim=1), 2 * 128 * round(2.5 * 3 * 1.584962500721156)),
        (lambda x: torch.fft.irfft(torch.fft.rfft(x)), 2 * 3 * 8 * int(2.5 * 16 * 4)),
        (lambda x: torch.fft.rfft(x, n=32), 2 * 3 * 8 * int(1.25 * 32 * 5)),
        (lambda x: torch.fft.fftn(x, dim=(0, 2, 3)), 3 * int(2.5 * 256 * 8)),
        (lambda x: torch.fft.fftshift(torch.fft.fft2(x)).abs(), FULL_FFT),
    ],
)
def test_fourier_transforms_by_hand(function: Callable[..., Any], products: int) -> None:
    found = counted(function, meta(2, 3, 8, 16)).products
    assert found == pytest.approx(products, rel=0.06 if products == 2 * 128 * 12 else 0)


@pytest.mark.parametrize(
    "free",
    [
        F.instance_norm,
        nn.InstanceNorm2d(4, affine=True),
        nn.BatchNorm2d(4),
        nn.MaxPool2d(3, 2, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.ReflectionPad2d(1),
        lambda x: (x - x.mean((2, 3), keepdim=True)) / x.var((2, 3), keepdim=True).add(1e-5).sqrt(),
        lambda x: x[torch.randperm(len(x), device="cpu").tolist()],
        lambda x: F.normalize(x.flatten(2), dim=1).sort(-1).values,
    ],
)
def test_norms_pooling_and_exchanged_statistics_cost_nothing(free: Callable[..., Tensor]) -> None:
    parts = (free,) if isinstance(free, nn.Module) else ()
    assert counted(lambda x, *_: free(x), meta(2, 4, 8, 8), parts=parts) == Cost()


def test_a_covariance_costs_its_product() -> None:
    assert counted(lambda x: x.flatten(2) @ x.flatten(2).mT, meta(2, 4, 8, 8)).products == 2 * 4 * 4 * 64


# ---- conventions


def test_conventions_by_hand() -> None:
    cost = Cost(products=1000, sampling=30, scan=50, skip=7)
    totals = {name: convention.total(cost) for name, convention in CONVENTIONS.items()}
    assert totals == {"mac": 1030, "flop": 2 * 1030 + 50, "paper": 2 * 2 * (1000 + 7)}
    assert (cost + cost) == cost * 2 == Cost(2000, 60, 100, 14)


# ---- what counts do not depend on


def test_counting_is_of_evaluation_also_for_a_model_in_training() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.extra = nn.Linear(4, 4), nn.Linear(4, 400)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (self.main(x), self.extra(x)) if self.training else (self.main(x),)

    assert count(Auxiliary().to("meta"), meta(1, 4)).total == Cost(16)


def test_counting_leaves_no_mode_behind() -> None:
    only(nn.Linear(3, 3), 3)
    grown = nn.Linear(3, 3)
    out = grown(torch.ones(2, 3))
    assert out.requires_grad
    assert not torch.jit.is_tracing()
    assert torch.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).item() == 9


@pytest.mark.parametrize("known", [True, False])
def test_a_model_is_left_in_the_modes_that_it_was_in(known):
    frozen, trained = nn.Sequential(nn.Linear(4, 4), nn.Dropout()), nn.Linear(4, 4)
    model = Calls(lambda x, a, b: b(a(x)) if known else torch.linalg.inv(b(a(x))), frozen, trained).to("meta").train()
    frozen.eval()
    before = [module.training for module in model.modules()]
    if known:
        count(model, meta(4, 4))
    else:
        with pytest.raises(CountError):
            count(model, meta(4, 4))
    assert [module.training for module in model.modules()] == before
    assert True in before
    assert False in before

"""Trunks of four maps: strides and channels, their layers against plain references, ERM on top of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mfuser
from dgbench.cost.counted import Subject, made_now
from dgbench.recipe import load_recipe
from mfuser.segmentor import Batch
from mfuser.towers.nat import NeighbourhoodAttention
from mfuser.towers.pyramid import TRUNKS, trunk
from mfuser.towers.vim import Vim, VimBlock
from mfuser.towers.vmamba import CrossScan, VMamba

TINY = ("tiny_swin", "tiny_convnext", "tiny_vmamba", "tiny_vim")


@pytest.mark.parametrize("name", [name for name in TRUNKS if not name.endswith(("_s", "_b", "101_deep"))])
def test_maps_have_strides_4_to_32_and_the_stated_channels(name: str) -> None:
    with torch.device("meta"):
        model = trunk(name, (224, 448)).eval()
        maps = list(model(torch.empty(1, 3, 224, 448)))
    assert [tuple(x.shape) for x in maps] == [
        (1, c, 224 // s, 448 // s)
        for c, s in zip(model.channels, (4, 8, 16, 32), strict=True)  # type: ignore[arg-type]
    ]


def test_an_unknown_trunk_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="unknown trunk `vmamba`; choose from .*vmamba_t"):
        trunk("vmamba", (64, 64))


# ---- NAT


def nearest(side: int, kernel: int, own: int) -> list[int]:
    """The indices of the `kernel` places that the paper lets a place attend to."""
    first = min(max(own - kernel // 2, 0), side - kernel)
    return list(range(first, first + kernel))


def test_neighbourhood_attention_is_attention_masked_to_the_nearest_window() -> None:
    torch.manual_seed(0)
    height, width, kernel, heads, dim = 6, 5, 3, 2, 8
    layer = NeighbourhoodAttention(dim, heads, kernel).double()
    nn.init.normal_(layer.rpb)
    x = torch.rand(2, height, width, dim, dtype=torch.float64)
    bias = torch.full((heads, height * width, height * width), -torch.inf, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            for key_row in nearest(height, kernel, row):
                for key_column in nearest(width, kernel, column):
                    place = layer.rpb[:, key_row - row + kernel - 1, key_column - column + kernel - 1]
                    bias[:, row * width + column, key_row * width + key_column] = place
    query, key, value = layer.qkv(x).flatten(1, 2).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    expected = layer.proj(mixed.transpose(1, 2).flatten(2)).unflatten(1, (height, width))
    torch.testing.assert_close(layer(x), expected)


def test_a_map_smaller_than_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="a map of 2x9 is smaller than the 7x7 window"):
        NeighbourhoodAttention(8, 2)(torch.rand(1, 2, 9, 8))


# ---- VMamba and Vim


def recurrence(scan: nn.Module, x: Tensor) -> Tensor:
    """The selective scan of Gu and Dao's algorithm 2, step by step."""
    rank, B, C = scan.x_proj(x).split([scan.rank, scan.state, scan.state], -1)
    step = F.softplus(scan.dt_proj(rank))
    h, found = x.new_zeros(x.shape[0], x.shape[2], scan.state), []
    for t in range(x.shape[1]):
        decay = torch.exp(step[:, t, :, None] * -scan.A_log.exp())
        h = decay * h + (step[:, t] * x[:, t])[..., None] * B[:, t, None]
        found.append((h * C[:, t, None]).sum(-1) + scan.D * x[:, t])
    return torch.stack(found, 1)


def test_a_cross_scan_is_the_sum_of_four_recurrences_over_the_map() -> None:
    torch.manual_seed(0)
    layer = CrossScan(6, ratio=2.0, state=2).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    inner = F.silu(layer.conv(layer.in_proj(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    across, down, back, up = layer.scans
    total = torch.zeros_like(inner)
    order = [(row, column) for row in range(3) for column in range(4)]
    by_column = [(row, column) for column in range(4) for row in range(3)]
    for scan, path in ((across, order), (back, order[::-1]), (down, by_column), (up, by_column[::-1])):
        y = recurrence(scan, torch.stack([inner[:, row, column] for row, column in path], 1))
        for t, (row, column) in enumerate(path):
            total[:, row, column] += y[:, t]
    torch.testing.assert_close(layer(x), layer.out_proj(layer.norm(total)))


def test_a_vim_block_with_its_directions_swapped_mirrors_the_sequence() -> None:
    torch.manual_seed(0)
    block = VimBlock(8, state=4).double()
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    before = block(x)
    block.convs, block.scans = nn.ModuleList(reversed(block.convs)), nn.ModuleList(reversed(block.scans))
    torch.testing.assert_close(block(x.flip(1)).flip(1), before)


def test_a_vim_trunk_takes_other_sizes_than_its_table() -> None:
    encoder = Vim(16, 4, (0, 1, 2, 3), state=2, grid=(4, 4)).eval()
    with torch.no_grad():
        assert [tuple(x.shape[-2:]) for x in encoder(torch.rand(1, 3, 96, 64))] == [(24, 16), (12, 8), (6, 4), (3, 2)]


def test_steps_start_within_mambas_range() -> None:
    encoder = VMamba(8, (1, 1, 1, 1))
    steps = torch.cat([F.softplus(part.dt_proj.bias) for stage in encoder.stages for part in stage[0].scan.scans])
    assert steps.min() >= 1e-4
    assert steps.max() <= 0.1 + 1e-6


# ---- ERM


@pytest.mark.parametrize("name", TINY)
def test_erm_trains_every_parameter_of_a_trunk(name: str) -> None:
    torch.manual_seed(0)
    model = mfuser.build("erm", backbone=name, image_size=(64, 64)).train()
    loss = sum(model.loss(Batch(torch.rand(2, 3, 64, 64), torch.randint(0, 19, (2, 64, 64)))).values())
    assert isinstance(loss, Tensor)
    loss.backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("name", TINY)
def test_erm_scores_any_size_and_padding_moves_nothing(name: str) -> None:
    model = mfuser.build("erm", backbone=name, image_size=(64, 64))
    image = torch.rand(1, 3, 64, 96)
    image[..., 50:, :] = image[..., 80:] = model.encoder.mean[:, :1, :1]  # what padding with zeros looks like, normalised
    with torch.no_grad():
        scores = model(image[..., :50, :80])
        torch.testing.assert_close(scores, model(image)[..., :50, :80])
    assert scores.shape == (1, 19, 50, 80)


def test_labels_of_a_size_that_is_padded_are_not_stretched() -> None:
    torch.manual_seed(0)
    model = mfuser.build("erm", backbone="tiny_convnext", image_size=(64, 64))
    images, labels = torch.rand(2, 3, 40, 64), torch.randint(0, 19, (2, 40, 64))
    padded = torch.cat([images, model.encoder.mean.expand(2, 3, 24, 64)], 2)
    with torch.no_grad():
        found = model.loss(Batch(images, labels))
        expected = model.loss(Batch(padded, F.pad(labels, (0, 0, 0, 24), value=255)))
    torch.testing.assert_close(found["aux.loss_seg"], expected["aux.loss_seg"])


@pytest.mark.parametrize("name", TINY)
def test_trunks_for_streets_cost_what_the_resnet_does(name: str) -> None:
    def operations(backbone: str) -> int:
        method = load_recipe("streets/erm", [f"method.backbone={backbone}"]).method
        cost = made_now(Subject(method, (128, 128))).counted.total
        return cost.products + cost.sampling + cost.scan

    assert operations(name) == pytest.approx(operations("tiny_resnet"), rel=0.02)


def test_state_space_parameters_are_not_decayed() -> None:
    model = mfuser.build("erm", backbone="tiny_vmamba", weights="meta")
    plain = {key for key, _ in model.named_parameters() if any(word in key for word in model.no_decay)}
    assert {key for key, _ in model.named_parameters() if key.endswith((".A_log", ".D"))} <= plain
    assert model.ops == ("selective_scan",)

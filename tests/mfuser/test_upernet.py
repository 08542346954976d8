"""UPerNet: parameters as printed, sizes, and gradients."""

from __future__ import annotations

import torch

from mfuser.decoder.upernet import AuxiliaryFCN, UPerNet


def test_a_head_on_resnet_50_has_as_many_parameters_as_mmsegmentations() -> None:
    # 66,516,108 of the whole, less the trunk's, which torchvision's model with the deep stem has
    with torch.device("meta"):
        head, aux = UPerNet((256, 512, 1024, 2048), 150), AuxiliaryFCN(1024, 150)
    assert sum(p.numel() for part in (head, aux) for p in part.parameters()) == 66_516_108 - 23_527_264


def test_maps_of_odd_sizes_become_scores_of_the_finest_map() -> None:
    head = UPerNet((4, 6, 8, 10), 3, dim=5).eval()
    maps = [torch.rand(2, c, *size) for c, size in zip((4, 6, 8, 10), ((15, 21), (8, 11), (4, 6), (2, 3)), strict=True)]
    with torch.no_grad():
        assert head(maps).shape == (2, 3, 15, 21)


def test_every_parameter_gets_a_gradient() -> None:
    head = UPerNet((4, 6, 8, 10), 3, dim=5)
    maps = [torch.rand(2, c, 48 // s, 48 // s) for c, s in zip((4, 6, 8, 10), (1, 2, 4, 8), strict=True)]
    head(maps).square().sum().backward()
    assert not [name for name, parameter in head.named_parameters() if parameter.grad is None]

"""The networks of the backbone tables: built on shapes alone or with random weights, and counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dgbench.cost.conventions import Cost
from mfuser.decoder.upernet import AuxiliaryFCN, UPerNet
from mfuser.towers.meta import unfilled
from mfuser.towers.pyramid import trunk

ADE20K_CLASSES = 150


@dataclass(frozen=True, slots=True)
class Net:
    """A network of a table, or a trunk alone.

    Attributes:
        table: "ade20k" (UPerNet), "maskrcnn", or "" for the trunk alone.    trunk: its name in `mfuser.towers.pyramid`.
        size: (H, W) of the image.    dim: width of UPerNet's head.
    """

    table: str
    trunk: str
    size: tuple[int, int]
    dim: int = 512

    @property
    def key(self) -> str:
        """A name for it in stored counts."""
        return f"{self.table or 'trunk'} {self.trunk} {self.size[0]}x{self.size[1]} {self.dim}"


@dataclass(frozen=True, slots=True)
class NetCount:
    """Parameters, and the cost of one forward pass of one image.

    Attributes:
        parameters: the auxiliary head's included.    auxiliary: the auxiliary head's, which a forward pass does not run.
        cost: of the whole.    trunk: of the trunk alone.
        norms: operations as fvcore counts norms: 5 an element of a layer norm, 2 of a batch norm in evaluation mode.
    """

    parameters: int
    auxiliary: int
    cost: Cost
    trunk: Cost
    norms: int

    @property
    def operations(self) -> int:
        """As the tables have them: multiply-accumulates, a scan's operations one each, no norms."""
        return self.cost.products + self.cost.sampling + self.cost.scan


class Segmenter(nn.Module):
    """UPerNet on a trunk, and the auxiliary head that training alone runs: (B, 3, H, W) to logits (B, 150, H/4, W/4)."""

    def __init__(self, trunk: nn.Module, dim: int) -> None:
        super().__init__()
        channels: tuple[int, ...] = trunk.channels  # type: ignore[assignment]
        self.trunk = trunk
        self.head = UPerNet(channels, ADE20K_CLASSES, dim)
        self.aux = AuxiliaryFCN(channels[2], ADE20K_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(images))
        return logits


class TrunkAlone(nn.Module):
    """A trunk, whose maps are the result."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.trunk(images))


def build(net: Net) -> nn.Module:
    """Build a network with random weights, in evaluation mode."""
    base = trunk(net.trunk, net.size)
    if net.table == "ade20k":
        return Segmenter(base, net.dim).eval()
    if net.table == "maskrcnn":
        from dgbench.cost.detector import MaskRCNN

        return MaskRCNN(base, net.size).eval()
    return TrunkAlone(base).eval()


def count_net(net: Net) -> NetCount:
    """Count a network on shapes alone."""
    from dgbench.cost.count import count

    with torch.random.fork_rng(devices=[]), unfilled():
        model = build(net)
    model = model.to("meta").requires_grad_(False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    auxiliary = sum(parameter.numel() for parameter in model.aux.parameters()) if isinstance(model, Segmenter) else 0
    image = torch.empty(1, 3, *net.size, device="meta")
    found = count(model, image)
    return NetCount(parameters, auxiliary, found.total, found.by_module["trunk"], norm_operations(model, image))


def norm_operations(model: nn.Module, image: Tensor) -> int:
    """Return what fvcore would count for the norms of a forward pass, which `count` leaves out."""
    total = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        nonlocal total
        total += (2 if isinstance(module, nn.BatchNorm2d) else 5) * inputs[0].numel()

    hooks = [part.register_forward_hook(add) for part in model.modules() if isinstance(part, nn.BatchNorm2d | nn.LayerNorm)]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return total

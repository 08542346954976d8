"""Images for the miniature towers: crops of rendered scenes, changed in colour, and features of a teacher at the same places.

A scene is rendered once at 256x512 and stays on the GPU as bytes; a crop of it is resampled to the towers' 128x128 pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = (256, 512)  # (H, W) of a rendered scene
SIDE = 128  # of what a tower sees


@dataclass(frozen=True)
class Crops:
    """Square crops of scenes, in fractions of the scene's height and width; `mirrored` ones are flipped left to right."""

    scene: Tensor  # (B,) indices
    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    mirrored: Tensor  # (B,) bool

    def grid(self, side: int) -> Tensor:
        """Return the places of side x side cell centres in the scene, (B, side, side, 2) as x, y in -1..1."""
        steps = (torch.arange(side, device=self.top.device) + 0.5) / side
        y = self.top[:, None] + self.height[:, None] * steps
        x = self.left[:, None] + self.width[:, None] * torch.where(self.mirrored[:, None], 1 - steps, steps)
        places = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
        return 2 * places - 1


def random_crops(count: int, scenes: int, draw: torch.Generator) -> Crops:
    """Draw crops of 0.5 to 1 of a scene's height, as wide in pixels as they are high."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=draw, device=draw.device)

    height = uniform(0.5, 1.0)
    width = height * SIZE[0] / SIZE[1]
    top, left = uniform(0, 1) * (1 - height), uniform(0, 1) * (1 - width)
    scene = torch.randint(scenes, (count,), generator=draw, device=draw.device)
    return Crops(scene, top, left, height, width, uniform(0, 1) < 0.5)


def seen(scenes: Tensor, crops: Crops) -> Tensor:
    """Return the crops as images (B, 3, 128, 128) in 0..1; scenes (N, 3, H, W) uint8."""
    chosen = scenes[crops.scene].float() / 255
    # twice the resolution, then averaged: without, details of large crops would alias
    return F.avg_pool2d(F.grid_sample(chosen, crops.grid(2 * SIDE), padding_mode="border", align_corners=False), 2)


def resampled(features: Tensor, crops: Crops, side: int) -> Tensor:
    """Return a teacher's features (N, C, h, w) at the crops' cells, (B, C, side, side)."""
    chosen = features[crops.scene].float()
    return F.grid_sample(chosen, crops.grid(side), padding_mode="border", align_corners=False)


_LUMA = (0.299, 0.587, 0.114)
_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def recoloured(images: Tensor, draw: torch.Generator) -> Tensor:
    """Change images (B, 3, H, W) in 0..1 in hue, saturation, tint, exposure, contrast, gamma, light, sharpness and noise."""
    device = images.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(images), *(shape or (1, 1, 1)), generator=draw, device=device)

    def sometimes(share: float, changed: Tensor, x: Tensor) -> Tensor:
        return torch.where(uniform(0, 1) < share, changed, x)

    x = images
    angle = uniform(-0.35, 0.35, 1).flatten()
    cos, sin, one, zero = angle.cos(), angle.sin(), torch.ones_like(angle), torch.zeros_like(angle)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], -1).view(-1, 3, 3)
    to = torch.tensor(_TO_YIQ, device=device)
    x = sometimes(0.5, torch.einsum("bij,bjhw->bihw", to.inverse() @ turn @ to, x), x)
    grey = (x * torch.tensor(_LUMA, device=device).view(3, 1, 1)).sum(1, keepdim=True)
    x = sometimes(0.8, grey + uniform(0.2, 1.8) * (x - grey), x)
    x = sometimes(0.1, grey.expand_as(x), x)
    x = sometimes(0.6, x * uniform(0.8, 1.2, 3, 1, 1), x)
    x = sometimes(0.8, x * uniform(0.5, 1.5), x)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = sometimes(0.8, mean + uniform(0.4, 1.6) * (x - mean), x)
    x = sometimes(0.5, x.clamp(1e-4, 1) ** torch.exp(uniform(-math.log(1.8), math.log(1.8))), x)
    # light that changes over the image
    light = F.interpolate(uniform(0.6, 1.4, 1, 3, 3), images.shape[-2:], mode="bicubic", align_corners=False)
    x = sometimes(0.4, x * light, x)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = sometimes(0.5, x + uniform(-0.6, 1.0) * (soft - x), x)
    noise = torch.randn(x.shape, generator=draw, device=device)
    return sometimes(0.5, x + uniform(0, 0.08) * noise, x).clamp(0, 1)

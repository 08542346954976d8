"""Mask R-CNN (He et al., ICCV 2017) with torchvision's FPN, RPN, box and mask heads on any trunk of four maps, for its cost.

The cost of its second stage depends on how many boxes there are. Here that is fixed: `PROPOSALS` boxes reach the box head and
`DETECTIONS` the mask head, at places and levels that are drawn once, so that a count needs no weights and a time repeats.
Anchors, the boxes' decoding and non-maximum suppression are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

CLASSES = 80 + 1  # COCO's, and the background
PROPOSALS, DETECTIONS = 1000, 100  # by which the published 260.2 G of ResNet-50 are met
WIDTH = 256  # of the feature pyramid
_SIDES = (80.0, 160.0, 320.0, 560.0)  # pixels of a box that is pooled from the level of stride 4, 8, 16, 32


class MaskRCNN(nn.Module):
    """One pass of the detector's network, (B, 3, H, W) to boxes' scores and offsets, masks and the RPN's maps.

    Args:
        trunk: with `channels` of its four maps.    size: (H, W) of the images.
    """

    def __init__(self, trunk: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.trunk = trunk
        channels: Sequence[int] = trunk.channels  # type: ignore[assignment]
        self.fpn = FeaturePyramidNetwork(list(channels), WIDTH, LastLevelMaxPool())
        self.rpn = RPNHead(WIDTH, 3)
        self.box_head = TwoMLPHead(WIDTH * 7 * 7, 1024)
        self.box_predictor = FastRCNNPredictor(1024, CLASSES)
        self.mask_head = MaskRCNNHeads(WIDTH, (256, 256, 256, 256), 1)
        self.mask_predictor = MaskRCNNPredictor(256, 256, CLASSES)
        draw = torch.Generator("cpu").manual_seed(0)
        for level, side in enumerate(_SIDES):
            count = PROPOSALS // len(_SIDES)
            # on the CPU, where the generator is, whatever the default device
            room = torch.tensor([max(size[1] - side, 1.0), max(size[0] - side, 1.0)], device="cpu")
            corner = torch.rand(count, 2, generator=draw, device="cpu") * room
            self.register_buffer(f"boxes{level}", torch.cat([corner, corner + side], 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.trunk(images)
        pyramid = list(self.fpn({str(level): x for level, x in enumerate(maps)}).values())
        objectness, deltas = self.rpn(pyramid)
        scores, offsets = self.box_predictor(self.box_head(self._pooled(pyramid, PROPOSALS, 7)))
        masks = self.mask_predictor(self.mask_head(self._pooled(pyramid, DETECTIONS, 14)))
        return scores, offsets, masks, *objectness, *deltas

    def _pooled(self, pyramid: Sequence[Tensor], count: int, cells: int) -> Tensor:
        """Return what lies within the first boxes of each level, of every image, (B * count, C, cells, cells)."""
        share = count // len(_SIDES)
        found = []
        for level, x in enumerate(pyramid[: len(_SIDES)]):
            boxes = self.get_buffer(f"boxes{level}")[:share]
            found.append(roi_align(x, [boxes] * len(x), cells, spatial_scale=1 / 2 ** (level + 2), sampling_ratio=2))
        return torch.cat(found)

"""Mask2Former's decoder as a part: pixel decoder, mask decoder, queries, matching and losses (Cheng et al., CVPR 2022).

Sizes, initialisation and losses are those of its implementation in mmdetection, which the methods for domain generalization use.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.criterion import MaskCriterion
from mfuser.decoder.mask_decoder import MaskDecoder, Output, class_scores
from mfuser.decoder.matching import Hungarian
from mfuser.decoder.pixel_decoder import PixelDecoder
from mfuser.decoder.points import Draw, uniform
from mfuser.decoder.queries import LearnedQueries
from mfuser.deformable import DeformableAttention

# parameters of this decoder that mmdetection's configs give no weight decay, besides norms
NO_DECAY = ("query_embed", "query_feat", "level_embed")
NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


class Mask2Former(nn.Module):
    """Four feature maps to class and mask logits of Q queries, and those to losses.

    Args:
        in_channels: channels of every feature map, or of each, finest first.
        queries: Q learned queries; None: every call gives its own.    classes: K.
        decoder_dim: D, width of pixel and mask decoder.    heads: attention heads of both.
        pixel_layers, mask_layers: layers of each.
        ffn_dim: feed-forward width of the mask decoder; the pixel decoder's is the same, but at most 1024.
        points: of deformable attention, per head and scale.    groups: of the group norms.
        mask_points: sampled per mask by matching and losses.    backend: of the sampling of deformable attention.
    """

    queries: LearnedQueries | None

    def __init__(
        self,
        in_channels: int | Sequence[int],
        *,
        queries: int | None = 100,
        classes: int = 19,
        decoder_dim: int = 256,
        heads: int = 8,
        pixel_layers: int = 6,
        mask_layers: int = 9,
        ffn_dim: int = 2048,
        points: int = 4,
        groups: int = 32,
        mask_points: int = 12544,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.pixel_decoder = PixelDecoder(
            in_channels,
            dim=decoder_dim,
            layers=pixel_layers,
            heads=heads,
            points=points,
            ffn_dim=min(ffn_dim, 1024),
            groups=groups,
            backend=backend,
        )
        self.queries = None if queries is None else LearnedQueries(queries, decoder_dim)
        self.mask_decoder = MaskDecoder(classes=classes, dim=decoder_dim, layers=mask_layers, heads=heads, ffn_dim=ffn_dim)
        self.criterion = MaskCriterion(classes, matcher=Hungarian(points=mask_points), points=mask_points)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as mmdetection does, which leaves embeddings, class and mask heads and most biases to PyTorch."""
        pixel = self.pixel_decoder
        for module in pixel.input_convs.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
        # uniform in +-sqrt(3 / fan_in), which mmdetection calls caffe2's Xavier
        for conv in (pixel.lateral_conv.conv, pixel.output_conv.conv, pixel.mask_feature):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        assert pixel.mask_feature.bias is not None
        nn.init.zeros_(pixel.mask_feature.bias)
        for layers in (pixel.layers, self.mask_decoder.layers):
            for parameter in layers.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_normal_(parameter)
        for module in pixel.layers.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()

    def forward(
        self,
        features: Sequence[Tensor],
        queries: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        last: bool = False,
    ) -> list[Output]:
        """Decode feature maps.

        Args:
            features: four maps (B, C, H, W), finest first.
            queries: (B, Q, D), of a decoder that has no learned ones.    positions: (Q, D) or (B, Q, D).
            last: only the last output.
        Returns: per output, class logits (B, Q, K + 1), the last column "no object", and mask logits (B, Q, h, w).
        Raises: ValueError for queries that are missing or not asked for.
        """
        if (queries is None or positions is None) == (self.queries is None):
            has = "no learned queries; give queries and positions" if self.queries is None else "learned queries; give none"
            raise ValueError(f"this Mask2Former has {has}")
        if self.queries is not None:
            queries, positions = self.queries(len(features[0]))
        mask_features, maps = self.pixel_decoder(features)
        outputs: list[Output] = self.mask_decoder(maps, mask_features, queries, positions, last=last)
        return outputs

    def loss(
        self, outputs: Sequence[Output], labels: Tensor, *, draw: Draw = uniform, present: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return weighted class, mask and dice terms of every output; labels are (B, H, W) train ids, 255 = ignore.

        `present` and errors are those of `MaskCriterion`.
        """
        terms: dict[str, Tensor] = self.criterion(outputs, labels, draw=draw, present=present)
        return terms


def window_scores(class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return class scores (B, K, H, W); mask logits are resized to the window before the sigmoid, as in mmsegmentation."""
    masks = F.interpolate(mask_logits, size, mode="bilinear", align_corners=False)
    return class_scores(class_logits, masks)

"""IBAFormer, reconstructed: MiT whose blocks also attend to the other images of the batch while it is trained.

There is no public code. The paper's abstract says that every attention block takes information from the other, independent
images of the batch, by one of two mechanisms. How the two attentions are put together, what becomes of it when one image is
scored, and which decode head follows is not public: these are choices of ours, most of them options.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfuser.decoder.daformer import DAFormerHead, SegFormerHead, enlarged, enlarged_loss
from mfuser.segmentor import Batch, Segmentor
from mfuser.towers.mit import Attention, MiTEncoder
from mfuser.towers.table import mits

TITLE = "IBAFormer (reconstructed)"
PAPER = "IBAFormer: Intra-batch Attention Transformer for Domain Generalized Semantic Segmentation, arXiv:2309.06282"
FIDELITY = "reconstructed"
BACKBONES = (
    {"backbone": "mit_b5"},
    {"backbone": "tiny_mit"},
)
TOWERS = {"backbone": {"trunk": "encoder.trunk"}}

_MECHANISMS = ("element", "mean")
_COMBINATIONS = ("mean", "sum", "learned")
_HEADS = {"daformer": (DAFormerHead, 256), "segformer": (SegFormerHead, 768)}


@dataclass(frozen=True)
class Options:
    """What a model is built from."""

    backbone: str = "mit_b5"  # a MiT of `dgbench models`
    attention: str = "element"  # element: to each other image; mean: to the means of the others' keys and values
    combine: str = "mean"  # of attention to itself and to the others: mean, sum, or learned, a factor a head that begins at 0
    head: str = "daformer"  # or segformer; which of them the authors have is not public
    decoder_dim: int | None = None  # width of the head; None: 256, of segformer 768, with tiny_mit 64
    image_size: tuple[int, int] = (512, 512)  # (H, W) of training crop and test window

    def __post_init__(self) -> None:
        if self.backbone not in mits():
            raise ValueError(f"backbone `{self.backbone}` is no MiT; choose from {', '.join(mits())}")
        for name, allowed in (("attention", _MECHANISMS), ("combine", _COMBINATIONS), ("head", tuple(_HEADS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} `{getattr(self, name)}` is unknown; choose from {', '.join(allowed)}")
        if self.decoder_dim is None:
            object.__setattr__(self, "decoder_dim", 64 if self.backbone == "tiny_mit" else _HEADS[self.head][1])


class IntraBatchAttention(Attention):
    """MiT's attention; in training, with the other images of the batch as well.

    In evaluation, and of one image alone, it is MiT's (ours: so that an image's scores do not depend on others).

    Args:
        by, combine: as the options `attention` and `combine`.
    """

    unpublished = ("share",)

    def __init__(self, dim: int, heads: int, reduction: int, *, by: str, combine: str) -> None:
        super().__init__(dim, heads, reduction)
        self.by, self.combine = by, combine
        if combine == "learned":
            self.share = nn.Parameter(torch.zeros(heads))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return what queries (B, heads, N, d) find in their own image, and in training in the others (B, heads, M, d)."""
        own = super().attend(query, key, value)
        if not self.training or len(query) < 2:
            return own
        others = intra_batch(query, key, value, by=self.by)
        if self.combine == "learned":
            return own + self.share.view(-1, 1, 1) * others
        return own + others if self.combine == "sum" else (own + others) / 2


def intra_batch(query: Tensor, key: Tensor, value: Tensor, *, by: str) -> Tensor:
    """Return what queries (B, heads, N, d) find with keys and values (B, heads, M, d) of the other images of the batch.

    Args:
        by: "mean", attention to the mean key and value of the others at each place (MIBA); "element", the mean of the attentions
            to each of the others (EIBA).
    """
    n = len(query)
    if by == "mean":
        key, value = ((x.sum(0, keepdim=True) - x) / (n - 1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value)
    found = [F.scaled_dot_product_attention(query, key.roll(i, 0), value.roll(i, 0)) for i in range(1, n)]
    return torch.stack(found).mean(0)


class IBAFormer(Segmentor):
    """MiT with intra-batch attention in every block, and a decode head of its four maps."""

    any_size = True
    min_batch = 2  # of one image there are no others
    no_decay = ("norm", ".share")

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.image_size = options.image_size
        attention = partial(IntraBatchAttention, by=options.attention, combine=options.combine)
        self.encoder = MiTEncoder(options.backbone, attention=attention)
        assert options.decoder_dim is not None
        self.decoder = _HEADS[options.head][0](self.encoder.channels, len(self.classes), options.decoder_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W)."""
        self.check_size(images)
        return enlarged(self.decoder(self.encoder(images)), images.shape[-2:])

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy at full size, as DAFormer's code has it.

        Raises: TypeError or ValueError for labels that are no train ids.
        """
        self.check_size(batch.images)
        return {"loss_seg": enlarged_loss(self.decoder(self.encoder(batch.images)), batch.labels)}


MODEL = IBAFormer

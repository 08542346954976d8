"""Transfer of an image's style to another by whitening and colouring (WCT; Li et al., NeurIPS 2017).

`PhotoWCT` does it with the features of an auto-encoder (Li et al., ECCV 2018), `pixel_wct` with the colours of pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SMALLEST = 1e-5  # eigenvalues below it are left out

# convolutions of each level beyond the level below it: name and channels; pooling goes before the last of them
_LEVELS: tuple[tuple[tuple[str, int, int], ...], ...] = (
    (("conv1_1", 3, 64),),
    (("conv1_2", 64, 64), ("conv2_1", 64, 128)),
    (("conv2_2", 128, 128), ("conv3_1", 128, 256)),
    (("conv3_2", 256, 256), ("conv3_3", 256, 256), ("conv3_4", 256, 256), ("conv4_1", 256, 512)),
)
LEVELS = (4, 3, 2, 1)  # coarsest first
_NUMBER = 8_349_948  # parameters


class Encoder(nn.Module):
    """The layers of VGG-19 to the first convolution of a level, with reflected borders; the pooled places are kept."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level = level
        self.conv0 = nn.Conv2d(3, 3, 1)
        for group in _LEVELS[:level]:
            for name, before, after in group:
                setattr(self, name, nn.Conv2d(before, after, 3))

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, torch.Size]]]:
        """Return the maps of levels 1 to `level`, finest first, and for each pooling its places and the size before it."""
        x, found, pooled = self.conv0(images), [], []
        for group in _LEVELS[: self.level]:
            for i, (name, _, _) in enumerate(group):
                if len(group) > 1 and i == len(group) - 1:
                    size = x.shape
                    x, places = F.max_pool2d(x, 2, 2, return_indices=True)
                    pooled.append((places, size))
                x = F.relu(getattr(self, name)(_bordered(x)))
            found.append(x)
        return found, pooled


class Decoder(nn.Module):
    """The way back from a level's map to an image: values return to the places that they were pooled from."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level = level
        for group in _LEVELS[:level]:
            for name, before, after in group:
                setattr(self, name, nn.Conv2d(after, before, 3))

    def forward(self, x: Tensor, pooled: list[tuple[Tensor, torch.Size]]) -> Tensor:
        pooled = list(pooled)
        for group in reversed(_LEVELS[: self.level]):
            for i, (name, _, _) in enumerate(reversed(group)):
                x = getattr(self, name)(_bordered(x))
                if name != "conv1_1":
                    x = F.relu(x)
                if len(group) > 1 and i == 0:
                    places, size = pooled.pop()
                    x = F.max_unpool2d(x, places, [2, 2], output_size=size[-2:])
        return x


class PhotoWCT(nn.Module):
    """PhotoWCT (Li et al., ECCV 2018) on whole batches, without its smoothing and without segments.

    Its names are those of NVIDIA's file `photo_wct.pth` (8,349,948 parameters; CC BY-NC-SA 4.0, not for commercial use).
    """

    def __init__(self) -> None:
        super().__init__()
        for level in LEVELS:
            setattr(self, f"e{level}", Encoder(level))
            setattr(self, f"d{level}", Decoder(level))

    @torch.no_grad()
    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        """Return content images (B, 3, H, W) with the styles of others, in their range of values."""
        given, own = content.dtype, next(self.parameters()).dtype
        content, style = content.to(own), style.to(own)
        styles, _ = self.get_submodule("e4")(style)
        for level in LEVELS:
            maps, pooled = getattr(self, f"e{level}")(content)
            coloured = wct(maps[-1].flatten(2), styles[level - 1].flatten(2)).view_as(maps[-1])
            content = getattr(self, f"d{level}")(coloured, pooled)
        return content.to(given)

    def take(self, path: Path) -> None:
        """Read the weights of a file.

        Raises: ValueError for a file that holds no such network.
        """
        from mfuser.authors import read_authors

        given, own = read_authors(path), self.state_dict()
        for name in own.keys() | given.keys():
            has, needs = (tuple(state[name].shape) if name in state else None for state in (given, own))
            if has != needs:
                said = "missing" if has is None else "unknown" if needs is None else f"{has}, expected {needs}"
                raise ValueError(f"{path} is no PhotoWCT of {_NUMBER:,} parameters: {name} is {said}")
        self.load_state_dict(given)


@torch.no_grad()
def pixel_wct(content: Tensor, style: Tensor) -> Tensor:
    """Return content images (B, 3, H, W) with mean and covariance of the colours of others, in their range of values."""
    return wct(content.flatten(2), style.flatten(2)).view_as(content)


@torch.no_grad()
def wct(content: Tensor, style: Tensor) -> Tensor:
    """Return features (B, C, N) with the means and covariances of others (B, C, M).

    Eigenvalues below 1e-5 are left out, as many as TLDR's code leaves out: of the contents those of the one that has most of
    them, of the styles as many as of the last one.
    """
    given = content.dtype
    content, style = content.double(), style.double()
    mean, target = content.mean(2, keepdim=True), style.mean(2, keepdim=True)
    content, style = content - mean, style - target
    values, vectors = torch.linalg.eigh(content @ content.mT / (content.shape[2] - 1))
    kept = int((values >= _SMALLEST).sum(1).min())
    values, vectors = values[:, values.shape[1] - kept :], vectors[..., vectors.shape[2] - kept :]
    white = vectors @ ((vectors.mT @ content) / values.sqrt()[..., None])
    values, vectors = torch.linalg.eigh(style @ style.mT / (style.shape[2] - 1))
    kept = int((values[-1] >= _SMALLEST).sum())
    values, vectors = values[:, values.shape[1] - kept :].clamp(min=0), vectors[..., vectors.shape[2] - kept :]
    out = vectors @ ((vectors.mT @ white) * values.sqrt()[..., None]) + target
    return out.to(given)


def _bordered(x: Tensor) -> Tensor:
    return F.pad(x, (1, 1, 1, 1), mode="reflect")

"""DeepLabV3+ and its losses, against torchvision's pyramid and PyTorch's cross entropy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.segmentation import deeplabv3

from mfuser.decoder.deeplab import ASPP, AuxiliaryHead, DeepLabV3Plus, conv_norm, pixel_loss


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """A module in evaluation mode whose norms have statistics of their own."""
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return module.eval()


def test_the_pyramid_is_torchvisions_with_the_pooled_branch_first() -> None:
    dim = 16
    theirs = shaken(deeplabv3.ASPP(24, [6, 12, 18], dim))
    ours, project = ASPP(24, dim).eval(), conv_norm(5 * dim, dim, 1).eval()
    for own, other in zip(ours.features, theirs.convs[:4], strict=True):
        own.load_state_dict(other.state_dict())
    pooling = {name.replace("1.", "0.", 1).replace("2.", "1.", 1): v for name, v in theirs.convs[4].state_dict().items()}
    ours.img_conv.load_state_dict(pooling)
    state = theirs.project.state_dict()
    # torchvision's order is 1x1, dilated, pooled
    state["0.weight"] = state["0.weight"].roll(dim, 1)
    project.load_state_dict({name: value for name, value in state.items() if not name.startswith("3.")})
    x = torch.randn(2, 24, 21, 30)
    with torch.no_grad():
        torch.testing.assert_close(project(ours(x)), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("coarse", [(6, 9), (5, 8)])
def test_logits_have_the_size_of_the_finest_map(coarse: tuple[int, int]) -> None:
    decoder = DeepLabV3Plus(8, 24, classes=5, dim=16).eval()
    assert decoder(torch.randn(1, 8, 21, 33), torch.randn(1, 24, *coarse)).shape == (1, 5, 21, 33)


def test_heads_have_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in m.parameters()) for m in (DeepLabV3Plus(256, 2048, 19), AuxiliaryHead(1024, 19))]
    assert counts == [16_843_635, 4_729_875]


def test_the_loss_is_pytorchs_over_labelled_pixels() -> None:
    logits, labels = torch.randn(2, 5, 6, 7), torch.randint(0, 5, (2, 6, 7), dtype=torch.uint8)
    labels[0, :4] = 255
    torch.testing.assert_close(pixel_loss(logits, labels), F.cross_entropy(logits, labels.long(), ignore_index=255))


def test_without_labelled_pixels_the_loss_is_zero() -> None:
    assert pixel_loss(torch.randn(1, 5, 6, 7), torch.full((1, 6, 7), 255)).item() == 0


def test_larger_labels_are_read_at_the_nearest_pixel() -> None:
    small = torch.randint(0, 5, (2, 6, 7))
    small[1, 2, 3] = 255
    logits = torch.randn(2, 5, 6, 7)
    large = small.repeat_interleave(16, 1).repeat_interleave(16, 2)
    torch.testing.assert_close(pixel_loss(logits, large), pixel_loss(logits, small))

"""The heads of MiT's methods and their loss: published sizes, recorded logits, PyTorch's cross entropy."""

from __future__ import annotations

import pytest
import torch
from golden_files import numbers
from named_weights import named_input, named_tensor
from torch.nn import functional as F

import mfuser
from mfuser.authors import to_authors_state_dict
from mfuser.decoder.daformer import DAFormerHead, SegFormerHead, enlarged_loss

MIT_B5 = (64, 128, 320, 512)


def maps(*channels: int) -> list[torch.Tensor]:
    return [torch.randn(2, c, -(-21 // 2**i), 32 // 2**i) for i, c in enumerate(channels)]


@pytest.mark.parametrize(("head", "count"), [(DAFormerHead, 3_712_275), (SegFormerHead, 3_164_947)])
def test_heads_have_the_published_number_of_parameters(head: type[DAFormerHead], count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in head(MIT_B5, 19).parameters()) == count


@pytest.mark.parametrize("head", [DAFormerHead, SegFormerHead])
def test_logits_have_the_size_of_the_finest_map(head: type[DAFormerHead]) -> None:
    assert head((8, 12, 16, 24), 5, 16).eval()(maps(8, 12, 16, 24)).shape == (2, 5, 21, 32)


def test_the_pyramid_is_dilated_by_1_6_12_and_18() -> None:
    branches = DAFormerHead((8, 12, 16, 24), 5, 16).aspp
    assert [(branch[0].kernel_size[0], branch[0].dilation[0], branch[0].groups) for branch in branches] == [
        *((1, 1, 1), (3, 6, 64), (3, 12, 64), (3, 18, 64)),
    ]


@pytest.mark.full
def test_logits_with_weights_by_name_are_the_authors() -> None:
    model = mfuser.build("shade", backbone="mit_b5", weights="random", image_size=(512, 512)).eval()
    for key, value in to_authors_state_dict(model).items():
        if not key.endswith("num_batches_tracked"):
            value.copy_(torch.from_numpy(named_tensor(key.removeprefix("model."), tuple(value.shape))))
    with torch.no_grad():
        stem = model.encoder.stem(torch.from_numpy(named_input("net.image", (2, 3, 64, 96))))
        logits = model.decoder(model.encoder.maps(stem))
    recorded = numbers("shade_mitb5")["eval.logits_stride4"]
    torch.testing.assert_close(logits[:, :, ::2, ::2], recorded, rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_mean_over_all_pixels_ignored_ones_too() -> None:
    logits, labels = torch.randn(2, 5, 6, 7), torch.randint(0, 5, (2, 24, 28), dtype=torch.uint8)
    labels[0, :9] = 255
    large = F.interpolate(logits, (24, 28), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(large, labels.long(), ignore_index=255, reduction="none").mean()
    torch.testing.assert_close(enlarged_loss(logits, labels), expected)

"""CLIP's ResNets against open_clip's own models, and what FAMix changes in their last stage."""

from __future__ import annotations

import pytest
import torch
from open_clip import get_tokenizer
from open_clip.model import CLIP
from torch import nn
from torch.nn import functional as F

from mfuser.style_mining import Miner
from mfuser.towers.clip_resnet import CLIPResNetEncoder, clip_resnets

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """A small CLIP of open_clip's, with statistics and scales that are not the initial ones."""
    torch.manual_seed(0)
    model = CLIP(64, {"layers": [1, 1, 1, 1], "width": 8, "image_size": 224, "head_width": 128}, TEXT).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
    return model


def test_images_and_texts_are_embedded_as_by_open_clip(theirs: nn.Module) -> None:
    state = theirs.state_dict()
    encoder = CLIPResNetEncoder("tiny_clip_rn")
    encoder.trunk.load_state_dict({name: state[f"visual.{name}"] for name in encoder.trunk.state_dict()})
    miner = Miner("tiny_clip_rn", encoder.trunk, published=False)
    for name, value in miner.attention.pool.state_dict().items():
        value.copy_(state[f"visual.attnpool.{name}"])
    for name, value in miner.text.state_dict().items():
        if name != "attn_mask":
            value.copy_(state[name])
    images = torch.rand(2, 3, 224, 224)
    ids = get_tokenizer("ViT-B-16")(["a cat in a street.", "a tattoo of a cat in a street."])
    with torch.no_grad():
        expected = theirs.encode_image(images)
        low = miner.encoder.from_normalised(images)
        found = miner.embedded(low)
        text = F.normalize(theirs.encode_text(ids).mean(0), dim=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(miner.read("cat in a street", ["a {}.", "a tattoo of a {}."]), text, rtol=1e-4, atol=1e-5)


def test_the_last_stage_of_stride_16_keeps_its_size_and_dilates_its_last_block_alone() -> None:
    coarse, fine = (CLIPResNetEncoder("clip_rn101", output_stride=stride) for stride in (32, 16))
    images = torch.empty(1, 3, 64, 96, device="meta")
    with torch.no_grad():
        shapes = [[tuple(x.shape[1:]) for x in encoder.to("meta")(images)] for encoder in (coarse, fine)]
    assert shapes[0] == [(256, 16, 24), (512, 8, 12), (1024, 4, 6), (2048, 2, 3)]
    assert shapes[1] == [*shapes[0][:3], (2048, 4, 6)]
    assert [block.conv2.dilation for block in fine.trunk.layer4] == [(1, 1), (1, 1), (2, 2)]
    assert coarse.state_dict().keys() == fine.state_dict().keys()


def test_another_tower_is_refused() -> None:
    with pytest.raises(ValueError, match="`resnet101` is no ResNet of CLIP's; choose from clip_rn50, clip_rn101, tiny_clip_rn"):
        CLIPResNetEncoder("resnet101")
    assert clip_resnets() == ["clip_rn50", "clip_rn101", "tiny_clip_rn"]

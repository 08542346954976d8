"""ResNets: timm's own maps, RobustNet's dilation, published files by name; stages against the numbers of its family's code."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from golden_files import fill_by_name, numbers
from named_weights import is_named, named_input, named_tensor, sample_index
from safetensors.torch import save_file
from torch import nn

from mfuser.towers.loading import fill, load_tower
from mfuser.towers.resnet import ResNetEncoder, resnets
from mfuser.towers.table import TOWERS
from mfuser.towers.vit import VisionEncoder


def test_undilated_maps_are_timms_own() -> None:
    encoder = ResNetEncoder("resnet18").eval()
    fill(encoder)
    reference = timm.create_model("resnet18", num_classes=0).eval()
    reference.load_state_dict(encoder.trunk.state_dict())
    images = torch.rand(1, 3, 65, 96)
    with torch.no_grad():
        maps = encoder(images)
        expected = reference.forward_intermediates(encoder.normalised(images), indices=4, intermediates_only=True)
    assert [m.shape[1] for m in maps] == list(encoder.channels)
    for found, wanted in zip(maps, expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(("output_stride", "strides"), [(32, (4, 8, 16, 32)), (16, (4, 8, 16, 16)), (8, (4, 8, 8, 8))])
@pytest.mark.parametrize("name", resnets())
def test_every_resnet_has_maps_of_the_strides_that_it_states(name: str, output_stride: int, strides: tuple[int, ...]) -> None:
    with torch.device("meta"):
        encoder = ResNetEncoder(name, output_stride=output_stride).to("meta")
        maps = encoder(torch.rand(1, 3, 70, 128))
    assert encoder.strides == strides
    assert [tuple(m.shape[1:]) for m in maps] == [
        (c, -(-70 // s), 128 // s) for c, s in zip(encoder.channels, strides, strict=True)
    ]


def test_all_3x3_convolutions_of_a_dilated_stage_are_dilated() -> None:
    encoder = ResNetEncoder("resnet101", output_stride=8)
    dilations = [
        {m.dilation[0] for m in stage.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}
        for stage in encoder.stages
    ]
    assert dilations == [{1}, {1}, {2}, {4}]


def test_stem_and_first_stages_with_weights_by_name_equal_the_familys_code() -> None:
    encoder = ResNetEncoder("resnet101", output_stride=16).eval()
    trunk = encoder.trunk
    parts = {"layer0.0": trunk.conv1, "layer0.1": trunk.bn1, "layer1": trunk.layer1, "layer2": trunk.layer2}
    for prefix, part in parts.items():
        fill_by_name(part.to_empty(device="cpu"), prefix)
        for name, buffer in part.named_buffers():
            if is_named(name):
                buffer.copy_(torch.from_numpy(named_tensor(f"{prefix}.{name}", tuple(buffer.shape))))
    with torch.no_grad():
        x = encoder.stem(torch.from_numpy(named_input("net.image", (2, 3, 64, 96))))
        found = {"layer0": x, "layer1": (x := trunk.layer1(x)), "layer2": trunk.layer2(x)}
    goldens = numbers("robustnet_deeplabv3plus_r101")
    for name, value in found.items():
        places = torch.from_numpy(sample_index(f"net.{name}", value.numel(), 4096))
        torch.testing.assert_close(value.flatten()[places], goldens[f"eval.{name}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("counted", [True, False])
def test_a_published_file_is_loaded_by_its_names(tmp_path: Path, counted: bool) -> None:
    published = timm.create_model("resnet18").state_dict()
    for name, value in published.items():
        value.fill_(7) if name.endswith("num_batches_tracked") else value.uniform_(-1, 1)
    kept = {name: value for name, value in published.items() if counted or "num_batches" not in name}
    save_file(kept, tmp_path / "model.safetensors")
    encoder = ResNetEncoder("resnet18", output_stride=16)
    load_tower("resnet18", tmp_path / "model.safetensors", {"trunk": encoder.trunk})
    own = encoder.trunk.state_dict()
    assert own.keys() == published.keys() - {"fc.weight", "fc.bias"}
    for name, value in own.items():
        assert value.dtype == published[name].dtype
        assert torch.equal(value, published[name]) or (not counted and "num_batches" in name)


def test_weights_are_torchvisions_first_ones() -> None:
    for name in ("resnet18", "resnet50", "resnet101"):
        file = TOWERS[name].weights
        assert file is not None
        assert file.repo == f"timm/{name}.tv_in1k"
        described = timm.get_pretrained_cfg(f"{name}.tv_in1k")
        assert described is not None
        assert described.hf_hub_id == file.repo
        assert (described.mean, described.std) == (TOWERS[name].mean, TOWERS[name].std)


def test_other_towers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="`dinov2_s` is no ResNet; choose from resnet18, resnet50, resnet101, resnet50_v1c"):
        ResNetEncoder("dinov2_s")
    with pytest.raises(ValueError, match="output_stride is 4; choose from 8, 16, 32"):
        ResNetEncoder("resnet18", output_stride=4)
    with pytest.raises(ValueError, match="`resnet50` is a convolutional network, not a plain transformer; choose from dinov2_s"):
        VisionEncoder("resnet50", (64, 64))


def test_contracted_dilation_is_timms_own() -> None:
    """torchvision's rule, which mmsegmentation calls contract_dilation: timm's `output_stride`."""
    ours = ResNetEncoder("resnet50", output_stride=8, contracted=True)
    theirs = timm.create_model("resnet50", output_stride=8)
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for mine, block in zip(ours.trunk.get_submodule(stage), theirs.get_submodule(stage), strict=True):
            assert (mine.conv2.dilation, mine.conv2.stride) == (block.conv2.dilation, block.conv2.stride)

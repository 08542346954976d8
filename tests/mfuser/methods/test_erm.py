"""ERM: the network of RobustNet's family by its recorded numbers and names, and what a training of it needs."""

from __future__ import annotations

import json

import pytest
import torch
from golden_files import FOLDER, numbers
from named_weights import is_named, named_input, named_tensor, sample_index
from torch import Tensor, nn
from typer.testing import CliRunner

import mfuser
from dgbench import cli
from mfuser.authors import load_authors_checkpoint, recognise, release_of, sources_of, to_authors_state_dict
from mfuser.decoder.deeplab import resized
from mfuser.segmentor import Batch

GOLDEN = "robustnet_deeplabv3plus_r101"
# DistributedDataParallel puts `module.` before each name of the layout
LAYOUT = {f"module.{key}": tuple(shape) for key, (shape, _) in json.loads((FOLDER / f"layout_{GOLDEN}.json").read_text()).items()}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def empty(names: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A checkpoint without values."""
    return {name: torch.empty(shape, device="meta") for name, shape in names.items()}


def batch() -> Batch:
    return Batch(torch.rand(2, 3, 64, 64), torch.randint(0, 19, (2, 64, 64)))


def test_parameters_are_as_many_as_the_familys() -> None:
    model = mfuser.build("erm", weights="meta")
    assert parameters(model) == 64_073_670
    assert (parameters(model.encoder), parameters(model.decoder), parameters(model.aux)) == (42_500_160, 16_843_635, 4_729_875)
    assert parameters(mfuser.build("erm", backbone="resnet50", weights="meta")) == 45_081_542


def test_names_and_shapes_are_those_of_the_familys_checkpoints() -> None:
    model = mfuser.build("erm", weights="meta")
    sources = sources_of(model, release_of(model), model.state_dict())
    found = {source.keys[0]: tuple(model.state_dict()[name].shape) for name, source in sources.items()}
    assert found == LAYOUT
    assert to_authors_state_dict(model).keys() == LAYOUT.keys()


@pytest.mark.parametrize("backbone", ["resnet101", "resnet50"])
def test_a_checkpoint_is_known_by_its_names(backbone: str) -> None:
    theirs = to_authors_state_dict(mfuser.build("erm", backbone=backbone, weights="meta"))
    ((method, release),) = recognise(theirs)
    assert (method, release.options) == ("erm", {"backbone": backbone})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"module.layer1.0.bn1.weight": None}, r"1 tensors missing \(module.layer1.0.bn1.weight\), 0 unknown"),
        ({"module.SHM.proto_mean": (64, 64)}, r"0 tensors missing \(\), 1 unknown \(module.SHM.proto_mean\)"),
        ({"module.final2.0.weight": (16, 256, 1, 1)}, r"module.final2.0.weight is \(16, 256, 1, 1\), expected \(19, 256, 1, 1\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(change: dict[str, tuple[int, ...] | None], said: str) -> None:
    names = {name: shape for name, shape in (LAYOUT | change).items() if shape is not None}
    with pytest.raises(ValueError, match=said):
        load_authors_checkpoint(mfuser.build("erm", weights="meta"), empty(names))


@pytest.mark.full
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_every_stage_with_weights_by_name_equals_the_familys_code(mode: str) -> None:
    model = mfuser.build("erm", weights="meta")
    state = {}
    for name, shape in LAYOUT.items():
        bare = name.removeprefix("module.")
        named = is_named(bare)
        state[name] = torch.from_numpy(named_tensor(bare, shape)) if named else torch.zeros(shape, dtype=torch.int64)
    report = load_authors_checkpoint(model, state)
    assert (len(report.used), report.dead) == (len(LAYOUT), ())
    model.train(mode == "train")
    model.aux[3].p = 0.0  # as it was recorded
    image = torch.from_numpy(named_input("net.image", (2, 3, 64, 96)))  # normalised
    with torch.no_grad():
        x = model.encoder.stem(image)
        maps = model.encoder.maps(x)
        logits = resized(model.decoder(maps[0], maps[3]), image.shape[-2:])
        found = {"logits": logits[:, :, ::8, ::8], "aux": model.aux(maps[2])}
    if mode == "eval":
        found |= {f"layer{i}": value for i, value in enumerate([x, *maps])}
    goldens = numbers(GOLDEN)
    for name, value in found.items():
        flat, expected = value.flatten(), goldens[f"{mode}.{name}"].flatten()
        if len(expected) < len(flat):
            flat = flat[torch.from_numpy(sample_index(f"net.{name}", len(flat), len(expected)))]
        torch.testing.assert_close(flat, expected, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize(("term", "moved"), [("loss_seg", "decoder.final2.0.weight"), ("aux.loss_seg", "aux.4.weight")])
def test_each_term_is_positive_and_moves_its_head_and_the_trunk(term: str, moved: str) -> None:
    torch.manual_seed(0)
    model = mfuser.build("erm", backbone="tiny_resnet", image_size=(64, 64)).train()
    loss = model.loss(batch())[term]
    assert loss.item() > 0
    loss.backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {moved, "encoder.trunk.conv1.0.weight"} <= grads


def test_any_size_becomes_scores_of_its_own_size() -> None:
    model = mfuser.build("erm", backbone="tiny_resnet")
    with torch.no_grad():
        assert model(torch.rand(1, 3, 71, 130)).shape == (1, 19, 71, 130)


def test_all_parameters_are_decayed() -> None:
    (group,) = mfuser.build("erm", weights="meta").groups(0.01, 5e-4)
    assert group["weight_decay"] == 5e-4


def test_another_tower_is_refused() -> None:
    with pytest.raises(
        ValueError, match="backbone `dinov2_s` is no ResNet; choose from resnet18, resnet50, resnet101, resnet50_v1c"
    ):
        mfuser.build("erm", backbone="dinov2_s")


def test_a_step_of_one_image_is_refused_before_it_is_made() -> None:
    done = CliRunner().invoke(cli.app, ["train", "streets/erm", "--set", "train.batch_size=1"], prog_name="dgbench")
    assert done.exit_code == 1
    assert "error: train.batch_size is 1, but `erm` needs at least 2 images a step" in done.stderr
    assert "hint: --set train.batch_size=2" in done.stderr

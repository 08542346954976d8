"""A training's pass as graphs: what is copied, given back and refused.

On a CPU, a recorder does the calls again in place of CUDA graphs; those are tested on a GPU.
"""

from __future__ import annotations

import copy

import pytest
import torch
from recorders import Again
from torch import Tensor, nn

import mfuser
from mfuser import blocks, training_graphs
from mfuser.segmentor import Batch, Segmentor
from mfuser.training_graphs import CudaRecorder, TrainingGraphs


def model(name: str = "mfuser", device: str = "cpu", **options: object) -> Segmentor:
    towers = {"vfm": "tiny", "vlm": "tiny"} if name == "mfuser" else {"vfm": "tiny"}
    torch.manual_seed(0)
    made = mfuser.build(name, **towers, image_size=(64, 64), weights="random", freeze_towers=True, **options)
    made.enter_training()
    return made.train().to(device, memory_format=torch.channels_last)


def captured(trained: Segmentor) -> Segmentor:
    on_gpu = next(trained.parameters()).is_cuda
    trained.training_outputs = TrainingGraphs(trained, CudaRecorder if on_gpu else Again)
    return trained


def batch(seed: int, device: str = "cpu", images: int = 2) -> Batch:
    numbers = torch.Generator().manual_seed(seed)
    pixels = torch.rand(images, 3, 64, 64, generator=numbers).to(device, memory_format=torch.channels_last)
    return Batch(pixels, torch.randint(0, 19, (images, 64, 64), generator=numbers).to(device))


def steps(trained: Segmentor, count: int = 3, *, bf16: bool = True, lr: float = 1e-3) -> list[dict[str, Tensor]]:
    """Loss terms, gradients and buffers of some steps with other data each."""
    device = next(trained.parameters()).device.type
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=lr, fused=True)
    found = []
    for i in range(count):
        torch.manual_seed(i)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            terms = trained.loss(batch(i, device))
        torch.stack(list(terms.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        grads = {name: p.grad.clone() for name, p in trained.named_parameters() if p.grad is not None}
        buffers = {name: buffer.clone() for name, buffer in trained.named_buffers()}
        found.append({**{name: term.detach() for name, term in terms.items()}, **grads, **buffers})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return found


def assert_equal(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(("name", "options"), [("mfuser", {"dropout": 0.3}), ("rein", {}), ("soma", {})])
def test_steps_are_those_without_graphs_bit_for_bit(name, options, bf16):
    """Draws, BatchNorm's statistics, casts and the optimizer's updates included."""
    expected = steps(model(name, **options), bf16=bf16)
    assert not torch.equal(expected[0]["decode.loss_mask"], expected[1]["decode.loss_mask"])
    assert_equal(steps(captured(model(name, **options)), bf16=bf16), expected)


class Added(Segmentor):
    """Two parameters with the same gradient, which is that of the outputs, and one that is not used."""

    method, image_size = "added", (64, 64)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(2, 3, 64, 64)), nn.Parameter(torch.zeros(2, 3, 64, 64))
        self.unused = nn.Parameter(torch.zeros(1))

    def training_outputs(self, images: Tensor) -> Tensor:
        return images.contiguous() + (self.first + self.second)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": (self.training_outputs(batch.images) ** 2).sum()}


def test_gradients_of_one_memory_are_scaled_once():
    expected = steps(Added().train())
    assert "unused" not in expected[0]
    assert_equal(steps(captured(Added().train())), expected)


def test_gradients_of_the_step_before_are_refused():
    trained = captured(Added().train())
    trained.loss(batch(0))["loss"].backward()
    with pytest.raises(RuntimeError, match="set them to None after each step"):
        trained.loss(batch(0))["loss"].backward()


def test_frozen_weights_in_16_bits_are_where_they_were_after_saving():
    trained = captured(model())
    frozen = blocks.FrozenWeights(trained)
    addresses = [p.data_ptr() for p in trained.parameters()]
    expected = steps(trained, lr=0.0)
    with frozen.whole(), pytest.raises(RuntimeError, match="a tensor of the model was replaced"):
        steps(trained, 1)
    assert [p.data_ptr() for p in trained.parameters()] == addresses
    losses = [name for name in expected[0] if name.startswith(("decode.", "scr_map"))]
    again = steps(trained, lr=0.0)
    assert all(torch.equal(one[name], other[name]) for one, other in zip(expected, again, strict=True) for name in losses)


def test_images_of_another_shape_are_captured_anew():
    trained, plain = captured(model("rein")), model("rein")
    graphs = trained.training_outputs
    for images in (2, 2, 3):
        for each in (trained, plain):
            torch.manual_seed(0)
            each.loss(batch(0, images=images))
        torch.manual_seed(0)
        expected = plain.training_outputs(batch(0, images=images).images)
        for found, wanted in zip(graphs(batch(0, images=images).images), expected, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_graphs_that_were_freed_are_captured_anew():
    trained = captured(model("rein"))
    graphs = trained.training_outputs
    expected = steps(trained, 1, lr=0.0)
    recorded = graphs._recorded
    graphs.release()
    with pytest.raises(AssertionError):
        recorded(batch(0).images)
    assert_equal(steps(trained, 1, lr=0.0), expected)


def test_without_gradients_and_in_evaluation_nothing_is_captured():
    trained = captured(model())
    graphs = trained.training_outputs
    with torch.no_grad():
        trained.loss(batch(0))
    trained.eval().loss(batch(0))
    assert graphs._recorded is None
    trained.train().loss(batch(0))
    assert graphs._recorded is not None


def test_a_copy_of_the_model_has_no_graphs():
    trained = captured(model())
    expected = steps(trained, 1)
    copied = copy.deepcopy(trained)
    assert copied.training_outputs.__self__ is copied
    trained.load_state_dict(copied.state_dict())
    assert steps(copied, 1)[0].keys() == expected[0].keys()


def test_a_method_without_such_a_part_is_refused():
    erm = mfuser.build("erm", backbone="tiny_resnet", image_size=(64, 64), weights="random")
    assert not training_graphs.captures(erm)
    with pytest.raises(ValueError, match="`erm` has no `training_outputs`"):
        training_graphs.capture(erm)
    assert all(training_graphs.captures(model(name)) for name in ("mfuser", "rein", "soma", "set"))


def assert_near(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]], *, within: float) -> None:
    """Each tensor's distance, as a share of its norm; gradients that are noise beside the largest do not count."""
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        largest = max(float(value.float().norm()) for name, value in other.items() if "." in name and value.isfinite().all())
        for name, value in one.items():
            if torch.equal(value, other[name]):  # such as a mask of -inf
                continue
            distance = float((value.float() - other[name].float()).norm())
            assert distance <= within * float(other[name].float().norm()) + 1e-4 * largest, name


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("name", "options"), [("mfuser", {"dropout": 0.0}), ("rein", {}), ("soma", {})])
def test_on_a_gpu_steps_are_those_without_graphs(name, options, compiled):
    """But for the order in which some kernels add."""
    found = []
    for graphs in (False, True):
        trained = model(name, "cuda", **options)
        blocks.FrozenWeights(trained)
        if compiled:
            blocks.compile_blocks(trained)
        found.append(steps(captured(trained) if graphs else trained, lr=1e-5))
    assert_near(found[1], found[0], within=0.02)
    assert not torch.equal(found[1][0]["decode.loss_mask"], found[1][1]["decode.loss_mask"])


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_dropout_draws_what_the_seed_says(compiled):
    def dropping() -> Segmentor:
        made = model(device="cuda", dropout=0.5)
        if compiled:
            blocks.compile_blocks(made)
        return made

    found = [steps(each, lr=0.0) for each in (dropping(), captured(dropping()))]
    assert_near(found[1], found[0], within=0.02)
    trained = captured(dropping())
    outputs = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        with torch.autocast("cuda", torch.bfloat16):
            outputs.append(trained.training_outputs(batch(0, "cuda").images)[1].detach().clone())
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.gpu
def test_on_a_gpu_a_replay_waits_for_nothing_and_launches_two_graphs():
    trained = captured(model(device="cuda"))
    data = batch(0, "cuda")
    for _ in range(2):
        outputs = torch.utils._pytree.tree_leaves(trained.training_outputs(data.images))
        torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
        trained.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.cuda.device(0), torch.profiler.profile(activities=activities) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = torch.utils._pytree.tree_leaves(trained.training_outputs(data.images))
            torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def calls(*names: str) -> int:
        return sum(event.count for event in profile.key_averages() if event.key.startswith(names))

    assert calls("cudaGraphLaunch") == 2
    # copies of images and of gradients, zeros, seeds
    assert calls("cudaLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync") < 8 * len(outputs) + 50

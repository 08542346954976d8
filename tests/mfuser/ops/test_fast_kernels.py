"""Fast inference through the kernels, emulated and interpreted on a CPU: the types that it gives them, eager and traced."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

import mfuser
from mfuser import fast, ops
from mfuser.ops import compiled


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda":
        with compiled.use(request.getfixturevalue("emulated")):
            yield "cuda"
        return
    pytest.importorskip("triton")
    yield "triton"


def test_mfuser_in_16_bits_runs_every_kernel_and_is_traced_whole(backend):
    torch.manual_seed(0)
    model = mfuser.build("mfuser", vfm="tiny", vlm="tiny", image_size=(64, 64), weights="random").eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
    for part in model.modules():
        if hasattr(part, "backend"):
            part.backend = backend
    before = ops.tally()
    plain = fast.prepare(model, compile=False)(images)
    # MTEnhancer's fusers among them; a scan is part of the block's kernels
    assert ops.ran_since(before)["mvfuser"] == ops.ran_since(before)["ms_deform_attn"] == backend
    torch._dynamo.reset()
    counters.clear()
    with torch.compiler.set_stance("default", force_backend="aot_eager"):
        traced = fast.prepare(model)(images)
    torch._dynamo.reset()
    assert not counters["graph_break"]
    for found in (plain, traced):
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()
        assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.97

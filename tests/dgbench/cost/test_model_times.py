"""What a timed forward pass of a model computes in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dgbench.cost.model_times import _Asked


@pytest.mark.parametrize(("dtype", "rounds"), [(torch.float32, False), (torch.bfloat16, True)])
def test_fp32_is_timed_without_tf32_as_exact_mode_scores(dtype, rounds):
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    seen = []
    model = nn.Conv2d(3, 19, 1)
    model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    _Asked(model, (8, 8), None, torch.device("cpu"), dtype).batch(1)()
    assert seen == [rounds]
    assert torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before

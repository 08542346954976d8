"""What tests of counts share: functions and modules as models on the meta device, and a machine without weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgbench.cost.count import Cost, count


class Calls(nn.Module):
    """A function of the inputs and of modules as a model."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *self.parts)


def meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


def counted(function: Callable[..., Any], *inputs: Tensor, parts: tuple[nn.Module, ...] = ()) -> Cost:
    return count(Calls(function, *parts).to("meta"), *inputs).total


def only(module: nn.Module, *shape: int) -> Cost:
    return counted(lambda x, m: m(x), meta(*shape), parts=(module,))


@pytest.fixture(scope="module", autouse=True)
def _no_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A machine with no weights, no tokenizers and no network."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("DGBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
    patch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    yield
    patch.undo()

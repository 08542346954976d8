"""One training step as a call: plain on a CPU, as a CUDA graph on a GPU, where launches can take longer than the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mfuser.ssm.network import Network

# S4's own learning rate at most, for what its dynamics consist of (state-spaces/s4)
_SLOW, _SLOW_LR = ("log_dt", "log_A_real", "A_imag", "P", "B"), 1e-3


def optimizer_of(network: Network, lr: float, device: torch.device) -> torch.optim.Adam:
    """Return Adam without weight decay; S4's dynamics learn by 0.001 at most."""
    slow = {id(p) for name, p in network.named_parameters() if name.rpartition(".")[2] in _SLOW and "layer" in name}
    groups = [
        {"params": [p for p in network.parameters() if id(p) not in slow], "lr": lr},
        {"params": [p for p in network.parameters() if id(p) in slow], "lr": min(lr, _SLOW_LR)},
    ]
    gpu = device.type == "cuda"
    return torch.optim.Adam([group for group in groups if group["params"]], capturable=gpu, fused=gpu or None)


class Step:
    """Forward, backward and update for one batch; adds loss, right tokens and right sequences to `sums`."""

    def __init__(self, network: Network, optimizer: torch.optim.Adam, device: torch.device) -> None:
        self.network, self.optimizer = network, optimizer
        self.sums = torch.zeros(3, device=device)

    def __call__(self, sequences: Tensor, targets: Tensor) -> None:
        """Take one step."""
        logits = self.network(sequences, read=targets.shape[1])
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        right = (logits.detach().argmax(-1) == targets).float()
        self.sums += torch.stack([loss.detach(), right.mean(), right.amin(1).mean()])

    def restore(self, network: Mapping[str, Tensor], optimizer: dict[str, Any] | None) -> None:
        """Set weights and moments; None: those of a new optimizer."""
        self.network.load_state_dict(network)
        if optimizer is not None:
            self.optimizer.load_state_dict(optimizer)


class GraphedStep(Step):
    """The same, recorded once and replayed.

    Raises: RuntimeError if an operator of the network cannot be recorded.
    """

    def __init__(
        self, network: Network, optimizer: torch.optim.Adam, device: torch.device, sequences: Tensor, targets: Tensor
    ) -> None:
        super().__init__(network, optimizer, device)
        self._sequences, self._targets = sequences.clone(), targets.clone()
        first = {name: value.clone() for name, value in network.state_dict().items()}
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # plans of transforms, moments, workspaces
                super().__call__(self._sequences, self._targets)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            super().__call__(self._sequences, self._targets)
        self.restore(first, None)
        self.sums.zero_()

    def __call__(self, sequences: Tensor, targets: Tensor) -> None:
        """Take one step."""
        self._sequences.copy_(sequences)
        self._targets.copy_(targets)
        self._graph.replay()

    def restore(self, network: Mapping[str, Tensor], optimizer: dict[str, Any] | None) -> None:
        """Set weights and moments in place, where the graph reads them."""
        self.network.load_state_dict(network)
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, parameter in enumerate(ordered):
            for name, value in self.optimizer.state[parameter].items():
                if optimizer is None:
                    value.zero_()
                else:
                    value.copy_(optimizer["state"][number][name])

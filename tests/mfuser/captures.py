"""What of a training's forward and backward pass a CUDA graph could not hold, found without a GPU.

The pass runs on fake tensors of the device "cuda", whose shapes, types and devices follow the real ones'. Inputs and results of
every operator must be there: one from elsewhere is copied from the host, or is a number of the host's that the graph would
repeat. An operator that asks the device for a value cannot run on fake tensors at all. torch's engine needs a GPU for the
backward pass, so that its nodes are called one by one here.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Found:
    """Numbers of operators, forward and backward, those that no graph can hold, and trained parameters without a gradient."""

    forward: int = 0
    backward: int = 0
    problems: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.problems = 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # asks for a tensor's device
            return out
        self.calls += 1
        devices = Counter(str(t.device.type) for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
        if set(devices) - {"cuda"}:
            frames = [frame for frame in traceback.extract_stack() if "torch" not in Path(frame.filename).parts]
            where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-2:-5:-1])
            self.problems.append(f"{func} of {dict(devices)} tensors, in {where}")
        return out


@contextmanager
def _autocast(enabled: bool) -> Iterator[None]:
    """Autocast of the device "cuda" to bf16, which torch.autocast refuses where there is none."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", enabled)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def found_in(model: nn.Module, run: Callable[[Tensor], Any], images: tuple[int, ...], *, bf16: bool) -> Found:
    """Run a pass of images of that shape and its backward pass; the model's tensors are then fake."""
    found, watch = Found(), _Watch()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    there = torch.empty_like(parameter, device="cuda")
                    module._parameters[name] = nn.Parameter(there, requires_grad=parameter.requires_grad)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device="cuda")
        given = torch.empty(images, device="cuda")
        with watch, _autocast(bf16):
            results = [leaf for leaf in tree_leaves(run(given)) if isinstance(leaf, Tensor)]
        found.forward = watch.calls
        ends = [result for result in results if result.requires_grad]
        incoming = [torch.empty_like(end) for end in ends]
        with watch, torch.no_grad():
            reached = _backward(ends, incoming)
        found.backward = watch.calls - found.forward
    found.problems = watch.problems
    found.unused = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached]
    return found


def _backward(ends: Sequence[Tensor], incoming: Sequence[Tensor]) -> set[int]:
    """Call the nodes behind some tensors, each after all that give it gradients; returns the ids of the leaves that got one."""
    waits: Counter[Any] = Counter()
    nodes = {end.grad_fn for end in ends}
    left = list(nodes)
    while left:
        for node, _ in left.pop().next_functions:
            if node is not None:
                waits[node] += 1
                if node not in nodes:
                    nodes.add(node)
                    left.append(node)
    gradients: dict[Any, dict[int, Tensor]] = {node: {} for node in nodes}

    def give(node: Any, index: int, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        # as the engine does: broadcast inputs and casts of the forward pass are not the nodes' own affair
        wanted = node._input_metadata[index]
        if tuple(gradient.shape) != tuple(wanted.shape):
            gradient = gradient.sum_to_size(tuple(wanted.shape))
        gradient, own = gradient.to(wanted.dtype), gradients[node]
        own[index] = own[index] + gradient if index in own else gradient

    for end, gradient in zip(ends, incoming, strict=True):
        give(end.grad_fn, end.output_nr, gradient)
    ready, reached = [node for node in nodes if not waits[node]], set()
    while ready:
        node = ready.pop()
        own = gradients.pop(node)
        if hasattr(node, "variable"):
            reached |= {id(node.variable)} if own else set()
            continue
        given = tuple(own.get(i) for i in range(len(node._input_metadata)))
        inputs = [(following, index) for following, index in node.next_functions if following is not None]
        for (following, index), gradient in zip(inputs, _called(node, given) if own else [None] * len(inputs), strict=True):
            give(following, index, gradient)
            waits[following] -= 1
            if not waits[following]:
                ready.append(following)
    return reached


def _called(node: Any, gradients: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Return the gradients of a node's inputs that have one."""
    if hasattr(node, "apply"):  # of a function in Python, whose inputs are not all tensors
        results = node.apply(*gradients)
        results = results if isinstance(results, tuple) else (results,)
        return [result for result, needed in zip(results, node.needs_input_grad, strict=True) if needed]
    results = node(*gradients)
    results = results if isinstance(results, tuple | list) else (results,)
    return [result for result, (following, _) in zip(results, node.next_functions, strict=True) if following is not None]

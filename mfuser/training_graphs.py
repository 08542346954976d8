"""A training's pass of images, forward and backward, as two CUDA graphs: a GPU does not wait for Python to launch its kernels.

What is captured is a model's `training_outputs`; its loss stays outside, where shapes follow from a batch's labels. A step copies
its images to where the first graph reads them, and the gradients of the outputs to where the second one does. The second one's
results are the parameters' gradients themselves: they must be used, and set to None, before the next step.

Graphs read fixed addresses: an optimizer must update weights in place, and no tensor of the model may be replaced. Draws of
torch's generators differ from replay to replay, and follow from the seed as without graphs.

Of several processes, each captures its own pass, all at the same step, and the backward pass averages the gradients over them:
the model is not to be wrapped in `DistributedDataParallel`, whose hooks see no replay. Exchanges within the pass, such as
SyncBatchNorm's, are captured with it, which NCCL allows and gloo does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from mfuser.by_size import handed_out
from mfuser.cuda_graphs import CaptureError, captured, rehearsed
from mfuser.ops import dispatch
from mfuser.processes import average, number_of_processes
from mfuser.segmentor import Segmentor

# passes before the capture, in which blocks are compiled, kernels loaded and chosen, and libraries make their workspaces
_WARM_UP = 3
# elements between whose multiples gradients that share memory begin, so that kernels read them as they do those that do not
_ALIGNED = 64

Call = Callable[[], Sequence[Tensor | None]]


class Memory(NamedTuple):
    """Bytes of a GPU.

    before: the peak of allocated memory until all was recorded.    idle: what graphs keep, but torch does not count as allocated.
    """

    before: int = 0
    idle: int = 0


class Recorder(Protocol):
    """Records what calls do, so that it can be done again at the same addresses."""

    def rehearse(self, call: Callable[[], object]) -> None:
        """Do it where it will be recorded, without recording."""
        ...

    def record(self, call: Call) -> tuple[list[Tensor | None], Callable[[], object]]:
        """Return the call's results, and a function that writes them anew."""
        ...

    def memory(self) -> Memory:
        """Return the memory of what was recorded, after the last record."""
        ...

    def forget(self) -> None:
        """Free what was recorded, which cannot be done again from then on."""
        ...


class CudaRecorder:
    """CUDA graphs of one stream, whose memory is shared: they are replayed in the order in which they were recorded."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: list[torch.cuda.CUDAGraph] = []
        with torch.cuda.device(device):
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def rehearse(self, call: Callable[[], object]) -> None:
        """Do it on the graphs' stream."""
        rehearsed(call, self._stream)

    def record(self, call: Call) -> tuple[list[Tensor | None], Callable[[], object]]:
        """Capture."""
        found, graph = captured(call, self._stream, self._pool)
        self._graphs.append(graph)
        return list(found), graph.replay

    def memory(self) -> Memory:
        """Return the graphs' memory, and let torch find its peak anew, which is from now on without theirs."""
        before = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        idle = sum(
            segment["total_size"] - segment["allocated_size"]
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment.get("segment_pool_id", ())) == tuple(self._pool)
        )
        return Memory(before, idle)

    def forget(self) -> None:
        """Free the graphs, whoever still refers to them."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()


class TrainingGraphs:
    """A model's `training_outputs`, captured when first called in training; in evaluation, or without gradients, it runs as is.

    One shape of images is kept at a time: another one is captured anew.
    """

    def __init__(self, model: Segmentor, recorder: Callable[[torch.device], Recorder] = CudaRecorder) -> None:
        self._model, self._recorder = model, recorder
        self._key: tuple[Any, ...] | None = None
        self._recorded: _Recorded | None = None

    @property
    def memory(self) -> Memory:
        """The graphs' memory; zeros before the first call."""
        return Memory() if self._recorded is None else self._recorded.memory

    def __call__(self, images: Tensor) -> Any:
        """Return what the method returns; its tensors are overwritten by the next call.

        Their backward pass sets the gradients of the trained parameters, and raises a RuntimeError unless those are None. Several
        processes call it together, with images of one shape, and get the means of their gradients; the backward pass raises a
        CaptureError if the loss has trained parameters elsewhere, of whose gradients there would be no means.

        Raises: CaptureError if it cannot be captured; RuntimeError if a tensor of the model has been replaced since.
        """
        if not (self._model.training and torch.is_grad_enabled()):
            return _outputs(self._model, images)
        kind = images.device.type
        precision = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        key = (images.shape, images.stride(), images.dtype, images.device, *precision)
        if self._recorded is None or self._key != key:
            self.release()  # its memory first
            self._recorded, self._key = _Recorded(self._model, images, precision, self._recorder(images.device)), key
        return self._recorded(images)

    def release(self) -> None:
        """Free the graphs; the next call captures anew. NCCL's communicators cannot end before the graphs that use them."""
        if self._recorded is not None:
            self._recorded.release()
        self._recorded = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return the method of the model's copy, which has no graphs."""
        copied = memo[id(self._model)]
        return type(copied).training_outputs.__get__(copied)


def capture(model: Segmentor) -> TrainingGraphs:
    """Have a model's `training_outputs` captured, in place; a copy of the model is without that.

    Raises: ValueError for a method whose loss has no such part.
    """
    if not captures(model):
        raise ValueError(f"`{model.method}` has no `training_outputs`")
    held: Any = model
    held.training_outputs = graphs = TrainingGraphs(model)
    return graphs


def captures(model: Segmentor) -> bool:
    """Return whether a method's loss has a part that can be captured."""
    return type(model).training_outputs is not Segmentor.training_outputs


def _outputs(model: Segmentor, images: Tensor) -> Any:
    return type(model).training_outputs(model, images)


class _Recorded:
    """Both graphs of images of one shape, and the tensors that they read and write."""

    def __init__(self, model: Segmentor, images: Tensor, precision: tuple[bool, torch.dtype], recorder: Recorder) -> None:
        kind = images.device.type
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.images = images.detach().clone()
        self._joined = _Joined(self.trained) if number_of_processes() > 1 else None
        self._recorder = recorder
        live: list[Tensor] = []  # with their autograd graph, which is dropped behind the backward pass

        def forward() -> list[Tensor]:
            # casts are shared within the pass, as without graphs, and with nothing outside of it
            torch.clear_autocast_cache()
            with torch.autocast(kind, enabled=precision[0], dtype=precision[1]):
                live[:], self._spec = tree_flatten(_outputs(model, self.images))
            torch.clear_autocast_cache()
            return [output.detach() for output in live]

        def backward() -> Sequence[Tensor | None]:
            ends = [output for output in live if output.requires_grad]
            found = torch.autograd.grad(ends, self.trained, [g for g in self.incoming if g is not None], allow_unused=True)
            live.clear()
            return _own(found, self.trained, self.incoming) if self._joined is None else self._joined.hold(found)

        def both() -> None:
            forward()
            self.incoming = [torch.zeros_like(output) if output.requires_grad else None for output in live]
            backward()

        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # such as BatchNorm's statistics
        cards = [images.device] if kind == "cuda" else []
        # the backward pass is outside of autocast, as in a training
        with torch.random.fork_rng(cards), torch.autocast(kind, enabled=False):
            for _ in range(_WARM_UP):
                recorder.rehearse(both)
            before = dispatch.tally()
            with handed_out() as self._tables:  # which a replay reads: here they outlive other sizes
                outputs, self._forward = recorder.record(forward)
            self.outputs = [output for output in outputs if output is not None]
            self.gradients, self._backward = recorder.record(backward)
            self._ran: Counter[tuple[str, str]] = dispatch.tally() - before
            self.memory = recorder.memory()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        self._anchor = torch.zeros((), device=images.device, requires_grad=True)  # has the results take part in a backward pass
        self._held = [*model.parameters(), *model.buffers()]
        self._addresses = [tensor.data_ptr() for tensor in self._held]
        outside = self.trained if self._joined is not None else []
        self._hooks = [parameter.register_post_accumulate_grad_hook(_refuse) for parameter in outside]

    def __call__(self, images: Tensor) -> Any:
        if [tensor.data_ptr() for tensor in self._held] != self._addresses:
            raise RuntimeError("a tensor of the model was replaced, and its CUDA graphs read the old one")
        results = _Replay.apply(self, images, self._anchor)
        dispatch.count(self._ran)
        return tree_unflatten(list(results), self._spec)

    def forwards(self, images: Tensor) -> tuple[Tensor, ...]:
        """Write the outputs of images, and return them."""
        self.images.copy_(images)
        self._forward()
        return tuple(output.detach() for output in self.outputs)

    def backwards(self, gradients: Sequence[Tensor | None]) -> None:
        """Write the parameters' gradients from those of the outputs."""
        if any(parameter.grad is not None for parameter in self.trained):
            raise RuntimeError("CUDA graphs write gradients where those of the step before are: set them to None after each step")
        for own, given in zip(self.incoming, gradients, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        self._backward()
        if self._joined is not None:
            for flat in self._joined.flats:
                average(flat)
        for parameter, gradient in zip(self.trained, self.gradients, strict=True):
            parameter.grad = gradient

    def release(self) -> None:
        """Free both graphs; nothing can be computed by them from then on."""
        self._recorder.forget()
        for hook in self._hooks:
            hook.remove()


class _Joined:
    """Memory of the gradients of parameters, one behind the other in their layouts, so that processes exchange all at once.

    flats: one tensor for each type of numbers; zeros between gradients, and where a parameter has none.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        begins: list[int] = []
        sizes: dict[torch.dtype, int] = {}
        for parameter in parameters:
            begins.append(sizes.get(parameter.dtype, 0))
            sizes[parameter.dtype] = begins[-1] + -(-parameter.numel() // _ALIGNED) * _ALIGNED
        device = parameters[0].device if parameters else None
        flats = {dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()}
        self.flats = list(flats.values())
        self._views = [
            flats[parameter.dtype].as_strided(parameter.shape, torch.empty_like(parameter, device="meta").stride(), begin)
            for parameter, begin in zip(parameters, begins, strict=True)
        ]

    def hold(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Copy gradients there, and return them where they are now."""
        pairs = [(view, own) for view, own in zip(self._views, gradients, strict=True) if own is not None]
        alike = [(view, own) for view, own in pairs if view.stride() == own.stride()]  # which one kernel copies hundreds of
        if alike:
            torch._foreach_copy_([view for view, _ in alike], [own for _, own in alike])
        for view, own in pairs:
            if view.stride() != own.stride():
                view.copy_(own)
        return [None if own is None else view for view, own in zip(self._views, gradients, strict=True)]


def _refuse(_: Tensor) -> None:
    """Refuse a parameter's gradient that comes from torch's engine, not from the graph."""
    raise CaptureError("its loss has trained weights outside of what is captured, whose gradients processes would not average")


def _own(gradients: Sequence[Tensor | None], trained: Sequence[Tensor], others: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return gradients as torch's engine would keep them: in their parameters' layout, and in memory of their own.

    An optimizer goes through both in memory's order, and what clips gradients scales each in place.
    """
    taken = {other.untyped_storage().data_ptr() for other in others if other is not None}
    found: list[Tensor | None] = []
    for gradient, parameter in zip(gradients, trained, strict=True):
        if gradient is not None:
            if gradient.stride() != parameter.stride() or gradient.untyped_storage().data_ptr() in taken:
                gradient = torch.empty_like(parameter).copy_(gradient)
            taken.add(gradient.untyped_storage().data_ptr())
        found.append(gradient)
    return found


class _Replay(torch.autograd.Function):
    """Both graphs as one node. The parameters' gradients are set, not given to the engine, which would copy each of them."""

    @staticmethod
    def forward(ctx: Any, recorded: _Recorded, images: Tensor, anchor: Tensor) -> tuple[Tensor, ...]:
        ctx.recorded = recorded
        outputs = recorded.forwards(images)
        ctx.mark_non_differentiable(*(o for o, end in zip(outputs, recorded.incoming, strict=True) if end is None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None, None]:
        ctx.recorded.backwards(gradients)
        return None, None, None

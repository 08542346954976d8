"""What a CUDA graph cannot hold, looked for without a GPU: every operator of a pass is seen on tensors that only say "cuda".

Tensors of torch's FakeTensorMode have a device and no values: an operator that asks for a value (`item`, `nonzero`) raises, and
one between a CPU and a GPU is a copy, for which a GPU waits, and which fails in a capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mfuser
from dgbench import protocol
from dgbench.engine import scoring
from mfuser import fast, methods
from mfuser.cuda_graphs import first_cause
from mfuser.ops.ms_deform_attn import torch_backend as deform
from mfuser.ops.selective_scan import torch_backend as scan
from mfuser.segmentor import Segmentor

SIDE = 64


class Copies(TorchDispatchMode):
    """Operators that have tensors of several devices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {each.device.type for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)}
        if len(devices) > 1:
            self.found.append(f"{func} between {sorted(devices)}")
        return out


@pytest.fixture(autouse=True)
def _pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have torch's autocast take a GPU for one that is there, and modules take parameters of another device."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(before)


def copies(model: Segmentor, pass_: Callable[[fast.Prepared], Tensor], dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """What is copied between host and GPU in a pass of a model's prepared copy, which is made there."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        nn.Module.to_empty(model.eval(), device="cuda")
        ready = fast.prepare(model, dtype=dtype, compile=False, graphs=False)
        with Copies() as seen:
            scores = pass_(ready)
    assert scores.device.type == "cuda"
    return seen.found


def images(count: int = 2, size: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
    return torch.rand(count, 3, *size, device="cuda")


def tiny(name: str, **options: object) -> Segmentor:
    return mfuser.build(
        name, **{**methods.module(name).BACKBONES[-1], "image_size": (SIDE, SIDE), "weights": "random", **options}
    )


@pytest.mark.parametrize("name", mfuser.method_names())
def test_a_pass_of_every_method_neither_waits_nor_copies(name):
    assert copies(tiny(name), lambda ready: ready(images())) == []


OTHERS = [
    *(("erm", {"backbone": f"tiny_{kind}"}) for kind in ("swin", "convnext", "vmamba", "vim")),
    ("shade", {"backbone": "tiny_mit"}),
    ("linear", {"vfm": "dinov3_s", "weights": "meta"}),
]


@pytest.mark.parametrize(("name", "options"), OTHERS, ids=[f"{name}-{next(iter(o.values()))}" for name, o in OTHERS])
def test_a_pass_of_other_trunks_neither_waits_nor_copies(name, options):
    assert copies(tiny(name, **options), lambda ready: ready(images())) == []


@pytest.mark.parametrize("vlm", ["eva02_b", "clip_b", "siglip_b"])
def test_a_pass_with_each_kind_of_towers_neither_waits_nor_copies(vlm):
    ids = torch.ones(len(Segmentor.classes), 5, dtype=torch.long)
    options = {"vfm": "dinov2_b", "vlm": vlm, "image_size": (SIDE, SIDE), "weights": "meta", "token_ids": ids}
    assert copies(mfuser.build("mfuser", **options), lambda ready: ready(images())) == []


@pytest.mark.parametrize("fuser", ["mvfuser_bidir", "bi_deform_attn", "selfattn_concat", "none"])
def test_a_pass_with_each_fuser_neither_waits_nor_copies(fuser):
    assert copies(tiny("mfuser", fuser=fuser), lambda ready: ready(images()), torch.float32) == []


def windows(ready: fast.Prepared) -> Tensor:
    return mfuser.slide(ready, images(1, (SIDE, 3 * SIDE)), (SIDE, SIDE), (SIDE, 40), windows_at_once=2)


def evaluated(ready: fast.Prepared) -> Tensor:
    """An image that is on the GPU already, as `dgbench eval` scores it, resized to another grid."""
    return scoring.score(ready, [images(1, (SIDE, 2 * SIDE))], (2 * SIDE, 4 * SIDE), protocol.lookup("unified")).argmax(1)


@pytest.mark.parametrize("name", ["mfuser", "rein", "source-only"])
def test_windows_are_put_together_where_they_were_scored(name):
    assert copies(tiny(name), windows) == []


def test_an_image_is_scored_where_it_is():
    # 4 windows through a model that says how many at once, without asking a GPU that is not there
    def scored(ready: fast.Prepared) -> Tensor:
        ready._most = 2
        return evaluated(ready)

    assert copies(tiny("linear"), scored) == []


def test_whole_images_of_another_size_neither_wait_nor_copy():
    model = tiny("erm")
    assert model.any_size
    assert copies(model, lambda ready: ready(images(1, (SIDE, 2 * SIDE)))) == []


def test_the_operators_in_torch_neither_wait_nor_copy():
    with FakeTensorMode(), Copies() as seen:
        on = {"device": "cuda"}
        points = torch.rand(1, 5, 2, 2, 3, 2, **on)
        deform.forward(torch.rand(1, 20, 2, 4, **on), [4, 4, 2, 2], points, points[..., 0])
        u, states = torch.rand(1, 70, 8, **on), torch.rand(1, 70, 4, **on)
        scan.forward(u, u, torch.rand(8, 4, **on), states, states, None, None, None, None, True, False)
    assert seen.found == []


def test_a_copy_from_the_host_would_be_seen():
    class Copying(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, [0]] + torch.tensor([1.0], device=x.device)

    with FakeTensorMode(), Copies() as seen:
        Copying()(torch.rand(1, 2, device="cuda"))
    assert len(seen.found) == 2
    assert all("cpu" in each for each in seen.found)


def test_the_error_that_came_first_is_told():
    before = ValueError("a copy from the host\nand more")
    error = RuntimeError("the capture failed because of an earlier error")
    error.__context__ = before
    assert first_cause(error) == "ValueError: a copy from the host"
    assert first_cause(KeyError("alone")) == "KeyError: 'alone'"

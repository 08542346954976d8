"""Attention of fast inference in one kernel, in Triton's interpreter on a CPU, against torch's in fp64, and where it is taken."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block as Plain
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mfuser import batch_first
from mfuser.fast import attention
from mfuser.fast.blocks import Block

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter has no products of bf16, and fast inference on a GPU none of fp32
TYPES = [torch.bfloat16, torch.float16] if DEVICE == "cuda" else [torch.float32, torch.float16]
# relative: sums in another order; of 16 bits, weights and results that are rounded
WITHIN = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
OURS, TORCHS = "mfuser.attention.default", "scaled_dot_product_attention"


def drawn(length: int, keys: int, width: int, *, dtype: torch.dtype = TYPES[0], heads: int = 3) -> list[Tensor]:
    """Queries, keys and values of heads that lie side by side, as a projection leaves them."""
    made = [torch.randn(2, n, heads, width).to(DEVICE, dtype).transpose(1, 2) for n in (length, keys, keys)]
    made[0] *= 3  # weights that differ
    return made


def packed(length: int, heads: int, width: int, dtype: torch.dtype = TYPES[0], batch: int = 2) -> tuple[Tensor, ...]:
    made = torch.randn(batch, length, 3, heads, width).to(DEVICE, dtype)
    return made.permute(2, 0, 3, 1, 4).unbind(0)


def agrees(found: Tensor, given: Any) -> None:
    q, k, v = (each.double() for each in given)
    with sdpa_kernel(SDPBackend.MATH):
        true = F.scaled_dot_product_attention(q, k, v)
    assert found.dtype is given[0].dtype
    assert (found.double() - true).norm() <= WITHIN[found.dtype] * true.norm()


# one token; less than a tile; whole tiles; tiles and a rest
LENGTHS = [(1, 1), (1, 70), (70, 1), (19, 64), (64, 19), (130, 128), (67, 200)]


@pytest.mark.parametrize(("length", "keys"), LENGTHS)
@pytest.mark.parametrize("dtype", TYPES)
def test_it_is_torchs(length, keys, dtype):
    given = drawn(length, keys, 32, dtype=dtype)
    agrees(attention.attention(*given), given)


@pytest.mark.parametrize("width", [16, 64, 128])
def test_it_is_torchs_of_other_widths(width):
    given = drawn(70, 70, width)
    agrees(attention.attention(*given), given)


def test_each_input_has_its_own_strides():
    q, k, v = packed(70, 3, 32)
    for given in (
        (q, k, v),
        (q.contiguous(), k.transpose(1, 2).contiguous().transpose(1, 2), v),  # as turned ones, beside a view of the product
        (q[:, :, :1].expand(-1, -1, 5, -1), k, v),
        (q.mT.contiguous().mT, k[..., ::2].repeat_interleave(2, -1), v.flip(0)),  # channels apart
    ):
        agrees(attention.attention(*given), given)


def test_large_scores_do_not_overflow():
    q, k, v = drawn(5, 130, 16)
    given = (q * 1000, k, v)
    agrees(attention.attention(*given), given)


def test_heads_of_a_token_lie_side_by_side_in_the_result():
    given = drawn(5, 7, 16)
    found = attention.attention(*given)
    assert found.shape == given[0].shape
    assert found.transpose(1, 2).flatten(2).data_ptr() == found.data_ptr()


def test_no_queries_are_no_results():
    q, k, v = drawn(5, 7, 16)
    assert attention.attention(q[:, :, :0], k, v).shape == (2, 3, 0, 16)
    assert attention.attention(q[:0], k[:0], v[:0]).shape == (0, 3, 5, 16)


@pytest.mark.parametrize(
    "given",
    [
        (torch.zeros(2, 3, 5, 24),) * 3,
        (torch.zeros(3, 5, 16),) * 3,
        (torch.zeros(2, 3, 5, 16), torch.zeros(2, 3, 7, 16), torch.zeros(2, 3, 8, 16)),
        (torch.zeros(2, 3, 5, 16), torch.zeros(1, 3, 7, 16), torch.zeros(1, 3, 7, 16)),
        (torch.zeros(2, 3, 5, 16), torch.zeros(2, 3, 0, 16), torch.zeros(2, 3, 0, 16)),
    ],
    ids=["width", "dimensions", "values", "images", "no keys"],
)
def test_other_shapes_are_refused_by_name(given):
    with pytest.raises(ValueError, match=r"attention: got q, k, v of .*16, 32, 64, 128.*`attend` takes the others"):
        attention.attention(*given)


def test_it_is_an_operator_as_torch_wants_them():
    torch.library.opcheck(attention.attention, tuple(drawn(5, 7, 16)))
    torch.library.opcheck(attention.attention, packed(7, 2, 32, torch.float16))


def test_compiled_it_takes_views_and_gives_one():
    def attended(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x @ weight).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        return attention.attention(q, k, v).transpose(1, 2).flatten(2)

    given = [torch.randn(*shape).to(DEVICE, TYPES[0]) for shape in ((2, 9, 32), (32, 96))]
    compiled = torch.compile(attended, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), attended(*given), rtol=0, atol=0)


# ---- where it is taken


def taken(run: Any) -> list[str]:
    """The attentions of a call, as the compiler finds them in one graph."""
    found: list[str] = []

    def noted(graph: Any, _inputs: Any) -> Any:
        names = (getattr(node.target, "__name__", "") or str(node.target) for node in graph.graph.nodes)
        found.extend(TORCHS if TORCHS in name else OURS for name in names if TORCHS in name or "attention" in name)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(run, fullgraph=True, dynamic=False, backend=noted)()
    return found


def on_a_gpu(module: nn.Module) -> nn.Module:
    """The module with tensors that say they are on a GPU; within a FakeTensorMode."""
    for part in module.modules():
        for held in (part._buffers, part._parameters):
            for name, value in held.items():
                if value is not None:
                    there = torch.empty_like(value, device="cuda")
                    held[name] = nn.Parameter(there, requires_grad=value.requires_grad) if held is part._parameters else there
    return module


BLOCKS = {
    "plain": lambda: Plain(64, 2, norm_layer=partial(LayerNorm, eps=1e-6)),
    "EVA02's": lambda: EvaBlock(64, 2, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True),
}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, OURS), (torch.float32, TORCHS)])
def test_a_block_on_a_gpu_takes_it_in_16_bits(kind, dtype, expected):
    block = Block(BLOCKS[kind]().eval(), dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        on_a_gpu(block)
        x = torch.empty(2, 9, 64, device="cuda")
        rope = None if kind == "plain" else torch.empty(2, 9, 32, device="cuda", dtype=dtype)
        assert taken(lambda: block(x, rope)) == [expected]


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_on_a_cpu_takes_torchs(kind):
    block, x = Block(BLOCKS[kind]().eval(), torch.bfloat16), torch.randn(2, 9, 64)
    with torch.no_grad():
        assert taken(lambda: block(x)) == [TORCHS]


def in_16_bits(attend: Any, *, gradient: bool = False, masked: bool = False, heads: int = 2) -> list[str]:
    """The attentions of a decoder's layer computed image by image, in 16 bits on a GPU."""
    layer = nn.MultiheadAttention(64, heads, batch_first=True).bfloat16().requires_grad_(gradient)
    batch_first.take(layer, **({} if attend is None else {"attend": attend}))
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_a_gpu(layer)
        x, text = (torch.empty(2, n, 64, device="cuda", dtype=torch.bfloat16) for n in (9, 5))
        mask = torch.zeros(9, 5, dtype=torch.bool, device="cuda") if masked else None
        return taken(lambda: layer(x, text, text, attn_mask=mask, need_weights=False)[0])


def test_decoders_take_it_where_it_is_given():
    assert in_16_bits(attention.attend) == [OURS]
    assert in_16_bits(None) == [TORCHS], "a training's"
    with torch.no_grad():
        assert in_16_bits(None) == [TORCHS], "and its validation's"


@pytest.mark.parametrize("options", [{"masked": True}, {"gradient": True}, {"heads": 8}])
def test_what_it_cannot_do_is_torchs(options):
    """Masks, gradients, and heads of 8 channels."""
    assert in_16_bits(attention.attend, **options) == [TORCHS]


def test_where_no_gradient_is_asked_for_weights_may_have_one():
    with torch.no_grad():
        assert in_16_bits(attention.attend, gradient=True) == [OURS]


def test_on_a_cpu_attend_is_torchs_bit_for_bit():
    given = [each.cpu().bfloat16() for each in drawn(9, 7, 16)]
    assert torch.equal(attention.attend(*given), F.scaled_dot_product_attention(*given))


# ---- on a GPU

FULL = {
    "a block of ViT-L": lambda dtype: packed(1297, 16, 64, dtype, batch=8),
    "one image": lambda dtype: packed(1297, 16, 64, dtype, batch=1),
    "texts": lambda dtype: drawn(6804, 19, 32, dtype=dtype, heads=8),
    "queries": lambda dtype: drawn(100, 100, 32, dtype=dtype, heads=8),
    "wide heads": lambda dtype: drawn(1297, 333, 128, dtype=dtype),
    "narrow heads": lambda dtype: drawn(77, 1000, 16, dtype=dtype),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FULL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_it_is_as_near_as_roundings(kind, dtype):
    given = FULL[kind](dtype)
    assert attention.fuses(*given)
    agrees(attention.attend(*given), given)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BLOCKS)
def test_on_a_gpu_a_compiled_block_is_the_block(kind):
    torch.manual_seed(0)
    block = BLOCKS[kind]().eval().cuda()
    ready, x = Block(block, torch.bfloat16), torch.randn(2, 70, 64, device="cuda")
    with torch.no_grad():
        expected = block(x)
        found = torch.compile(ready, fullgraph=True, dynamic=False)(x)
    assert (found - expected).norm() <= 0.01 * expected.norm()

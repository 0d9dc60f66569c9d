"""What every backend of self_attention and attention is held to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pixart_kernels as pk
from pixart_kernels.testing import assert_within_eager_error, poisoned_allocations

FP32, BF16, FP16 = DTYPES = torch.float32, torch.bfloat16, torch.float16

per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(*shape: int, dtype: torch.dtype = FP32, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def packed(B, N, H, d, dtype=FP32, device="cpu") -> list[Tensor]:
    return [random(B, N, 3 * H * d, dtype=dtype, device=device)]


def separate(B, Nq, Nk, H, d, dtype=FP32, device="cpu") -> list[Tensor]:
    lengths = (Nq, Nk, Nk)
    return [random(B, N, H, d, dtype=dtype, device=device, seed=i) for i, N in enumerate(lengths)]


def self_attention(H: int):
    def op(qkv: Tensor, backend: str) -> Tensor:
        return pk.self_attention(qkv, H, backend=backend)

    return op


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return pk.attention(q, k, v, backend=backend)


def run(op, leaves, backend, dout=None) -> list[Tensor]:
    """The output and the gradient of each leaf."""
    # detached, and so as strided as they came
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = op(*leaves, backend=backend)
    dout = gradient_like(out) if dout is None else dout
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def gradient_like(out: Tensor) -> Tensor:
    return random(*out.shape, dtype=out.dtype, device=str(out.device), seed=9)


def assert_same_bits(expected, actual) -> None:
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def check_error_rule(op, leaves, backend) -> None:
    """The backend against fp64, given the error of eager PyTorch in this precision."""
    with poisoned_allocations():
        actual = run(op, leaves, backend)
    dout = gradient_like(actual[0])
    eager = run(op, leaves, "reference", dout)
    exact = run(op, [leaf.double() for leaf in leaves], "reference", dout)
    terms = 4 * max(leaf.shape[1] for leaf in leaves) + 1
    for found, expected, plain in zip(actual, exact, eager, strict=True):
        assert found.dtype == leaves[0].dtype
        assert_within_eager_error(found, expected, plain, terms=terms)


def sliced(tensor: Tensor) -> Tensor:
    """The same values, as a slice of a wider tensor whose other values are NaN."""
    wide = tensor.new_full((*tensor.shape[:-1], 3 * tensor.shape[-1]), float("nan"))
    return wide[..., tensor.shape[-1] : 2 * tensor.shape[-1]].copy_(tensor)


def misaligned(tensor: Tensor) -> Tensor:
    """One element past a 16-byte boundary."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 8), float("nan"))
    return wide[..., 1 : 1 + tensor.shape[-1]].copy_(tensor)


def tokens_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def last_dimension_strided(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


LAYOUTS = [sliced, misaligned, tokens_first, last_dimension_strided]
per_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


def check_strided_views(layout, backend, device="cpu", d=24) -> None:
    for op, leaves in (
        (self_attention(2), packed(2, 19, 2, d, BF16, device)),
        (attention, separate(2, 19, 5, 2, d, BF16, device)),
    ):
        expected = run(op, leaves, backend)
        views = [layout(leaf) for leaf in leaves]
        dout = layout(gradient_like(expected[0]))
        assert_same_bits(expected, run(op, views, backend, dout))


def check_heads_first_and_packed_keys(backend, device="cpu", d=24) -> None:
    """What a KV-compressed layer passes: k and v of one tensor, queries as (B, H, N, d)."""
    q, k, v = separate(2, 19, 5, 2, d, FP16, device)
    expected = run(attention, [q, k, v], backend)
    views = [q.transpose(1, 2).contiguous().transpose(1, 2), *torch.stack([k, v], 2).unbind(2)]
    assert_same_bits(expected, run(attention, views, backend))


def check_expanded(backend, device="cpu", d=24, dtype=FP32, tolerance=1e-5) -> None:
    """Stride 0: one sample of keys for all queries, and sum() as the loss."""
    q, k, v = separate(1, 19, 5, 2, d, dtype, device)
    grads = []
    for name in ("reference", backend):
        leaves = [leaf.detach().requires_grad_() for leaf in (q, k, v)]
        expanded = [leaf.expand(3, -1, -1, -1) for leaf in leaves]
        # a weight of its own for each key keeps the gradients from vanishing
        out = attention(expanded[0], *expanded[1:], backend=name)
        grads.append(torch.autograd.grad(out.sum() + out[0].square().sum(), leaves))
    for expected, actual in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def check_addresses_beyond_32_bits(backend, device="cpu", d=8) -> None:
    """A batch stride of 2^31 elements over memory that is reserved and mostly never touched."""
    width, stride = 3 * d, 2**31
    try:
        storage = torch.empty(2 * stride + 3 * width, dtype=BF16, device=device)
    except RuntimeError:
        pytest.skip("cannot reserve 8 GiB of addresses")
    (qkv,) = packed(3, 3, 1, d, BF16, device)
    view = storage.as_strided((3, 3, width), (stride, width, 1)).copy_(qkv)
    op = self_attention(1)
    assert_same_bits(run(op, [qkv], backend), run(op, [view], backend))


def check_large_scores(dtype, backend, device="cpu", d=24) -> None:
    """One key takes all the weight, scores of thousands stay finite, and keys tie."""
    q, k, v = separate(1, 19, 21, 1, d, dtype, device)
    q[:, 3] *= 1000
    k[:, 7] *= 100
    k[:, 20] = k[:, 7]
    q[:, 5] = 0
    found = run(attention, [q, k, v], backend)
    exact = run(attention, [x.double() for x in (q, k, v)], "reference", gradient_like(found[0]))
    assert all(x.isfinite().all() for x in found)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(found[0].double(), exact[0], rtol=4 * unit, atol=4 * unit)


def check_scores_at_the_limit(backend, device="cpu", d=16) -> None:
    """Weights are 1 at the maximum even where a score's last place is worth thousands."""
    q, k, v = separate(1, 17, 18, 1, d, FP16, device)
    q[:], k[:] = 60000, 1
    k[:, 4] = 60000
    out = attention(q, k, v, backend=backend)
    assert torch.equal(out, v[:, 4:5].expand_as(out))


def check_all_scores_far_below_zero(backend, device="cpu", d=24) -> None:
    """Rows past the end score 0, which must not count, nor its weight overflow in dq."""
    q, k, v = separate(1, 17, 19, 2, d, FP16, device)
    q, k = q.abs() + 20, -k.abs() - 20
    assert all(x.isfinite().all() for x in run(attention, [q, k, v], backend))
    check_error_rule(attention, [q, k, v], backend)


def check_nan_stays_in_its_row(backend, device="cpu", d=24) -> None:
    q, k, v = separate(2, 19, 5, 2, d, BF16, device)
    clean = run(attention, [q, k, v], backend)
    q[1, 18, 0] = float("nan")
    found = run(attention, [q, k, v], backend)
    assert found[0][1, 18, 0].isnan().all() and found[1][1, 18, 0].isnan().all()
    for x, y in zip(clean[:2], found[:2], strict=True):
        spared = y.isfinite()
        assert spared.sum() == y.numel() - d and torch.equal(x[spared], y[spared])


def check_a_sample_alone(op, leaves, backend) -> None:
    dout = gradient_like(run(op, leaves, backend)[0])
    together = run(op, leaves, backend, dout)
    alone = run(op, [leaf[1:2] for leaf in leaves], backend, dout[1:2])
    assert_same_bits([tensor[1:2] for tensor in together], alone)


def check_some_gradients(backend, device="cpu", d=8, dtype=FP32) -> None:
    """Each gradient is the same whether or not the others are asked for."""
    leaves = separate(1, 17, 5, 2, d, dtype, device)
    _, *expected = run(attention, leaves, backend)
    for i, gradient in enumerate(expected):
        some = [leaf.detach().requires_grad_(i == j) for j, leaf in enumerate(leaves)]
        out = attention(*some, backend=backend)
        out.backward(gradient_like(out))
        assert torch.equal(some[i].grad, gradient)
        assert all(leaf.grad is None for j, leaf in enumerate(some) if i != j)


def check_opcheck(ops, needs_grad, device="cpu", d=8) -> None:
    """``ops``: the namespace that the backend registers its ops in."""
    (qkv,) = packed(2, 5, 2, d, FP16, device)
    q, k, v = separate(2, 5, 3, 2, d, BF16, device)
    out, lse = ops.attention_fwd(q, k, v)
    self_out, self_lse = ops.self_attention_fwd(qkv, 2)
    leaves = [leaf.requires_grad_(needs_grad) for leaf in (qkv, q, k, v)]
    qkv, q, k, v = leaves
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, arguments in (
        (ops.attention_fwd, (q, k, v)),
        (ops.attention_bwd, (out, q, k, v, out, lse)),
        (ops.self_attention_fwd, (qkv, 2)),
        (ops.self_attention_bwd, (self_out, qkv, self_out, self_lse, 2)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=checks)


def check_one_recompilation_for_other_lengths(
    backend, lengths, device="cpu", d=8, dtype=FP32
) -> None:
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, example_inputs)

    def both(qkv, q, k, v, backend):
        return pk.self_attention(qkv, 2, backend=backend), pk.attention(q, k, v, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend=count)
    for N in lengths:
        leaves = packed(2, N, 2, d, dtype, device) + separate(2, N + 10, N, 2, d, dtype, device)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        expected = run(self_attention(2), leaves[:1], backend), run(attention, leaves[1:], backend)
        outs = compiled(*leaves, backend=backend)
        grads = torch.autograd.grad(outs, leaves, [gradient_like(out) for out in outs])
        assert_same_bits(expected[0], [outs[0], grads[0]])
        assert_same_bits(expected[1], [outs[1], *grads[1:]])
    assert len(graphs) == 2


def check_compiles_with_one_tensor_thrice(
    backend, device="cpu", d=8, dtype=FP32, tolerance=1e-5
) -> None:
    """Dynamo refuses a Function that gets the same tensor twice."""
    x = random(1, 5, 2, d, dtype=dtype, device=device).requires_grad_()
    op = torch.compile(pk.attention, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    found = op(x, x, x, backend=backend)
    expected = pk.attention(x, x, x, backend=backend)
    assert torch.equal(found, expected)
    dout = gradient_like(found)
    # three gradients of one tensor, added up in another order
    (actual,), (gradient,) = (torch.autograd.grad(out, x, dout) for out in (found, expected))
    torch.testing.assert_close(actual, gradient, rtol=tolerance, atol=tolerance / 10)


def check_compiles_with_inductor_and_without_gradients(backend, device="cpu", d=8) -> None:
    (qkv,) = packed(2, 5, 2, d, BF16, device)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(pk.self_attention, fullgraph=True)(qkv, 2, backend=backend)
    assert torch.equal(found, pk.self_attention(qkv, 2, backend=backend))

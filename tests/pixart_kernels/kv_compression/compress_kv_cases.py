"""What every backend of compress_kv is held to."""

from __future__ import annotations

import itertools

import pytest
import torch

import pixart_kernels as pk
from pixart_kernels.testing import assert_within_eager_error, poisoned_allocations

FP32, BF16, FP16 = DTYPES = torch.float32, torch.bfloat16, torch.float16

per_dtypes = pytest.mark.parametrize(
    "kv_dtype, parameter_dtype",
    list(itertools.product(DTYPES, repeat=2)),
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)

# (batch, height, width, D), ratio
Shape = tuple[tuple[int, int, int, int], int]


def inputs(shape, kv_dtype=FP32, parameter_dtype=FP32, device="cpu", seed=0):
    """Leaves (kv, weight, bias, norm_weight, norm_bias); kv has a mean, which a variance must
    survive."""
    (B, height, width, D), R = shape
    generator = torch.Generator().manual_seed(seed)

    def leaf(*size):
        return torch.randn(size, generator=generator)

    kv = 2 * leaf(B, height * width, 2, D) + 3
    parameters = [leaf(D, 1, R, R) / R, leaf(D), leaf(D), leaf(D)]
    return [kv.to(device, kv_dtype), *(p.to(device, parameter_dtype) for p in parameters)]


def compress(shape, leaves, backend):
    (_, height, width, _), R = shape
    kv, *parameters = leaves
    return pk.compress_kv(kv, height, width, *parameters, ratio=R, backend=backend)


def run(shape, leaves, backend, dout=None):
    """The output and the gradients of every leaf."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = compress(shape, leaves, backend)
    dout = gradient_like(out) if dout is None else dout.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def gradient_like(out, seed=1):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)


def assert_same_bits(expected, actual):
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def check_error_rule(shape, leaves, backend):
    """The backend against fp64, given the error of eager in this precision."""
    with poisoned_allocations():
        actual = run(shape, leaves, backend)
    dout = gradient_like(actual[0])
    eager = run(shape, leaves, "reference", dout)
    exact = run(shape, [leaf.double() for leaf in leaves], "reference", dout)
    (B, height, width, D), R = shape
    # statistics sum over D, gradients of the parameters over windows
    terms = max(1, D, 2 * B * (height // R) * (width // R))
    for found, expected, plain in zip(actual, exact, eager, strict=True):
        assert_within_eager_error(found, expected, plain, terms=terms)


def check_parameters_of_several_dtypes(backend, device="cpu"):
    shape = (2, 4, 5, 40), 2
    kv, weight, bias, norm_weight, norm_bias = inputs(shape, BF16, device=device)
    leaves = [kv, weight.to(FP16), bias, norm_weight.to(BF16), norm_bias.to(FP16)]
    check_error_rule(shape, leaves, backend)


def check_fp64_parameters(backend, device="cpu"):
    """Beside fp32 tokens they are read as fp32, as the reference reads them."""
    shape = (2, 3, 5, 24), 2
    kv, *parameters = inputs(shape, device=device)
    leaves = [kv, *(parameter.double() for parameter in parameters)]
    actual, expected = (run(shape, leaves, b) for b in (backend, "reference"))
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def packed(kv):
    """The last two thirds of a projection, as the model has them."""
    B, N, _, D = kv.shape
    return kv.new_full((B, N, 3, D), float("nan"))[:, :, 1:].copy_(kv)


def misaligned(kv):
    """One element past a 16-byte boundary, each row elsewhere, which vector loads must notice."""
    wide = kv.new_full((*kv.shape[:-1], kv.shape[-1] + 7), float("nan"))
    return wide[..., 1 : 1 + kv.shape[-1]].copy_(kv)


def tokens_first(kv):
    return kv.transpose(0, 1).contiguous().transpose(0, 1)


def values_apart(kv):
    return kv.movedim(2, 0).contiguous().movedim(0, 2)


def last_dimension_strided(kv):
    return kv.transpose(-1, -2).contiguous().transpose(-1, -2)


LAYOUTS = [packed, misaligned, tokens_first, values_apart, last_dimension_strided]
per_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


def check_strided_views(layout, backend, device="cpu"):
    shape = (2, 3, 4, 24), 2
    kv, weight, *vectors = leaves = inputs(shape, BF16, device=device)
    views = [
        layout(kv),
        weight.mT.contiguous().mT,
        *(torch.stack([vector, vector], 1)[:, 0] for vector in vectors),
    ]
    dout = gradient_like(compress(shape, leaves, "reference"))
    expected = run(shape, leaves, backend, dout)
    # apart, because the gradient's strides need not be those of kv
    assert_same_bits(expected, run(shape, views, backend, dout))
    assert_same_bits(expected, run(shape, leaves, backend, layout(dout)))


def check_no_copy_of_the_packed_projection(backend, device="cpu"):
    """What the Function keeps of this size is the projection itself."""
    (B, height, width, D), R = shape = (2, 4, 4, 24), 2
    _, *parameters = (leaf.requires_grad_() for leaf in inputs(shape, device=device))
    qkv = torch.randn(B, height * width, 3, D, device=device, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        compress(shape, [qkv[:, :, 1:], *parameters], backend)
    large = {t.untyped_storage().data_ptr() for t in kept if t.numel() > 4 * R * R * D}
    assert large == {qkv.data_ptr()}


def check_heads(backend, device="cpu"):
    shape = (2, 4, 5, 24), 2
    kv, *parameters = inputs(shape, device=device)
    expected = run(shape, [kv, *parameters], backend)
    heads = kv.unflatten(-1, (3, 8))
    dout = gradient_like(expected[0]).unflatten(-1, (3, 8))
    out, dkv, *grads = run(shape, [heads, *parameters], backend, dout)
    assert out.shape[2:] == (2, 3, 8)
    assert_same_bits(expected, [out.flatten(3), dkv.flatten(3), *grads])


def check_expanded(backend, device="cpu"):
    """Stride 0: one sample for all, and sum() as the loss, over norm_bias for a gradient."""
    shape = (3, 4, 4, 24), 2
    kv, *parameters = inputs(((1, 4, 4, 24), 2), device=device)
    found = []
    for name in ("reference", backend):
        leaves = [leaf.detach().requires_grad_() for leaf in (kv, *parameters)]
        out = compress(shape, [leaves[0].expand(3, -1, -1, -1), *leaves[1:]], name)
        found.append([out, *torch.autograd.grad(out[:, :, 1].sum(), leaves)])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def check_addresses_beyond_32_bits(backend, device="cpu"):
    """A stride of 2^31 elements over memory that is reserved and, but for 4 tokens, not touched."""
    shape, stride = ((1, 2, 2, 8), 2), 2**31
    try:
        storage = torch.empty(3 * stride + 16, dtype=BF16, device=device)
    except RuntimeError:
        pytest.skip("cannot reserve 12 GiB of addresses")
    kv, *parameters = inputs(shape, BF16, device=device)
    far = storage.as_strided(kv.shape, (0, stride, 8, 1)).copy_(kv)
    found = (compress(shape, [tokens, *parameters], backend) for tokens in (kv, far))
    assert torch.equal(*found)


def check_nan_stays_in_its_window(backend, device="cpu"):
    shape = (2, 4, 4, 24), 2
    leaves = inputs(shape, BF16, device=device)
    # token (1, 2) of the first sample's k: window (0, 1)
    leaves[0][0, 6, 0, 3] = float("nan")
    out, dkv, *_ = run(shape, leaves, backend)
    assert out[0, 1, 0].isnan().all() and out.isnan().sum() == 24
    assert dkv.isnan().any(-1).nonzero().tolist() == [[0, n, 0] for n in (2, 3, 6, 7)]


def check_a_sample_alone(backend, device="cpu"):
    """It does not depend on its batch."""
    kv, *parameters = inputs(((3, 6, 9, 72), 2), device=device)
    together = compress(((3, 6, 9, 72), 2), [kv, *parameters], backend)
    alone = compress(((1, 6, 9, 72), 2), [kv[1:2], *parameters], backend)
    assert torch.equal(together[1:2], alone)


def check_forward_mode_is_refused(backend, device="cpu"):
    """Rather than tangents dropped."""
    shape = (1, 2, 2, 8), 2
    leaves = tuple(inputs(shape, device=device))
    with pytest.raises(RuntimeError, match="jvp|forward"):
        torch.func.jvp(lambda *leaves: compress(shape, leaves, backend), leaves, leaves)


def check_opcheck(ops, kv_dtype, parameter_dtype, needs_grad, device="cpu"):
    """``ops``: the namespace that the backend registers its ops in."""
    (B, height, width, _), R = shape = (2, 3, 4, 24), 2
    leaves = inputs(shape, kv_dtype, parameter_dtype, device=device)
    kv, *parameters = (leaf.requires_grad_(needs_grad) for leaf in leaves)
    dout = gradient_like(compress(shape, leaves, "reference")).detach()
    stats = torch.ones(2, B, (height // R) * (width // R), 2, device=device)
    for op, arguments in (
        (ops.compress_kv_fwd, (kv, height, width, *parameters, 1e-5)),
        (ops.compress_kv_bwd, (dout, kv, height, width, *parameters, stats)),
    ):
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op.default, arguments, test_utils=checks)


def check_one_recompilation_for_other_grids(backend, grids, device="cpu"):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, example_inputs)

    torch._dynamo.reset()
    compiled = torch.compile(pk.compress_kv, fullgraph=True, backend=count)
    for height, width in grids:
        shape = (2, height, width, 24), 2
        kv, *parameters = leaves = [leaf.requires_grad_() for leaf in inputs(shape, device=device)]
        out = compiled(packed(kv), height, width, *parameters, ratio=2, backend=backend)
        dout = gradient_like(out)
        expected = run(shape, leaves, backend, dout)
        assert_same_bits(expected, [out, *torch.autograd.grad(out, leaves, dout)])
    assert len(graphs) == 2


def check_compiles_with_inductor_and_without_gradients(backend, device="cpu"):
    shape = (2, 4, 5, 24), 2
    leaves = inputs(shape, BF16, device=device)
    torch._dynamo.reset()
    with torch.no_grad():
        actual = torch.compile(compress, fullgraph=True)(shape, leaves, backend)
    assert torch.equal(actual, compress(shape, leaves, backend))

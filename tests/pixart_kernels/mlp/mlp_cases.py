"""What every backend of bias_gelu is held to."""

from __future__ import annotations

import itertools

import pytest
import torch

import pixart_kernels as pk
from pixart_kernels.testing import assert_within_eager_error, poisoned_allocations

FP32, BF16, FP16 = DTYPES = torch.float32, torch.bfloat16, torch.float16

per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
per_dtypes = pytest.mark.parametrize(
    "x_dtype, bias_dtype",
    list(itertools.product(DTYPES, repeat=2)),
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)


def inputs(shape, x_dtype=FP32, bias_dtype=None, device="cpu", seed=0):
    """Leaves (x, bias)."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(shape, generator=generator)
    bias = torch.randn(shape[-1:], generator=generator)
    return [x.to(device, x_dtype), bias.to(device, bias_dtype or x_dtype)]


def run(leaves, backend, dy=None):
    """y, dx and dbias."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = pk.bias_gelu(*leaves, backend=backend)
    dy = gradient_like(y) if dy is None else dy.to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def gradient_like(y, seed=1):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y)


def assert_same_bits(expected, actual):
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def check_error_rule(leaves, backend):
    """The backend against the fp32 reference, given the error of eager in this precision."""
    with poisoned_allocations():
        actual = run(leaves, backend)
    x, bias = leaves
    dy = gradient_like(actual[0])
    eager = run(leaves, "reference", dy)
    exact = run([x.double(), bias.double()], "reference", dy)
    rows = x.numel() // max(1, x.shape[-1])
    for found, expected, plain in zip(actual, exact, eager, strict=True):
        assert_within_eager_error(found, expected, plain, terms=max(1, rows))


def sliced(tensor):
    """The same values, as a slice of a wider tensor."""
    wide = tensor.new_full((*tensor.shape[:-1], 3 * tensor.shape[-1]), float("nan"))
    return wide[..., tensor.shape[-1] : 2 * tensor.shape[-1]].copy_(tensor)


def misaligned(tensor):
    """One element past a 16-byte boundary, which vector loads must notice."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 8), float("nan"))
    return wide[..., 1 : 1 + tensor.shape[-1]].copy_(tensor)


def tokens_first(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def last_dimension_strided(tensor):
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


LAYOUTS = [sliced, misaligned, tokens_first, last_dimension_strided]
per_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


def check_strided_views(layout, backend, N, device="cpu"):
    x, bias = inputs((3, N, 24), BF16, device=device)
    dy = gradient_like(x)
    views = [layout(x), torch.stack([bias, bias], 1)[:, 0]]
    assert_same_bits(run([x, bias], backend, dy), run(views, backend, layout(dy)))


def check_expanded(backend, rows, device="cpu", atol=1e-4):
    """Stride 0: one row for all, and sum() as the loss."""
    x, bias = inputs((1, 24), device=device)
    bias.requires_grad_()
    grads = []
    for name in ("reference", backend):
        y = pk.bias_gelu(x.expand(rows, -1), bias, backend=name)
        grads.append(torch.autograd.grad(y.sum(), bias)[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=atol)


def check_addresses_beyond_32_bits(backend, device="cpu"):
    """A stride of 2^31 elements over memory that is reserved and, but for 3 rows, never touched."""
    D, stride = 8, 2**31
    try:
        storage = torch.empty(2 * stride + D, dtype=BF16, device=device)
    except RuntimeError:
        pytest.skip("cannot reserve 8 GiB of addresses")
    rows, bias = inputs((3, D), BF16, device=device)
    x = storage.as_strided((3, D), (stride, 1)).copy_(rows)
    assert_same_bits(run([rows, bias], backend), run([x, bias], backend))


def check_relative_accuracy(backend, device="cpu", fast=2):
    """``fast``: units that a fast exponential and division lose beside exact ones."""
    # eager loses the large negative ones to 1 + tanh
    magnitudes = torch.logspace(-37, 0.9, 4001, device=device)
    z = torch.cat([-magnitudes, magnitudes])
    y, dx, _ = run([z, torch.zeros_like(z)], backend, torch.ones_like(z))
    z = z.double().requires_grad_()
    exponent = 2 * (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)
    exact = z * torch.sigmoid(exponent)
    (slope,) = torch.autograd.grad(exact.sum(), z)
    # and rounding; an exponential passes on what its argument is off by, in proportion to it
    roundings = (4 + fast + (2 + fast / 2) * exponent.detach().abs()) * torch.finfo(FP32).eps
    assert ((y - exact.detach()).abs() <= roundings * exact.detach().abs()).all()
    torch.testing.assert_close(dx.double(), slope, rtol=1e-6, atol=1e-6)


def check_limits_and_nan(dtype, backend, device="cpu"):
    large = torch.finfo(dtype).max
    values = [-torch.inf, -large, -20, 20, large, torch.inf, torch.nan]
    x = torch.tensor(values, dtype=dtype, device=device)
    y, dx, _ = run([x, torch.zeros_like(x)], backend, torch.ones_like(x))
    assert y.tolist()[:-1] == [0, 0, 0, 20, large, torch.inf] and y[-1].isnan()
    assert dx.tolist()[:-1] == [0, 0, 0, 1, 1, 1] and dx[-1].isnan()


def check_opcheck(ops, x_dtype, bias_dtype, needs_grad, device="cpu"):
    """``ops``: the namespace that the backend registers its ops in."""
    leaves = inputs((5, 24), x_dtype, bias_dtype, device=device)
    x, bias = (leaf.requires_grad_(needs_grad) for leaf in leaves)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, arguments in (
        (ops.bias_gelu_fwd, (x, bias)),
        (ops.bias_gelu_bwd, (gradient_like(x), x, bias)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=checks)


def check_one_recompilation_for_other_lengths(backend, lengths, device="cpu"):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, example_inputs)

    torch._dynamo.reset()
    compiled = torch.compile(pk.bias_gelu, fullgraph=True, backend=count)
    for N in lengths:
        leaves = inputs((2, N, 24), device=device)
        x, bias = (leaf.requires_grad_() for leaf in leaves)
        dy = gradient_like(x)
        y = compiled(x, bias, backend=backend)
        assert_same_bits(run(leaves, backend, dy), [y, *torch.autograd.grad(y, (x, bias), dy)])
    assert len(graphs) == 2


def check_compiles_with_inductor_and_without_gradients(backend, device="cpu"):
    leaves = inputs((2, 5, 24), BF16, device=device)
    torch._dynamo.reset()
    with torch.no_grad():
        actual = torch.compile(pk.bias_gelu, fullgraph=True)(*leaves, backend=backend)
    assert torch.equal(actual, pk.bias_gelu(*leaves, backend=backend))

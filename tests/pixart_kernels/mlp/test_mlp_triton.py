"""bias_gelu in Triton against the reference: on a GPU as it is, without one interpreted."""

from __future__ import annotations

import itertools

import pytest
import torch
from mlp_cases import BF16, FP16, FP32, check_error_rule, gradient_like, inputs, run

import pixart_kernels as pk
from pixart_kernels import _triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(
        _triton.problem is not None or (DEVICE == "cpu" and not _triton.INTERPRETED),
        reason=_triton.problem or "no GPU, and TRITON_INTERPRET=1 is not set",
    ),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]

# one element; a bare vector; odd everything; two blocks of columns, the second masked; more tiles
# of rows than splits; nothing at all, in two ways
SHAPES = [
    (1, 1),
    (19,),
    (3, 7, 72),
    (2, 1, 1151),
    (4, 23, 8),
    (2, 0, 16),
    (3, 0),
]
DTYPES = (FP32, BF16, FP16)


def on_device(leaves):
    return [leaf.to(DEVICE) for leaf in leaves]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32(shape):
    check_error_rule(on_device(inputs(shape)), "triton")


@pytest.mark.parametrize(
    "x_dtype, bias_dtype",
    itertools.product(DTYPES, repeat=2),
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_dtypes(x_dtype, bias_dtype):
    check_error_rule(on_device(inputs((2, 7, 203), x_dtype, bias_dtype)), "triton")


def tokens_first(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def last_dimension_strided(tensor):
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def sliced(tensor):
    """The same values, as a slice of a wider tensor."""
    wide = tensor.new_full((*tensor.shape[:-1], 3 * tensor.shape[-1]), float("nan"))
    view = wide[..., tensor.shape[-1] : 2 * tensor.shape[-1]]
    return view.copy_(tensor)


@pytest.mark.parametrize("layout", [sliced, tokens_first, last_dimension_strided])
def test_strided_views(layout):
    x, bias = on_device(inputs((3, 5, 24), BF16))
    dy = gradient_like(x)
    expected = run([x, bias], "triton", dy)
    actual = run([layout(x), torch.stack([bias, bias], 1)[:, 0]], "triton", layout(dy))
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_expanded_rows_and_gradients():
    """Stride 0: one row for all, and sum() as the loss."""
    x, bias = on_device(inputs((1, 24)))
    bias.requires_grad_()
    grads = []
    for backend in ("reference", "triton"):
        y = pk.bias_gelu(x.expand(13, -1), bias, backend=backend)
        grads.append(torch.autograd.grad(y.sum(), bias)[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_relative_accuracy_holds_for_tiny_and_large_values():
    # eager loses the large negative ones to 1 + tanh
    magnitudes = torch.logspace(-37, 0.9, 4001, device=DEVICE)
    z = torch.cat([-magnitudes, magnitudes])
    y, dx, _ = run([z, torch.zeros_like(z)], "triton", torch.ones_like(z))
    z = z.double().requires_grad_()
    exponent = 2 * (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)
    exact = z * torch.sigmoid(exponent)
    (slope,) = torch.autograd.grad(exact.sum(), z)
    # an exponential passes the rounding of its argument on, in proportion to it
    roundings = (4 + 2 * exponent.detach().abs()) * torch.finfo(FP32).eps
    assert ((y - exact.detach()).abs() <= roundings * exact.detach().abs()).all()
    torch.testing.assert_close(dx.double(), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits_and_nan(dtype):
    large = torch.finfo(dtype).max
    values = [-torch.inf, -large, -20, 20, large, torch.inf, torch.nan]
    x = torch.tensor(values, dtype=dtype, device=DEVICE)
    y, dx, _ = run([x, torch.zeros_like(x)], "triton", torch.ones_like(x))
    assert y.tolist()[:-1] == [0, 0, 0, 20, large, torch.inf] and y[-1].isnan()
    assert dx.tolist()[:-1] == [0, 0, 0, 1, 1, 1] and dx[-1].isnan()


def test_bitwise_repeatable():
    shape, times = ((2, 11, 40), 1) if _triton.INTERPRETED else ((8, 301, 4608), 100)
    leaves = on_device(inputs(shape, BF16))
    expected = run(leaves, "triton")
    for _ in range(times):
        assert all(map(torch.equal, expected, run(leaves, "triton")))


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("x_dtype, bias_dtype", [(FP32, BF16), (FP16, FP32)])
def test_opcheck(needs_grad, x_dtype, bias_dtype):
    ops = torch.ops.pixart_kernels_triton
    x, bias = (
        leaf.requires_grad_(needs_grad) for leaf in on_device(inputs((5, 24), x_dtype, bias_dtype))
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, arguments in (
        (ops.bias_gelu_fwd, (x, bias)),
        (ops.bias_gelu_bwd, (gradient_like(x), x, bias)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=checks)


def test_compiles_as_one_graph_with_one_recompilation_for_other_lengths():
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, example_inputs)

    torch._dynamo.reset()
    compiled = torch.compile(pk.bias_gelu, fullgraph=True, backend=count)
    for N in (3, 5, 7):
        x, bias = (leaf.requires_grad_() for leaf in on_device(inputs((2, N, 24))))
        dy = gradient_like(x)
        y = compiled(x, bias, backend="triton")
        actual = [y, *torch.autograd.grad(y, (x, bias), dy)]
        assert all(map(torch.equal, run([x, bias], "triton", dy), actual))
    assert len(graphs) == 2


def test_forward_mode_is_refused():
    """Rather than tangents dropped."""
    leaves = tuple(inputs((3, 24)))
    with pytest.raises(RuntimeError, match="jvp|forward"):
        torch.func.jvp(lambda x, b: pk.bias_gelu(x, b, backend="triton"), leaves, leaves)

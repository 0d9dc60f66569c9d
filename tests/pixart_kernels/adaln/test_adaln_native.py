"""The C++ kernels against the reference: values, gradients, layouts, determinism, compilation."""

from __future__ import annotations

import itertools

import pytest
import torch

import pixart_kernels as pk
from pixart_kernels import _extension
from pixart_kernels.testing import assert_within_eager_error, poisoned_allocations

pytestmark = pytest.mark.skipif(
    _extension.problem is not None, reason=f"no compiled kernels: {_extension.problem}"
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# one token; odd everything; the model's width; a width that fills no vector; several chunks of
# rows; no tokens; no samples
SHAPES = [
    (1, 1, 8),
    (3, 7, 72),
    (2, 63, 1152),
    (2, 1, 1151),
    (1, 1000, 384),
    (2, 0, 16),
    (0, 3, 16),
]
ROWS = 6


def inputs(shape, x_dtype=FP32, branch_dtype=None, table_dtype=FP32, t_dtype=None, seed=0):
    """Leaves (x, branch, table, t); x has a mean, because a good variance must survive one."""
    B, N, D = shape
    generator = torch.Generator().manual_seed(seed)

    def leaf(dtype, *size):
        return torch.randn(size, generator=generator).to(dtype)

    branch_dtype = branch_dtype or x_dtype
    return [
        (2 * leaf(FP32, B, N, D) + 3).to(x_dtype),
        leaf(branch_dtype, B, N, D),
        leaf(table_dtype, ROWS, D) / 4,
        leaf(t_dtype or branch_dtype, B, ROWS * D),
    ]


def adaln_single(x, branch, table, t, **options):
    return (pk.adaln_single(x, table, t, shift_row=0, scale_row=1, **options),)


def same_row_twice(x, branch, table, t, **options):
    return (pk.adaln_single(x, table, t, shift_row=3, scale_row=3, **options),)


def adaln_modulate(x, branch, table, t, **options):
    D = x.shape[-1]
    t = t.reshape(x.shape[0], ROWS, D)
    return (pk.adaln_modulate(x, t[:, 2], t[:, 5], **options),)


def gated_residual(x, branch, table, t, **options):
    return (pk.gated_residual(x, branch, table, t, gate_row=2, **options),)


def gated_residual_adaln(x, branch, table, t, **options):
    return pk.gated_residual_adaln(
        x, branch, gate=(table, t, 2), modulation=(table, t, 3, 4), **options
    )


def residual_adaln(x, branch, table, t, **options):
    return pk.gated_residual_adaln(x, branch, modulation=(table, t, 3, 4), **options)


OPS = [
    adaln_single,
    same_row_twice,
    adaln_modulate,
    gated_residual,
    gated_residual_adaln,
    residual_adaln,
]
per_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)


def run(op, leaves, backend, out_grads=None):
    """Outputs and the gradients of every leaf."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = op(*leaves, backend=backend)
    if out_grads is None:
        out_grads = gradients_like(outputs)
    grads = [g.to(o.dtype) for g, o in zip(out_grads, outputs, strict=True)]
    found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    return [o.detach() for o in outputs], list(found)


def gradients_like(outputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]


def check_error_rule(op, leaves):
    """Native against the fp32 reference, given the error of the reference in this precision."""
    with poisoned_allocations():
        outputs, grads = run(op, leaves, "native")
    out_grads = gradients_like(outputs)
    eager_outputs, eager_grads = run(op, leaves, "reference", out_grads)
    exact_leaves = [leaf.double() for leaf in leaves]
    exact_outputs, exact_grads = run(op, exact_leaves, "reference", out_grads)
    for actual, eager, exact in zip(
        outputs + grads, eager_outputs + eager_grads, exact_outputs + exact_grads, strict=True
    ):
        if actual is None:
            assert eager is None
            continue
        assert actual.shape == eager.shape
        # statistics sum over D, gradients of table and t over B and N
        B, N, D = leaves[0].shape
        assert_within_eager_error(actual, exact, eager, terms=max(D, B * N))


@per_op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32(op, shape):
    check_error_rule(op, inputs(shape))


@per_op
@pytest.mark.parametrize(
    "x_dtype, branch_dtype",
    itertools.product((FP32, BF16, FP16), repeat=2),
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_dtypes(op, x_dtype, branch_dtype):
    check_error_rule(op, inputs((2, 67, 200), x_dtype, branch_dtype))


@per_op
@pytest.mark.parametrize("table_dtype, t_dtype", [(BF16, FP16), (FP16, FP32), (FP32, BF16)])
def test_modulation_dtypes(op, table_dtype, t_dtype):
    check_error_rule(op, inputs((3, 5, 40), BF16, BF16, table_dtype, t_dtype))


@per_op
def test_fp64_operands_beside_fp32_tokens(op):
    leaves = inputs((2, 5, 24))
    leaves = [leaves[0], *(leaf.double() for leaf in leaves[1:])]
    outputs, grads = run(op, leaves, "native")
    expected_outputs, expected_grads = run(op, leaves, "reference")
    for actual, expected in zip(outputs + grads, expected_outputs + expected_grads, strict=True):
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def sliced(tensor):
    """The same values, as a slice of a wider tensor."""
    wide = torch.full((*tensor.shape[:-1], 3 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype)
    view = wide[..., tensor.shape[-1] : 2 * tensor.shape[-1]]
    view.copy_(tensor)
    return view


def tokens_first(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def last_dimension_strided(tensor):
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


@per_op
@pytest.mark.parametrize("layout", [sliced, tokens_first, last_dimension_strided])
def test_strided_views_are_read_where_they_lie(op, layout):
    leaves = inputs((3, 70, 24), BF16)
    x, branch, table, t = leaves
    views = [layout(x), layout(branch), sliced(table), sliced(t)]
    expected, actual = run(op, leaves, "native"), run(op, views, "native")
    for a, b in zip(expected[0] + expected[1], actual[0] + actual[1], strict=True):
        assert a is b is None or torch.equal(a, b)


@per_op
def test_expanded_inputs_and_gradients(op):
    """Stride 0: one timestep and one prompt for the whole batch, and sum() as the loss."""
    B, N, D = 3, 70, 24
    x, branch, table, t = inputs((1, N, D))

    def expanded(x, branch, table, t, **options):
        t_BRD = t.reshape(1, ROWS, D).expand(B, -1, -1)
        x, branch = x.expand(B, -1, -1), branch.expand(B, -1, -1)
        if op is adaln_modulate:
            t_BRD = t.expand(B, -1)
        return [output.sum() for output in op(x, branch, table, t_BRD, **options)]

    expected, actual = (run(expanded, [x, branch, table, t], b) for b in ("reference", "native"))
    for a, b in zip(expected[0] + expected[1], actual[0] + actual[1], strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_addresses_beyond_32_bits():
    """A stride of 2^31 elements over memory that is reserved and, but for 3 rows, never touched."""
    D, stride = 8, 2**31
    try:
        storage = torch.empty(2 * stride + D, dtype=BF16)
    except RuntimeError:
        pytest.skip("cannot reserve 8 GiB of addresses")
    x = storage.as_strided((1, 3, D), (0, stride, 1))
    rows = inputs((1, 3, D), BF16)
    x.copy_(rows[0])
    expected, actual = (
        run(adaln_single, rows, "native"),
        run(adaln_single, [x, *rows[1:]], "native"),
    )
    assert torch.equal(expected[0][0], actual[0][0])
    assert torch.equal(expected[1][0], actual[1][0])


@per_op
def test_only_one_output_used(op):
    leaves = inputs((2, 5, 24))
    for kept in range(len(op(*leaves))):

        def partial(*args, kept=kept, **options):
            return (op(*args, **options)[kept],)

        expected, actual = (run(partial, leaves, b) for b in ("reference", "native"))
        for a, b in zip(expected[1], actual[1], strict=True):
            a, b = (torch.zeros(()) if g is None else g for g in (a, b))
            torch.testing.assert_close(a.expand_as(b), b, rtol=1e-4, atol=1e-5)


def test_rows_not_used_have_zero_gradients():
    _, (_, _, dtable, dt) = run(adaln_single, inputs((2, 5, 24)), "native")
    assert dtable[2:].eq(0).all() and dt.reshape(2, ROWS, 24)[:, 2:].eq(0).all()


def test_plain_residual_in_another_dtype():
    check_error_rule(residual_adaln, inputs((2, 70, 40), FP32, BF16))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_nan_and_infinity_reach_the_output(dtype):
    x, branch, table, t = inputs((1, 4, 24), dtype)
    branch[0, 1, 3], branch[0, 2, 5] = float("nan"), float("inf")
    x_new, h = gated_residual_adaln(x, branch, table, t, backend="native")
    expected_x, expected_h = gated_residual_adaln(x, branch, table, t, backend="reference")
    assert torch.equal(x_new.isnan(), expected_x.isnan())
    assert torch.equal(x_new.isinf(), expected_x.isinf())
    assert torch.equal(h.isnan(), expected_h.isnan()) and h[0, 1].isnan().all()


@per_op
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_bitwise_repeatable_for_any_number_of_threads(op, dtype):
    leaves = inputs((3, 301, 136), dtype)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 2, 1):
            torch.set_num_threads(count)
            outputs, grads = run(op, leaves, "native")
            found.append([g for g in outputs + grads if g is not None])
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_a_sample_does_not_depend_on_its_batch():
    leaves = inputs((3, 130, 72))
    x, branch, table, t = leaves
    together, _ = run(gated_residual_adaln, leaves, "native")
    alone, _ = run(gated_residual_adaln, [x[1:2], branch[1:2], table, t[1:2]], "native")
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(needs_grad):
    ops = torch.ops.pixart_kernels
    x, branch, table, t = (
        leaf.requires_grad_(needs_grad) for leaf in inputs((2, 5, 24), FP32, BF16)
    )
    dh, stats = torch.randn(2, 5, 24).bfloat16(), torch.ones(2, 2, 5)
    dx = torch.randn(2, 5, 24)
    shift, scale = t[:, :24], t[:, 24:48]
    calls = [
        (ops.adaln_single_fwd, (x, table, t, 0, 1, 1e-6)),
        (ops.adaln_single_bwd, (dh, x, table, t, stats, 0, 1)),
        (ops.adaln_modulate_fwd, (x, shift, scale, 1e-6)),
        (ops.adaln_modulate_bwd, (dh, x, shift, scale, stats)),
        (ops.gated_residual_fwd, (x, branch, table, t, 2)),
        (ops.gated_residual_bwd, (dx, branch, table, t, 2)),
        (ops.gated_residual_adaln_fwd, (x, branch, table, t, 2, table, t, 3, 4, 1e-6)),
        (ops.gated_residual_adaln_fwd, (x, branch, None, None, 0, table, t, 3, 4, 1e-6)),
        (ops.gated_residual_adaln_bwd, (dx, dh, x, branch, table, t, 2, table, t, stats, 3, 4)),
        (ops.gated_residual_adaln_bwd, (None, dh, x, branch, None, None, 0, table, t, stats, 3, 4)),
        (ops.gated_residual_adaln_bwd, (dx, dx, x, x + 1, None, None, 0, table, t, stats, 3, 4)),
    ]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments, test_utils=checks)


def test_fakes_know_every_output_dtype():
    ops = torch.ops.pixart_kernels
    for x_dtype, branch_dtype in itertools.product((FP32, BF16, FP16), repeat=2):
        x, branch, table, t = inputs((1, 3, 16), x_dtype, branch_dtype)
        arguments = (x, branch, table, t, 2, table, t, 3, 4, 1e-6)
        torch.library.opcheck(
            ops.gated_residual_adaln_fwd.default, arguments, test_utils="test_faketensor"
        )
        arguments = (x, table, t, 3, 4, 1e-6)
        torch.library.opcheck(ops.adaln_single_fwd.default, arguments, test_utils="test_faketensor")


def test_wrong_memory_is_refused_by_the_ops_themselves():
    x, branch, table, t = inputs((2, 5, 24))
    with pytest.raises(RuntimeError, match="`t` must be"):
        torch.ops.pixart_kernels.adaln_single_fwd(x, table, t[:, :-1], 0, 1, 1e-6)
    with pytest.raises(RuntimeError, match="row 9 is outside"):
        torch.ops.pixart_kernels.adaln_single_fwd(x, table, t, 0, 9, 1e-6)
    with pytest.raises(RuntimeError, match="`branch` must have"):
        torch.ops.pixart_kernels.gated_residual_fwd(x, branch[:1], table, t, 0)
    stats = torch.ones(2, 2, 5)
    with pytest.raises(RuntimeError, match="`dh` has not the dtype"):
        torch.ops.pixart_kernels.adaln_single_bwd(x.bfloat16(), x, table, t, stats, 0, 1)
    with pytest.raises(RuntimeError, match="`stats` must be"):
        torch.ops.pixart_kernels.adaln_single_bwd(x, x, table, t, stats[:1], 0, 1)


def test_compiles_as_one_graph_with_one_recompilation_for_other_lengths():
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, example_inputs)

    def block(x, branch, table, t):
        h = pk.adaln_single(x, table, t, shift_row=0, scale_row=1, backend="native")
        x = pk.gated_residual(x, h * branch, table, t, gate_row=2, backend="native")
        x, h = residual_adaln(x, branch, table, t, backend="native")
        x, h = gated_residual_adaln(x, h, table, t, backend="native")
        return h, x + pk.adaln_modulate(x, t[:, :24], t[:, :24], backend="native")

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=count)
    for N in (4, 9, 17, 30):
        leaves = inputs((2, N, 24))

        expected = run(lambda *a, backend: block(*a), leaves, None)
        actual = run(lambda *a, backend: compiled(*a), leaves, None)
        for a, b in zip(expected[0] + expected[1], actual[0] + actual[1], strict=True):
            assert torch.equal(a, b)
    assert len(graphs) == 2


@per_op
def test_compiles_without_gradients(op):
    leaves = inputs((2, 5, 24))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        expected, actual = op(*leaves, backend="native"), compiled(*leaves, backend="native")
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_compiles_with_inductor():
    leaves = inputs((2, 5, 24))
    torch._dynamo.reset()
    compiled = torch.compile(gated_residual_adaln, fullgraph=True)
    expected, actual = run(gated_residual_adaln, leaves, "native"), run(compiled, leaves, "native")
    for a, b in zip(expected[0] + expected[1], actual[0] + actual[1], strict=True):
        torch.testing.assert_close(a, b)


def test_reasons():
    assert _extension.why_not_native(torch.zeros(1, 1, 8)) is None
    assert "float64" in _extension.why_not_native(torch.zeros(1, 1, 8).double())
    assert "meta" in _extension.why_not_native(torch.zeros(1, 1, 8, device="meta"))


def test_a_named_backend_that_cannot_run_lists_every_reason():
    x, _, table, t = inputs((1, 2, 8))
    with pytest.raises(RuntimeError) as error:
        adaln_single(x.double(), None, table, t, backend="native")
    message = str(error.value)
    assert "backend 'native' cannot run adaln_single: x is torch.float64" in message
    for line in ("cuda: ", "triton: ", "reference: can run"):
        assert line in message
    h = pk.adaln_single(x.double(), table, t, shift_row=0, scale_row=1)
    assert h.dtype == table.dtype

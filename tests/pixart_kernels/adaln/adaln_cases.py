"""What every backend of the adaLN family is held to."""

from __future__ import annotations

import itertools

import pytest
import torch

import pixart_kernels as pk
from pixart_kernels.testing import assert_within_eager_error, poisoned_allocations

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ROWS = 6


def inputs(
    shape, x_dtype=FP32, branch_dtype=None, table_dtype=FP32, t_dtype=None, device="cpu", seed=0
):
    """Leaves (x, branch, table, t); x has a mean, because a good variance must survive one."""
    B, N, D = shape
    generator = torch.Generator().manual_seed(seed)

    def leaf(dtype, *size):
        return torch.randn(size, generator=generator).to(device, dtype)

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


def final_layer(x, branch, table, t, **options):
    """A table of two rows, and one vector of the timestep for both: stride 0 between rows."""
    t_B2D = t.reshape(x.shape[0], ROWS, x.shape[2])[:, 5:].expand(-1, 2, -1)
    return (pk.adaln_single(x, table[:2], t_B2D, shift_row=0, scale_row=1, **options),)


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
    final_layer,
    adaln_modulate,
    gated_residual,
    gated_residual_adaln,
    residual_adaln,
]
per_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)

per_dtypes = pytest.mark.parametrize(
    "x_dtype, branch_dtype",
    list(itertools.product((FP32, BF16, FP16), repeat=2)),
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)


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
    return [torch.randn(o.shape, generator=generator).to(o) for o in outputs]


def assert_same_bits(expected, actual):
    for a, b in zip(expected[0] + expected[1], actual[0] + actual[1], strict=True):
        assert a is b is None or torch.equal(a, b)


def check_error_rule(op, leaves, backend):
    """The backend against the fp32 reference, given the error of eager in this precision."""
    with poisoned_allocations():
        outputs, grads = run(op, leaves, backend)
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


def check_fp64_operands(op, backend, device="cpu"):
    """Beside fp32 tokens they are read as fp32, as the reference reads them."""
    leaves = inputs((2, 5, 24), device=device)
    leaves = [leaves[0], *(leaf.double() for leaf in leaves[1:])]
    outputs, grads = run(op, leaves, backend)
    expected_outputs, expected_grads = run(op, leaves, "reference")
    for actual, expected in zip(outputs + grads, expected_outputs + expected_grads, strict=True):
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def sliced(tensor):
    """The same values, as a slice of a wider tensor."""
    wide = tensor.new_full((*tensor.shape[:-1], 3 * tensor.shape[-1]), float("nan"))
    view = wide[..., tensor.shape[-1] : 2 * tensor.shape[-1]]
    view.copy_(tensor)
    return view


def tokens_first(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def last_dimension_strided(tensor):
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


per_layout = pytest.mark.parametrize("layout", [sliced, tokens_first, last_dimension_strided])


def check_strided_views(op, layout, backend, N, device="cpu"):
    leaves = inputs((3, N, 24), BF16, device=device)
    x, branch, table, t = leaves
    views = [layout(x), layout(branch), sliced(table), sliced(t)]
    assert_same_bits(run(op, leaves, backend), run(op, views, backend))


def check_expanded(op, backend, N, device="cpu"):
    """Stride 0: one timestep and one prompt for the whole batch, and sum() as the loss."""
    B, D = 3, 24
    x, branch, table, t = inputs((1, N, D), device=device)

    def expanded(x, branch, table, t, **options):
        t_BRD = t.reshape(1, ROWS, D).expand(B, -1, -1)
        x, branch = x.expand(B, -1, -1), branch.expand(B, -1, -1)
        if op is adaln_modulate:
            t_BRD = t.expand(B, -1)
        return [output.sum() for output in op(x, branch, table, t_BRD, **options)]

    expected, actual = (run(expanded, [x, branch, table, t], b) for b in ("reference", backend))
    for a, b in zip(expected[0] + expected[1], actual[0] + actual[1], strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def check_addresses_beyond_32_bits(backend, device="cpu"):
    """A stride of 2^31 elements over memory that is reserved and, but for 3 rows, never touched."""
    D, stride = 8, 2**31
    try:
        storage = torch.empty(2 * stride + D, dtype=BF16, device=device)
    except RuntimeError:
        pytest.skip("cannot reserve 8 GiB of addresses")
    rows = inputs((1, 3, D), BF16, device=device)
    x = storage.as_strided((1, 3, D), (0, stride, 1)).copy_(rows[0])
    expected, actual = (run(adaln_single, [x, *rows[1:]], backend) for x in (rows[0], x))
    assert_same_bits(expected, actual)


def check_only_one_output_used(op, backend, device="cpu"):
    leaves = inputs((2, 5, 24), device=device)
    for kept in range(len(op(*leaves))):

        def partial(*args, kept=kept, **options):
            return (op(*args, **options)[kept],)

        expected, actual = (run(partial, leaves, b) for b in ("reference", backend))
        for a, b in zip(expected[1], actual[1], strict=True):
            a, b = (torch.zeros((), device=device) if g is None else g for g in (a, b))
            torch.testing.assert_close(a.expand_as(b), b, rtol=1e-4, atol=1e-5)


def check_forward_mode_is_refused(op, backend, device="cpu"):
    """Rather than tangents dropped."""
    leaves = tuple(inputs((2, 5, 24), device=device))
    with pytest.raises(RuntimeError, match="jvp|forward"):
        torch.func.jvp(lambda *args: op(*args, backend=backend), leaves, leaves)


def check_a_plain_residual_keeps_no_branch(backend, device="cpu"):
    leaves = [leaf.requires_grad_() for leaf in inputs((2, 5, 24), device=device)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        residual_adaln(*leaves, backend=backend)
    sizes = sorted(tensor.untyped_storage().nbytes() for tensor in kept)
    # x_new alone is of this size; table and t are larger here than N rows
    assert sizes.count(leaves[1].untyped_storage().nbytes()) == 1, sizes


def check_rows_not_used_have_zero_gradients(backend, device="cpu"):
    with poisoned_allocations():
        _, (_, _, dtable, dt) = run(adaln_single, inputs((2, 5, 24), device=device), backend)
    assert dtable[2:].eq(0).all() and dt.reshape(2, ROWS, 24)[:, 2:].eq(0).all()
    assert dtable[:2].ne(0).all() and dt.reshape(2, ROWS, 24)[:, :2].ne(0).all()


def check_nan_and_infinity(dtype, backend, device="cpu"):
    x, branch, table, t = inputs((1, 4, 24), dtype, device=device)
    branch[0, 1, 3], branch[0, 2, 5] = float("nan"), float("inf")
    x_new, h = gated_residual_adaln(x, branch, table, t, backend=backend)
    expected_x, expected_h = gated_residual_adaln(x, branch, table, t, backend="reference")
    assert torch.equal(x_new.isnan(), expected_x.isnan())
    assert torch.equal(x_new.isinf(), expected_x.isinf())
    assert torch.equal(h.isnan(), expected_h.isnan()) and h[0, 1].isnan().all()


def check_normalises_what_was_stored(backend, N, device="cpu"):
    """The rounded x_new, and as ``adaln_single`` does: a model makes h again from x_new alone."""
    for dtype, branch_dtype in ((BF16, BF16), (FP32, BF16), (FP32, FP32)):
        x, branch, table, t = inputs((2, N, 72), dtype, branch_dtype, device=device)
        for op in (gated_residual_adaln, residual_adaln):
            x_new, h = op(x, branch, table, t, backend=backend)
            again = pk.adaln_single(x_new, table, t, shift_row=3, scale_row=4, backend=backend)
            assert torch.equal(h, again)


def check_a_sample_alone(backend, N, device="cpu"):
    """It does not depend on its batch."""
    leaves = inputs((3, N, 72), device=device)
    x, branch, table, t = leaves
    together, _ = run(gated_residual_adaln, leaves, backend)
    alone, _ = run(gated_residual_adaln, [x[1:2], branch[1:2], table, t[1:2]], backend)
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))


def check_opcheck(ops, needs_grad, device="cpu"):
    """``ops``: the namespace that the backend registers its ops in."""
    x, branch, table, t = (
        leaf.requires_grad_(needs_grad) for leaf in inputs((2, 5, 24), FP32, BF16, device=device)
    )
    dx = torch.randn(2, 5, 24, device=device)
    dh, stats = dx.bfloat16(), torch.ones(2, 2, 5, device=device)
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


def check_fakes_know_every_output_dtype(ops, device="cpu"):
    for x_dtype, branch_dtype in itertools.product((FP32, BF16, FP16), repeat=2):
        x, branch, table, t = inputs((1, 3, 16), x_dtype, branch_dtype, device=device)
        arguments = (x, branch, table, t, 2, table, t, 3, 4, 1e-6)
        torch.library.opcheck(
            ops.gated_residual_adaln_fwd.default, arguments, test_utils="test_faketensor"
        )
        arguments = (x, table, t, 3, 4, 1e-6)
        torch.library.opcheck(ops.adaln_single_fwd.default, arguments, test_utils="test_faketensor")


def check_one_recompilation_for_other_lengths(backend, lengths, device="cpu"):
    """One graph for the whole block, forward and backward, and one more that takes any N."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, example_inputs)

    def block(x, branch, table, t, backend):
        h = pk.adaln_single(x, table, t, shift_row=0, scale_row=1, backend=backend)
        x = pk.gated_residual(x, h * branch, table, t, gate_row=2, backend=backend)
        x, h = residual_adaln(x, branch, table, t, backend=backend)
        x, h = gated_residual_adaln(x, h, table, t, backend=backend)
        return h, x + pk.adaln_modulate(x, t[:, :24], t[:, :24], backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=count)
    for N in lengths:
        leaves = inputs((2, N, 24), device=device)
        assert_same_bits(run(block, leaves, backend), run(compiled, leaves, backend))
    assert len(graphs) == 2


def check_compiles_without_gradients(op, backend, device="cpu"):
    leaves = inputs((2, 5, 24), device=device)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        expected, actual = op(*leaves, backend=backend), compiled(*leaves, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def check_compiles_with_inductor(backend, device="cpu"):
    leaves = inputs((2, 5, 24), device=device)
    torch._dynamo.reset()
    compiled = torch.compile(gated_residual_adaln, fullgraph=True)
    expected, actual = run(gated_residual_adaln, leaves, backend), run(compiled, leaves, backend)
    for a, b in zip(expected[0] + expected[1], actual[0] + actual[1], strict=True):
        torch.testing.assert_close(a, b)

"""The Triton kernels against the reference: on a GPU as they are, without one interpreted."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import adaln_cases as cases
import pytest
import torch
from adaln_cases import BF16, FP16, FP32, inputs, per_dtypes, per_layout, per_op, run
from triton_devices import (
    DEVICE,
    check_schema_is_that_of_the_compiled_op,
    interpret_in_place,
    needs_triton,
    on_gpu,
)

from pixart_kernels import _extension, _triton
from pixart_kernels.adaln import config

pytestmark = needs_triton

# one token; odd everything; the model's width; a width that masks; a power of two; several tiles;
# no tokens; no samples; no columns
SHAPES = [
    (1, 1, 8),
    (3, 11, 72),
    (2, 5, 1152),
    (2, 1, 1151),
    (1, 3, 64),
    (2, 9, 200),
    (2, 0, 16),
    (0, 3, 16),
    (2, 3, 0),
]


@pytest.fixture(autouse=True)
def little_to_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row of a tile costs a millisecond, masked or not, and each program of the fold."""
    if _triton.INTERPRETED:
        monkeypatch.setattr(config, "tiles", lambda D: (config.Tile(2, 1), config.Tile(2, 1)))
        monkeypatch.setattr("pixart_kernels._triton_rows.FOLD_COLUMNS", 512)


@per_op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32(op, shape):
    cases.check_error_rule(op, inputs(shape, device=DEVICE), "triton")


@pytest.mark.parametrize("shape", [(2, 9, 72), (2, 5, 384), (2, 5, 1152)], ids=str)
def test_tiles_as_shipped(shape, monkeypatch):
    monkeypatch.undo()
    cases.check_error_rule(cases.gated_residual_adaln, inputs(shape, BF16, device=DEVICE), "triton")


@per_op
@per_dtypes
def test_dtypes(op, x_dtype, branch_dtype):
    leaves = inputs((2, 3, 40), x_dtype, branch_dtype, device=DEVICE)
    cases.check_error_rule(op, leaves, "triton")


@per_op
@pytest.mark.parametrize("table_dtype, t_dtype", [(BF16, FP16), (FP16, FP32), (FP32, BF16)])
def test_modulation_dtypes(op, table_dtype, t_dtype):
    leaves = inputs((2, 3, 40), BF16, BF16, table_dtype, t_dtype, device=DEVICE)
    cases.check_error_rule(op, leaves, "triton")


@per_op
def test_bf16_at_the_width_of_the_model(op):
    cases.check_error_rule(op, inputs((2, 3, 1152), BF16, device=DEVICE), "triton")


@per_op
def test_fp64_operands_beside_fp32_tokens(op):
    cases.check_fp64_operands(op, "triton", DEVICE)


@per_op
@per_layout
def test_strided_views_are_read_where_they_lie(op, layout):
    cases.check_strided_views(op, layout, "triton", N=3, device=DEVICE)


@per_op
def test_expanded_inputs_and_gradients(op):
    cases.check_expanded(op, "triton", N=3, device=DEVICE)


def test_addresses_beyond_32_bits(monkeypatch):
    interpret_in_place(monkeypatch)
    cases.check_addresses_beyond_32_bits("triton", DEVICE)


@on_gpu
def test_more_samples_than_a_grid_has_rows():
    cases.check_error_rule(
        cases.gated_residual_adaln, inputs((70_000, 1, 8), device=DEVICE), "triton"
    )


@per_op
def test_only_one_output_used(op):
    cases.check_only_one_output_used(op, "triton", DEVICE)


def test_rows_not_used_have_zero_gradients():
    cases.check_rows_not_used_have_zero_gradients("triton", DEVICE)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_nan_and_infinity_reach_the_output(dtype):
    cases.check_nan_and_infinity(dtype, "triton", DEVICE)


@pytest.mark.parametrize("op", [cases.adaln_modulate, cases.gated_residual_adaln])
@pytest.mark.parametrize("splits", [1, 3, 11])
def test_any_number_of_splits(op, splits, monkeypatch):
    """Fewer and more of them than the fold adds in one step, which takes at most 4 samples of 5."""
    monkeypatch.setattr(config, "tiles", lambda D: (config.Tile(3, 1), config.Tile(1, 1)))
    kernels, rows = "pixart_kernels.adaln.triton", "pixart_kernels._triton_rows"
    monkeypatch.setattr(f"{kernels}.backward_splits", lambda B, tiles, *rest: min(splits, tiles))
    monkeypatch.setattr(f"{rows}.fold_tile", {1: (4, 1), 3: (2, 4), 11: (1, 4)}.__getitem__)
    cases.check_error_rule(op, inputs((5, 11, 24), device=DEVICE), "triton")


@per_op
def test_bitwise_repeatable(op):
    B, N, D, times = (2, 5, 72, 1) if _triton.INTERPRETED else (8, 301, 1152, 100)
    leaves = inputs((B, N, D), BF16, device=DEVICE)
    out_grads = cases.gradients_like(op(*leaves))
    expected = run(op, leaves, "triton", out_grads)
    for _ in range(times):
        cases.assert_same_bits(expected, run(op, leaves, "triton", out_grads))


def test_normalises_what_was_stored():
    cases.check_normalises_what_was_stored("triton", N=5, device=DEVICE)


def test_a_sample_does_not_depend_on_its_batch():
    cases.check_a_sample_alone("triton", N=5, device=DEVICE)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(needs_grad):
    cases.check_opcheck(torch.ops.pixart_kernels_triton, needs_grad, DEVICE)


def test_fakes_know_every_output_dtype():
    cases.check_fakes_know_every_output_dtype(torch.ops.pixart_kernels_triton, DEVICE)


@pytest.mark.skipif(_extension.problem is not None, reason="no compiled kernels to compare with")
def test_schemas_are_those_of_the_compiled_ops():
    from pixart_kernels.adaln.autograd import Kernels

    for name in Kernels._fields:
        check_schema_is_that_of_the_compiled_op(name)


def test_compiles_as_one_graph_with_one_recompilation_for_other_lengths():
    cases.check_one_recompilation_for_other_lengths("triton", (3, 5, 7), DEVICE)


@per_op
def test_compiles_without_gradients(op):
    cases.check_compiles_without_gradients(op, "triton", DEVICE)


@on_gpu
def test_compiles_with_inductor():
    cases.check_compiles_with_inductor("triton", DEVICE)


@on_gpu
@per_op
def test_captured_in_a_graph(op):
    leaves = inputs((2, 65, 1152), BF16, device=DEVICE)
    expected = run(op, leaves, "triton")
    out_grads = cases.gradients_like(expected[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op, leaves, "triton", out_grads)
    graph.replay()
    cases.assert_same_bits(expected, captured)


@pytest.mark.parametrize("D", [1, 2, 8, 72, 127, 384, 1024, 1151, 1152, 1153, 5000])
def test_two_powers_of_two_hold_every_column(D):
    from pixart_kernels._triton_rows import split

    head, tail = split(D)
    assert head.bit_count() == tail.bit_count() == 1
    assert head + tail // 2 < D + (D == 1) <= head + tail or (head, tail) == (1, 1)
    assert head < D or D == 1


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("B, tiles", [(1, 1), (1, 5000), (7, 3), (300, 64), (70_000, 1)])
def test_splits_fill_the_device_and_never_outnumber_tiles(B, tiles, processors):
    from pixart_kernels._triton_rows import backward_splits

    splits = backward_splits(B, tiles, 4, processors)
    assert 1 <= splits <= tiles
    assert splits == tiles or B * splits >= 4 * processors


def test_reasons(monkeypatch):
    assert "float64" in _triton.why_not_triton(torch.zeros(1, device=DEVICE).double())
    old = SimpleNamespace(device=torch.device("cuda"), dtype=FP32)
    monkeypatch.setattr(_triton, "_capability", lambda device: (7, 5))
    assert _triton.why_not_triton(old) == (
        "Triton kernels need compute capability 8.0 and cuda has 7.5"
    )
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    assert _triton.why_not_triton(torch.zeros(1)) == "Triton kernels run on a GPU and x is on cpu"


def test_without_triton_everything_else_works():
    code = """
import sys
sys.modules["triton"] = None
import torch, pixart_kernels as pk
x, table = torch.ones(1, 2, 8), torch.ones(2, 8)
pk.adaln_single(x, table, table[None], shift_row=0, scale_row=1)
pk.adaln_single(x, table, table[None], shift_row=0, scale_row=1, backend="triton")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "cannot run adaln_single: triton is not installed; install it with `pip " in done.stderr


@per_op
def test_forward_mode_is_refused(op):
    cases.check_forward_mode_is_refused(op, "triton", DEVICE)

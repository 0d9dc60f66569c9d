"""compress_kv in Triton against the reference: on a GPU as it is, without one interpreted."""

from __future__ import annotations

import compress_kv_cases as cases
import pytest
import torch
from compress_kv_cases import BF16, FP16, FP32, inputs, per_dtypes, per_layout, run
from triton_devices import (
    DEVICE,
    check_schema_is_that_of_the_compiled_op,
    interpret_in_place,
    needs_triton,
    on_gpu,
)

from pixart_kernels import _extension, _triton

if _triton.problem is None:
    from pixart_kernels.kv_compression import triton as kernels

pytestmark = needs_triton

# one token; odd sides; the model's width; widths that mask; a power of two; more taps than a
# program of the backward takes, in whole groups and not; no samples
SHAPES = [
    ((1, 1, 1, 8), 1),
    ((2, 5, 7, 72), 2),
    ((2, 2, 4, 1152), 2),
    ((1, 2, 3, 1151), 2),
    ((1, 4, 2, 64), 2),
    ((2, 4, 9, 24), 4),
    ((2, 7, 3, 24), 3),
    ((2, 3, 2, 16), 1),
    ((0, 4, 4, 16), 2),
]


@pytest.fixture(autouse=True)
def little_to_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program of the fold costs a millisecond."""
    if _triton.INTERPRETED:
        monkeypatch.setattr(kernels, "FOLD_COLUMNS", 512)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32(shape):
    cases.check_error_rule(shape, inputs(shape, device=DEVICE), "triton")


@per_dtypes
def test_dtypes(kv_dtype, parameter_dtype):
    shape = (2, 4, 5, 40), 2
    leaves = inputs(shape, kv_dtype, parameter_dtype, device=DEVICE)
    cases.check_error_rule(shape, leaves, "triton")


def test_parameters_of_several_dtypes():
    cases.check_parameters_of_several_dtypes("triton", DEVICE)


def test_fp64_parameters_beside_fp32_tokens():
    cases.check_fp64_parameters("triton", DEVICE)


def test_bf16_at_the_width_of_the_model():
    shape = (2, 4, 2, 1152), 2
    cases.check_error_rule(shape, inputs(shape, BF16, device=DEVICE), "triton")


def test_the_fold_as_shipped(monkeypatch):
    monkeypatch.undo()
    shape = (2, 4, 4, 72), 2
    cases.check_error_rule(shape, inputs(shape, device=DEVICE), "triton")


@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize("R", [2, 4])
def test_any_number_of_splits(splits, R, monkeypatch):
    """Fewer and more of them than the fold adds in one step."""
    monkeypatch.setattr(kernels, "FOLD_ROWS", 4)
    monkeypatch.setattr(kernels, "backward_splits", lambda B, rows, *rest: min(splits, rows))
    shape = (3, 4, 4, 24), R
    cases.check_error_rule(shape, inputs(shape, device=DEVICE), "triton")


@per_layout
def test_strided_views_are_read_where_they_lie(layout):
    cases.check_strided_views(layout, "triton", DEVICE)


def test_the_packed_projection_is_not_copied():
    cases.check_no_copy_of_the_packed_projection("triton", DEVICE)


def test_heads():
    cases.check_heads("triton", DEVICE)


def test_expanded_inputs_and_gradients():
    cases.check_expanded("triton", DEVICE)


def test_addresses_beyond_32_bits(monkeypatch):
    interpret_in_place(monkeypatch)
    cases.check_addresses_beyond_32_bits("triton", DEVICE)


def test_nan_stays_in_its_window():
    cases.check_nan_stays_in_its_window("triton", DEVICE)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_bitwise_repeatable(dtype):
    grid, times = ((2, 4, 5, 72), 1) if _triton.INTERPRETED else ((4, 33, 32, 1152), 100)
    shape = grid, 2
    leaves = inputs(shape, dtype, device=DEVICE)
    dout = cases.gradient_like(cases.compress(shape, leaves, "triton"))
    expected = run(shape, leaves, "triton", dout)
    for _ in range(times):
        cases.assert_same_bits(expected, run(shape, leaves, "triton", dout))


def test_a_sample_does_not_depend_on_its_batch():
    cases.check_a_sample_alone("triton", DEVICE)


def test_forward_mode_is_refused():
    cases.check_forward_mode_is_refused("triton", DEVICE)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("kv_dtype, parameter_dtype", [(FP32, BF16), (FP16, FP32)])
def test_opcheck(needs_grad, kv_dtype, parameter_dtype):
    ops = torch.ops.pixart_kernels_triton
    cases.check_opcheck(ops, kv_dtype, parameter_dtype, needs_grad, DEVICE)


@pytest.mark.skipif(_extension.problem is not None, reason="no compiled kernels to compare with")
@pytest.mark.parametrize("name", ["compress_kv_fwd", "compress_kv_bwd"])
def test_schemas_are_those_of_the_compiled_ops(name):
    check_schema_is_that_of_the_compiled_op(name)


def test_compiles_as_one_graph_with_one_recompilation_for_other_grids():
    cases.check_one_recompilation_for_other_grids("triton", ((2, 5), (3, 4), (4, 2)), DEVICE)


@on_gpu
def test_compiles_with_inductor_and_without_gradients():
    cases.check_compiles_with_inductor_and_without_gradients("triton", DEVICE)


@on_gpu
def test_captured_in_a_graph():
    shape = (2, 32, 32, 1152), 2
    leaves = inputs(shape, BF16, device=DEVICE)
    dout = cases.gradient_like(cases.compress(shape, leaves, "triton"))
    expected = run(shape, leaves, "triton", dout)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(shape, leaves, "triton", dout)
    graph.replay()
    cases.assert_same_bits(expected, captured)

"""compress_kv in C++ against the reference: values, gradients, layouts, compilation."""

from __future__ import annotations

import compress_kv_cases as cases
import pytest
import torch
from compress_kv_cases import BF16, FP16, FP32, inputs, per_dtypes, per_layout, run

from pixart_kernels import _extension

pytestmark = pytest.mark.skipif(
    _extension.problem is not None, reason=f"no compiled kernels: {_extension.problem}"
)

# one token; one window; odd sides; widths that fill no vector; ratios known to the compiler and
# not; several chunks of windows; more windows than 64 chunks of 32; no samples
SHAPES = [
    ((1, 1, 1, 8), 1),
    ((1, 2, 2, 1), 2),
    ((2, 5, 7, 72), 2),
    ((2, 2, 4, 1152), 2),
    ((1, 2, 3, 1151), 2),
    ((2, 9, 8, 20), 4),
    ((2, 7, 3, 24), 3),
    ((3, 13, 12, 36), 2),
    ((2, 65, 66, 8), 2),
    ((0, 4, 4, 16), 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32(shape):
    cases.check_error_rule(shape, inputs(shape), "native")


@per_dtypes
@pytest.mark.parametrize("R", [2, 3])
def test_dtypes(kv_dtype, parameter_dtype, R):
    shape = (2, 6, 7, 203), R
    cases.check_error_rule(shape, inputs(shape, kv_dtype, parameter_dtype), "native")


def test_parameters_of_several_dtypes():
    cases.check_parameters_of_several_dtypes("native")


def test_fp64_parameters_beside_fp32_tokens():
    cases.check_fp64_parameters("native")


@per_layout
def test_strided_views(layout):
    cases.check_strided_views(layout, "native")


def test_the_packed_projection_is_not_copied():
    cases.check_no_copy_of_the_packed_projection("native")


def test_heads():
    cases.check_heads("native")


def test_expanded_inputs_and_gradients():
    cases.check_expanded("native")


def test_addresses_beyond_32_bits():
    cases.check_addresses_beyond_32_bits("native")


def test_nan_stays_in_its_window():
    cases.check_nan_stays_in_its_window("native")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_bitwise_repeatable_for_any_number_of_threads(dtype):
    shape = (2, 33, 40, 136), 2
    leaves = inputs(shape, dtype)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 2, 1):
            torch.set_num_threads(count)
            found.append(run(shape, leaves, "native"))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        cases.assert_same_bits(found[0], others)


def test_a_sample_does_not_depend_on_its_batch():
    cases.check_a_sample_alone("native")


def test_forward_mode_is_refused():
    cases.check_forward_mode_is_refused("native")


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("kv_dtype, parameter_dtype", [(FP32, BF16), (FP16, FP32)])
def test_opcheck(needs_grad, kv_dtype, parameter_dtype):
    cases.check_opcheck(torch.ops.pixart_kernels, kv_dtype, parameter_dtype, needs_grad)


def test_wrong_memory_is_refused_by_the_ops_themselves():
    ops = torch.ops.pixart_kernels
    kv, weight, *vectors = inputs(((2, 4, 5, 24), 2))
    with pytest.raises(RuntimeError, match="`kv` must be .2, 16, 2, 24."):
        ops.compress_kv_fwd(kv, 4, 4, weight, *vectors, 1e-5)
    with pytest.raises(RuntimeError, match="`kv` must be .* no smaller than a window"):
        ops.compress_kv_fwd(kv, 20, 1, weight, *vectors, 1e-5)
    with pytest.raises(RuntimeError, match="`weight` must be"):
        ops.compress_kv_fwd(kv, 4, 5, weight[:, 0], *vectors, 1e-5)
    with pytest.raises(RuntimeError, match="`norm_weight` must be .24,."):
        ops.compress_kv_fwd(kv, 4, 5, weight, vectors[0], vectors[1][1:], vectors[2], 1e-5)
    with pytest.raises(RuntimeError, match="`kv` has an unsupported dtype"):
        ops.compress_kv_fwd(kv.double(), 4, 5, weight, *vectors, 1e-5)
    dout, stats = ops.compress_kv_fwd(kv, 4, 5, weight, *vectors, 1e-5)
    with pytest.raises(RuntimeError, match="`dout` must be .2, 4, 2, 24."):
        ops.compress_kv_bwd(dout[:, 1:], kv, 4, 5, weight, *vectors, stats)
    with pytest.raises(RuntimeError, match="`dout` must have the dtype"):
        ops.compress_kv_bwd(dout.bfloat16(), kv, 4, 5, weight, *vectors, stats)
    with pytest.raises(RuntimeError, match="`stats` must be"):
        ops.compress_kv_bwd(dout, kv, 4, 5, weight, *vectors, stats[:1])


def test_compiles_as_one_graph_with_one_recompilation_for_other_grids():
    cases.check_one_recompilation_for_other_grids("native", ((4, 5), (9, 6), (17, 3), (8, 8)))


def test_compiles_with_inductor_and_without_gradients():
    cases.check_compiles_with_inductor_and_without_gradients("native")

"""What the Triton kernels of compress_kv become: compiled, not run."""

from __future__ import annotations

import pytest
import torch
from triton_compiled import (
    ARCHS,
    assert_nothing_spills,
    compiled_launches,
    print_resources,
    share_of_wide_loads,
)

from pixart_kernels import _triton
from pixart_kernels.testing import recorded_launches

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# D, ratio, dtype of kv, dtype of the parameters
CONFIGURATIONS = {
    "1152 bf16": (1152, 2, BF16, BF16),
    "1152 fp16 and fp32": (1152, 2, FP16, FP32),
    "1152 fp32": (1152, 2, FP32, FP32),
    "1152 bf16 by 4": (1152, 4, BF16, BF16),
    "384 bf16": (384, 2, BF16, FP32),
    "2304 bf16": (2304, 2, BF16, FP32),
}


def launches(D: int, R: int, kv_dtype: torch.dtype, parameter_dtype: torch.dtype):
    """What training launches, on tensors without memory."""
    from pixart_kernels.kv_compression import triton as kernels

    def empty(*sizes, dtype=parameter_dtype):
        return torch.empty(sizes, dtype=dtype, device="meta")

    kv = empty(4, 32 * 32, 3, D, dtype=kv_dtype)[:, :, 1:]
    parameters = empty(D, 1, R, R), empty(D), empty(D), empty(D)
    with recorded_launches(kernels._fwd_kernel, kernels._bwd_kernel, kernels._fold_kernel) as found:
        out, stats = kernels.compress_kv_fwd(kv, 32, 32, *parameters, 1e-5)
        kernels.compress_kv_bwd(out, kv, 32, 32, *parameters, stats)
    return found


@pytest.fixture(scope="module")
def compiled():
    return compiled_launches(__file__)


def test_every_configuration_compiles_for_every_architecture(compiled):
    kernels = ("_fwd_kernel", "_bwd_kernel", "_fold_kernel")
    expected = {(name, k, arch) for name in CONFIGURATIONS for k in kernels for arch in ARCHS}
    assert {tuple(where) for *where, _ in compiled} == expected


def test_nothing_spills(compiled):
    assert_nothing_spills(compiled)


def test_rows_of_the_model_are_read_16_bytes_at_a_time(compiled):
    """But for tails of 128 columns, which 128 threads read one by one, and for statistics."""
    for *where, resources in compiled:
        if where[0].startswith("1152"):
            assert share_of_wide_loads(resources) > 0.8, (where, resources)


if __name__ == "__main__":
    _triton.processors = lambda device: 132
    for name, configuration in CONFIGURATIONS.items():
        print_resources(name, launches(*configuration))

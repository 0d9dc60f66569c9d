"""What the shipped configurations of the Triton kernels become: compiled, not run."""

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
from pixart_kernels.testing import compiled_resources, recorded_launches

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# D, residual dtype, activation dtype
CONFIGURATIONS = {
    "1152 bf16": (1152, BF16, BF16),
    "1152 fp16": (1152, FP16, FP16),
    "1152 fp32 and bf16": (1152, FP32, BF16),
    "384 bf16": (384, BF16, BF16),
    "72 fp32": (72, FP32, FP32),
}


def launches(D: int, x_dtype: torch.dtype, branch_dtype: torch.dtype):
    """What training launches, on tensors without memory."""
    from pixart_kernels._triton_rows import fold_kernel
    from pixart_kernels.adaln import triton as adaln

    def empty(*sizes, dtype=FP32):
        return torch.empty(sizes, dtype=dtype, device="meta")

    table = empty(6, D)
    with recorded_launches(adaln._fwd_kernel, adaln._bwd_kernel, fold_kernel) as found:
        # the second for its fold, of many samples with few splits each
        for B, N in ((4, 1024), (256, 64)):
            x, branch = empty(B, N, D, dtype=x_dtype), empty(B, N, D, dtype=branch_dtype)
            t, stats = empty(B, 6 * D, dtype=branch_dtype), empty(2, B, N)
            dh = branch if x_dtype == FP32 else x
            adaln.adaln_single_bwd(dh, x, table, t, stats, 0, 1)
        adaln.adaln_single_fwd(x, table, t, 0, 1, 1e-6)
        adaln.gated_residual_fwd(x, branch, table, t, 2)
        adaln.gated_residual_bwd(x, branch, table, t, 2)
        adaln.gated_residual_adaln_fwd(x, branch, table, t, 2, table, t, 3, 4, 1e-6)
        adaln.gated_residual_adaln_bwd(x, dh, x, branch, table, t, 2, table, t, stats, 3, 4)
    return found


@pytest.fixture(scope="module")
def compiled():
    return compiled_launches(__file__)


def test_every_configuration_compiles_for_every_architecture(compiled):
    kernels = ("_fwd_kernel", "_bwd_kernel", "fold_kernel")
    expected = {(name, k, arch) for name in CONFIGURATIONS for k in kernels for arch in ARCHS}
    assert {tuple(where) for *where, _ in compiled} == expected


def test_nothing_spills(compiled):
    assert_nothing_spills(compiled)


def test_rows_of_the_model_are_read_16_bytes_at_a_time(compiled):
    """But for tails of 128 columns, which 128 threads read one by one, and for statistics."""
    for *where, resources in compiled:
        if where[0].startswith("1152"):
            assert share_of_wide_loads(resources) > 0.8, (where, resources)


@pytest.mark.skipif(not _triton.INTERPRETED, reason="kernels are not interpreted here")
def test_interpreted_kernels_cannot_be_compiled():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is set"):
        compiled_resources(launches(*CONFIGURATIONS["72 fp32"])[0], 90)


if __name__ == "__main__":
    _triton.processors = lambda device: 132
    for name, configuration in CONFIGURATIONS.items():
        print_resources(name, launches(*configuration))

"""What the MLP's Triton kernels become at the model's width: compiled, not run."""

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

D = 4 * 1152
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def launches(dtype: torch.dtype):
    """What training launches, on tensors without memory."""
    from pixart_kernels._triton_rows import fold_kernel
    from pixart_kernels.mlp import triton as mlp

    x = torch.empty(4096, D, dtype=dtype, device="meta")
    bias = torch.empty(D, device="meta")
    with recorded_launches(mlp._fwd_kernel, mlp._bwd_kernel, fold_kernel) as found:
        mlp.bias_gelu_fwd(x, bias)
        mlp.bias_gelu_bwd(x, x, bias)
    return found


@pytest.fixture(scope="module")
def compiled():
    return compiled_launches(__file__)


def test_every_dtype_compiles_for_every_architecture(compiled):
    kernels = ("_fwd_kernel", "_bwd_kernel", "fold_kernel")
    expected = {(name, k, arch) for name in DTYPES for k in kernels for arch in ARCHS}
    assert {tuple(where) for *where, _ in compiled} == expected


def test_nothing_spills(compiled):
    assert_nothing_spills(compiled)


def test_rows_are_read_16_bytes_at_a_time(compiled):
    for *where, resources in compiled:
        assert share_of_wide_loads(resources) == 1, (where, resources)


if __name__ == "__main__":
    _triton.processors = lambda device: 132
    for name, dtype in DTYPES.items():
        print_resources(name, launches(dtype))

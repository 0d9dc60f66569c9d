"""What CAME's Triton kernels become at the model's width: compiled, not run."""

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

from pixart_kernels.testing import recorded_launches

KERNELS = (
    "_squares_kernel",
    "_scaled_squares_kernel",
    "_move_kernel",
    "_update_kernel",
    "_vector_squares_kernel",
    "_vector_update_kernel",
)
# the narrow ones are a convolution's
CONFIGURATIONS = {
    "bf16": (torch.bfloat16, 1152),
    "fp16": (torch.float16, 1152),
    "fp32": (torch.float32, 1152),
    "narrow": (torch.float32, 2),
}


def launches(dtype: torch.dtype, width: int):
    """What a step launches, on tensors without memory."""
    from pixart_kernels.came import triton as came

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=dtype, device="meta")] * 28

    rows, columns = (empty(4608), empty(width)) if width > 2 else (empty(1, 2), empty(1, 2))
    shape = (4608, width) if width > 2 else (1, 2, 2)
    matrices = {"exp_avg": empty(*shape)}
    matrices |= {f"exp_avg_{kind}_row": rows for kind in ("sq", "res")}
    matrices |= {f"exp_avg_{kind}_col": columns for kind in ("sq", "res")}
    vectors = {"exp_avg": empty(width), "exp_avg_sq": empty(width)}
    settings = {"lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16)}
    settings |= {"clip_threshold": 1.0, "weight_decay": 0.0}
    with recorded_launches(*(getattr(came, name) for name in KERNELS)) as found:
        for size, state in ((shape, matrices), ((width,), vectors)):
            weights = empty(*size, dtype=dtype)
            came.came_step(weights, weights, state, **settings)
    return found


@pytest.fixture(scope="module")
def compiled():
    return compiled_launches(__file__)


def test_every_dtype_compiles_for_every_architecture(compiled):
    expected = {(name, k, arch) for name in CONFIGURATIONS for k in KERNELS for arch in ARCHS}
    assert {tuple(where) for *where, _ in compiled} == expected


def test_nothing_spills(compiled):
    assert_nothing_spills(compiled)


def test_weights_are_read_16_bytes_at_a_time(compiled):
    """The rest is addresses, and factors of rows."""
    for *where, resources in compiled:
        if where[0] != "narrow":
            assert set(resources.loads) <= {4, 8, 16}, (where, resources)
            assert resources.loads.count(16) >= 3, (where, resources)
            assert share_of_wide_loads(resources) > 0.7, (where, resources)


if __name__ == "__main__":
    for name, configuration in CONFIGURATIONS.items():
        print_resources(name, launches(*configuration))

"""What the shipped configurations of cross-attention's Triton kernels become: compiled, not run."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from test_attention_triton_compiled import MATRIX_INSTRUCTION, SHARED
from triton_compiled import ARCHS, compiled_launches, share_of_wide_loads

from pixart_kernels import _triton
from pixart_kernels.testing import Launch, compiled_resources, recorded_launches

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = {"_fwd_kernel", "_dq_kernel", "_dkdv_kernel"}
ALL = KERNELS | {"_fold_kernel"}
# head dimension, dtype, image tokens, kernels: with few tokens, programs own half as many rows, and
# there is nothing to add up
CONFIGURATIONS = {
    "72 bf16": (72, BF16, 4096, ALL),
    "72 fp16, few tokens": (72, FP16, 64, KERNELS),
    "128 bf16": (128, BF16, 4096, ALL),
    "72 fp32": (72, FP32, 4096, ALL),
}


def launches(arch: int, d: int, dtype: torch.dtype, N: int) -> list[Launch]:
    """What training launches on ``arch``, on tensors without memory."""
    from pixart_kernels.attention import cross_triton, triton

    B, L, H = 2, 300, 16
    triton._major = lambda device: arch // 10
    q = torch.empty(B, N, H, d, dtype=dtype, device="meta")
    kv = torch.empty(B, L, 2, H, d, dtype=dtype, device="meta")
    lengths = torch.empty(B, dtype=torch.int32, device="meta")
    lse = torch.empty(B, H, N, device="meta")
    kernels = (triton._fwd_kernel, triton._dq_kernel, triton._dkdv_kernel)
    with recorded_launches(*kernels, cross_triton._fold_kernel) as found:
        cross_triton.cross_attention_fwd(q, kv, lengths)
        cross_triton.cross_attention_bwd(q, q, kv, lengths, q, lse)
    return found


@pytest.fixture(scope="module")
def compiled():
    return compiled_launches(__file__)


def test_every_configuration_compiles_for_every_architecture(compiled):
    expected = {
        (name, kernel, arch)
        for name, (*_, kernels) in CONFIGURATIONS.items()
        for kernel in kernels
        for arch in ARCHS
    }
    assert {tuple(where) for *where, _ in compiled} == expected


def test_nothing_spills(compiled):
    for *where, resources in compiled:
        assert resources.stack == 0, (where, resources)
        assert resources.shared <= SHARED[where[-1]], (where, resources)


def test_16_bit_products_run_on_tensor_cores(compiled):
    for name, kernel, arch, resources in compiled:
        used = MATRIX_INSTRUCTION[arch] in resources.products
        expected = "fp32" not in name and kernel != "_fold_kernel"
        assert used == expected, (name, kernel, arch, resources)


def test_heads_are_read_16_bytes_at_a_time(compiled):
    """But for a tail that more threads share than it has such pieces, lse, delta and a length."""
    for *where, resources in compiled:
        assert share_of_wide_loads(resources) > 0.75, (where, resources)


if __name__ == "__main__":
    _triton.processors = lambda device: 132
    for name, (*configuration, _) in CONFIGURATIONS.items():
        for arch in ARCHS:
            for launch in launches(arch, *configuration):
                resources = asdict(compiled_resources(launch, arch))
                print(json.dumps([name, launch.kernel.__name__, arch, resources]), flush=True)

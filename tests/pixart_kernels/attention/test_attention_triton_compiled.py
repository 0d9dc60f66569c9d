"""What the shipped configurations of attention's Triton kernels become: compiled, not run."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from triton_compiled import ARCHS, compiled_launches, share_of_wide_loads

from pixart_kernels import _triton
from pixart_kernels.testing import Launch, compiled_resources, recorded_launches

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# head dimension, dtype, tokens: with few, programs own half as many rows
CONFIGURATIONS = {
    "72 bf16": (72, BF16, 4096),
    "72 fp16, few tokens": (72, FP16, 64),
    "128 bf16": (128, BF16, 4096),
    "72 fp32": (72, FP32, 4096),
}
KERNELS = ("_fwd_kernel", "_dq_kernel", "_dkdv_kernel")
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# bytes that one program may take
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def launches(arch: int, d: int, dtype: torch.dtype, N: int) -> list[Launch]:
    """What training launches on ``arch``, on tensors without memory."""
    from pixart_kernels.attention import triton as attention

    B, H = 2, 16
    attention._major = lambda device: arch // 10
    qkv = torch.empty(B, N, 3 * H * d, dtype=dtype, device="meta")
    out = torch.empty(B, N, H * d, dtype=dtype, device="meta")
    lse = torch.empty(B, H, N, device="meta")
    with recorded_launches(*(getattr(attention, name) for name in KERNELS)) as found:
        attention.self_attention_fwd(qkv, H)
        attention.self_attention_bwd(out, qkv, out, lse, H)
    return found


@pytest.fixture(scope="module")
def compiled():
    return compiled_launches(__file__)


def test_every_configuration_compiles_for_every_architecture(compiled):
    expected = {(name, k, arch) for name in CONFIGURATIONS for k in KERNELS for arch in ARCHS}
    assert {tuple(where) for *where, _ in compiled} == expected


def test_nothing_spills(compiled):
    for *where, resources in compiled:
        assert resources.stack == 0, (where, resources)
        assert resources.shared <= SHARED[where[-1]], (where, resources)


def test_16_bit_products_run_on_tensor_cores(compiled):
    for *where, resources in compiled:
        used = MATRIX_INSTRUCTION[where[-1]] in resources.products
        assert used == ("fp32" not in where[0]), (where, resources)


def test_heads_are_read_16_bytes_at_a_time(compiled):
    """But for a tail that more threads share than it has such pieces, and for lse and delta."""
    for *where, resources in compiled:
        assert share_of_wide_loads(resources) > 0.75, (where, resources)


if __name__ == "__main__":
    _triton.processors = lambda device: 132
    for name, configuration in CONFIGURATIONS.items():
        for arch in ARCHS:
            for launch in launches(arch, *configuration):
                resources = asdict(compiled_resources(launch, arch))
                print(json.dumps([name, launch.kernel.__name__, arch, resources]), flush=True)

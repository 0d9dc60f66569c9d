"""KV compression's cases: bytes are those of real tensors, and the 16-bit formula is the op's."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kv_compression import FAMILIES, OP
from benchmarks.providers import leaves_of
from benchmarks.registry import BF16, FP32, Case
from benchmarks.rivals import OFFICIAL

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", [FP32, BF16], ids=lambda p: p.name)
def test_bytes_are_those_of_the_tensors_involved(precision) -> None:
    case = Case(OP, (2, 5, 5, 24), precision)
    leaves = leaves_of(case.inputs(CPU))
    (out,) = OP.call("reference", *leaves)
    dkv, *_ = torch.autograd.grad(out, leaves, torch.ones_like(out))
    kv = leaves[0]
    assert case.bytes_moved("forward") == kv.nbytes + out.nbytes
    assert case.bytes_moved("backward") == out.nbytes + kv.nbytes + dkv.nbytes


def test_the_official_formula_is_the_op() -> None:
    tensors = Case(OP, (2, 4, 4, 24), FP32).inputs(CPU)
    torch.testing.assert_close(
        OFFICIAL["compress_kv"](*tensors), OP.call("reference", *tensors), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_differ_and_read_a_packed_projection(device: str) -> None:
    cases = FAMILIES["kv_compression"](device)
    about = [(case.shape, case.precision.name) for case in cases]
    assert len(set(about)) == len(about)
    kv = Case(OP, (2, 4, 4, 24), FP32).inputs(CPU)[0]
    assert kv.stride() == (16 * 72, 72, 24, 1)

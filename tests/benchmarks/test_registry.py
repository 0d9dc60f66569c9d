"""Byte counts are those of real tensors, and the cases are what the targets speak of."""

from __future__ import annotations

import pytest
import torch

from benchmarks.providers import leaves_of
from benchmarks.registry import BF16, FAMILIES, FP32, MIXED, TINY, Case
from benchmarks.rivals import rivals

OPS = {case.op.name: case.op for family in FAMILIES.values() for case in family("cpu")}
# which inputs' gradients are the incoming ones, and so are neither computed nor written
PASSED_ON = {"gated_residual": 1}
# tensors of x's shape that the backward needs again, beside the incoming gradients
READ_AGAIN = {
    "adaln_single": ["x"],
    "adaln_modulate": ["x"],
    "gated_residual": ["branch"],
    "gated_residual_adaln": ["x", "branch"],
    "bias_gelu": ["x"],
}
# vectors (table and t, or one alone) that forward and backward read
ROWS_READ = {
    "adaln_single": (2, 1),
    "adaln_modulate": (2, 1),
    "gated_residual": (1, 1),
    "gated_residual_adaln": (3, 2),
    "bias_gelu": (1, 1),
}


@pytest.mark.parametrize("precision", [FP32, BF16, MIXED], ids=lambda p: p.name)
@pytest.mark.parametrize("op", OPS)
def test_bytes_are_those_of_the_tensors_involved(op: str, precision) -> None:
    if op == "bias_gelu" and precision is MIXED:
        pytest.skip("has no residual")
    case = Case(OPS[op], (2, 5, 24), precision)
    leaves = leaves_of(case.inputs(torch.device("cpu")))
    outputs = case.op.call("reference", *leaves)
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
    big = [leaf for leaf in leaves if leaf.shape == case.shape]
    # a row of the table and of every sample's t; the bias has no batch
    vectors = [leaf for leaf in leaves if leaf.shape != case.shape]
    row = sum(v.nbytes // (6 if v.shape[-1] == 6 * 24 or len(v) == 6 else 1) for v in vectors)
    if op == "adaln_modulate":
        row //= 2  # shift and scale are two rows
    forward_rows, backward_rows = ROWS_READ[op]
    forward = sum(t.nbytes for t in (*big, *outputs)) + forward_rows * row
    assert case.bytes_moved("forward") == forward

    again = {"x": big[0], "branch": big[-1]}
    backward = sum(o.nbytes for o in outputs) + backward_rows * row
    backward += sum(again[name].nbytes for name in READ_AGAIN[op])
    backward += sum(grad.nbytes for grad in grads[PASSED_ON.get(op, 0) :])
    assert case.bytes_moved("backward") == backward
    assert case.bytes_moved("forward+backward") == forward + backward


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cases_differ_and_end_with_the_tiny_one(family: str, device: str) -> None:
    cases = FAMILIES[family](device)
    about = [(case.op.name, case.shape, case.precision.name) for case in cases]
    assert len(set(about)) == len(about)
    assert cases[-1].shape == TINY


def test_the_targets_shapes_come_first() -> None:
    first = {(case.shape, case.precision.name) for case in FAMILIES["adaln"]("cpu")[:8]}
    assert first == {((8, 256, 1152), "float32"), ((8, 1024, 1152), "float32")}


def test_inputs_differ_by_seed_and_repeat() -> None:
    case, cpu = FAMILIES["adaln"]("cpu")[-1], torch.device("cpu")
    for a, b, other in zip(case.inputs(cpu), case.inputs(cpu), case.inputs(cpu, 1), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, other)


def test_only_the_ungated_norm_has_rivals(monkeypatch) -> None:
    libraries = ("liger_kernel.ops.layer_norm", "liger_kernel.ops.modulated_rms_norm", "quack")
    asked = []

    def find(name: str):
        asked.append(name)

    monkeypatch.setattr("benchmarks.rivals._import", find)
    assert all(rivals(op) == {} for op in OPS)
    assert asked == list(libraries)

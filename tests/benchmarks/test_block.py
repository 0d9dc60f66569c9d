"""Memory is counted to the byte, and a block's variants differ in their ops alone."""

from __future__ import annotations

import pytest
import torch

from benchmarks import block as block_module
from benchmarks.block import only, parts, time_part
from benchmarks.environment import read
from benchmarks.memory import step_memory
from benchmarks.timing import Measurement, Timing
from pixart.config import PixArtConfig
from pixart_kernels import dispatch

CPU = torch.device("cpu")
SMALL = PixArtConfig(depth=1, hidden_size=32, num_heads=2)


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setattr(block_module, "PixArtConfig", lambda depth: SMALL)
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **_: compiled(module, backend="eager"))
    # without a GPU, tests interpret Triton's kernels: too slow to repeat
    monkeypatch.setattr(dispatch, "PRIORITY", ("native", "reference"))
    timing = Timing(1.0, 1.0, 1.0, 1)
    monkeypatch.setattr(
        block_module,
        "measure",
        lambda steps, seconds: (
            [step() for step in steps.values()] and Measurement(2, dict.fromkeys(steps, timing))
        ),
    )


def test_memory_of_a_step_is_exact() -> None:
    megabyte = 2**20
    x = torch.zeros(megabyte, dtype=torch.uint8)

    def forward():
        scratch = x + 1  # released once the next line is done
        return (scratch * 2,)

    def backward(outputs):
        return outputs[0] + 1

    found = step_memory(forward, backward, CPU)
    assert found["saved"] == pytest.approx(megabyte, rel=0.01)
    assert found["peak"] == pytest.approx(2 * megabyte, rel=0.01)


def test_memory_sees_inside_compiled_kernels() -> None:
    x = torch.randn(4, 256, 512, requires_grad=True)
    table, t = torch.randn(2, 512), torch.randn(4, 1024)
    if dispatch.why_not("adaln_single", "native", x) is not None:
        pytest.skip("the extension is not built")

    def forward():
        h = block_module.pk.adaln_single(x, table, t, shift_row=0, scale_row=1, backend="native")
        return (h,)

    found = step_memory(forward, lambda outputs: torch.autograd.grad(outputs[0].sum(), x), CPU)
    # h, and the fp32 mean and 1/std of each token
    assert found["saved"] == pytest.approx(x.nbytes + 2 * 4 * 256 * 4, rel=0.01)


@pytest.mark.parametrize("index", [0, 1], ids=["block", "adaLN part"])
def test_parts_run_in_every_variant(small, index: int) -> None:
    part = parts((3, 5), CPU, torch.float32)[index]
    row = time_part(part, CPU, 0.0)
    assert row["incorrect"] == {}
    assert {"eager", "torch.compile"} <= set(row["timings"]) == set(row["memory"])
    assert next(iter(row["timings"])) == "eager"
    assert all(tensor.grad is None for tensor in part.inputs)
    assert all(parameter.grad is None for parameter in part.module.parameters())


def test_parts_that_fail_or_do_not_fit_are_rows(tmp_path, monkeypatch) -> None:
    fates = iter(["timed", "fails", "timed", "stopped"])

    def time_part(part, device, seconds: float) -> dict:
        fate = next(fates)
        if fate == "stopped":
            raise KeyboardInterrupt
        if fate == "fails":
            raise RuntimeError("no such kernel\nand a long trace")
        return {"timings": {}}

    monkeypatch.setattr(block_module, "time_part", time_part)
    monkeypatch.setattr(block_module, "PixArtConfig", lambda depth: SMALL)
    output = ["--output", str(tmp_path)]

    def rows() -> list[dict]:
        return read(tmp_path / "block.jsonl")

    with pytest.raises(KeyboardInterrupt):
        block_module.main(output)
    assert [row["part"] for row in rows()] == [*block_module.PARTS] * 2
    assert [row["shape"] for row in rows()] == [[2, 256, 32]] * 2 + [[2, 1024, 32]] * 2
    assert all(row["commit"] for row in rows())
    assert [row.get("failed", row.get("not_measured")) for row in rows()] == [
        *(None, "RuntimeError: no such kernel", None, "was stopped")
    ]
    fates = iter(["fails"] * 4)
    with pytest.raises(SystemExit) as ended:
        block_module.main(output)
    assert ended.value.code == 1
    with pytest.raises(SystemExit) as ended:
        block_module.main([*output, "--budget", "0"])
    assert ended.value.code == 0
    assert [row["not_measured"] for row in rows()] == ["0 s were over"] * 4


def test_a_part_s_preparation_counts_against_its_time(small, monkeypatch) -> None:
    given, now = [], iter([100.0, 104.0])
    real = block_module.measure
    monkeypatch.setattr(
        block_module,
        "measure",
        lambda steps, seconds: given.append(seconds) or real(steps, seconds),
    )
    monkeypatch.setattr(block_module.time, "perf_counter", lambda: next(now, 104.0))
    time_part(parts((1, 2), CPU, torch.float32)[1], CPU, 10.0)
    assert given == [6.0]


def test_a_wrong_variant_is_not_timed(small, monkeypatch) -> None:
    (_, part) = parts((3, 5), CPU, torch.float32)
    real = block_module._variants

    def with_bad(part) -> dict:
        bad = lambda *inputs: tuple(o + 1e-3 for o in part.module(*inputs))  # noqa: E731
        return {**real(part), "bad": ("reference", bad)}

    monkeypatch.setattr(block_module, "_variants", with_bad)
    row = time_part(part, CPU, 0.0)
    assert list(row["incorrect"]) == ["bad"]
    assert "bad" not in row["timings"]


def test_only_means_only_and_is_undone() -> None:
    x, before = torch.zeros(1, 1, 8), dispatch.VERIFIED
    with only("reference"):
        assert dispatch.chosen("adaln_single", x) == "reference"
    if dispatch.why_not("adaln_single", "native", x) is None:
        with only("native"):
            assert dispatch.chosen("adaln_single", x) == "native"
            # an op that the backend does not have still runs
            assert dispatch.chosen("self_attention", x) == "reference"
    assert dispatch.VERIFIED is before


def test_the_exact_twin_is_the_same_function() -> None:
    (_, part) = parts((2, 2), CPU, torch.float32)
    with only("reference"):
        for single, double in zip(part.forward(), part.in_double().forward(), strict=True):
            assert double.dtype == torch.float64
            torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)

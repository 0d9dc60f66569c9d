"""Nothing wrong is timed, and nothing that was not reached goes unsaid."""

from __future__ import annotations

import types

import pytest
import torch

from benchmarks import cuda, providers
from benchmarks import run as run_module
from benchmarks.environment import read
from benchmarks.providers import correct_providers, leaves_of, wrong
from benchmarks.registry import BF16, FAMILIES, FP32, MIXED, Case
from benchmarks.rivals import EAGER_16BIT, OFFICIAL, rivals
from benchmarks.timing import Measurement, Timing

CPU = torch.device("cpu")
OPS = {case.op.name: case.op for case in FAMILIES["adaln"]("cpu")}
SMALL = Case(OPS["gated_residual_adaln"], (2, 3, 16), FP32)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Compiles nothing and measures nothing: that works, and takes its time, elsewhere."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    # without a GPU, tests interpret Triton's kernels: too slow to repeat
    monkeypatch.setattr(providers.dispatch, "PRIORITY", ("native", "reference"))
    monkeypatch.setattr(run_module, "measure", lambda calls, seconds: _called_once(calls))
    monkeypatch.setattr(cuda, "measure", lambda calls, seconds, repeats: _called_once(calls))
    # `providers` sets these for the process
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield


def _called_once(calls) -> Measurement:
    for call in calls.values():
        call()
    return Measurement(2, {name: Timing(1.0, 1.0, 1.0, 1) for name in calls}, rounds=1)


@pytest.mark.parametrize("broken", ["output", "gradient", "raises"])
def test_a_wrong_provider_is_named_and_not_timed(monkeypatch, broken: str) -> None:
    def bad(*tensors):
        if broken == "raises":
            raise RuntimeError("no such kernel\nand a long trace")
        x_new, h = SMALL.op.call("reference", *tensors)
        if broken == "output":
            return x_new, h + 1e-3
        # right in value, wrong in gradient
        return x_new, 2 * h - h.detach()

    real = providers.providers

    def with_bad(case, x):
        found = real(case, x)
        return {**found, "bad": (bad, found["eager"][1])}

    monkeypatch.setattr(providers, "providers", with_bad)
    correct, failures = correct_providers(SMALL, SMALL.inputs(CPU))
    assert "eager" in correct
    assert list(failures) == ["bad"]
    if broken == "raises":
        assert failures["bad"] == "RuntimeError: no such kernel"
    (row, *_) = run_module.run([SMALL], CPU, 60)
    assert "bad" in row["incorrect"]
    assert "bad" not in row["timings"]


def test_rows_say_what_was_done() -> None:
    rows = run_module.run([SMALL], CPU, 60)
    assert [row["pass"] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        assert row["op"] == "gated_residual_adaln"
        assert row["bytes"] == SMALL.bytes_moved(row["pass"])
        assert {"eager", "torch.compile"} <= set(row["timings"])
        assert row["incorrect"] == {}


def test_what_the_budget_did_not_reach_is_listed(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(run_module.FAMILIES, "adaln", lambda device: [SMALL, SMALL])
    with pytest.raises(SystemExit) as ended:
        run_module.main(["--op", "adaln", "--budget", "0", "--output", str(tmp_path)])
    assert ended.value.code == 0
    rows = read(tmp_path / "adaln.jsonl")
    assert [row["not_measured"] for row in rows] == ["0 s were over"] * 2
    assert all(row["shape"] == [2, 3, 16] and row["commit"] for row in rows)
    assert "Not measured, 2 of 2 cases" in capsys.readouterr().out


def test_a_case_that_fails_is_a_row_and_not_the_end(tmp_path, monkeypatch, capsys) -> None:
    real, large = run_module.time_case, Case(SMALL.op, (9, 9, 16), FP32)

    def time_case(case, *arguments):
        if case is large:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmuch advice")
        return real(case, *arguments)

    monkeypatch.setattr(run_module, "time_case", time_case)
    monkeypatch.setitem(run_module.FAMILIES, "adaln", lambda device: [large, SMALL])
    with pytest.raises(SystemExit) as ended:
        run_module.main(["--op", "adaln", "--output", str(tmp_path)])
    assert ended.value.code == 1
    rows = read(tmp_path / "adaln.jsonl")
    assert rows[0]["failed"] == "OutOfMemoryError: CUDA out of memory."
    assert [row["pass"] for row in rows[1:]] == ["forward", "forward+backward"]
    assert "failed: OutOfMemoryError" in capsys.readouterr().out


def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path, monkeypatch) -> None:
    real, cases = run_module.time_case, [SMALL, Case(SMALL.op, (9, 9, 16), FP32)]

    def time_case(case, *arguments):
        if case is cases[1]:
            raise KeyboardInterrupt
        return real(case, *arguments)

    monkeypatch.setattr(run_module, "time_case", time_case)
    monkeypatch.setitem(run_module.FAMILIES, "adaln", lambda device: cases)
    with pytest.raises(KeyboardInterrupt):
        run_module.main(["--op", "adaln", "--output", str(tmp_path)])
    rows = read(tmp_path / "adaln.jsonl")
    assert [row.get("not_measured") for row in rows] == [None, None, "was stopped"]


def test_compiled_providers_never_fall_back_to_eager() -> None:
    providers.providers(SMALL, SMALL.inputs(CPU)[0])
    assert torch._dynamo.config.recompile_limit == 64
    assert torch._dynamo.config.fail_on_recompile_limit_hit


ALL = [case.op for family in FAMILIES.values() for case in family("cpu")[-4:]]


@pytest.mark.parametrize("op", {op.name: op for op in ALL}.values(), ids=lambda op: op.name)
def test_official_formulas_are_the_ops_in_x_s_dtype(op) -> None:
    tensors = Case(op, (2, 3, 16), FP32).inputs(CPU)
    official = OFFICIAL[op.name]
    assert wrong(lambda *inputs: op.call("reference", *inputs), official, tensors) is None
    low = Case(op, (2, 3, 16), BF16).inputs(CPU)
    outputs, references = official(*low), op.call("reference", *low)
    assert all(o.dtype == torch.bfloat16 for o in outputs)
    # rounded at every step, not once
    assert any(not torch.equal(o, r) for o, r in zip(outputs, references, strict=True))


def test_16_bit_cases_have_the_official_formula_beside_them() -> None:
    for precision in (FP32, BF16, MIXED):
        case = Case(SMALL.op, (2, 3, 16), precision)
        correct, failures = correct_providers(case, case.inputs(CPU))
        assert failures == {}
        assert (EAGER_16BIT in correct) == (precision is BF16)


def test_rivals_are_held_to_their_own_definition(monkeypatch) -> None:
    F = torch.nn.functional

    def layer_norm(x, weight, bias, eps):
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def rms_norm(x, weight, bias, eps):
        return F.rms_norm(x, weight.shape, weight, eps) + bias

    def modulated(x, weight, scale, shift, eps, offset, casting, in_place):
        assert weight is None and offset == 0 and not in_place
        return F.rms_norm(x, x.shape[-1:], None, eps) * (1 + scale[:, None]) + shift[:, None]

    modules = {
        "liger_kernel.ops.layer_norm": {
            "LigerLayerNormFunction": types.SimpleNamespace(apply=layer_norm)
        },
        "liger_kernel.ops.modulated_rms_norm": {
            "LigerModulatedRMSNormFunction": types.SimpleNamespace(apply=modulated)
        },
        "quack": {"rmsnorm": rms_norm},
    }
    monkeypatch.setattr(
        "benchmarks.rivals._import", lambda name: types.SimpleNamespace(**modules[name])
    )
    case = Case(OPS["adaln_modulate"], (2, 3, 16), FP32)
    found = rivals("adaln_modulate")
    assert len(found) == 3
    for name, rival in found.items():
        # the first sample's scale alone is used by two of them
        one_sample = [tensor[:1] for tensor in case.inputs(CPU)]
        assert wrong(rival.definition, rival.run, one_sample) is None, name


@pytest.mark.parametrize("moved, cache", [(2**20, 50 * 2**20), (2**31, 50 * 2**20), (2**20, 2**30)])
def test_rotated_inputs_exceed_twice_the_cache(moved: int, cache: int) -> None:
    count = cuda.input_sets(moved, cache)
    assert count * moved > max(2 * cache, cuda.REPLAY_BYTES)
    assert (count - 1) * moved <= max(2 * cache, cuda.REPLAY_BYTES)


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_gpu_timing_with_a_stand_in_for_the_gpu(fake_gpu, which: str) -> None:
    correct, _ = correct_providers(SMALL, SMALL.inputs(CPU))
    row = cuda.time_pass(SMALL, correct, which, CPU, 0.0)
    calls = cuda.input_sets(SMALL.bytes_moved(which), 2**10)
    assert calls > 2
    assert set(row["timings"]) == {*correct, "copy"}
    for timing in row["timings"].values():
        assert timing["median"] == 6.0 / calls
        assert timing["calls"] == cuda.MIN_REPLAYS
    forwards = len(correct) if which == "backward" else 0  # each before its backward
    assert fake_gpu.replays == cuda.MIN_REPLAYS * (len(correct) + 1 + forwards)
    assert row["gpu"]["after"] == {"clocks.sm": "1 MHz"}
    if which == "backward":
        assert row["peak_bytes"] == dict.fromkeys(correct, 7)


def test_gradients_of_a_tiny_call_are_timed_too(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    correct, _ = correct_providers(SMALL, SMALL.inputs(CPU))
    row = cuda.time_tiny(correct, SMALL.inputs(CPU), "forward+backward", 0.0)
    assert set(row["timings"]) == set(correct)
    assert str(cuda.TINY_CALLS) in row["method"]


def test_leaves_keep_strides() -> None:
    view = torch.randn(3, 8)[:, :4]
    (leaf,) = leaves_of([view])
    assert leaf.stride() == (8, 1)
    assert leaf.requires_grad

"""Whole models are compared before they are timed, with the same weights and inputs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from benchmarks import model as model_module
from benchmarks.environment import read, write
from benchmarks.model import (
    EAGER,
    STOCK,
    ModelCase,
    cases,
    errors,
    models,
    time_case,
    variants,
)
from benchmarks.model_tables import model as model_table
from benchmarks.timing import Measurement, Timing
from pixart import PixArtConfig
from pixart.generation import cache
from pixart_kernels import dispatch

CPU = torch.device("cpu")
SMALL = PixArtConfig(
    depth=2, input_size=8, hidden_size=24, num_heads=2, caption_channels=10, max_caption_tokens=7
)
CASES = {
    which: ModelCase("small", SMALL, which, batch=3, text=5, lengths=(5, 1, 3))
    for which in ("forward", "step")
}


@pytest.fixture
def timed(monkeypatch) -> list[str]:
    """The names that are timed, each called once."""
    names: list[str] = []

    def measure(calls, seconds):
        for call in calls.values():
            call()
        names.extend(calls)
        return Measurement(1, dict.fromkeys(calls, Timing(1.0, 1.0, 1.0, 1)))

    monkeypatch.setattr(model_module, "measure", measure)
    return names


@pytest.mark.parametrize("which", CASES)
def test_all_are_compared_and_timed_on_a_cpu(which: str, timed) -> None:
    row = time_case(CASES[which], CPU, torch.float32, 0.0)
    assert timed == [STOCK, EAGER, "auto"] == list(row["peak_bytes"])
    assert row["incorrect"] == {}
    # an output, and a gradient
    assert {len(error) for error in row["errors"].values()} == {1 if which == "forward" else 2}
    assert all(0 < error < 1e-5 for found in row["errors"].values() for error in found)


@pytest.mark.parametrize("where", ["output", "gradient"])
def test_a_wrong_model_is_not_timed(where: str, timed, monkeypatch) -> None:
    real = model_module.variants

    def with_wrong(ours, stock, device, which):
        found = real(ours, stock, device, which)
        bias = stock.proj_out.bias
        if where == "output":
            # in place it would be ours as well
            stock.proj_out.bias = torch.nn.Parameter(bias + 1)
        else:
            bias.register_hook(lambda grad: 2 * grad)
        return found

    monkeypatch.setattr(model_module, "variants", with_wrong)
    row = time_case(CASES["step"], CPU, torch.float32, 0.0)
    assert list(row["incorrect"]) == [STOCK] and STOCK not in timed
    assert STOCK not in row["peak_bytes"]


def test_no_layer_is_left_at_zero_and_no_caption_is_dropped() -> None:
    ours, stock = models(replace(SMALL, caption_dropout=0.9), CPU, torch.float32)
    assert all(parameter.any() for parameter in (*ours.parameters(), *stock.parameters()))
    assert ours.config.caption_dropout == 0
    low, twin = models(SMALL, CPU, torch.bfloat16)
    assert {p.dtype for p in (*low.parameters(), *twin.parameters())} == {torch.bfloat16}
    arguments = CASES["forward"].inputs(CPU, torch.bfloat16)
    call = model_module._call_stock(arguments)
    assert call(twin)[0].dtype == torch.bfloat16


@pytest.fixture
def as_if_on_a_gpu(monkeypatch) -> None:
    """One of our backends can run; compiled code is eager; a replay runs the forward again."""
    why_not = dispatch.why_not

    def only_triton(op: str, backend: str, x, **facts):
        if (op, backend) == ("adaln_single", "triton"):
            return None
        return why_not(op, backend, x, **facts)

    def capture(forward, pool):
        output = forward()
        return lambda: output.copy_(forward()), output

    monkeypatch.setattr(dispatch, "why_not", only_triton)
    monkeypatch.setattr(model_module, "only", lambda *backends: nullcontext())
    monkeypatch.setattr(cache, "capture", capture)
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **_: compiled(module, backend="eager")
    )


@pytest.mark.parametrize("which", CASES)
def test_a_gpu_also_has_compiled_blocks_and_graphs(which: str, as_if_on_a_gpu) -> None:
    ours, stock = models(SMALL, CPU, torch.float32)
    found = variants(ours, stock, torch.device("cuda"), which)
    eager = [STOCK, EAGER, "triton"]
    last = ["triton, graph"] if which == "forward" else ["auto"]
    assert list(found) == [*eager, *(f"{name}, compiled" for name in eager), *last]
    twin = found["triton, compiled"].module
    assert all(a is b for a, b in zip(ours.parameters(), twin.parameters(), strict=True))
    assert twin is not ours and ours.blocks[0]._compiled_call_impl is None
    distances, incorrect = errors(found, CASES[which].inputs(CPU, torch.float32), which)
    assert incorrect == {} and sorted(distances) == sorted(found)


def test_cases_of_a_gpu_are_of_xl_2_at_every_size() -> None:
    found = {(case.about()["shape"][1], case.which): case for case in cases("cuda")}
    assert set(found) == {(n, w) for n in (256, 1024, 4096, 16384) for w in ("forward", "step")}
    assert {case.batch for case in found.values() if case.which == "forward"} == {2}
    assert found[256, "step"].batch == 64 and found[16384, "step"].batch == 1
    assert all(case.config.depth == 28 for case in found.values())


def test_command_resumes_and_the_report_shows_it(results, monkeypatch, timed) -> None:
    monkeypatch.setattr(model_module, "cases", lambda kind: list(CASES.values()))
    for options in ([], ["--resume"]):
        with pytest.raises(SystemExit) as ended:
            model_module.main(["--output", str(results), *options])
        assert not ended.value.code
    assert len(timed) == 2 * 3  # nothing twice
    file = results / "model.jsonl"
    rows = read(file)
    assert [row["config"] for row in rows] == [SMALL.to_dict()] * 2
    for row in rows:
        row["peak_bytes"] = dict.fromkeys(row["peak_bytes"], 3 * 2**20)
        ratios = {STOCK: 1.0, EAGER: 0.5, "auto": 2.0}
        row["speedups"] = {n: {"median": r, "p20": r, "p80": r} for n, r in ratios.items()}
    write(file, rows)
    text = model_table(file)
    first, slower = "1 ms, 3 MiB", "**0.50× (0.50–0.50), 1 ms, 3 MiB**"
    line = f"| small, step, 3 × 16 tokens | {first} | {slower} | 2.00× (2.00–2.00), 1 ms, 3 MiB |"
    assert line in text.splitlines()
    del rows[1]["timings"][STOCK]
    write(file, rows)
    assert "| small, step, 3 × 16 tokens | – | 1 ms, 3 MiB | 1 ms, 3 MiB |" in model_table(file)
    assert "tokens of text 5, of which 5, 1 and 3 are real" in text

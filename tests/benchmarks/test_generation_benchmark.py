"""Pictures are compared before drawing them is timed, each way in a process of its own."""

from __future__ import annotations

import multiprocessing.dummy
import threading
import types
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy
import pytest
import torch

from benchmarks import generation as generation_module
from benchmarks.environment import read, write
from benchmarks.generation import (
    EXACT,
    STOCK,
    VARIANTS,
    GenerationCase,
    NoPicture,
    Parts,
    Worker,
    cases,
    time_case,
    variants,
)
from benchmarks.model_tables import generation as generation_table
from benchmarks.timing import Measurement, Timing
from pixart import PixArtConfig
from pixart.generation import PixArtPipeline, cache

CPU = torch.device("cpu")
SMALL = PixArtConfig(
    depth=2, input_size=8, hidden_size=24, num_heads=2, caption_channels=10, max_caption_tokens=30
)
CASE = GenerationCase("small", SMALL, batch=3, steps=3, text=30)
ON_A_CPU = variants("cpu")


class Thread(multiprocessing.dummy.Process):
    """A stand-in for a process, quick to start, whose end of the pipe is its own."""

    def kill(self) -> None: ...

    def run(self) -> None:
        connection, *_ = self._args
        super().run()
        Connection.close(connection)


def pipe() -> tuple[Connection, Connection]:
    ours, theirs = multiprocessing.Pipe()
    theirs.close = lambda: None
    return ours, theirs


@pytest.fixture(autouse=True)
def in_threads(monkeypatch) -> Iterator[None]:
    """Compiled code is eager, and what is of a process is as it was after it."""
    threads = types.SimpleNamespace(Process=Thread, Pipe=pipe)
    monkeypatch.setattr(generation_module, "PROCESSES", threads)
    of, lock = Parts.of, threading.Lock()

    def one_at_a_time(*arguments) -> Parts:
        # they share a random generator
        with lock:
            return of(*arguments)

    monkeypatch.setattr(Parts, "of", one_at_a_time)
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **_: compiled(module, backend="eager")
    )
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def timed(monkeypatch) -> list[str]:
    """The names that are timed, each called once."""
    names: list[str] = []

    def measure(calls, seconds, warm_ups, own):
        before = own()
        for call in calls.values():
            call()
        assert own() > before
        names.extend(calls)
        timings = dict.fromkeys(calls, Timing(1.0, 1.0, 1.0, 1))
        return Measurement(1, timings, dict.fromkeys(calls, Timing(0.5, 0.5, 0.5, 1)))

    monkeypatch.setattr(generation_module, "measure", measure)
    return names


def test_all_draw_the_same_and_are_timed(timed) -> None:
    row = time_case(CASE, CPU, torch.float32, 60.0)
    assert row["incorrect"] == {}
    assert timed == ON_A_CPU == list(row["first_seconds"])
    assert timed[0] == STOCK and len(timed) == 5
    assert all(0 < error < 1e-5 for error in row["errors"].values())
    assert row["peak_bytes"] == row["decoding_peak_bytes"] == {}


def test_what_draws_something_else_is_not_timed(timed, monkeypatch) -> None:
    def spoilt(parts: Parts):
        parts.ours.final_layer.linear.bias = torch.nn.Parameter(torch.full((32,), 0.01))
        return parts.our_draw()

    def late(parts: Parts):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmuch advice")

    def tired(parts: Parts):
        drawn = iter([parts.our_draw()()])
        return lambda: next(drawn)

    names = [STOCK, "ours", "tired", "spoilt", "late"]
    ways = {STOCK: VARIANTS[STOCK], "ours": VARIANTS["ours"]}
    ways |= {"tired": tired, "spoilt": spoilt, "late": late}
    monkeypatch.setattr(generation_module, "VARIANTS", ways)
    row = time_case(CASE, CPU, torch.float32, 60.0)
    assert timed == names[:2]
    assert row["incorrect"]["spoilt"].startswith("is off by ")
    assert row["incorrect"]["late"] == "OutOfMemoryError: CUDA out of memory."
    assert row["incorrect"]["tired"].startswith("StopIteration")
    assert list(row["first_seconds"]) == names[:4]
    # nothing to compare with
    ways[STOCK] = late
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        time_case(CASE, CPU, torch.float32, 60.0)


def test_one_that_does_not_start_is_left_out(timed, monkeypatch) -> None:
    monkeypatch.setattr(generation_module, "VARIANTS", {STOCK: VARIANTS[STOCK], "ours": None})
    served = generation_module.serve

    def serve(connection, case, name, *arguments) -> None:
        if name == "ours":
            connection.send({"cpu_seconds": 0.0, "error": "OutOfMemoryError"})
        else:
            served(connection, case, name, *arguments)

    monkeypatch.setattr(generation_module, "serve", serve)
    row = time_case(CASE, CPU, torch.float32, 60.0)
    assert timed == [STOCK] and row["incorrect"] == {"ours": "OutOfMemoryError"}


@torch.no_grad()
def test_each_decodes_by_its_own_pipeline() -> None:
    parts = Parts.of(CASE, CPU, torch.float32)
    latents = parts.noise[:, :, :5]
    ours, stock = parts.decode("ours, graph", latents), parts.decode(STOCK, latents)
    assert [picture.size for picture in stock] == [(64, 40)] * 3
    for one, other in zip(ours, stock, strict=True):
        assert abs(numpy.asarray(one, int) - numpy.asarray(other, int)).max() <= 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation_module.VAE, "decode", lambda *_, **__: [])
        assert parts.decode("ours", latents) == [] != parts.decode(f"{STOCK}, compiled", latents)


def test_a_process_that_is_late_or_dies_is_noticed() -> None:
    worker = Worker(EXACT, CASE, CPU, torch.float32, 1)
    with worker.running():
        worker.answer(60.0)
        with pytest.raises(NoPicture, match="no answer within 0 s"):
            worker.draw(0.0)
        assert worker.answer(60.0)["latents"].shape == (3, 4, 8, 8)
        worker.process.join()
        with pytest.raises(NoPicture, match="its process ended"):
            worker.draw(5.0)


@pytest.fixture
def as_if_on_a_gpu(monkeypatch) -> None:
    """A replay runs the forward again."""

    def capture(forward, pool):
        output = forward()
        return lambda: output.copy_(forward()), output

    def with_graphs(model, vae, text_encoder, cuda_graphs):
        pipeline = PixArtPipeline(model, vae, text_encoder)
        pipeline.cuda_graphs = cache.CudaGraphs(model) if cuda_graphs else None
        return pipeline

    monkeypatch.setattr(cache, "capture", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(generation_module, "PixArtPipeline", with_graphs)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ON_A_CPU])
@torch.no_grad()
def test_ways_of_a_gpu_draw_the_same(name: str, as_if_on_a_gpu) -> None:
    parts = Parts.of(CASE, CPU, torch.float32)
    expected = Parts.of(CASE, CPU, torch.float32).exact_draw()()
    latents = VARIANTS[name](parts)()
    assert (latents - expected).norm() < 1e-5 * expected.norm()


def test_cases_of_a_gpu_are_of_xl_2_at_every_size() -> None:
    found = {(case.about()["pixels"], case.batch): case for case in cases("cuda")}
    assert {(pixels, 1) for pixels in (512, 1024, 2048, 4096)} <= set(found)
    assert {(pixels, 8) for pixels in (512, 1024, 2048)} <= set(found)
    assert found[1024, 1].steps == found[512, 1].steps == 20
    assert all(case.config.depth == 28 for case in found.values())
    assert found[4096, 1].config.pe_interpolation == 8
    assert variants("cuda") == list(VARIANTS)


def test_command_resumes_and_the_report_shows_it(results, monkeypatch, timed) -> None:
    monkeypatch.setattr(generation_module, "cases", lambda kind: [CASE])
    monkeypatch.setattr(
        generation_module, "VARIANTS", {name: VARIANTS[name] for name in (STOCK, "ours")}
    )
    for options in ([], ["--resume"]):
        with pytest.raises(SystemExit) as ended:
            generation_module.main(["--output", str(results), *options])
        assert not ended.value.code
    assert timed == [STOCK, "ours"]  # nothing twice
    file = results / "generation.jsonl"
    (row,) = read(file)
    row |= {"first_seconds": {STOCK: 2.0, "ours": 3.0}, "peak_bytes": {"ours": 3 * 2**29}}
    row |= {"decoding_peak_bytes": {"ours": 2**30}}
    write(file, [row])
    text = generation_table(file)
    cells = "3e+03 it/s, 2 s | **0.50× (0.50–0.50), 3e+03 it/s, 3 s, 1.50 and 1.00 GiB** |"
    assert f"| small, 64px, 3, 3 steps | {cells}" in text.splitlines()
    assert "memory at the peaks of drawing and of decoding, weights included" in text

"""Each tile is what runs while it is measured, and is right before that."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

import pixart_kernels as pk
from benchmarks import attention, cuda, tiles
from benchmarks.environment import ROOT, read
from benchmarks.tiles import KERNELS, SHIPPED, compare, table
from pixart_kernels import _triton, dispatch
from pixart_kernels.attention import config
from pixart_kernels.testing import recorded_launches

CPU = torch.device("cpu")


@pytest.fixture
def small(fake_gpu, monkeypatch) -> None:
    monkeypatch.setattr(tiles, "TOKENS", 12)
    monkeypatch.setattr(tiles, "LENGTHS", (4, 6))
    monkeypatch.setattr(attention, "REPLAY_FLOPS", 1)
    monkeypatch.setattr(cuda, "MAX_REPLAYS", cuda.MIN_REPLAYS)


@contextmanager
def as_reference(change):
    """The reference, as a tile with a fault of its own would be."""
    ops = dispatch._implementations["self_attention"]
    real = ops["reference"]
    ops["reference"] = replace(real, function=lambda *args: change(real.function(*args)))
    try:
        yield
    finally:
        ops["reference"] = real


def too_large(out):
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.skipif(not _triton.INTERPRETED, reason="launches are recorded where there is no GPU")
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
def test_a_tile_of_triton_s_is_the_one_launched(kernel: str) -> None:
    from pixart_kernels.attention import triton

    shipped = config.tiles(72, 2, 9)
    names = {"forward": "_fwd_kernel", "dq": "_dq_kernel", "dkdv": "_dkdv_kernel"}
    qkv = torch.randn(1, 40, 3 * 72).bfloat16().requires_grad_()
    chosen = KERNELS["triton", kernel][1]["64x32, 4 warps, 3 stages"]
    recorded = recorded_launches(*(getattr(triton, name) for name in names.values()))
    with chosen(), recorded as launches:
        pk.self_attention(qkv, 1, backend="triton").sum().backward()
    assert len(launches) == 3
    for launch, (name, attribute) in zip(launches, names.items(), strict=True):
        assert launch.kernel is getattr(triton, attribute)
        tile = config.Tile(*launch.arguments[-2:], **launch.options)
        asked = config.Tile(64, 32, 4, 3)
        assert tile == (asked if name == kernel else getattr(shipped, name))
    assert config.tiles(72, 2, 9) is shipped


def test_the_shipped_tiles_are_among_them() -> None:
    shipped = config.tiles(72, 2, 9)
    for kernel in ("forward", "dq", "dkdv"):
        tile = getattr(shipped, kernel)
        name = f"{tile.rows}x{tile.columns}, {tile.num_warps} warps, {tile.num_stages} stages"
        assert name in KERNELS["triton", kernel][1]


@pytest.mark.parametrize("source, kernel", [("fwd", "forward"), ("bwd", "backward")])
def test_tiles_of_cuda_s_are_those_of_the_source(source: str, kernel: str) -> None:
    text = (ROOT / "csrc" / "attention" / f"{source}_sm90.cu").read_text()
    # asked_or_chosen("VARIABLE", {{groups, rows}, ...}, ...)
    ((variable, cuts),) = re.findall(r'asked_or_chosen\("(\w+)",\s*\{(.*?\})\}', text, re.DOTALL)
    names = [f"{groups}x{rows}" for groups, rows in re.findall(r"\{(\d+), (\d+)\}", cuts)]
    assert list(KERNELS["cuda", kernel][1]) == names
    assert {choice.args[0] for choice in KERNELS["cuda", kernel][1].values()} == {variable}


@pytest.mark.parametrize("before", [None, "1x128"])
def test_a_tile_of_cuda_s_is_in_the_environment_while_it_runs(monkeypatch, before) -> None:
    variable = "PIXART_ATTENTION_TILE"
    monkeypatch.delenv(variable, raising=False)
    if before is not None:
        monkeypatch.setenv(variable, before)
    with pytest.raises(KeyError), KERNELS["cuda", "forward"][1]["2x176"]():
        assert os.environ[variable] == "2x176"
        raise KeyError
    assert os.environ.get(variable) == before


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_a_tile_is_checked_then_timed_beside_what_ships(small, monkeypatch, which: str) -> None:
    choices = {
        "good": nullcontext,
        "wrong": lambda: as_reference(lambda out: 1.5 * out),
        "wrong backward": lambda: as_reference(lambda out: 2 * out - out.detach()),
        "too large": lambda: as_reference(too_large),
    }
    monkeypatch.setitem(KERNELS, ("reference", "k"), (which, choices))
    row = compare("reference", "k", 4, CPU, 60.0)
    assert row["shape"] == [3, 4, 4, 16, 72] and row["pass"] == which
    wrong = ["wrong", "wrong backward"]
    fine = wrong[1:] if which == "forward" else []
    assert list(row["timings"]) == [SHIPPED, "good", *fine] and row["speedups"]["good"] == 1
    assert list(row["incorrect"]) == wrong[: 2 - len(fine)]
    assert row["cannot"] == {"too large": "RuntimeError: out of resource: shared memory"}
    row = compare("reference", "k", 4, CPU, 0.0)
    assert row["not_measured"] == list(choices) and not row["timings"]


def row_of(N: int, times: dict[str, float], **more) -> dict:
    timings = {name: {"median": time} for name, time in times.items()}
    speedups = {name: times[SHIPPED] / time for name, time in times.items()}
    empty = {"cannot": {}, "incorrect": {}, "not_measured": []}
    about = {"backend": "cuda", "kernel": "forward", "pass": "forward", "flops": 6e9}
    shape = {"shape": [1, N, N, 16, 72], "timings": timings, "speedups": speedups}
    return {**empty, **about, **shape, **more}


def test_table_has_the_fastest_first() -> None:
    rows = [
        row_of(1024, {SHIPPED: 2.0, "a": 1.0}, cannot={"b": "no"}, not_measured=["c"]),
        row_of(256, {SHIPPED: 2.0, "a": 3.0, "b": 4.0}),
    ]
    lines = [line.split() for line in table(rows).splitlines()]
    assert lines[0] == ["cuda", "forward,", "TFLOP/s", "of", "the", "forward"]
    assert lines[1:5] == [
        *(["256", "1024"], ["a", "2", "6"], ["as", "shipped", "3", "3"], ["b", "2", "-"])
    ]
    assert lines[5:] == [["cannot:", "b:", "no"], ["not", "reached:", "1", "tiles"]]


def test_lines_of_other_kernels_stay(small, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tiles, "environment", lambda device: {"commit": commits.pop(0)})

    def compared(backend, kernel, N, device, seconds) -> dict:
        return row_of(N, {SHIPPED: 2.0}, backend=backend, kernel=kernel, incorrect=wrong)

    monkeypatch.setattr(tiles, "compare", compared)
    commits = ["abc", "def"]
    for kernels, wrong in (
        (["cuda-forward", "triton-dq"], {}),
        (["triton-dq"], {"a": "out: error"}),
    ):
        with pytest.raises(SystemExit) as ended:
            tiles.main(["--kernels", *kernels, "--output", str(tmp_path)])
        assert ended.value.code == bool(wrong)
    rows = read(tmp_path / "tiles.jsonl")
    found = [(row["kernel"], row["shape"][1], row["commit"]) for row in rows]
    assert found == [
        ("forward", 4, "abc"),
        ("forward", 6, "abc"),
        ("dq", 4, "def"),
        ("dq", 6, "def"),
    ]
    assert "triton dq, TFLOP/s" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        tiles.main([])

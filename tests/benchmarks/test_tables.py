"""Tables hold the ratios and rates of their rows, and say what they lack."""

from __future__ import annotations

from pathlib import Path

import pytest
from result_rows import ABOUT, attention_rows, gpu_rows, row

from benchmarks.environment import RESULTS, read, write
from benchmarks.model_tables import block
from benchmarks.op_tables import MMAPPED, attention_cpu_table, cpu_table
from benchmarks.registry import TINY
from benchmarks.report import gpu


def written(file: Path, rows: list[dict]) -> Path:
    write(file, rows)
    return file


def test_table_gives_the_range_over_shapes(results) -> None:
    timings = {"torch.compile": 3.0, "native": 2.0, "native, compiled": 2.5}
    rows = [row((1, size, 8), {"eager": size, **timings}) for size in (4, 6)]
    text = cpu_table(written(results / "x.jsonl", rows))
    assert "| `an_op` | 2.0–3.0 / 1.5 (1.2) |" in text
    assert "Bold" not in text
    assert "Cases" not in text


def test_table_shows_rivals_that_win_and_what_is_missing(results) -> None:
    rows = [
        row((1, 4, 8), {"eager": 1.94, "torch.compile": 5.0, "native": 2.0}),
        row((1, 6, 8), {"eager": 2.5, "native": 2.0}, quiet=False, incorrect={"x": "no"}),
        row(TINY, {"eager": 0.021, "native": 0.009}),
        {**ABOUT, "op": "an_op", "shape": [9, 9, 9], "not_measured": "1 s were over"},
        {**ABOUT, "op": "an_op", "shape": [9, 8], "dtype": "float32", "failed": "KeyError: 'x'"},
    ]
    text = cpu_table(written(results / "x.jsonl", rows))
    assert "| `an_op` | **0.97–1.25** / 2.5 |" in text
    assert "Bold: at some shape the rival was faster." in text
    assert "1 of 2 rows were measured beside other work" in text
    assert "`an_op` forward 9 (21)" in text
    assert "Cases not measured: 1." in text
    assert "not timed there: x." in text
    assert "Ended in an error: an_op 9×8 float32 (KeyError: 'x')." in text


def test_16_bit_columns_compare_with_the_official_formula(results) -> None:
    times = {"eager": 8.0, "torch.compile": 3.0, "native": 2.0}
    rows = [row((1, 4, 8), times), row((1, 4, 8), times, dtype="bfloat16")]
    text = cpu_table(written(results / "x.jsonl", rows))
    assert "| `an_op` | 4.0 / 1.5 | 4.0 / 1.5 |" in text
    assert "16-bit" not in text
    rows[1]["timings"]["eager, 16-bit"] = {"median": 5.0}
    text = cpu_table(written(results / "x.jsonl", rows))
    assert "| `an_op` | 4.0 / 1.5 | 2.5 / 1.5 |" in text
    assert "16-bit columns: against the official formula in that type." in text


@pytest.mark.parametrize(
    "dtype, numel, malloc, said",
    [
        ("float32", MMAPPED // 4, "default", True),
        ("float32", MMAPPED // 4 - 1, "default", False),
        ("bfloat16", MMAPPED // 2, "default", True),
        ("bfloat16", MMAPPED // 4, "default", False),
        ("float32", MMAPPED // 4, "4294967296", False),
    ],
)
def test_what_malloc_does_to_large_tensors_is_said(
    results, dtype: str, numel: int, malloc: str, said: bool
) -> None:
    times = {"eager": 3.0, "native": 2.0}
    rows = [row((1, size, 1), times, dtype=dtype, malloc=malloc) for size in (4, numel)]
    text = cpu_table(written(results / "x.jsonl", rows))
    assert ("mapped anew by glibc's malloc" in text) == said


def test_gpu_table_takes_the_faster_of_ours(results) -> None:
    assert "no GPU figures" in gpu(results)
    write(results / "sm_90-x" / "adaln.jsonl", gpu_rows())
    text = gpu(results)
    # 6 MB in 2 ms; 1.8 and 2.0 of 2 ms; the small shape counts for ratios alone
    assert "| `an_op` forward | 3 | 90–100 | 4.5–9.0 | **0.95–1.90** |" in text
    write(results / "sm_90-x" / "mlp.jsonl", [{**r, "op": "an_mlp"} for r in gpu_rows()])
    assert gpu(results).startswith(text)
    assert "| `an_mlp` forward |" in gpu(results)


def test_attention_on_gpus_shows_everyone_and_the_best(results) -> None:
    rows = attention_rows()
    rows[0]["cannot"] = {"xformers": "xformers is not installed", "triton": "of no account"}
    rows[1]["incorrect"] = {"SDPA cuDNN": "out: error"}
    rows[3]["peak_bytes"] = {"SDPA": 5 << 20, "triton": 3 << 20}
    file = written(results / "sm_90-x" / "attention-rivals.jsonl", rows)
    text = gpu(results)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0].split(" | ")[1:] == ["SDPA", "triton", "SDPA cuDNN", *lines[0].split(" | ")[4:]]
    assert lines[2:] == [
        "| forward, 1024 tokens | 3 | **4** | – | 33 |",
        "| forward, 4096 tokens | 3 | 2 | **6** | 50 |",
        "| forward, 1024 queries, 256 keys | **3** | – | – | 25 |",
        "| forward+backward, 1024 tokens | 1 | **2** | – | 12 |",
        "| MiB at the peak of it, 1024 tokens | 5 | **3** | – |  |",
    ]
    assert "cuDNN 9" in text
    assert "Nowhere: xformers (xformers is not installed)." in text
    assert "not timed there: SDPA cuDNN." in text
    # a run with our kernels, once it has measured anything, takes the place of one without
    ours = file.with_name("attention.jsonl")
    write(ours, [{**ABOUT, "op": "attention", "shape": [1], "not_measured": "was stopped"}])
    assert gpu(results) == text
    write(ours, attention_rows(commit="def"))
    assert "commit def" in gpu(results) and "commit abc" not in gpu(results)
    write(results / "sm_90-x" / "adaln.jsonl", gpu_rows())
    assert gpu(results).startswith("| L2-cold |") and "commit def" in gpu(results)


def test_a_gpu_has_the_tables_of_models_too(results) -> None:
    for name in ("model", "generation", "cross_attention"):
        write(results / "sm_90-x" / f"{name}.jsonl", read(RESULTS / "cpu" / f"{name}.jsonl"))
    heads = ("| whole model |", "| pictures |", "| times as fast as eager / masked SDPA |")
    assert all(head in gpu(results) for head in heads)


def test_attention_on_a_cpu_is_compared_with_a_direct_call(results) -> None:

    def one(N: int, Nk: int, dtype: str, low: float, median: float, high: float) -> dict:
        op = "self_attention" if N == Nk else "attention"
        spread = {"p20": low, "median": median, "p80": high}
        more = {"op": op, "dtype": dtype, "speedups": {"SDPA": {}, "auto": spread}}
        return row((2, N, Nk, 16, 72), {"SDPA": 1.0, "auto": 1.0}, **more)

    rows = [
        one(1024, 1024, "float32", 0.95, 0.9986, 1.01),
        one(64, 64, "float32", 0.91, 0.95, 0.99),
        one(64, 64, "bfloat16", 0.97, 1.0, 1.03),
        one(64, 16, "bfloat16", 0.97, 1.0, 1.03),
        {**ABOUT, "op": "attention", "shape": [9], "not_measured": "1 s were over"},
    ]
    text = attention_cpu_table(written(results / "attention.jsonl", rows))
    assert [line for line in text.splitlines() if line.startswith("| `")] == [
        "| `self_attention`, 1024 tokens | 0.999 (0.95–1.01) | – |",
        "| `self_attention`, 64 tokens | **0.950 (0.91–0.99)** | 1.000 (0.97–1.03) |",
        "| `attention`, 64 queries, 16 keys | – | 1.000 (0.97–1.03) |",
    ]
    assert "Cases not measured: 1." in text


def test_block_table_shows_time_and_memory(results) -> None:
    memory = {"saved": 3 * 2**20, "peak": 5 * 2**20}
    found = row((2, 256, 1152), {"eager": 4.0, "native": 2.0, "native, compiled": 8.0})
    found |= {"part": "block", "text": 120, "memory": dict.fromkeys(found["timings"], memory)}
    spread = {"p20": 0.4, "p80": 2.5}
    found["speedups"] = {
        name: {"median": 4.0 / timing["median"], **spread}
        for name, timing in found["timings"].items()
    }
    failed = {**ABOUT, "part": "adaLN part", "shape": [2, 256, 1152], "dtype": "bfloat16"}
    failed["failed"] = "RuntimeError: no"
    text = block(written(results / "block.jsonl", [failed, found]))
    assert "Ended in an error: adaLN part 2×256×1152 bfloat16 (RuntimeError: no)." in text
    native = "2.000× (0.40–2.50), 2 ms; 3, 5 MiB"
    assert f"| block, 256 tokens | 4 ms; 3, 5 MiB | {native} | **0.500× (0.40–2.50), 8 ms" in text

"""The README's figures are those of the result files."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import plot
from benchmarks.registry import TINY
from benchmarks.report import (
    MMAPPED,
    PAGES,
    ROOT,
    attention_cpu_table,
    block,
    cpu_table,
    gpu,
    updated,
)
from pixart_kernels.dispatch import VERIFIED

ABOUT = {"device": "a device", "torch": "2", "triton": "3", "commit": "abc"}


@pytest.fixture(autouse=True)
def images(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plot, "IMAGES", tmp_path / "images")


def row(shape, timings: dict[str, float], **more) -> dict:
    return {
        **ABOUT,
        **{"op": "an_op", "dtype": "float32", "pass": "forward", "shape": list(shape)},
        **{"quiet": True, "threads": 2, "bytes": 6_000_000, "incorrect": {}},
        "timings": {name: {"median": time} for name, time in timings.items()},
        **more,
    }


def write(file, rows: list[dict]):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_up_to_date(name: str) -> None:
    page = (ROOT / name).read_text()
    again = updated(page, in_docs=name.startswith("docs/"))
    assert again == page, "run: python -m benchmarks report"


@pytest.mark.parametrize("name", PAGES)
def test_what_pages_link_to_is_there(name: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text()):
        assert "://" in link or ((ROOT / name).parent / link).exists(), link


def test_every_verification_has_its_results() -> None:
    for (op, backend, architecture), proof in VERIFIED.items():
        rows = (ROOT / "benchmarks" / "results" / proof.results).read_text().splitlines()
        mine = [row for row in map(json.loads, rows) if row["op"] == op and "timings" in row]
        assert mine, op
        assert all(backend in row["timings"] and not row["incorrect"] for row in mine)
        assert {row["commit"] for row in mine} == {proof.commit}
        assert architecture == "cpu" or proof.results.startswith(architecture)


def test_table_gives_the_range_over_shapes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.report.ROOT", tmp_path)
    timings = {"torch.compile": 3.0, "native": 2.0, "native, compiled": 2.5}
    rows = [row((1, size, 8), {"eager": size, **timings}) for size in (4, 6)]
    text = cpu_table(write(tmp_path / "x.jsonl", rows))
    assert "| `an_op` | 2.0–3.0 / 1.5 (1.2) |" in text
    assert "Bold" not in text
    assert "Cases" not in text


def test_table_shows_rivals_that_win_and_what_is_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.report.ROOT", tmp_path)
    rows = [
        row((1, 4, 8), {"eager": 1.94, "torch.compile": 5.0, "native": 2.0}),
        row((1, 6, 8), {"eager": 2.5, "native": 2.0}, quiet=False, incorrect={"x": "no"}),
        row(TINY, {"eager": 0.021, "native": 0.009}),
        {**ABOUT, "op": "an_op", "shape": [9, 9, 9], "not_measured": "1 s were over"},
        {**ABOUT, "op": "an_op", "shape": [9, 8], "dtype": "float32", "failed": "KeyError: 'x'"},
    ]
    text = cpu_table(write(tmp_path / "x.jsonl", rows))
    assert "| `an_op` | **0.97–1.25** / 2.5 |" in text
    assert "Bold: at some shape the rival was faster." in text
    assert "1 of 2 rows were measured beside other work" in text
    assert "`an_op` forward 9 (21)" in text
    assert "Cases not measured: 1." in text
    assert "not timed there: x." in text
    assert "Ended in an error: an_op 9×8 float32 (KeyError: 'x')." in text


def test_16_bit_columns_compare_with_the_official_formula(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.report.ROOT", tmp_path)
    times = {"eager": 8.0, "torch.compile": 3.0, "native": 2.0}
    rows = [row((1, 4, 8), times), row((1, 4, 8), times, dtype="bfloat16")]
    text = cpu_table(write(tmp_path / "x.jsonl", rows))
    assert "| `an_op` | 4.0 / 1.5 | 4.0 / 1.5 |" in text
    assert "16-bit" not in text
    rows[1]["timings"]["eager, 16-bit"] = {"median": 5.0}
    text = cpu_table(write(tmp_path / "x.jsonl", rows))
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
    tmp_path, monkeypatch, dtype: str, numel: int, malloc: str, said: bool
) -> None:
    monkeypatch.setattr("benchmarks.report.ROOT", tmp_path)
    times = {"eager": 3.0, "native": 2.0}
    rows = [row((1, size, 1), times, dtype=dtype, malloc=malloc) for size in (4, numel)]
    text = cpu_table(write(tmp_path / "x.jsonl", rows))
    assert ("mapped anew by glibc's malloc" in text) == said


def gpu_rows() -> list[dict]:
    times = {"eager": 9.0, "copy": 1.8, "triton": 2.0, "cuda": 3.0, "torch.compile": 1.9}
    return [
        row((8, 4096, 1152), times, dtype="bfloat16"),
        row((1, 1024, 1152), {**times, "cuda": 1.0, "copy": 0.5}, dtype="bfloat16"),
        row((8, 4096, 384), {**times, "copy": 2.0}, dtype="bfloat16"),
    ]


def test_gpu_table_takes_the_faster_of_ours(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.report.ROOT", tmp_path)
    assert "no GPU figures" in gpu(tmp_path)
    write(tmp_path / "sm_90-x" / "adaln.jsonl", gpu_rows())
    text = gpu(tmp_path)
    # 6 MB in 2 ms; 1.8 and 2.0 of 2 ms; the small shape counts for ratios alone
    assert "| `an_op` forward | 3 | 90–100 | 4.5–9.0 | **0.95–1.90** |" in text
    write(tmp_path / "sm_90-x" / "mlp.jsonl", [{**r, "op": "an_mlp"} for r in gpu_rows()])
    assert gpu(tmp_path).startswith(text)
    assert "| `an_mlp` forward |" in gpu(tmp_path)


def attention_rows(**more) -> list[dict]:
    """Forward and backward at two lengths, and forward with fewer keys, heads of 72; one of 64."""
    about = {**ABOUT, "cudnn": 9, "dtype": "bfloat16", "cannot": {}, "incorrect": {}}

    def one(op: str, N: int, Nk: int, d: int, which: str, **times: float) -> dict:
        timings = {name.replace("_", " "): {"median": time} for name, time in times.items()}
        row = {"op": op, "shape": [4, N, Nk, 16, d], "pass": which, "timings": timings}
        rates = {"flops": 6e9, "roof_flops": 12e9, "peak_bytes": dict.fromkeys(timings, N << 20)}
        return {**about, **row, **rates, **more}

    times = {"SDPA": 2.0, "SDPA_cuDNN": 1.0, "triton": 3.0, "matmul": 1.0}
    forward, both = "forward", "forward+backward"
    return [
        one("self_attention", 4096, 4096, 72, forward, **times),
        one("self_attention", 1024, 1024, 72, forward, SDPA=2.0, triton=1.5, matmul=1.0),
        one("attention", 1024, 256, 72, forward, SDPA=2.0, matmul=1.0),
        one("self_attention", 1024, 1024, 72, both, SDPA=6.0, triton=4.0, matmul=1.0),
        one("self_attention", 1024, 1024, 64, forward, SDPA=2.0, matmul=1.0),
    ]


def test_attention_on_gpus_shows_everyone_and_the_best(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.report.ROOT", tmp_path)
    rows = attention_rows()
    rows[0]["cannot"] = {"xformers": "xformers is not installed", "triton": "of no account"}
    rows[1]["incorrect"] = {"SDPA cuDNN": "out: error"}
    rows[3]["peak_bytes"] = {"SDPA": 5 << 20, "triton": 3 << 20}
    file = write(tmp_path / "sm_90-x" / "attention-rivals.jsonl", rows)
    text = gpu(tmp_path)
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
    assert gpu(tmp_path) == text
    write(ours, attention_rows(commit="def"))
    assert "commit def" in gpu(tmp_path) and "commit abc" not in gpu(tmp_path)
    write(tmp_path / "sm_90-x" / "adaln.jsonl", gpu_rows())
    assert gpu(tmp_path).startswith("| L2-cold |") and "commit def" in gpu(tmp_path)


def test_attention_on_a_cpu_is_compared_with_a_direct_call(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.report.ROOT", tmp_path)

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
    assert attention_cpu_table(tmp_path / "attention.jsonl") == "No run is recorded yet."
    text = attention_cpu_table(write(tmp_path / "attention.jsonl", rows))
    assert [line for line in text.splitlines() if line.startswith("| `")] == [
        "| `self_attention`, 1024 tokens | 0.999 (0.95–1.01) | – |",
        "| `self_attention`, 64 tokens | **0.950 (0.91–0.99)** | 1.000 (0.97–1.03) |",
        "| `attention`, 64 queries, 16 keys | – | 1.000 (0.97–1.03) |",
    ]
    assert "Cases not measured: 1." in text


def test_block_table_shows_time_and_memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.report.ROOT", tmp_path)
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
    text = block(write(tmp_path / "block.jsonl", [failed, found]))
    assert "Ended in an error: adaLN part 2×256×1152 bfloat16 (RuntimeError: no)." in text
    native = "2.000× (0.40–2.50), 2 ms; 3, 5 MiB"
    assert f"| block, 256 tokens | 4 ms; 3, 5 MiB | {native} | **0.500× (0.40–2.50), 8 ms" in text


def test_only_marked_places_of_the_readme_change() -> None:
    assert updated("nothing is marked here") == "nothing is marked here"
    readme = "a\n<!-- gpu: begin -->\nold\n<!-- gpu: end -->\nb"
    assert updated(readme).startswith("a\n<!-- gpu: begin -->\n")
    assert updated(readme).endswith("\n<!-- gpu: end -->\nb")
    assert "old" not in updated(readme)


def test_plots_are_drawn_for_each_device(tmp_path) -> None:
    times = {"eager": 3.0, "torch.compile": 2.0, "native": 1.0, "an unknown rival": 4.0}
    skipped = {**ABOUT, "op": "an_op", "shape": [9, 9, 9], "not_measured": "1 s were over"}
    write(tmp_path / "cpu" / "adaln.jsonl", [row((1, 4, 8), times), row(TINY, times), skipped])
    write(tmp_path / "cpu" / "quickstart.jsonl", [ABOUT])
    write(tmp_path / "sm_90-x" / "adaln.jsonl", gpu_rows())
    write(tmp_path / "sm_90-x" / "attention.jsonl", [*attention_rows(), skipped])
    plot.main(["--results", str(tmp_path)])
    drawn = {file.name: file.read_bytes() for file in plot.IMAGES.iterdir()}
    assert set(drawn) == {"adaln-cpu.png", "an_op-sm_90-x.png", "attention-sm_90-x.png"}
    assert all(content.startswith(b"\x89PNG") for content in drawn.values())


def test_plots_hold_the_ratios_and_rates() -> None:
    (panel,) = plot.speed_ups([row((1, 4, 8), {"eager": 3.0, "native": 2.0})]).axes
    (points,) = (line for line in panel.get_lines() if line.get_label() == "native")
    assert list(points.get_xdata()) == [1.5]
    assert [tick.get_text() for tick in panel.get_yticklabels()] == ["an_op  1×4×8"]
    timings = {"eager": 3.0, "eager, 16-bit": 5.0, "native": 2.0}
    (panel,) = plot.speed_ups([row((1, 4, 8), timings)]).axes
    (points,) = (line for line in panel.get_lines() if len(line.get_xdata()) == 1)
    assert list(points.get_xdata()) == [2.5]
    (panel,) = plot.bandwidths([row((32, 4), {"copy": 1.0})], "an_op").axes
    (line,) = panel.get_lines()
    assert list(line.get_xdata()) == [32]  # an MLP's rows are its tokens
    (panel,) = plot.bandwidths(gpu_rows(), "an_op").axes
    (line,) = (line for line in panel.get_lines() if line.get_label() == "cuda")
    assert list(line.get_xdata()) == [1024, 32768]  # the narrow shape is left out
    assert list(line.get_ydata()) == [6.0, 2.0]


def test_attention_s_plot_has_a_panel_for_each_head_and_pass() -> None:
    panels = plot.throughputs(attention_rows()).axes
    assert [panel.get_title() for panel in panels] == [
        f"head_dim {d}, {which}"
        for which in ("forward", "backward", "forward+backward")
        for d in (72, 64)
    ]
    lines = {line.get_label(): line for line in panels[0].get_lines()}
    assert list(lines["triton"].get_xdata()) == [1024, 4096]
    assert list(lines["triton"].get_ydata()) == [4.0, 2.0]
    assert list(lines["matmul"].get_ydata()) == [12.0, 12.0]
    assert list(lines["SDPA cuDNN"].get_xdata()) == [4096]

"""Plots are drawn for each device, and hold the ratios and rates of their rows."""

from __future__ import annotations

from result_rows import ABOUT, attention_rows, gpu_rows, row

from benchmarks import plot
from benchmarks.environment import write
from benchmarks.registry import TINY


def test_plots_are_drawn_for_each_device(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plot, "IMAGES", tmp_path / "images")
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

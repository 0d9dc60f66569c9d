"""The ablation's memory is what tensors take, and its table says how it was found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import pixart_kernels as pk
from benchmarks import conditioning, model_tables
from benchmarks.conditioning import CONDITIONINGS, Step, counted, memory
from benchmarks.environment import read, write
from benchmarks.memory import _allocations
from benchmarks.timing import Measurement, Timing
from pixart import PixArtConfig

CPU = torch.device("cpu")
SMALL = PixArtConfig(
    depth=2, input_size=8, hidden_size=48, num_heads=2, caption_channels=10, max_caption_tokens=7
)


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_what_is_counted_is_what_a_step_takes(name: str) -> None:
    config = replace(SMALL, conditioning=name)

    def run() -> Step:
        with pk.use_backend("reference"):
            step = Step(config, 3, CPU, autocast=True)
            step()
            step()
        return step

    run()  # what lives for ever
    assert counted(config, 3) == pytest.approx(max(_allocations(run)), rel=0.03)


def test_a_parameter_more_takes_its_state() -> None:
    found = memory(SMALL, 1, CPU)
    more, peak = (
        found[key]["adaln"] - found[key]["adaln_single"] for key in ("parameters", "peak_bytes")
    )
    # weight, gradient, two moments, average; and rounded, or less, where its block is under way
    assert 20 * more <= peak <= 23 * more


def test_command_and_its_table(results, monkeypatch) -> None:
    stepped: list[str] = []

    def measure(calls, seconds):
        for name, call in calls.items():
            call()
            stepped.append(name)
        return Measurement(1, {name: Timing(1.5, 1.0, 2.0, 1) for name in calls})

    monkeypatch.setattr(conditioning, "measure", measure)
    monkeypatch.setattr(conditioning, "XL_2", SMALL)
    monkeypatch.setattr(conditioning, "SMALL", replace(SMALL, depth=1))
    with pytest.raises(SystemExit) as ended:
        conditioning.main(["--output", str(results)])
    assert ended.value.code == 0
    file = results / "conditioning.jsonl"
    *counts, times = rows = read(file)
    assert [row["batch"] for row in counts] == list(conditioning.BATCHES)
    assert all(row["how"] == "counted" and row["commit"] for row in counts)
    assert stepped == list(CONDITIONINGS) == list(times["timings"]) and times["depth"] == 1
    rows[0]["peak_bytes"] = {"adaln": 29 * 10**9, "adaln_single": 23_040_000_000}
    rows[0]["parameters"] = {"adaln": 833 * 10**6, "adaln_single": 611 * 10**6}
    write(file, rows)
    text = model_tables.conditioning(file)
    assert "| XL/2, 256px, batch 64 | 29.0 GB | 23.0 GB |" in text
    assert "| depth 1, width 48, batch 2 | 1.5 ms | 1.5 ms |" in text
    assert "counted under bf16 autocast, with 833 and 611 million parameters" in text

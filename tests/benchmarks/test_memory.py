"""The account of what a block keeps: every byte of activations, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import memory, model_tables
from benchmarks.block import only
from benchmarks.environment import read, write
from benchmarks.memory import Kept, accounts
from pixart import PixArtConfig
from pixart_kernels import dispatch

CPU = torch.device("cpu")
SMALL = PixArtConfig(depth=3, input_size=16, hidden_size=72, num_heads=2, caption_channels=10)


def test_counts_activations_that_live_by_their_origin() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))
    with torch.autocast("cpu", torch.bfloat16), Kept(model) as found:
        output = model(torch.ones(7, 3))
        torch.zeros(1000)  # is gone
    rows = [(row["module"], row["dtype"], row["bytes"]) for row in found.rows()]
    # the input that autocast rounded, each layer's output; no weight, and no rounded weight
    assert ("0", "bfloat16", 7 * 3 * 2) in rows
    assert ("0", "bfloat16", 7 * 5 * 2) in rows and ("1", "bfloat16", 7 * 5 * 2) in rows
    assert ("2", "bfloat16", output.nbytes) in rows
    assert sum(nbytes for *_, nbytes in rows) == 2 * 7 * (3 + 5 + 5 + 2)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "GRID", 8)
    monkeypatch.setattr(memory, "TEXT_TOKENS", 5)
    monkeypatch.setattr(memory, "PixArtConfig", lambda depth: SMALL)


def test_tokens_are_kept_as_often_as_the_backward_needs_them(small) -> None:
    x = torch.zeros(1, 1, 1, 1)
    for op in ("gated_residual_adaln", "bias_gelu", "cross_attention"):
        if dispatch.why_not(op, "native", x) is not None:
            pytest.skip("the extension is not built")
    token = 8 * 8 * 72
    counts = {}
    with only("native"):
        for row in accounts(SMALL, CPU):
            size = token * (4 if row["precision"] == "float32" else 2)
            # of the size of tokens: not the text's, nor statistics
            large = sum(kept["bytes"] for kept in row["kept"] if kept["bytes"] >= size)
            counts[row["precision"], row["mode"]] = large / size
    # in the width of a token: qkv 3, the four branches' ends and queries 5, fc1 4, and the residual
    # stream, which autocast leaves in float32
    assert counts["float32", "default"] == 3 + 5 + 4 + 1
    assert counts["bf16 autocast", "default"] == 3 + 5 + 4 + 2
    assert counts["float32", "selective"] == 3 + 3 + 1
    assert counts["float32", "whole blocks"] == 1
    assert counts["float32", "diffusers"] == 23
    assert counts["bf16 autocast", "diffusers"] == 29
    assert counts["float32", "default"] < counts["float32", "everything kept"]


def test_command_writes_rows_that_the_report_shows(small, results) -> None:
    memory.main(["--output", str(results)])
    file = results / "memory.jsonl"
    rows = read(file)
    assert len(rows) == 10 and all(row["commit"] and row["kept"] for row in rows)
    for row in rows:
        row["bytes"] = {"diffusers": 64_000, "default": 32_000}.get(row["mode"], 640)
    write(file, rows)
    lines = model_tables.memory(file).splitlines()
    assert "| diffusers | 1,000, 100% | 1,000, 100% |" in lines
    assert "| default | 500, 50% | 500, 50% |" in lines
    assert "1 × 64 tokens of 72 channels, 5 tokens of text" in lines[-1]

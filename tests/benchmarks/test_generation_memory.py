"""The account of what drawing takes: every tensor that lives, and each mode's weights."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config

from benchmarks import generation_memory, model_tables
from benchmarks.environment import read, write
from benchmarks.generation_memory import Live, Parts, rows
from pixart import PixArtConfig
from pixart.conditioning import vae

CPU = torch.device("cpu")


def small(device: torch.device) -> Parts:
    text = T5Config(
        vocab_size=1000, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    config = PixArtConfig(input_size=8, hidden_size=24, depth=2, num_heads=2, caption_channels=16)
    autoencoder = {
        "block_out_channels": (8, 16, 16, 16),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    return Parts(text, config, autoencoder, device)


def test_counts_what_lives_at_once() -> None:
    weight = torch.nn.Parameter(torch.zeros(5000))
    with Live([weight]) as live, torch.no_grad():
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100)
        del b
        assert (live.now, live.peak) == (4000, 8000)
        weight.view(50, 100)  # is no tensor more
        torch.zeros(300)
        assert (live.now, live.peak) == (4000, 8000)
        d = c.new_empty(2000)
        assert (live.now, live.peak) == (12000, 12000)
        del c, d
    assert (live.now, live.peak) == (0, 12000)


def test_each_part_holds_the_weights_of_its_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_memory, "SIZES", (512,))
    high, low = rows(CPU, small)
    parts = small(CPU)
    t5, transformer, autoencoder = (
        sum(p.nbytes for p in part.parameters())
        for part in (parts.t5, parts.transformer, parts.vae.model)
    )
    # the same work, with other weights beside it
    assert high["denoise"] - low["denoise"] == t5 + autoencoder
    assert high["decode"] - low["decode"] == t5 + transformer
    largest = 1000 * 16 * 2
    assert high["text"] - low["text"] == t5 + transformer + autoencoder - largest
    assert high["peak"] == max(high[part] for part in ("text", "denoise", "decode"))


def test_decoding_takes_what_is_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae, "PIXELS_AT_ONCE", 512**2)
    monkeypatch.setattr(generation_memory, "SIZES", (1024,))
    high, low = rows(CPU, small)
    parts = small(CPU)
    weights = [sum(p.nbytes for p in part.parameters()) for part in
               (parts.t5, parts.transformer, parts.vae.model)]  # fmt: skip
    # what auto reckons with: the latents, and what else is small, come to it
    estimate = parts.vae.decoding_bytes(1024, 1024)
    assert estimate < high["decode"] - sum(weights) < 1.01 * estimate
    # half a tile's activations, and two of a quarter of the pixels, beside the picture in float32
    assert low["decode"] - weights[2] < 0.75 * estimate


def test_command_writes_rows_that_the_report_shows(results, monkeypatch) -> None:
    monkeypatch.setattr(generation_memory, "SIZES", (256,))
    monkeypatch.setattr(generation_memory, "rows", lambda device: rows(device, small))
    generation_memory.main(["--output", str(results)])
    file = results / "generation_memory.jsonl"
    written = read(file)
    assert [row["mode"] for row in written] == ["high", "low"]
    assert all(row["commit"] and row["how"] == "counted" for row in written)
    for row in written:
        row.update(text=12_340_000_000, denoise=2e9, decode=1.26e9, peak=12_340_000_000)
    write(file, written)
    lines = model_tables.generation_memory(file).splitlines()
    assert "| 256 × 256 | low | 12.3 GB | 2.0 GB | 1.3 GB | 12.3 GB |" in lines
    assert "counted, weights included: bfloat16" in lines[-1]

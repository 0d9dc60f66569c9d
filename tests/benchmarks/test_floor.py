"""The floor's formulas, against torch's counter and by hand; what is counted beside them."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import floor
from benchmarks.block import only
from benchmarks.environment import read, write
from benchmarks.floor import (
    MODELS,
    MovedBytes,
    _attention_flops,
    counted,
    counted_block,
    measured_rates,
)
from benchmarks.model_tables import floor_counts, floor_sites
from pixart import PixArt, PixArtConfig
from pixart.floor import Site, block_sites, model_flops, seconds, tokens_of
from pixart_kernels import dispatch

# every size differs from every other
SMALL = PixArtConfig(
    depth=2, input_size=16, hidden_size=48, num_heads=2, caption_channels=10, caption_dropout=0.0
)
GRID, TEXT, BATCH = 3, 5, 2


def native_or_skip() -> None:
    x = torch.zeros(1, 1, 8)
    for op in ("gated_residual_adaln", "bias_gelu", "cross_attention"):
        if dispatch.why_not(op, "native", x) is not None:
            pytest.skip("the extension is not built")


@pytest.mark.parametrize(
    "pixels, tflop", [(256, 0.33), (512, 1.28), (1024, 6.63), (2048, 52.4)], ids=str
)
def test_a_forward_of_xl_2_takes_what_is_known(pixels: int, tflop: float) -> None:
    config = PixArtConfig()
    found = model_flops(config, tokens_of(pixels, config), 300)
    assert found / 1e12 == pytest.approx(tflop, rel=0.01)


@pytest.mark.parametrize("which", MODELS)
def test_formulas_are_what_is_dispatched(which: str) -> None:
    if which == "ours":
        native_or_skip()
    sites = block_sites(SMALL, GRID**2, TEXT, BATCH)
    found = counted_block(which, SMALL, GRID, TEXT, BATCH)
    forward = sum(site.flops for site in sites)
    assert found["forward"]["flops"] == forward
    assert found["step"]["flops"] == forward + sum(site.backward_flops for site in sites)
    whole = counted(which, SMALL, GRID, TEXT, BATCH)["forward"]["flops"]
    assert whole == model_flops(SMALL, GRID**2, TEXT, BATCH)


@pytest.mark.parametrize(
    "changes",
    [
        {"conditioning": "class"},
        {"conditioning": "adaln"},
        {"kv_compression": {"sampling": "uniform", "scale_factor": 2, "layers": [1]}},
    ],
    ids=["class", "adaln", "compressed"],
)
def test_flops_of_other_models(changes: dict) -> None:
    config = replace(SMALL, **changes)
    latents, times = torch.randn(BATCH, 4, 8, 8), torch.full((BATCH,), 5)
    condition = torch.randn(BATCH, TEXT, 10)
    if config.conditioning == "class":
        condition = torch.zeros(BATCH, dtype=torch.long)
    counter = FlopCounterMode(display=False, custom_mapping=_attention_flops())
    with only("reference"), counter:
        PixArt(config)(latents, times, condition)
    assert counter.get_total_flops() == model_flops(config, 16, TEXT, BATCH)


def test_each_site_s_flops_are_its_layer_s() -> None:
    model = PixArt(SMALL)
    arguments = torch.randn(BATCH, 4, 6, 6), torch.full((BATCH,), 5), torch.randn(BATCH, TEXT, 10)
    counter = FlopCounterMode(display=False, custom_mapping=_attention_flops())
    with torch.no_grad(), only("reference"), counter:
        model(*arguments)
    layers = {
        name.removeprefix("PixArt.blocks.1."): sum(ops.values())
        for name, ops in counter.get_flop_counts().items()
    }
    parts = {
        "qkv": layers["attn.qkv"],
        "proj": layers["attn.proj"],
        "self-attention": layers["attn"] - layers["attn.qkv"] - layers["attn.proj"],
        "text: q": layers["cross_attn.q_linear"],
        "text: k, v": layers["cross_attn.kv_linear"],
        "text: proj": layers["cross_attn.proj"],
        "fc1": layers["mlp.fc1"],
        "fc2": layers["mlp.fc2"],
    }
    parts["cross-attention"] = layers["cross_attn"] - sum(
        parts[name] for name in ("text: q", "text: k, v", "text: proj")
    )
    sites = block_sites(SMALL, GRID**2, TEXT, BATCH)
    assert parts == {site.name: site.flops for site in sites if site.flops}


def test_nothing_is_copied_between_ours() -> None:
    native_or_skip()
    config = PixArtConfig()
    sites = block_sites(config, 1024, 120)
    forward, backward = (sum(getattr(s, key) for s in sites) for key in ("bytes", "backward_bytes"))
    found = counted_block("ours", config, 32, 120)
    # one copy of an image's tokens, in one op, would be 3 % more
    assert forward <= found["forward"]["bytes"] <= 1.01 * forward
    # bias gradients and one sum of gradients besides
    image = 2 * 1024 * 1152
    besides = (3 + 1 + 1 + 1 + 4 + 1) * image + 3 * image
    assert found["step"]["bytes"] == pytest.approx(forward + backward + besides, rel=0.01)


def test_bytes_of_the_residual_stream_by_hand() -> None:
    narrow, wide = (
        {s.name: s for s in block_sites(SMALL, 7, TEXT, BATCH, residual)} for residual in (2, 4)
    )
    image = BATCH * 7 * 48
    more = {
        name: ((wide[name].bytes - site.bytes) / image,
               (wide[name].backward_bytes - site.backward_bytes) / image)
        for name, site in narrow.items()
        if wide[name] != site
    }  # fmt: skip
    assert more == {
        # x and its sum are 2 bytes wider; backward: x, the gradient in and out, and again
        "add MLP, LN-modulate": (4, 6 + 4),
        # and the query is a tensor of its own
        "add attention": (4 + 2, 4 + 4 + 2),
        # backward: the gradient in and out, x twice, the branch's gradient
        "add text, LN-modulate": (4, 8 + 2),
    }
    assert narrow["qkv"].bytes == 2 * (14 * 48 + 48 * 144 + 14 * 144)
    assert narrow["self-attention"].bytes == 2 * 4 * image


def test_moved_bytes_by_hand() -> None:
    x, row = torch.zeros(6, 8), torch.zeros(8)
    with MovedBytes() as moved:
        y = torch.empty(6, 8)
        x.view(48)[None].transpose(0, 1).detach()
    assert moved.total == 0
    with MovedBytes() as moved:
        torch.add(x, row.expand(6, 8))
    assert moved.total == 4 * (48 + 8 + 48)
    with MovedBytes() as moved:
        y.mul_(x)
    assert moved.total == 4 * 3 * 48
    with MovedBytes() as moved:
        torch.zeros(3, dtype=torch.int64)
    assert moved.total == 8 * 3


def test_an_op_waits_for_the_slower_rate() -> None:
    assert seconds(3 * 10**12, 10**9, tflops=2.0, gbs=1.0) == 1.5
    assert seconds(10**12, 3 * 10**9, tflops=2.0, gbs=1.0) == 3.0


def test_rates_are_the_best_that_were_measured(tmp_path) -> None:
    with pytest.raises(ValueError, match="no result"):
        measured_rates(tmp_path)
    rows = [
        {"roof_flops": 4e12, "timings": {"matmul": {"median": 8.0}}},
        {"roof_flops": 4e12, "timings": {"matmul": {"median": 5.0}}},
        {"bytes": 6e9, "timings": {"copy": {"median": 3.0}, "triton": {"median": 1.0}}},
        {"not_measured": "was stopped"},
    ]
    write(tmp_path / "some.jsonl", rows)
    assert measured_rates(tmp_path) == (800.0, 2000.0)


def row(pixels: int, text: int) -> dict:
    sites = [Site("a product", 10**12, 10**9, 2 * 10**12, 2 * 10**9), Site("a sum", 0, 10**9, 0, 0)]
    found = {"forward": {"flops": 10**12, "bytes": 3 * 10**9}}
    found["step"] = {"flops": 3 * 10**12, "bytes": 10**10}
    return {
        **{"pixels": pixels, "tokens": 4, "text": text, "model_flops": 7 * 10**12},
        **{"torch": "2", "commit": "abc", "sites": [asdict(site) for site in sites]},
        "float32_residual": {"bytes": 3 * 10**9, "backward_bytes": 10**9},
        "counted": {"ours": found},
    }


def test_page_shows_sites_and_multiples(results) -> None:
    file = results / "floor.jsonl"
    found = [row(1024, 300), row(1024, 120)]
    write(file, found)
    lines = floor_sites(file).splitlines()
    assert "| a product | 1000.0 | 1000.0 | 1000 | 2000.0 | 2000.0 | 1000 |" in lines
    assert "| a sum | – | 1000.0 | – | – | 0.0 | – |" in lines
    assert "| all | 1000.0 | 2000.0 | 500 | 2000.0 | 2000.0 | 1000 |" in lines
    assert "300 tokens of text" in lines[-1] and "3000.0 MB forward" in lines[-1]
    text = floor_counts(file)
    assert "| 1024px, 120 | 7.00 | 1000.0, 2000 | 1.50× | 3000.0, 4000 | 2.50× |" in text
    assert "are the floor's in every case" in text
    found[0]["counted"]["ours"]["step"]["flops"] += 1
    write(file, found)
    assert "Counted other FLOPs: ours" in floor_counts(file)


def test_command_writes_rows_and_prints_times(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(floor, "PIXELS", (32,))
    monkeypatch.setattr(floor, "PixArtConfig", lambda: SMALL)
    output = ["--output", str(tmp_path)]
    floor.main([*output, "--tflops", "1", "--gbs", "1"])
    rows = read(tmp_path / "floor.jsonl")
    assert [row["text"] for row in rows] == [120, 300] and all(row["commit"] for row in rows)
    assert set(rows[0]["counted"]) == set(MODELS)
    assert "with its backward" in capsys.readouterr().out
    for wrong in (["--tflops", "1"], ["--gbs", "1", "--rates", str(tmp_path)]):
        with pytest.raises(SystemExit):
            floor.main([*output, *wrong])

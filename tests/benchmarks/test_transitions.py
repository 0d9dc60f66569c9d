"""The comparison of transitions: what is compared, and that errors of two scales compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import plot, report, transitions
from benchmarks.transitions import SCHEDULE, TEXT, Pictures
from pixart import PixArt


def pictures(side: int, scale: float = 1.0) -> Pictures:
    generator = torch.Generator().manual_seed(0)
    mean = scale * torch.randn(4, 8, side, side, generator=generator)
    caption, mask = torch.randn(4, 5, 384, generator=generator), torch.ones(4, 5)
    return Pictures(mean, 0.1 * mean.abs(), caption, mask, torch.arange(4) % 3, scale)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    other = "other autoencoder"
    data = {"small": pictures(8), "large": pictures(16), other: pictures(8)}
    return transitions.run({**data, f"{other}, wrongly scaled": pictures(8, 0.5)}, 2, 2, 0)


def test_each_transition_is_made_rightly_wrongly_and_not_at_all(rows: list[dict]) -> None:
    starts: dict[str, list[str]] = {}
    for row in rows:
        starts.setdefault(row["transition"], []).append(row["start"].partition(":")[0])
        assert row["steps"][0] == 0 and row["steps"][-1] == 2
        assert len(row["steps"]) == len(row["error"])
    usual = ["grown", "wrong", "from scratch"]
    assert list(starts.values()) == [usual, usual, [*usual, "not compressed"], usual]


def test_scratch_knows_nothing_of_the_noise(rows: list[dict]) -> None:
    for row in rows:
        if row["start"] == "from scratch":
            assert row["error"][0] == pytest.approx(1, abs=0.05)


def test_wrong_turns_change_what_they_say_alone() -> None:
    model = PixArt(transitions.COMPRESSED)
    wrong = transitions._random_convolution(model)
    changed = [
        k for k, v in model.state_dict().items() if not torch.equal(wrong.state_dict()[k], v)
    ]
    assert {key.partition(".attn.")[2] for key in changed} == {"sr.weight", "sr.bias"}
    wrong = transitions._fresh_modulation(model)
    changed = [
        k for k, v in model.state_dict().items() if not torch.equal(wrong.state_dict()[k], v)
    ]
    assert "t_block.1.weight" in changed and "blocks.0.scale_shift_table" in changed
    assert not [key for key in changed if "attn" in key or "mlp" in key]


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.7])
def test_errors_are_at_the_same_noise_whatever_the_scale(scale: float) -> None:
    seen = []

    class Spy(PixArt):
        def forward(self, latents, t, caption, mask):
            kept = SCHEDULE.alphas_cumprod[t[0]]
            seen.append(scale * float((kept / (1 - kept)).sqrt()))
            return torch.zeros_like(latents)

    error = transitions.error_of(Spy(TEXT), pictures(8, scale))
    assert error == pytest.approx(1, abs=0.05)
    kept = SCHEDULE.alphas_cumprod[list(transitions.TIMESTEPS)]
    assert seen == pytest.approx((kept / (1 - kept)).sqrt().tolist(), rel=0.02)


def test_drawn_and_tabled(rows: list[dict], tmp_path: Path) -> None:
    about = {"device": "CPU", "torch": "2", "commit": "abc", "seed": 0}
    file = report.ROOT / "benchmarks" / "results" / "cpu" / "transitions.jsonl"
    figure = plot.transitions([row | about for row in rows])
    assert [ax.get_title() for ax in figure.axes] == list(
        dict.fromkeys(r["transition"] for r in rows)
    )
    assert report.transitions(tmp_path / "none.jsonl") == ""
    if file.is_file():
        table = report.transitions(file)
        first = json.loads(file.read_text().splitlines()[0])
        assert f"| {first['start']} | | {first['error'][0]:.3f} |" in table

"""The comparison of transitions: what is compared, and that errors of two scales compare."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import model_tables, plot, transitions
from benchmarks.environment import read, write
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
    data[f"{other}, wrongly scaled"] = pictures(8, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transitions, "BATCH", 4)
        return transitions.run(data, 2, 2, 0)


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


def test_seeds_make_a_median_and_a_range(rows: list[dict], results: Path) -> None:
    about = {"device": "CPU", "torch": "2", "commit": "abc"}
    found = []
    for seed, factor in enumerate((1.0, 4.0, 2.0)):
        for row in rows:
            # the second transition's wrong way is ahead in one of the seeds
            ahead = seed == 1 and row["start"] == "wrong: positions continued"
            errors = {"grown": 0.2, "wrong": 0.1 if ahead else 0.3}
            error = factor * errors.get(row["start"].partition(":")[0], 0.25)
            curve = {"before": factor, "steps": [0, 1, 2], "error": [error] * 3}
            found.append(row | about | curve | {"seed": seed})
    file = results / "transitions.jsonl"
    write(file, found)
    lines = model_tables.transitions(file).splitlines()
    assert "| **32 to 64 pixels** | 2.000 (1.000–4.000) |  |  |  |" in lines
    cell = "0.400 (0.200–0.800)"
    assert f"| grown: positions interpolated |  | {cell} | {cell} | {cell} |" in lines
    assert "32 to 64 pixels 2, 2 and 2; keys and values compressed 3, 3 and 3;" in lines[-1]
    write(file, found[: len(rows)])
    assert "| from scratch |  | 0.250 | 0.250 | 0.250 |" in model_tables.transitions(file)
    panels = plot.transitions(found).axes
    assert [panel.get_title() for panel in panels] == list(model_tables.over_seeds(found))
    line = {line.get_label(): line for line in panels[1].get_lines()}["from scratch"]
    assert list(line.get_ydata()) == [0.5] * 3
    band = panels[1].collections[2].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.25, 1.0)


def test_command_runs_each_seed(tmp_path: Path, monkeypatch) -> None:
    asked = []

    def run(data, base_steps: int, steps: int, seed: int) -> list[dict]:
        asked.append(data)
        if seed == 7:
            raise KeyboardInterrupt
        return [{"transition": "a", "start": "grown", "error": [seed]}]

    monkeypatch.setattr(transitions, "prepare", lambda folder, vae_steps: object())
    monkeypatch.setattr(transitions, "run", run)
    with pytest.raises(KeyboardInterrupt):
        transitions.main(["--seeds", "3", "5", "7", "--output", str(tmp_path)])
    assert asked == asked[:1] * 3  # all on the same pictures
    written = read(tmp_path / "transitions.jsonl")
    assert [(row["seed"], row["error"]) for row in written] == [(3, [3]), (5, [5])]
    assert all(row["commit"] for row in written)

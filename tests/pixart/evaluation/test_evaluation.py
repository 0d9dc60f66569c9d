"""Prompt retrieval and its control."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from pixart.evaluation import plot_loss, prompt_retrieval

CAPTIONS = [f"thing {i // 2}" for i in range(20)]  # two pictures each


@pytest.fixture
def training() -> torch.Tensor:
    return torch.randn(20, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def test_perfect_pictures(training: torch.Tensor) -> None:
    result = prompt_retrieval(training + 0.01, CAPTIONS, training, CAPTIONS)
    assert result.retrieval == 1 and result.wrong == []
    assert result.chance == 0.1 and result.captions == 10 and result.pictures == 20
    assert result.control == pytest.approx(0.1, abs=0.02)


def test_pictures_that_ignore_their_prompts_are_found_out(training: torch.Tensor) -> None:
    noise = torch.randn(200, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    result = prompt_retrieval(noise, CAPTIONS * 10, training, CAPTIONS)
    assert result.retrieval < 0.25
    # good pictures of always the same thing
    same = training[:1].expand(20, -1, -1, -1)
    result = prompt_retrieval(same, CAPTIONS, training, CAPTIONS)
    assert result.retrieval == pytest.approx(0.1)
    assert result.wrong[0] == ("thing 1", "thing 0")


def test_loss_plot(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 50)]
    plot_loss(rows, tmp_path / "loss.png", "a run")
    assert Image.open(tmp_path / "loss.png").size == (840, 480)

"""The optimisers that are timed: the same weights and gradients, and CAMEs that agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import optimizer
from benchmarks.optimizer import OURS, THEIRS, error, main, optimizers, shapes

pytest.importorskip("came_pytorch")


def test_shapes_are_a_pixarts() -> None:
    assert sum(size.numel() for size in shapes(1152, 28)) == 610_856_096


def test_an_optimiser_that_went_elsewhere_is_off() -> None:
    found = optimizers([torch.Size((3, 4)), torch.Size((5,))], torch.device("cpu"))
    start = found[THEIRS][0][0].detach().clone()
    assert all(torch.equal(parameters[0], start) for parameters, _ in found.values())
    assert error(found) < 1e-4
    found[OURS][1].param_groups[0]["lr"] *= 1.01
    assert error(found) > 1e-3


def test_command_writes_a_row_for_each_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "MODELS", ((72, 1),))
    monkeypatch.setattr("benchmarks.timing.ROUND_SECONDS", 0.01)
    monkeypatch.setattr("benchmarks.timing.PAUSE_SECONDS", 0.0)
    main(["--output", str(tmp_path), "--seconds", "0"])
    (row,) = map(json.loads, (tmp_path / "optimizer.jsonl").read_text().splitlines())
    assert set(row["timings"]) == {"CAME", "came-pytorch", "fused AdamW"}
    assert (row["width"], row["depth"]) == (72, 1) and row["error"] < 1e-3
    assert row["commit"] and row["speedups"]["came-pytorch"]["median"] == 1
    monkeypatch.setattr(optimizer, "error", lambda found: float("nan"))
    with pytest.raises(SystemExit, match="width 72: our CAME is nan of its way"):
        main(["--output", str(tmp_path), "--seconds", "0"])

"""The optimisers that are timed: the same weights and gradients, and CAMEs that agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import pixart_kernels as pk
from benchmarks import optimizer
from benchmarks.optimizer import ADAMW, THEIRS, backends, errors, main, optimizers, shapes, step

pytest.importorskip("came_pytorch")

CPU = torch.device("cpu")


def test_shapes_are_a_pixarts() -> None:
    assert sum(size.numel() for size in shapes(1152, 28)) == 610_856_096


@pytest.mark.parametrize("name", backends(CPU))
def test_an_optimiser_that_went_elsewhere_is_off(name: str) -> None:
    found = optimizers([torch.Size((3, 4)), torch.Size((5,))], CPU)
    start = found[THEIRS][0][0].detach().clone()
    assert all(torch.equal(parameters[0], start) for parameters, _ in found.values())
    assert max(errors(found).values()) < 1e-4
    found[name][1].param_groups[0]["lr"] *= 1.01
    assert [of for of, error in errors(found).items() if error > 1e-3] == [name]


def test_each_is_timed_on_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(optimizer.CAME, "step", lambda self: ran.append(pk.current_backend()))
    found = optimizers([torch.Size((2,))], CPU)
    for name in backends(CPU):
        step(found, name)
    assert ran == backends(CPU)
    assert ran[-1] == "reference" and list(found) == [THEIRS, *ran, ADAMW]


def test_command_writes_a_row_for_each_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "MODELS", (optimizer.Model(72, 1),))
    monkeypatch.setattr("benchmarks.timing.ROUND_SECONDS", 0.01)
    monkeypatch.setattr("benchmarks.timing.PAUSE_SECONDS", 0.0)
    with pytest.raises(SystemExit) as ended:
        main(["--output", str(tmp_path)])
    assert ended.value.code == 0
    (row,) = map(json.loads, (tmp_path / "optimizer.jsonl").read_text().splitlines())
    assert set(row["timings"]) == {"came-pytorch", *backends(CPU), "fused AdamW"}
    assert (row["op"], row["width"], row["depth"]) == ("came_step", 72, 1)
    assert max(row["error"].values()) < 1e-3 and not row["incorrect"]
    assert row["commit"] and row["speedups"]["came-pytorch"]["median"] == 1
    monkeypatch.setattr(optimizer, "errors", lambda found: {"native": float("nan")})
    with pytest.raises(SystemExit) as ended:
        main(["--output", str(tmp_path)])
    assert ended.value.code == 1
    (row,) = map(json.loads, (tmp_path / "optimizer.jsonl").read_text().splitlines())
    assert "native is nan of the way off came-pytorch" in row["failed"] and "timings" not in row

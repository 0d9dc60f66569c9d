"""The quickstart with too few steps to learn anything: every part runs, and says what came out."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from pixart.quickstart import quickstart


def test_quickstart_leaves_pictures_a_curve_and_a_report(tmp_path: Path) -> None:
    result = quickstart(tmp_path, vae_steps=2, steps=2)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["retrieval"] == result.retrieval
    assert report["captions"] >= 48
    assert report["pictures"] == 2 * report["captions"]
    # an untrained model is at chance: the measure does not flatter
    assert result.retrieval < 0.1
    assert len(result.wrong) == round((1 - result.retrieval) * result.pictures)
    for name in ("samples.png", "loss.png"):
        assert min(Image.open(tmp_path / name).size) > 400
    # nothing is trained twice
    checkpoint = tmp_path / "model" / "checkpoints" / "step-0000002" / "checkpoint.json"
    before = checkpoint.stat().st_mtime_ns
    again = quickstart(tmp_path, vae_steps=2, steps=2)
    assert checkpoint.stat().st_mtime_ns == before
    assert again == result

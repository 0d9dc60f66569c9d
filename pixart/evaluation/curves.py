"""Curves of a run's log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixart.files import write_atomically


def plot_loss(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws the loss of a run's log into a PNG: as logged, and averaged over 1/50 of the run."""
    # a figure without pyplot: no window system, no global state
    from matplotlib.figure import Figure

    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    window = max(1, len(losses) // 50)
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", title=title, yscale="log")
    axes.plot(steps, losses, color="0.8", label="logged")
    axes.plot(steps[window - 1 :], mean, color="C0", label=f"mean of {window}")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))

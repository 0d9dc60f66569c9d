"""Curves of a run's log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixart.files import write_atomically


def plot_loss(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws the loss of a run's log rows, as it was logged and smoothed, into a PNG."""
    # a figure without pyplot: no window system, no global state
    from matplotlib.figure import Figure

    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    smooth, smoothed = losses[0], []
    for loss in losses:
        smooth += 0.1 * (loss - smooth)
        smoothed.append(smooth)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", title=title, yscale="log")
    axes.plot(steps, losses, color="0.8", label="logged")
    axes.plot(steps, smoothed, color="C0", label="smoothed")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))

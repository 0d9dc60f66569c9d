"""Evaluation: what a run learned, in numbers and pictures."""

from pixart.evaluation.curves import plot_loss
from pixart.evaluation.retrieval import Retrieval, prompt_retrieval

__all__ = ["Retrieval", "plot_loss", "prompt_retrieval"]

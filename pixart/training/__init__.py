"""Training: recipes, the loop, and what it can train."""

from pixart.training.recipe import TrainRecipe, VAERecipe, load_recipe
from pixart.training.trainer import train

__all__ = ["TrainRecipe", "VAERecipe", "load_recipe", "train"]

"""Training recipes: YAML files, checked before anything is loaded.

A recipe says everything about a run. Unknown keys and bad values are named together, each with
the nearest valid one, so that a typing error costs seconds and not a night.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pixart.config import PixArtConfig, presets
from pixart.diffusion import SAMPLERS

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    # a frozen recipe is the one that was checked and written beside the results
    model_config = ConfigDict(extra="forbid", frozen=True)


class Optimizer(Section):
    """AdamW. The papers train with lr 2e-5, weight decay 0.03 and eps 1e-10."""

    lr: Rate = 2e-5
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Rate = 1e-10
    weight_decay: float = Field(default=0.03, ge=0)


class Schedule(Section):
    """Learning rate over the run: linear warm-up, then constant, or decaying to zero."""

    name: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: Count = 1000


class Run(Section):
    """What every training run has, whatever it trains."""

    output: Path
    seed: Count = 0
    steps: Positive
    batch_size: Positive = Field(description="samples per process and optimiser micro-step")
    gradient_accumulation: Positive = 1
    gradient_clip: Rate | None = Field(default=0.01, description="largest norm; null: no clipping")
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    ema_decay: Share | None = Field(
        default=0.9999, description="null: no moving average of the weights"
    )
    workers: Count = 0
    log_every: Positive = 20
    checkpoint_every: Positive = 1000
    keep_checkpoints: Positive = 2


class Data(Section):
    """Cached features; with ``images``, they are encoded into it first, where missing."""

    features: Path
    images: Path | None = Field(default=None, description="folder of images with captions")
    size: Positive | None = Field(
        default=None, description="crop images to this square; null: as they are"
    )
    vae: str | None = Field(
        default=None, description="AutoencoderKL folder, to encode and to draw samples"
    )
    text_encoder: str | None = Field(default=None, description="encoder folder, or minilm")
    max_bad_fraction: Share = Field(
        default=0.05, description="stop when more of the images are unusable"
    )


class Samples(Section):
    """Pictures drawn during training, from the averaged weights."""

    prompts: list[str] = []
    every: Positive = 1000
    sampler: str = "dpm-solver++"
    steps: Positive = 20
    guidance_scale: float = Field(default=4.5, ge=1)
    guidance_mask: Literal["official", "diffusers"] = "official"

    @field_validator("sampler")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in SAMPLERS:
            raise ValueError(f"should be {', '.join(SAMPLERS)}{_nearest(name, SAMPLERS)}")
        return name


class TrainRecipe(Run):
    """Text to image: ``pixart train``."""

    model: dict[str, Any] = Field(description="preset and/or fields of PixArtConfig; init: a path")
    data: Data
    min_snr_gamma: Rate | None = Field(
        default=None, description="weight min(snr, gamma) / snr; null: 1"
    )
    gradient_checkpointing: Literal[False, "selective", True] = Field(
        default=False,
        description="recompute in the backward, to save memory: false, only what costs next to "
        "nothing; selective, a block after its self-attention; true, whole blocks",
    )
    samples: Samples = Samples()

    @field_validator("model")
    @classmethod
    def _buildable(cls, model: dict[str, Any]) -> dict[str, Any]:
        fields = [field.name for field in dataclasses.fields(PixArtConfig)]
        known = [*fields, "preset", "init"]
        unknown = [f"{key}{_nearest(key, known)}" for key in model if key not in known]
        if unknown:
            raise ValueError(f"unknown {', '.join(unknown)}")
        name = model.get("preset", "sigma-256")
        if not isinstance(name, str) or name not in presets:
            raise ValueError(f"preset should be {', '.join(presets)}{_nearest(name, presets)}")
        if not isinstance(model.get("init", ""), str):
            raise ValueError("init should be a path")
        _model_config(model)
        return model

    @property
    def config(self) -> PixArtConfig:
        return _model_config(self.model)

    @property
    def init(self) -> str | None:
        """Weights to start from, in any format that ``PixArt.from_pretrained`` reads."""
        return self.model.get("init")


class VAERecipe(Run):
    """Autoencoder: ``pixart train-vae``."""

    images: Path
    size: Positive
    model: dict[str, Any] = Field(description="fields of diffusers' AutoencoderKL; init: a path")
    kl_weight: float = Field(default=1e-6, ge=0)
    samples_every: Positive = 1000


def _model_config(model: dict[str, Any]) -> PixArtConfig:
    changes = {key: value for key, value in model.items() if key not in ("preset", "init")}
    if "preset" in model:
        return dataclasses.replace(presets[model["preset"]], **changes)
    return PixArtConfig(**changes)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


Recipe = TypeVar("Recipe", bound=Run)


def builtin_recipes() -> list[str]:
    folder = importlib.resources.files("pixart") / "configs"
    return sorted(path.name[:-5] for path in folder.iterdir() if path.name.endswith(".yaml"))


def read_yaml(source: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, or in a recipe that ships with the package, by its name.

    Raises ValueError when there is no such file or it is no mapping.
    """
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = Path(str(importlib.resources.files("pixart") / "configs" / f"{source}.yaml"))
    if not path.is_file():
        known = ", ".join(builtin_recipes())
        raise ValueError(f"no recipe {source!r}: give a .yaml file, or one of {known}")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not keys and values")
    return _numbers(values)


def load_recipe(
    kind: type[Recipe], source: str | Path, overrides: list[str] | tuple[str, ...] = ()
) -> Recipe:
    """Reads and checks a recipe.

    Args:
        kind: TrainRecipe or VAERecipe.
        source: a .yaml file, or the name of a recipe that ships with the package.
        overrides: ``key=value`` or ``section.key=value``, the value in YAML.

    Raises:
        ValueError: one line for each unknown key or bad value, with the nearest valid one.
    """
    values = read_yaml(source)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"override {override!r} is not of the form key=value")
        section = values
        *sections, last = key.split(".")
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise ValueError(f"override {override!r}: {name} holds a value, not a section")
        try:
            section[last] = _numbers(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ValueError(f"override {override!r} is not valid YAML: {error}") from error
    return check_recipe(kind, values, str(source))


def check_recipe(kind: type[Recipe], values: dict[str, Any], source: str) -> Recipe:
    """Raises ValueError as :func:`load_recipe`; ``source`` is what the message calls the recipe."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_problem(kind, problem)}" for problem in error.errors())
        raise ValueError(f"{source}:\n{problems}") from None


def _numbers(value: Any) -> Any:
    """Numbers that YAML 1.1 reads as text, 1e-4 without a point, as numbers; also within."""
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)
    return float(value) if is_number else value


def _problem(kind: type[BaseModel], problem: Any) -> str:
    *sections, key = (str(part) for part in problem["loc"])
    where = ".".join([*sections, key])
    if problem["type"] == "extra_forbidden":
        known: type[BaseModel] | None = kind
        for name in sections:
            field = known.model_fields.get(name) if known else None
            known = field.annotation if field and isinstance(field.annotation, type) else None
        fields = list(known.model_fields) if known else []
        return f"{where}: unknown key{_nearest(key, fields)}"
    if problem["type"] == "missing":
        return f"{where}: required"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "literal_error":
        literal = kind
        for name in (*sections, key):
            annotation = literal.model_fields[name].annotation
            literal = annotation if isinstance(annotation, type) else literal
        message += _nearest(problem["input"], map(str, get_args(annotation)))
    if where == "model":
        return f"{where}: {message}"
    return f"{where}: got {problem['input']!r}; {message[0].lower()}{message[1:]}"

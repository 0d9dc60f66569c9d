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
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pixart.config import PixArtConfig, presets
from pixart.data.aspect_ratios import bucket_sizes
from pixart.diffusion import SAMPLERS

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    # a frozen recipe is the one that was checked and written beside the results
    model_config = ConfigDict(extra="forbid", frozen=True)


class Optimizer(Section):
    """What moves the weights: AdamW as alpha was trained with it, CAME as Sigma was."""

    name: Literal["adamw", "came", "adamw-8bit"] = "adamw"
    lr: Rate = 2e-5
    base_batch_size: Positive | None = Field(
        default=None,
        description="the batch that lr is for: another, over processes and accumulation, "
        "multiplies it by the square root of their ratio; null: lr as it is",
    )
    betas: tuple[Share, ...] = Field(default=(0.9, 0.999), description="came: 0.9, 0.999, 0.9999")
    eps: Rate | None = Field(default=1e-10, description="came: null, it has its own")
    weight_decay: float = Field(default=0.03, ge=0, description="came: 0")

    @model_validator(mode="before")
    @classmethod
    def _came(cls, values: Any) -> Any:
        # filled in here, so that the recipe in a run's folder says them
        if isinstance(values, dict) and values.get("name") == "came":
            return {"betas": (0.9, 0.999, 0.9999), "eps": None, "weight_decay": 0.0, **values}
        return values

    @field_validator("betas", "eps")
    @classmethod
    def _of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.data.get("name")
        if info.field_name == "betas" and len(value) != (3 if name == "came" else 2):
            raise ValueError("came takes three" if name == "came" else "should be two numbers")
        if info.field_name == "eps" and (value is None) != (name == "came"):
            raise ValueError("came has its own" if name == "came" else "should be a number")
        return value


class Schedule(Section):
    """Learning rate over the run: linear warm-up, then constant, or decaying to zero."""

    name: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: Count = 1000


class Parallel(Section):
    """How the processes of a run share the work; it changes no weight beyond rounding."""

    strategy: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="ddp: every process has all weights; fsdp: each a share of them (FSDP2)",
    )
    sequence: Positive = Field(
        default=1, description="processes that share the tokens of each picture"
    )


class Run(Section):
    """What every training run has, whatever it trains."""

    output: Path
    seed: int = Field(default=0, ge=0, lt=2**32)
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
    keep_every: Positive | None = Field(
        default=None, description="never delete the checkpoint of such a multiple of steps"
    )
    parallel: Parallel = Parallel()

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML takes a bare no for false

    @field_validator("parallel")
    @classmethod
    def _sharded(cls, parallel: Parallel, info: ValidationInfo) -> Parallel:
        if parallel.strategy == "fsdp" and info.data.get("mixed_precision") == "fp16":
            raise ValueError("fsdp goes with mixed_precision bf16 or no, not with fp16")
        optimizer = info.data.get("optimizer")
        if parallel.strategy == "fsdp" and optimizer and optimizer.name == "adamw-8bit":
            raise ValueError("fsdp goes with optimizer adamw or came: bitsandbytes has no shards")
        return parallel


class Data(Section):
    """Cached features; with ``images``, they are encoded into it first, where missing."""

    features: Path
    images: Path | None = Field(default=None, description="folder of images with captions")
    size: Positive | None = Field(
        default=None, description="crop images to this square; null: as they are"
    )
    buckets: bool | list[str] = Field(
        default=False,
        description="crop each image to the nearest of several ratios instead, at the square's "
        "area: true, the 40 of the papers; or a list of width:height, as ['16:9', '1:1']",
    )
    vae: str | None = Field(
        default=None, description="AutoencoderKL folder, to encode and to draw samples"
    )
    text_encoder: str | None = Field(default=None, description="encoder folder, or minilm")
    max_bad_fraction: Share = Field(
        default=0.05, description="stop when more of the images are unusable"
    )

    @field_validator("buckets", mode="before")
    @classmethod
    def _ratios(cls, buckets: Any, info: ValidationInfo) -> Any:
        if buckets is False:
            return buckets
        if not info.data.get("size"):
            raise ValueError("needs data.size, the side of the square that has their area")
        if isinstance(buckets, list) and buckets and all(isinstance(x, str) for x in buckets):
            bucket_sizes(info.data["size"], 1, buckets)
        elif buckets is not True:
            raise ValueError(
                'should be true, false or ratios in quotes, as ["16:9", "1:1"]: YAML takes bare '
                "ones for numbers"
            )
        return buckets

    def sizes(self, multiple: int) -> int | list[tuple[int, int]] | None:
        """What ``ImageFolder`` cuts images to; sides of buckets are multiples of ``multiple``."""
        if not self.buckets or self.size is None:
            return self.size
        ratios = None if self.buckets is True else self.buckets
        return bucket_sizes(self.size, multiple, ratios)


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


class Lora(Section):
    """Adapters that are trained in the place of weights, through peft (arXiv:2106.09685)."""

    rank: Positive = 16
    alpha: Rate | None = Field(
        default=None, description="what an adapter adds is times alpha / rank; null: the rank"
    )
    dora: bool = Field(default=False, description="train magnitudes apart (arXiv:2402.09353)")
    layers: list[str] = Field(
        default=[
            "attn.qkv",
            "attn.proj",
            "cross_attn.q_linear",
            "cross_attn.kv_linear",
            "cross_attn.proj",
            "mlp.fc1",
            "mlp.fc2",
        ],
        description="those whose names end so have adapters",
    )
    base_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of the frozen weights; adapters are float32"
    )


class Prior(Section):
    """DreamBooth's prior preservation (arXiv:2208.12242, section 3.3)."""

    folder: str = Field(
        description="of data.images: pictures of the class, the others are of the subject"
    )
    weight: Rate = Field(default=1.0, description="of their loss beside that of the subject")


class Distill(Section):
    """Latent consistency distillation (arXiv:2310.04378) of ``model.init``."""

    guidance_scale: float = Field(
        default=5.5, ge=1, description="the teacher's; 1 + omega in the paper's notation"
    )
    huber_c: Rate = 1e-3


class Control(Section):
    """A ControlNet for a frozen model (PixArt-delta, arXiv:2401.05252, section 4)."""

    features: Path = Field(description="cache of the control images' latents")
    images: Path | None = Field(
        default=None, description="folder of images named and sized as those of data.images"
    )
    copies: Positive = Field(default=13, description="how many of the first blocks are copied")


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
    lora: Lora | None = None
    prior: Prior | None = None
    distill: Distill | None = None
    control: Control | None = None

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

    @field_validator("lora", "prior", "distill", "control")
    @classmethod
    def _of_text(cls, section: Section | None, info: ValidationInfo) -> Section | None:
        model = info.data.get("model")
        if section and model and _model_config(model).conditioning == "class":
            raise ValueError("a class model has none")
        return section

    @field_validator("distill", "control")
    @classmethod
    def _alone(cls, section: Section | None, info: ValidationInfo) -> Section | None:
        if section is None:
            return None
        others = {"distill": ["prior"], "control": ["lora", "prior", "distill"]}
        for other in others[str(info.field_name)]:
            if info.data.get(other) is not None:
                raise ValueError(f"goes without {other}")
        if "init" not in info.data.get("model", {"init": ""}):
            raise ValueError("should come with model.init, the model that teaches or is controlled")
        parallel = info.data.get("parallel")
        if parallel is not None and parallel.strategy == "fsdp":
            raise ValueError("goes with parallel.strategy ddp, not with fsdp")
        if parallel is not None and parallel.sequence > 1:
            raise ValueError("goes with parallel.sequence 1")
        samples = info.data.get("samples")
        if info.field_name == "control" and samples is not None and samples.prompts:
            raise ValueError("goes without samples.prompts: captions of the data are drawn")
        return section

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
    parts: Literal["all", "decoder"] = Field(
        default="all",
        description="decoder: latents stay what they are, for transformers trained on them",
    )
    pixel_loss: Literal["l1", "mse"] = "l1"
    edge_weight: float = Field(default=1, ge=0, description="of neighbours' differences, in L1")
    perceptual_weight: float = Field(default=0, ge=0, description="of LPIPS, from package lpips")
    kl_weight: float = Field(default=1e-6, ge=0)
    samples_every: Positive = 1000

    @field_validator("perceptual_weight")
    @classmethod
    def _of_size(cls, weight: float, info: ValidationInfo) -> float:
        if weight and info.data.get("size", 16) < 16:
            raise ValueError(
                "needs a size of 16 or more: LPIPS's network halves pictures four times"
            )
        return weight

    @field_validator("parts")
    @classmethod
    def _of_something(cls, parts: str, info: ValidationInfo) -> str:
        if parts == "decoder" and "init" not in info.data.get("model", {}):
            raise ValueError("should come with model.init, the autoencoder whose decoder it is")
        return parts


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


def _section(kind: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section that a key of that name holds, also one that may be left out."""
    field = kind.model_fields.get(name)
    annotation = field.annotation if field else None
    kinds = [annotation, *get_args(annotation)]
    return next((x for x in kinds if isinstance(x, type) and issubclass(x, BaseModel)), None)


def _problem(kind: type[BaseModel], problem: Any) -> str:
    *sections, key = (str(part) for part in problem["loc"])
    where = ".".join([*sections, key])
    if problem["type"] == "extra_forbidden":
        known: type[BaseModel] | None = kind
        for name in sections:
            known = _section(known, name) if known else None
        fields = list(known.model_fields) if known else []
        return f"{where}: unknown key{_nearest(key, fields)}"
    if problem["type"] == "missing":
        return f"{where}: required"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "literal_error":
        literal: type[BaseModel] | None = kind
        for name in sections:
            literal = _section(literal, name) if literal else None
        if literal:
            values = get_args(literal.model_fields[key].annotation)
            message += _nearest(problem["input"], map(str, values))
    if problem["type"] == "path_type":
        message = "should be a path"
    if where == "model":
        return f"{where}: {message}"
    return f"{where}: got {problem['input']!r}; {message[0].lower()}{message[1:]}"

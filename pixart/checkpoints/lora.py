"""LoRA files: merged into a model's weights, whoever trained them, and written."""

from __future__ import annotations

import copy
import logging
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    TypeAdapter,
    ValidationError,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pixart.checkpoints.diffusers import to_diffusers_names
from pixart.checkpoints.files import read_tensors
from pixart.files import finish_folder, unfinished_folder
from pixart.model import PixArt

log = logging.getLogger(__name__)

PEFT_CONFIG = "adapter_config.json"
# peft's and diffusers' names for the one file of a folder
WEIGHTS = ("adapter_model", "pytorch_lora_weights")
# where diffusers keeps peft's settings, in a file's metadata
DIFFUSERS_CONFIG = "lora_adapter_metadata"

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = tuple(f"lokr_w{i}{part}" for i in (1, 2) for part in ("", "_a", "_b"))
_PARTS = {
    "down": r"\.lora_A|\.lora_down|[._]lora\.down",
    "up": r"\.lora_B|\.lora_up|[._]lora\.up",
    "alpha": r"\.alpha",
    "magnitude": r"\.lora_magnitude_vector",
    "dora_scale": r"\.dora_scale",
    **{name: rf"\.{name}" for name in (*_LOHA, *_LOKR)},
}
# behind the part may stand the adapter's name, which peft's own state dict has
_KEY = re.compile(
    "(?P<layer>.+?)(?:"
    + "|".join(f"(?P<{part}>{spelling})" for part, spelling in _PARTS.items())
    + r")(?:\.(?!bias$)\w+)?(?:\.weight)?"
)
# kohya's files have underscores for dots, which is how all layers are looked up here
_PREFIX = re.compile(r"(?:base_model_model|unet|transformer|diffusion_model|lora|lycoris)_")
_TEXT_ENCODER = re.compile(r"(?:lora_te\d*_|te\d*\.|text_encoder|bundle_emb\.).*")
# they change the weights that training starts from, and so what the file belongs to
_CHANGED_BASE = re.compile(r"pissa.*|olora|corda|loftq|lora_ga")


def _layer_name(pattern: str) -> str:
    """peft takes regular expressions, of which a stranger's may run forever."""
    name = pattern.replace("\\.", ".").removesuffix("$")
    if not re.fullmatch(r"\^?[\w.]+", name):
        raise ValueError("accepted: a layer's name or how it ends, no other regular expression")
    return name


_LayerName = Annotated[str, AfterValidator(_layer_name)]
_Rank = Annotated[int, Field(gt=0, lt=2**31)]


class _Settings(BaseModel):
    """What of peft's settings tells how a layer is merged."""

    model_config = ConfigDict(strict=True)

    peft_type: Literal["LORA", "LOHA", "LOKR"] = "LORA"
    init_lora_weights: Any = True
    r: _Rank | None = None
    lora_alpha: FiniteFloat | None = None  # LoRA's
    alpha: FiniteFloat | None = None  # LoHa's and LoKr's
    use_rslora: bool = False
    rank_pattern: dict[_LayerName, _Rank] | None = None
    alpha_pattern: dict[_LayerName, FiniteFloat] | None = None


class _Layer(NamedTuple):
    name: str  # as in the model that has it: ours or diffusers'
    parameter: str  # our parameter that it is, or is some rows of
    weight: Tensor


def load_lora(model: PixArt, path: str | Path, scale: float = 1.0) -> list[str]:
    """Merges a LoRA file into a model's weights, in place and for good.

    Read are LoRA (arXiv:2106.09685), with or without rank-stabilised scaling (arXiv:2312.03732),
    DoRA (arXiv:2402.09353), LoHa and LoKr (arXiv:2309.14859), of linear and convolutional layers,
    as peft, diffusers, kohya's scripts, OneTrainer, LyCORIS and ComfyUI name them, with
    diffusers' names for layers or the official ones. A weight becomes::

        W + scale * alpha / rank * up @ down
        W + scale * (m / |V| * V - W),  V = W + alpha / rank * up @ down     (DoRA)

    computed in float32 and rounded once, to the weight's dtype: a 16-bit weight does not see a
    change below its spacing, so merge before casting. Where a file says nothing of alpha, it is
    the rank. Files merged one after another add up; DoRA's depend on their order.

    Args:
        path: a ``.safetensors`` or torch file, or the folder that peft or diffusers wrote. The
            settings that peft wrote beside its file are found either way.
        scale: how much of the change is made; 0 is none, and below 0 is away from it.

    Returns:
        The names of our parameters that were changed.

    Warns:
        UserWarning: naming tensors for the text encoder, which are passed over; or peft's settings
            are missing, and alpha with them.

    Raises:
        FileNotFoundError: there is no such file, or the folder holds none.
        ValueError: the file is damaged, or is no LoRA of this model: every tensor that is for no
            layer, or whose shape, rank, counterpart or values are amiss, in one message; or
            peft's settings are. The model is then as it was.
    """
    path = Path(path)
    if not math.isfinite(scale):
        raise ValueError(f"load_lora: `scale` is {scale}; accepted: a finite number")
    tensors, config = _read(path)
    adapters = _match(tensors, _layers(model), path)
    with torch.no_grad():
        for layer, parts in adapters:
            W = layer.weight.to(torch.promote_types(layer.weight.dtype, torch.float32))
            parts = {part: tensor.to(W) for part, tensor in parts.items()}
            change = _scaling(layer.name, parts, config) * _product(parts).view_as(W)
            magnitude = parts.get("magnitude", parts.get("dora_scale"))
            if magnitude is not None:
                V, axis = W + change, _magnitude_axis(parts, W)
                others = [i for i in range(W.dim()) if i != axis]
                norm = torch.linalg.vector_norm(V, dim=others, keepdim=True)
                change = magnitude.view_as(norm) / norm * V - W
            layer.weight.copy_(W + scale * change)
    log.info("%s: merged into %d layers at scale %g", path, len(adapters), scale)
    return sorted({layer.parameter for layer, _ in adapters})


def save_lora(model: PixArt, folder: str | Path) -> None:
    """Writes the adapters that peft put into a model's layers as a folder of peft's.

    :func:`load_lora` merges it, and stock diffusers takes it by ``PeftModel.from_pretrained(
    pipe.transformer, folder)``: layers have diffusers' names where the model's conditioning is
    "adaln_single", and where theirs are rows of ours, all have the same ``lora_A``. Written as
    float32, complete or not at all.

    Raises:
        ValueError: the model has no adapters.
    """
    from peft.tuners.lora import LoraLayer

    adapters: dict[str, Any] = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)
    }
    if not adapters:
        raise ValueError("save_lora: `model` has no adapters; accepted: a model with LoRA of peft")
    single = model.config.conditioning == "adaln_single"
    tensors: dict[str, Tensor] = {}
    layers = []
    for name, layer in adapters.items():
        (adapter,) = layer.active_adapters
        rows = {"lora_B.weight": layer.lora_B[adapter].weight}
        if adapter in layer.lora_magnitude_vector:
            rows["lora_magnitude_vector"] = layer.lora_magnitude_vector[adapter].weight
        for part, tensor in rows.items():
            named = {f"{name}.weight": tensor}
            for key, its_rows in (to_diffusers_names(named) if single else named).items():
                stem = key.removesuffix("weight")
                tensors[f"base_model.model.{stem}{part}"] = its_rows
                tensors[f"base_model.model.{stem}lora_A.weight"] = layer.lora_A[adapter].weight
                layers.append(stem.removesuffix("."))
    config = copy.copy(cast(Any, model).peft_config[adapter])
    config.target_modules, config.inference_mode = sorted(set(layers)), True
    folder = Path(folder)
    partial = unfinished_folder(folder)
    config.save_pretrained(str(partial))
    # without clones, three names would be of one tensor
    whole = {key: x.detach().to("cpu", torch.float32, copy=True) for key, x in tensors.items()}
    save_file(whole, partial / f"{WEIGHTS[0]}.safetensors", metadata={"format": "pt"})
    finish_folder(folder)


def _read(path: Path) -> tuple[dict[str, Tensor], _Settings]:
    """The tensors, and peft's settings where there are any."""
    file = path
    if path.is_dir():
        names = [f"{name}{suffix}" for name in WEIGHTS for suffix in (".safetensors", ".bin")]
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: no LoRA in this folder, none of {', '.join(names)}")
        file = found[0]
    tensors, config = read_tensors(file), _Settings()
    if file.stem == WEIGHTS[0] and (file.parent / PEFT_CONFIG).is_file():
        config = _parse((file.parent / PEFT_CONFIG).read_bytes(), file.parent / PEFT_CONFIG)
    elif file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            packed = (opened.metadata() or {}).get(DIFFUSERS_CONFIG, "{}")
        # one name for all models of a pipeline, each setting behind its model's name
        config = _parse(packed, file, prefix=r"(?:transformer|unet)\.")
    start = config.init_lora_weights
    if isinstance(start, str) and _CHANGED_BASE.fullmatch(start):
        raise ValueError(
            f"{path}: `init_lora_weights` is {start!r}, which changes the model before training; "
            "let peft convert it: save_pretrained(..., path_initial_model_for_weight_conversion=)"
        )
    by_peft = any("base_model.model." in key for key in tensors)
    if (
        by_peft
        and not config.model_fields_set
        and not any(key.endswith(".alpha") for key in tensors)
    ):
        warnings.warn(
            f"{path}: peft's {PEFT_CONFIG}, which tells alpha, is not beside it; alpha is taken to "
            "be the rank",
            stacklevel=3,
        )
    return tensors, config


def _parse(text: str | bytes, file: Path, prefix: str = "") -> _Settings:
    try:
        settings = TypeAdapter(dict[str, Any]).validate_json(text)
        named = ((re.fullmatch(f"{prefix}(\\w+)", key), x) for key, x in settings.items())
        own = {match[1]: x for match, x in named if match}
        if own.get("peft_type", "LORA") == "LORA":
            # it may hold regular expressions, and the tensors tell
            own.pop("rank_pattern", None)
        return _Settings.model_validate(own)
    except ValidationError as error:
        problems = "; ".join(
            (f"`{found['loc'][0]}` is {found['input']!r:.100}: " if found["loc"] else "")
            + found["msg"].removeprefix("Value error, ")
            for found in error.errors()
        )
        raise ValueError(f"{file}: peft's settings: {problems}") from None


def _layers(model: PixArt) -> dict[str, _Layer]:
    """What a LoRA can be for, by names with underscores for dots; ours and diffusers'."""
    layers: dict[str, _Layer] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) and getattr(module, "groups", None) != 1:
            continue
        key = f"{name}.weight"
        named = {key: module.weight.detach()}
        if model.config.conditioning == "adaln_single":
            # views of the rows that are diffusers' layer of their own
            named |= to_diffusers_names(named)
        for full_name, weight in named.items():
            layer = _Layer(full_name.removesuffix(".weight"), key, weight)
            layers[layer.name.replace(".", "_")] = layer
            # early diffusers had processors, which knew no list behind to_out
            layers[layer.name.replace("to_out.0", "to_out").replace(".", "_")] = layer
    return layers


def _match(
    tensors: Mapping[str, Tensor], layers: Mapping[str, _Layer], path: Path
) -> list[tuple[_Layer, dict[str, Tensor]]]:
    """Each layer that the file is for, with its tensors by part."""
    parts_of: dict[str, dict[str, Tensor]] = defaultdict(dict)
    found: dict[str, _Layer] = {}
    skipped, strange, twice, worthless = [], [], [], []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        layer = _find(match["layer"], layers) if match else None
        if _TEXT_ENCODER.fullmatch(key):
            skipped.append(key)
        elif match is None or layer is None:
            strange.append(key)
        elif match.lastgroup in parts_of[layer.name]:
            twice.append(key)
        else:
            assert match.lastgroup is not None
            found[layer.name] = layer
            parts_of[layer.name][match.lastgroup] = tensor
            # kohya writes alpha as the integer that it was given
            is_number = tensor.is_floating_point() or match.lastgroup == "alpha"
            if not is_number or not tensor.to(torch.float32).isfinite().all():
                worthless.append(f"{key} ({str(tensor.dtype).removeprefix('torch.')})")
    adapters = [(layer, parts_of[name]) for name, layer in found.items()]
    misshapen = [
        f"{layer.name} {tuple(layer.weight.shape)}: "
        + ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in parts.items())
        for layer, parts in adapters
        if not _fits(parts, layer.weight)
    ]
    problems = {
        "for no layer, or of no kind that is read": strange,
        "given twice": twice,
        "misshapen or incomplete": misshapen,
        "not of finite floating-point numbers": worthless,
    }
    lines = [f"  {kind} ({len(x)}): {_listed(x)}" for kind, x in problems.items() if x]
    if lines:
        raise ValueError("\n".join([f"{path}: no LoRA of this model:", *lines]))
    if not adapters:
        raise ValueError(f"{path}: holds no LoRA of the transformer")
    if skipped:
        warnings.warn(
            f"{path}: {len(skipped)} tensors for the text encoder are passed over: "
            f"{_listed(skipped)}",
            stacklevel=3,
        )
    return adapters


def _listed(names: list[str], most: int = 20) -> str:
    """Not all of the thousands in a file for another model."""
    rest = len(names) - most
    return ", ".join(sorted(names)[:most]) + (f", and {rest} more" if rest > 0 else "")


def _find(name: str, layers: Mapping[str, _Layer]) -> _Layer | None:
    name = name.replace(".", "_").replace("_processor_", "_")
    while name not in layers:
        prefix = _PREFIX.match(name)
        if prefix is None:
            return None
        name = name[prefix.end() :]
    return layers[name]


def _fits(parts: Mapping[str, Tensor], weight: Tensor) -> bool:
    try:
        product = _product({part: tensor.to("meta") for part, tensor in parts.items()})
        axis = _magnitude_axis(parts, weight)
    except (KeyError, IndexError, RuntimeError):
        return False
    one_alpha = "alpha" not in parts or parts["alpha"].numel() == 1
    has_rank = all(tensor.numel() for tensor in parts.values())
    fits = axis is not None and product.shape == weight.flatten(1).shape
    return fits and one_alpha and has_rank


def _product(parts: Mapping[str, Tensor]) -> Tensor:
    """The unscaled change (out, in), kernels flattened. Raises KeyError or RuntimeError."""
    p = {part: tensor.flatten(1) for part, tensor in parts.items() if tensor.dim() > 1}
    if any(part in p for part in _LOHA):
        return (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
    if any(part in p for part in _LOKR):
        w1, w2 = (p[w] if (w := f"lokr_w{i}") in p else p[f"{w}_a"] @ p[f"{w}_b"] for i in (1, 2))
        return torch.kron(w1, w2)
    return p["up"] @ p["down"]


def _scaling(layer: str, parts: Mapping[str, Tensor], config: _Settings) -> float:
    """alpha / rank, or alpha / sqrt(rank) where the settings say so."""

    def of_layer(patterns: Mapping[str, float] | None, default: float) -> float:
        for name, value in (patterns or {}).items():
            if f"^{layer}" == name or f".{layer}".endswith(f".{name}"):
                return value
        return default

    inner = [parts[x] for x in ("down", *_LOHA[1::2], *_LOKR[2::3]) if x in parts]
    # LoKr of two full matrices shows no rank: peft scales it, LyCORIS does not, whatever its alpha
    rank = len(inner[0]) if inner else of_layer(config.rank_pattern, config.r or 0)
    if not rank:
        return 1.0
    given = [alpha for alpha in (config.lora_alpha, config.alpha) if alpha is not None]
    alpha = of_layer(config.alpha_pattern, given[0] if given else rank)
    alpha = float(parts["alpha"]) if "alpha" in parts else alpha
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _magnitude_axis(parts: Mapping[str, Tensor], weight: Tensor) -> int | None:
    """Along which axis of a weight DoRA's magnitudes lie, 0 without any; None: they do not fit.

    peft has one for each output. LyCORIS and OneTrainer have one for each input in earlier files,
    (1, in), and (out, 1) in later ones.
    """
    if "magnitude" in parts:
        return 0 if parts["magnitude"].numel() == len(weight) else None
    if "dora_scale" not in parts:
        return 0
    shape = parts["dora_scale"].shape
    axis = 1 if len(shape) > 1 and shape[0] == 1 else 0
    return axis if shape.numel() == shape[axis] == weight.shape[axis] else None

"""The official code's recorded inputs, outputs and gradients, as this project names things."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from pixart import PixArtConfig

DATA = Path(__file__).parents[1] / "data"
NAMES = sorted(
    path.stem for path in DATA.glob("*.safetensors") if path.stem[:5] in ("alpha", "sigma")
)


@dataclass
class Golden:
    config: PixArtConfig
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    output: Tensor
    loss_weight: Tensor
    gradients: dict[str, Tensor]


def load_golden(name: str) -> Golden:
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        official = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def group(prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    compression = official.get("kv_compress_config")
    if compression is not None:
        compression = {**compression, "layers": compression["kv_compress_layer"]}
        del compression["kv_compress_layer"]
    config = PixArtConfig(
        **{k: official[k] for k in ("input_size", "patch_size", "in_channels", "hidden_size")},
        depth=official["depth"],
        num_heads=official["num_heads"],
        caption_channels=official["caption_channels"],
        max_caption_tokens=official["model_max_length"],
        pe_interpolation=official.get("pe_interpolation", 1.0),
        micro_conditioning=official.get("micro_condition", False),
        qk_norm=official.get("qk_norm", False),
        kv_compression=compression,
        caption_dropout=0.0,
    )
    return Golden(
        config,
        group("state."),
        group("input."),
        tensors["output"],
        tensors["loss.weight"],
        group("grad."),
    )

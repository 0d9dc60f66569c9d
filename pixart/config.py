"""The shape of a PixArt model, and the published ones by name."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONDITIONINGS = ("adaln_single", "adaln", "class")
SAMPLINGS = ("conv", "ave", "uniform", "uniform_every")


@dataclass(frozen=True)
class PixArtConfig:
    """Everything that decides a model's parameters and its forward pass.

    Defaults are PixArt-Sigma XL/2 at 256px with the SDXL autoencoder and T5-XXL.

    Attributes:
        input_size: side of the training latents, in latent pixels (image side / 8). Positions
            are measured relative to it, whatever grid the model is run on.
        patch_size: latent pixels per token side.
        in_channels: latent channels.
        hidden_size: D, a multiple of 4 and of num_heads (and of 3 with micro_conditioning).
        depth: number of blocks (28 in XL/2, 42 in the 900M variant).
        num_heads: attention heads; D / num_heads = 72 in every published model.
        mlp_ratio: hidden width of the MLP, in units of D.
        caption_channels: width of the text encoder's features (4096 for T5-XXL).
        max_caption_tokens: length of the null caption (120 in alpha, 300 in Sigma).
        pe_interpolation: positions are divided by it; raised with input_size so that a finer
            grid covers the coordinates that the coarser one was trained on.
        micro_conditioning: adds embeddings of image size and aspect ratio to the timestep's
            (alpha 1024 only).
        qk_norm: LayerNorm over the full width of q and of k.
        kv_compression: None, or {"sampling": "conv" | "ave" | "uniform" | "uniform_every",
            "scale_factor": int, "layers": [int, ...]}.
        learn_sigma: the output also holds the variance, so it has 2 * in_channels channels.
        caption_dropout: share of captions replaced by the null caption in training.
        conditioning: "adaln_single" (PixArt), "adaln" (the ablation with one modulation layer
            per block, 833M in the paper) or "class" (DiT: a class label, no cross-attention).
        gated_cross_attention: scales cross-attention by tanh of a learned scalar, zero at first.
        num_classes: labels in "class" conditioning, the null class not counted.

    Raises:
        ValueError: naming the field, what was got and what is accepted.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    caption_channels: int = 4096
    max_caption_tokens: int = 300
    pe_interpolation: float = 1.0
    micro_conditioning: bool = False
    qk_norm: bool = False
    kv_compression: dict[str, Any] | None = None
    learn_sigma: bool = True
    caption_dropout: float = 0.1
    conditioning: str = "adaln_single"
    gated_cross_attention: bool = False
    num_classes: int = 1000

    def __post_init__(self) -> None:
        def require(ok: bool, field: str, accepted: str) -> None:
            if not ok:
                got = getattr(self, field)
                raise ValueError(f"PixArtConfig: `{field}` is {got!r}; accepted: {accepted}")

        for entry in dataclasses.fields(self):
            name, kind, value = entry.name, entry.type, getattr(self, entry.name)
            if kind == "int":
                ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
                require(ok, name, "a positive integer")
            elif kind == "float":
                ok = isinstance(value, (int, float)) and not isinstance(value, bool)
                require(ok, name, "a number")
            elif kind == "bool":
                require(isinstance(value, bool), name, "True or False")
        p, H = self.patch_size, self.num_heads
        require(self.input_size % p == 0, "input_size", f"a multiple of patch_size = {p}")
        require(self.hidden_size % 4 == 0, "hidden_size", "a multiple of 4 (2D positions)")
        require(self.hidden_size % H == 0, "hidden_size", f"a multiple of num_heads = {H}")
        require(self.pe_interpolation > 0, "pe_interpolation", "a positive number")
        require(self.mlp_ratio > 0, "mlp_ratio", "a positive number")
        require(0 <= self.caption_dropout < 1, "caption_dropout", "0 <= p < 1")
        require(self.conditioning in CONDITIONINGS, "conditioning", ", ".join(CONDITIONINGS))
        if self.micro_conditioning:
            require(self.hidden_size % 3 == 0, "hidden_size", "a multiple of 3 (size and ratio)")
            require(self.conditioning != "class", "micro_conditioning", "False for a class model")
        if self.gated_cross_attention:
            accepted = "False for a class model, which has no cross-attention"
            require(self.conditioning != "class", "gated_cross_attention", accepted)
        if self.kv_compression is not None:
            kv, field = self.kv_compression, "kv_compression"
            keys = {"sampling", "scale_factor", "layers"}
            require(isinstance(kv, dict) and set(kv) == keys, field, f"None or keys {keys}")
            require(kv["sampling"] in SAMPLINGS, field, f"sampling of {', '.join(SAMPLINGS)}")
            scale = kv["scale_factor"]
            require(isinstance(scale, int) and scale >= 1, field, "a positive scale_factor")
            layers = kv["layers"]
            in_range = isinstance(layers, (list, tuple)) and all(
                isinstance(layer, int) and 0 <= layer < self.depth for layer in layers
            )
            require(in_range, field, f"layers within 0 to {self.depth - 1}")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    def compression_ratio(self, layer: int) -> int:
        """Compression of keys and values per axis in block ``layer``; 1 means none."""
        kv = self.kv_compression
        return kv["scale_factor"] if kv is not None and layer in kv["layers"] else 1

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PixArtConfig:
        """Raises ValueError listing the names that are no fields."""
        fields = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(f"PixArtConfig: unknown {unknown}; accepted: {', '.join(fields)}")
        return cls(**values)

    @classmethod
    def from_json(cls, path: str | Path) -> PixArtConfig:
        return cls.from_dict(json.loads(Path(path).read_text()))


def _sigma(pixels: int, **changes: Any) -> PixArtConfig:
    # coordinates span [0, 32) at every size (Sigma trained 256px at half steps); SDXL's VAE
    return PixArtConfig(input_size=pixels // 8, pe_interpolation=pixels / 512, **changes)


def _alpha(pixels: int, pe_interpolation: float = 1.0, **changes: Any) -> PixArtConfig:
    return PixArtConfig(
        input_size=pixels // 8, pe_interpolation=pe_interpolation, max_caption_tokens=120, **changes
    )


# the second half of the blocks keep a quarter of their keys and values
_KV_CONV = {"sampling": "conv", "scale_factor": 2, "layers": list(range(14, 28))}

presets: dict[str, PixArtConfig] = {
    "alpha-256": _alpha(256),
    "alpha-512": _alpha(512),
    # the one model that is told the image's size and aspect ratio
    "alpha-1024": _alpha(1024, pe_interpolation=2.0, micro_conditioning=True),
    "sigma-256": _sigma(256),
    "sigma-512": _sigma(512),
    "sigma-1024": _sigma(1024),
    "sigma-2k": _sigma(2048),
    "sigma-1024-kv": _sigma(1024, kv_compression=_KV_CONV),
    "sigma-2k-kv": _sigma(2048, kv_compression=_KV_CONV),
    # as many pixels as 3840 x 2160
    "sigma-4k": _sigma(2880),
    "sigma-4k-kv": _sigma(2880, kv_compression=_KV_CONV),
    "900m-1024": _sigma(1024, depth=42),
    "adaln-256": _alpha(256, conditioning="adaln"),
    "dit-256": _alpha(256, conditioning="class"),
}

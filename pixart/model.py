"""PixArt: a diffusion transformer that draws what a caption says.

PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (arXiv 2403.04692). The parameters carry the
names of the official checkpoints.

Shape suffixes: B batch, C channels, N image tokens, L text tokens, D hidden size, H heads,
K head dimension, R modulation rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

import pixart_kernels as pk
from pixart.config import PixArtConfig
from pixart.recompute import Recipe, recomputing
from pixart.sequence import SharedTokens

# rows of a block's scale_shift_table; the final layer's table has the first two alone
SHIFT_ATTN, SCALE_ATTN, GATE_ATTN, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)

# of position embeddings: the 40 grids of a multi-aspect data set at 512 pixels, and less than one
# of an XL/2 at 4096
MAX_CACHED_BYTES = 2**28

# nothing in a block is drawn at random
CHECKPOINT: Any = {"use_reentrant": False, "preserve_rng_state": False}

# learned table (R, D) and the timestep's share (B, R, D) or (B, R*D); their sum modulates
Modulation = tuple[Tensor, Tensor]

# a branch that the residual stream lacks yet, and the modulation of the block that made it
Pending = tuple[Tensor, Modulation]


class Time(NamedTuple):
    """What a model makes of timesteps (and picture sizes); see :meth:`PixArt.embed_time`."""

    t_BD: Tensor
    t0: Tensor | None  # (B, 6 D), with adaLN-single


class Text(NamedTuple):
    """What a model makes of captions; see :meth:`PixArt.embed_text`."""

    of_blocks: Sequence[Tensor]  # for each block (B, L, D), or its keys and values (B, L, 2, H, K)
    lengths_B: Tensor  # int32, real tokens, which come first


class Mlp(nn.Module):
    def __init__(self, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden)
        self.fc2 = nn.Linear(hidden, out_features)

    def forward(self, x: Tensor) -> Tensor:
        if self._fuses(x):
            inputs = F.linear(x, self.fc1.weight), self.fc1.bias
            gelu = partial(pk.bias_gelu, *inputs, backend=pk.current_backend())
            del inputs
        else:
            gelu = partial(F.gelu, self.fc1(x), approximate="tanh")
        with recomputing() as again:
            y = gelu()
            again(gelu, y)
            del gelu  # and its input, where there is no backward
            return self.fc2(y)

    def _fuses(self, x: Tensor) -> bool:
        """Whether fc1 is as it was made, so that nobody expects to see its output."""
        fc1 = self.fc1
        watched = fc1._forward_hooks or fc1._forward_pre_hooks or fc1._backward_hooks
        watched = watched or fc1._backward_pre_hooks
        if type(fc1) is not nn.Linear or fc1.bias is None or watched:
            return False
        return pk.chosen_backend("bias_gelu", x) != "reference"


class PatchEmbed(nn.Module):
    """Latents to tokens in raster order, (B, C, height, width) -> (B, N, D)."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents).flatten(2).transpose(1, 2)


class ScalarEmbedder(nn.Module):
    """Sinusoids of a number, then an MLP: timesteps, image sides, aspect ratios."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, values: Tensor) -> Tensor:
        """(B,) any real dtype -> (B, width) in the parameters' dtype."""
        half = self.frequencies // 2
        exponents = torch.arange(half, dtype=torch.float32, device=values.device) / half
        # fp32 throughout: bf16 steps by 4 above 512 and would confuse timesteps
        angles = values.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoids.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class labels, with one more for "no class" (DiT)."""

    def __init__(self, num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.null_class, self.dropout = num_classes, dropout
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels_B: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            dropped = torch.rand(labels_B.shape, device=labels_B.device) < self.dropout
            labels_B = torch.where(dropped, self.null_class, labels_B)
        return self.embedding_table(labels_B)


class CaptionEmbedder(nn.Module):
    """Projects text features to the model's width; replaces some by the null caption."""

    y_embedding: Tensor

    def __init__(self, caption_channels: int, width: int, max_tokens: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.y_proj = Mlp(caption_channels, width, width)
        # the null caption is data, not a parameter: a buffer in the official code too
        self.register_buffer("y_embedding", torch.empty(max_tokens, caption_channels))

    def forward(self, caption_BLC: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            B, L, _ = caption_BLC.shape
            if L > len(self.y_embedding):
                raise ValueError(
                    f"PixArt: `caption` has {L} tokens; caption dropout replaces it by a null "
                    f"caption of {len(self.y_embedding)}: raise max_caption_tokens or cut it"
                )
            dropped = torch.rand(B, 1, 1, device=caption_BLC.device) < self.dropout
            null = self.y_embedding[:L].to(caption_BLC.dtype)
            caption_BLC = torch.where(dropped, null, caption_BLC)
        return self.y_proj(caption_BLC)


class SelfAttention(nn.Module):
    def __init__(self, config: PixArtConfig, layer: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_heads
        self.shared_tokens: SharedTokens | None = None
        self.ratio = config.compression_ratio(layer)
        self.sampling = config.kv_compression["sampling"] if config.kv_compression else None
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        if self.ratio > 1 and self.sampling == "conv":
            self.sr = nn.Conv2d(D, D, self.ratio, stride=self.ratio, groups=D)
            self.norm = nn.LayerNorm(D)
        self.q_norm = nn.LayerNorm(D) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(D) if config.qk_norm else nn.Identity()

    def forward(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """``grid`` is the picture's, also where ``x_BND`` has some of its rows alone."""
        qkv, shared = self.qkv(x_BND), self.shared_tokens
        if self.ratio == 1 and isinstance(self.q_norm, nn.Identity):
            if shared is None:
                return self.proj(pk.self_attention(qkv, self.num_heads))
            counts = [rows * columns for rows, columns in shared.grids(grid)]
            qkv = shared.to_heads(qkv.unflatten(-1, (3, self.num_heads, -1)), counts).flatten(2)
            out = pk.self_attention(qkv, self.num_heads // shared.size)
            return self.proj(shared.to_tokens(out, counts))
        B, N, D = x_BND.shape
        q, kv = qkv.view(B, N, 3, D).split((1, 2), dim=2)
        q, (k, v) = q.squeeze(2), kv.unbind(2)
        if not isinstance(self.q_norm, nn.Identity):
            # a LayerNorm under autocast returns fp32
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
            if self.ratio > 1 or shared is not None:
                kv = torch.stack([k, v], dim=2)
        if shared is not None:
            return self.proj(self._attend_shared(shared, q, kv, grid))
        if self.ratio > 1:
            k, v = self.compress(kv, grid).unbind(2)
        q, k, v = (tensor.unflatten(-1, (self.num_heads, -1)) for tensor in (q, k, v))
        return self.proj(pk.attention(q, k, v).reshape(B, N, D))

    def _attend_shared(
        self, shared: SharedTokens, q: Tensor, kv: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        grids, r = shared.grids(grid), self.ratio
        counts = [rows * columns for rows, columns in grids]
        kept = counts
        if r > 1:
            kv = self.compress(kv, grids[shared.rank])
            kept = [(rows // r) * (columns // r) for rows, columns in grids]
            if self.sampling == "uniform_every":
                kept = [count // r for count in counts]
        q = shared.to_heads(q.unflatten(-1, (1, self.num_heads, -1)), counts)
        k, v = shared.to_heads(kv.unflatten(-1, (self.num_heads, -1)), kept).unbind(2)
        return shared.to_tokens(pk.attention(q.squeeze(2), k, v).flatten(2), counts)

    def compress(self, kv: Tensor, grid: tuple[int, int]) -> Tensor:
        """Fewer keys and values, (B, N, 2, D) -> (B, N', 2, D): PixArt-Sigma, section 3.3."""
        r, (height, width) = self.ratio, grid
        if self.sampling == "conv":
            conv, norm = self.sr, self.norm
            return pk.compress_kv(
                kv, height, width, conv.weight, conv.bias, norm.weight, norm.bias, ratio=r
            )
        if self.sampling == "uniform_every":
            return kv[:, : kv.shape[1] // r * r : r]
        # "ave" takes the nearest token in the official code, which is what "uniform" does;
        # an odd last row or column is dropped, as the convolution drops it
        tokens = kv.unflatten(1, grid)
        return tokens[:, : height // r * r : r, : width // r * r : r].flatten(1, 2)


class CrossAttention(nn.Module):
    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_heads
        self.q_linear = nn.Linear(D, D)
        self.kv_linear = nn.Linear(D, 2 * D)
        self.proj = nn.Linear(D, D)
        self.gate = nn.Parameter(torch.zeros(1)) if config.gated_cross_attention else None

    def keys_values(self, text_BLD: Tensor) -> Tensor:
        """(B, L, 2, H, K): all that a block needs to know of the text."""
        return self.kv_linear(text_BLD).unflatten(-1, (2, self.num_heads, -1))

    def forward(self, x_BND: Tensor, text: Tensor, text_lengths_B: Tensor) -> Tensor:
        """``text``: (B, L, D), or what :meth:`keys_values` made of it."""
        q_BNHK = self.q_linear(x_BND).unflatten(-1, (self.num_heads, -1))
        kv_BL2HK = text if text.dim() == 5 else self.keys_values(text)
        out = self.proj(pk.cross_attention(q_BNHK, kv_BL2HK, text_lengths_B).flatten(2))
        # in out's dtype: under autocast an fp32 gate would widen the branch
        return out if self.gate is None else self.gate.tanh().to(out.dtype) * out


class Block(nn.Module):
    def __init__(self, config: PixArtConfig, layer: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.attn = SelfAttention(config, layer)
        self.cross_attn = CrossAttention(config) if config.conditioning != "class" else None
        self.mlp = Mlp(D, int(D * config.mlp_ratio), D)
        if config.conditioning == "adaln_single":
            self.scale_shift_table = nn.Parameter(torch.empty(6, D))
        else:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def modulation(self, t: Tensor, t0: Tensor | None) -> Modulation:
        if t0 is not None:
            return self.scale_shift_table, t0
        return _layer_as_modulation(self.adaLN_modulation, t)

    def forward(
        self,
        x: Tensor,  # (B, N, D) residual stream
        pending: Pending | None,  # what is to be added to it first
        grid: tuple[int, int],
        text: Tensor | None,  # (B, L, D), or this block's keys and values
        text_lengths: Tensor | None,  # (B,) int32
        t: Tensor,  # (B, D)
        t0: Tensor | None,  # (B, 6 D), with adaLN-single
        recompute: bool | Literal["selective"] = False,  # PixArt.gradient_checkpointing
    ) -> tuple[Tensor, Pending | None]:
        """The residual stream, and what it lacks: what follows adds this block's MLP to it."""
        modulation = self.modulation(t, t0)
        if recompute is True:
            inputs = (x, grid, text, text_lengths, modulation)
            return checkpoint(self._whole, *inputs, **CHECKPOINT), None
        selective = recompute == "selective"
        x, mlp = self._parts(x, pending, grid, text, text_lengths, modulation, selective)
        return x, (mlp, modulation)

    def _parts(
        self,
        x: Tensor,
        pending: Pending | None,
        grid: tuple[int, int],
        text: Tensor | None,
        text_lengths: Tensor | None,
        modulation: Modulation,
        selective: bool = False,
    ) -> tuple[Tensor, Tensor]:
        # named, because the backward may make them again where another backend is in force
        enter = partial(_enter, x, pending, modulation, pk.current_backend())
        with recomputing() as again:
            x, h = enter()
            entered = again(enter, x, h)
            # nobody holds their tensors any longer, where there is no backward
            del enter, pending
            attn = self.attn(h, grid)
            inputs = (x, attn, text, text_lengths, modulation)
            if selective:
                return checkpoint(self._after_attention, *inputs, **CHECKPOINT)
            return self._after_attention(*inputs, entered)

    def _after_attention(
        self,
        x: Tensor,
        attn: Tensor,
        text: Tensor | None,
        text_lengths: Tensor | None,
        modulation: Modulation,
        entered: Recipe | None = None,
    ) -> tuple[Tensor, Tensor]:
        before_mlp, backend = (*modulation, SHIFT_MLP, SCALE_MLP), pk.current_backend()

        def add_attention(x: Tensor, _h: Tensor | None = None) -> tuple[Tensor, Tensor]:
            x = pk.gated_residual(x, attn, *modulation, gate_row=GATE_ATTN, backend=backend)
            return x, x.to(attn.dtype)

        with recomputing() as again:
            if self.cross_attn is None:
                gate = (*modulation, GATE_ATTN)
                x, h = pk.gated_residual_adaln(x, attn, gate=gate, modulation=before_mlp)
            else:
                x, query = add_attention(x)
                again(add_attention, x, query, source=entered)
                # neither normalised nor modulated: x itself asks the text
                cross = self.cross_attn(query, text, text_lengths)
                x, h = pk.gated_residual_adaln(x, cross, modulation=before_mlp)
            again(partial(_before_mlp, x, modulation, h.dtype, backend), h)
            return x, self.mlp(h)

    def _whole(
        self,
        x: Tensor,
        grid: tuple[int, int],
        text: Tensor | None,
        text_lengths: Tensor | None,
        modulation: Modulation,
    ) -> Tensor:
        x, mlp = self._parts(x, None, grid, text, text_lengths, modulation)
        return pk.gated_residual(x, mlp, *modulation, gate_row=GATE_MLP)


class FinalLayer(nn.Module):
    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.linear = nn.Linear(D, config.patch_size**2 * config.out_channels)
        if config.conditioning == "adaln_single":
            self.scale_shift_table = nn.Parameter(torch.empty(2, D))
        else:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def modulation(self, t: Tensor, t0: Tensor | None) -> Modulation:
        if t0 is not None:
            # the timestep's embedding itself, twice, and not t0: so trained, so kept
            return self.scale_shift_table, t[:, None].expand(-1, 2, -1)
        return _layer_as_modulation(self.adaLN_modulation, t)


def _enter(
    x: Tensor, pending: Pending | None, modulation: Modulation, backend: str
) -> tuple[Tensor, Tensor]:
    """The residual stream with what it lacked, and its normalised, modulated copy."""
    table, t = modulation
    if pending is None:
        rows = {"shift_row": SHIFT_ATTN, "scale_row": SCALE_ATTN}
        return x, pk.adaln_single(x, table, t, **rows, backend=backend)
    branch, of_branch = pending
    gate, norm = (*of_branch, GATE_MLP), (table, t, SHIFT_ATTN, SCALE_ATTN)
    return pk.gated_residual_adaln(x, branch, gate=gate, modulation=norm, backend=backend)


def _before_mlp(x: Tensor, modulation: Modulation, dtype: torch.dtype, backend: str) -> Tensor:
    """The h that ``gated_residual_adaln`` returned beside x."""
    table, t = modulation
    rows = {"shift_row": SHIFT_MLP, "scale_row": SCALE_MLP}
    return pk.adaln_single(x, table, t, **rows, backend=backend).to(dtype)


def _layer_as_modulation(layer: nn.Sequential, t: Tensor) -> Modulation:
    """A modulation layer of adaLN as adaLN-single sees it: its bias is the learned table."""
    linear = layer[1]
    return linear.bias.view(-1, t.shape[1]), F.linear(F.silu(t), linear.weight)


class PixArt(nn.Module):
    """The transformer of PixArt-alpha and PixArt-Sigma, their ablation, and DiT.

    ``PixArt(config)`` has fresh weights; ``PixArt.from_pretrained(path)`` reads our folder, an
    official ``.pth`` or ``.safetensors``, or a diffusers folder.
    """

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.config = config
        # what the backward computes again, besides what costs next to nothing: nothing, all of a
        # block after its self-attention, or all of it
        self.gradient_checkpointing: bool | Literal["selective"] = False
        # with other processes; see share_tokens
        self.shared_tokens: SharedTokens | None = None
        D = config.hidden_size
        self.x_embedder = PatchEmbed(config.in_channels, D, config.patch_size)
        self.t_embedder = ScalarEmbedder(D)
        if config.micro_conditioning:
            self.csize_embedder = ScalarEmbedder(D // 3)
            self.ar_embedder = ScalarEmbedder(D // 3)
        if config.conditioning == "adaln_single":
            self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.y_embedder: CaptionEmbedder | LabelEmbedder
        if config.conditioning == "class":
            self.y_embedder = LabelEmbedder(config.num_classes, D, config.caption_dropout)
        else:
            self.y_embedder = CaptionEmbedder(
                config.caption_channels, D, config.max_caption_tokens, config.caption_dropout
            )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._positions: dict[tuple, Tensor] = {}
        self.initialize()

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor | Time,
        caption: Tensor | Text,
        caption_mask: Tensor | None = None,
        image_size: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        """Predicts the noise in ``latents`` (and the variance, if learned).

        Args:
            latents: (B, C, height, width), sides multiples of patch_size, any aspect.
            timestep: (B,), 0 to 999, integer or fractional; or what ``embed_time`` made of it
                and of the sizes.
            caption: text features (B, L, caption_channels); for a "class" model labels (B,); or
                what ``embed_text`` made of caption and mask.
            caption_mask: (B, L), non-zero where a token is real; None: all are. Any pattern.
            image_size: (B, 2) height and width in pixels, with micro_conditioning.
            aspect_ratio: (B,) or (B, 1) height / width, with micro_conditioning.

        Returns:
            (B, out_channels, height, width): noise, then variance; in the parameters' dtype, or
            autocast's.

        Raises:
            ValueError: naming the argument, what was got and what is accepted.
        """
        self._check(latents, timestep, caption, caption_mask, image_size, aspect_ratio)
        if not isinstance(timestep, Time):
            timestep = self.embed_time(timestep, image_size, aspect_ratio)
        t, t0 = timestep
        texts: Sequence[Tensor | None] = [None] * len(self.blocks)
        text_lengths = None
        if self.config.conditioning == "class":
            t = t + self.y_embedder(caption)
        else:
            if not isinstance(caption, Text):
                caption = self.embed_text(caption, caption_mask)
            texts, text_lengths = caption

        dtype, p = self.x_embedder.proj.weight.dtype, self.config.patch_size
        grid = (latents.shape[2] // p, latents.shape[3] // p)
        x = self.x_embedder(latents.to(dtype))
        x = x + self.position_embedding(grid, x.device).to(dtype)
        if self.shared_tokens is not None:
            x = self.shared_tokens.split(x, grid)
        recompute = self.gradient_checkpointing if torch.is_grad_enabled() else False
        pending = None
        for block, text in zip(self.blocks, texts, strict=True):
            x, pending = block(x, pending, grid, text, text_lengths, t, t0, recompute)
        _, h = _enter(x, pending, self.final_layer.modulation(t, t0), pk.current_backend())
        out = self.final_layer.linear(h)
        if self.shared_tokens is not None:
            out = self.shared_tokens.gather(out, grid)
        return self._unpatchify(out, grid)

    def share_tokens(self, group: ProcessGroup | None) -> None:
        """From now on each picture's tokens are shared by a group's processes; None: by nobody.

        They must be given the same arguments, and all get the whole output. The gradients of
        their parameters are those of the sum of what each makes of it.

        Raises ValueError where the group's size does not divide the number of heads.
        """
        if group is not None and self.config.num_heads % group.size():
            raise ValueError(
                f"{group.size()} processes cannot share {self.config.num_heads} heads evenly"
            )
        layers = [module for module in self.modules() if isinstance(module, SelfAttention)]
        rows = max(layer.ratio for layer in layers)
        shared = None if group is None else SharedTokens(group, rows)
        self.shared_tokens = shared
        for layer in layers:
            layer.shared_tokens = shared

    def embed_time(
        self,
        timestep: Tensor,
        image_size: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Time:
        """Of :meth:`forward`'s arguments, for calls that share them."""
        t = self.t_embedder(timestep)
        if self.config.micro_conditioning:
            t = t + self._size_embedding(image_size, aspect_ratio)
        return Time(t, self.t_block(t) if self.config.conditioning == "adaln_single" else None)

    def embed_text(self, caption: Tensor, caption_mask: Tensor | None = None) -> Text:
        """Of :meth:`forward`'s arguments, for calls that share them."""
        text = self.y_embedder(caption.to(self.x_embedder.proj.weight.dtype))
        text, lengths = _real_tokens_first(text, caption_mask)
        return Text([text] * len(self.blocks), lengths)

    def position_embedding(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """2D sinusoids of a grid of tokens, (1, N, D) fp32, computed on ``device`` once per grid.

        Each axis is stretched to the training grid's extent, then divided by pe_interpolation.
        """
        # a compiled graph computes it anew: a tensor kept across calls would be an output
        if torch.compiler.is_compiling():
            return self._compute_positions(grid, device)
        key = (grid, device)
        if key not in self._positions:
            with torch.inference_mode(False), torch.no_grad():
                positions = self._compute_positions(grid, device)
            kept = sum(tensor.nbytes for tensor in self._positions.values())
            if kept + positions.nbytes > MAX_CACHED_BYTES:
                self._positions.clear()
            # the latest is kept however large it is: graphs are captured of what is computed
            self._positions[key] = positions
        return self._positions[key]

    def _compute_positions(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        config = self.config
        base = config.input_size // config.patch_size
        quarter = config.hidden_size // 4
        steps = torch.arange(quarter, dtype=torch.float64, device=device)
        frequencies = 1 / 10_000 ** (steps / quarter)

        def axis(length: int) -> Tensor:
            coordinates = torch.arange(length, dtype=torch.float32, device=device)
            # divided in fp32 and in this order, as the published models were
            coordinates = coordinates / (length / base) / config.pe_interpolation
            angles = coordinates.double()[:, None] * frequencies
            return torch.cat([angles.sin(), angles.cos()], dim=1)

        (rows, columns), half = grid, config.hidden_size // 2
        by_column = axis(columns)[None, :, :].expand(rows, columns, half)
        by_row = axis(rows)[:, None, :].expand(rows, columns, half)
        # the first half of the channels encodes the column
        return torch.cat([by_column, by_row], dim=-1).reshape(1, -1, 2 * half).float()

    def _size_embedding(self, image_size: Tensor | None, aspect_ratio: Tensor | None) -> Tensor:
        assert image_size is not None and aspect_ratio is not None  # checked by _check
        height, width = (self.csize_embedder(image_size[:, i]) for i in (0, 1))
        ratio = self.ar_embedder(aspect_ratio.reshape(-1))
        return torch.cat([height, width, ratio], dim=1)

    def _unpatchify(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        (rows, columns), p = grid, self.config.patch_size
        x = x_BND.view(-1, rows, columns, p, p, self.config.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, x.shape[-1], rows * p, columns * p)

    def _check(
        self,
        latents: Tensor,
        timestep: Tensor | Time,
        caption: Tensor | Text,
        caption_mask: Tensor | None,
        image_size: Tensor | None,
        aspect_ratio: Tensor | None,
    ) -> None:
        config, B, p = self.config, latents.shape[0], self.config.patch_size

        def require(ok: bool, name: str, got: object, accepted: str) -> None:
            if not ok:
                got = tuple(got.shape) if isinstance(got, Tensor) else got
                raise ValueError(f"PixArt: `{name}` is {got}; accepted: {accepted}")

        C = config.in_channels
        accepted = f"(B, {C}, height, width), sides multiples of {p}"
        ok = latents.dim() == 4 and latents.shape[1] == C
        require(
            ok and not any(side % p for side in latents.shape[2:]), "latents", latents, accepted
        )
        if isinstance(timestep, Time):
            single = config.conditioning == "adaln_single"
            ok = len(timestep.t_BD) == B and (timestep.t0 is not None) == single
            accepted = f"what this model's embed_time made, of {B} timesteps"
            require(ok, "timestep", "a Time of another kind or number", accepted)
        else:
            require(timestep.shape == (B,), "timestep", timestep, f"({B},)")
        if isinstance(caption, Text):
            ok = len(caption.of_blocks) == config.depth and caption.lengths_B.shape == (B,)
            accepted = f"what this model's embed_text made, of {B} captions"
            require(ok, "caption", "a Text of another depth or number", accepted)
            accepted = "None beside a Text, which knows its lengths"
            require(caption_mask is None, "caption_mask", caption_mask, accepted)
        elif config.conditioning == "class":
            require(caption.shape == (B,), "caption", caption, f"class labels ({B},)")
        else:
            accepted = f"({B}, L, {config.caption_channels})"
            ok = caption.dim() == 3 and caption.shape[::2] == (B, config.caption_channels)
            require(ok, "caption", caption, accepted)
            if caption_mask is not None:
                accepted = f"{tuple(caption.shape[:2])}"
                require(
                    caption_mask.shape == caption.shape[:2], "caption_mask", caption_mask, accepted
                )
        if config.micro_conditioning and isinstance(timestep, Tensor):
            missing = "a tensor: this model has micro_conditioning"
            for name, value, per_sample in (
                ("image_size", image_size, 2),
                ("aspect_ratio", aspect_ratio, 1),
            ):
                require(value is not None, name, value, missing)
                assert value is not None
                ok = value.shape[:1] == (B,) and value.numel() == B * per_sample
                require(ok, name, value, f"({B}, {per_sample})")

    def initialize(self) -> None:
        """Fresh weights as PixArt-alpha's: at first text is ignored and the output is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, PatchEmbed):
                nn.init.xavier_uniform_(module.proj.weight.flatten(1))
            elif isinstance(module, ScalarEmbedder):
                nn.init.normal_(module.mlp[0].weight, std=0.02)
                nn.init.normal_(module.mlp[2].weight, std=0.02)
            elif isinstance(module, LabelEmbedder):
                nn.init.normal_(module.embedding_table.weight, std=0.02)
            elif isinstance(module, CaptionEmbedder):
                nn.init.normal_(module.y_proj.fc1.weight, std=0.02)
                nn.init.normal_(module.y_proj.fc2.weight, std=0.02)
                nn.init.normal_(module.y_embedding, std=self.config.caption_channels**-0.5)
            elif isinstance(module, SelfAttention) and hasattr(module, "sr"):
                # an average at first
                nn.init.constant_(module.sr.weight, 1 / module.ratio**2)
                nn.init.zeros_(module.sr.bias)
            elif isinstance(module, CrossAttention) and module.gate is None:
                # with a gate, itself zero at first, a zero projection would never learn
                nn.init.zeros_(module.proj.weight)
            elif isinstance(module, (Block, FinalLayer)):
                if self.config.conditioning == "adaln_single":
                    nn.init.normal_(module.scale_shift_table, std=self.config.hidden_size**-0.5)
                else:
                    nn.init.zeros_(module.adaLN_modulation[1].weight)
        if self.config.conditioning == "adaln_single":
            nn.init.normal_(self.t_block[1].weight, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)

    @classmethod
    def from_pretrained(cls, path: str | Path, config: PixArtConfig | None = None) -> PixArt:
        """Reads any of the formats PixArt is published in; see ``pixart.checkpoints.load``."""
        from pixart import checkpoints

        return checkpoints.load(path, config)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors``, the latter complete or not at all."""
        from pixart import checkpoints

        checkpoints.save(self, folder)


def _real_tokens_first(text_BLD: Tensor, mask_BL: Tensor | None) -> tuple[Tensor, Tensor]:
    """Text with its real tokens moved to the front, and how many there are, (B,) int32.

    Attention does not care about the order of keys, so this attends any mask exactly, without
    asking the host how many tokens are real.
    """
    B, L, _ = text_BLD.shape
    if mask_BL is None:
        return text_BLD, torch.full((B,), L, dtype=torch.int32, device=text_BLD.device)
    real = mask_BL != 0
    order = torch.argsort(real.to(torch.int8), dim=1, descending=True, stable=True)
    return text_BLD.gather(1, order[..., None].expand_as(text_BLD)), real.sum(1, dtype=torch.int32)

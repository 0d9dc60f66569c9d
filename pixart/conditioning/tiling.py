"""An autoencoder's convolutions tile by tile, with the result of the whole picture.

Tiles that are decoded apart and blended show seams and shifts of colour, because a GroupNorm takes
its statistics from all pixels. Here each tile is cut with what its convolutions see beyond its
edge, and each GroupNorm has the statistics of the whole, which a pass over the tiles gathers
first. Against the whole picture at once, what remains is rounding.

The autoencoder runs in stages: one for its full resolution, and one for each residual block below
it. What is held whole are the pixels, and what lies between two stages, which has a quarter of the
picture's pixels at most. The middle block, whose attention joins all pixels, runs whole at the
latents' resolution. The price: for every norm its stage is computed anew up to there. With PixArt's
autoencoders decoding takes 3.4 times the convolutions' work of decoding at once, encoding 2.3.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# pixels of a tile's side, at its stage's finer resolution. Its activations are then small beside
# what is held between stages at 2048 pixels, and what it sees beyond its edge is 6 % more
TILE = 512


def decode(model: Any, latents: Tensor) -> Tensor:
    """``AutoencoderKL.decode`` of one picture, (1, C, h, w) to (1, 3, factor h, factor w).

    Raises ValueError for an autoencoder with attention outside its middle block.
    """
    decoder = model.decoder
    _require_convolutions(decoder.up_blocks)
    x = latents if model.post_quant_conv is None else model.post_quant_conv(latents)
    x = decoder.mid_block(decoder.conv_in(x))
    stages: list[list[nn.Module]] = [[]]
    *smaller, last = decoder.up_blocks
    for block in smaller:
        for resnet in block.resnets:
            stages[-1].append(resnet)
            stages.append([])
        stages[-1] += block.upsamplers
    stages[-1] += [*last.resnets, decoder.conv_norm_out, decoder.conv_act, decoder.conv_out]
    return _run(stages, x)


def encode(model: Any, images: Tensor) -> Tensor:
    """The parameters of ``AutoencoderKL.encode``'s distribution of one picture, (1, 2 C, h, w).

    Raises ValueError for an autoencoder with attention outside its middle block.
    """
    encoder = model.encoder
    _require_convolutions(encoder.down_blocks)
    stages = [[*block.resnets, *(block.downsamplers or ())] for block in encoder.down_blocks]
    stages[0].insert(0, encoder.conv_in)
    x = encoder.mid_block(_run(stages, images))
    x = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(x)))
    return x if model.quant_conv is None else model.quant_conv(x)


def _require_convolutions(blocks: Iterable[nn.Module]) -> None:
    others = sorted({type(block).__name__ for block in blocks if hasattr(block, "attentions")})
    if others:
        raise ValueError(
            f"this autoencoder has {', '.join(others)}, whose attention takes all pixels at once; "
            "tiles are for DownEncoderBlock2D and UpDecoderBlock2D, as PixArt's autoencoders have"
        )


def _run(stages: Iterable[list[nn.Module]], x: Tensor) -> Tensor:
    for stage in stages:
        x = _by_tiles(stage, x)
    return x


@dataclass(frozen=True)
class _Span:
    """A tile along one axis of its stage's input: its own pixels, and those that it sees."""

    own: tuple[int, int]
    seen: tuple[int, int]

    def scaled(self, ratio: float) -> slice:
        """Its own part of the stage's output."""
        return slice(*(int(pixel * ratio) for pixel in self.own))

    def within(self, length: int) -> slice:
        """Its own part of an activation of what it sees, ``length`` long in any resolution."""
        low, high = self.seen
        return slice(*((pixel - low) * length // (high - low) for pixel in self.own))


def _spans(length: int, tile: int, halo: int) -> list[_Span]:
    edges = [*range(0, length, tile), length]
    return [
        _Span((start, stop), (max(0, start - halo), min(length, stop + halo)))
        for start, stop in itertools.pairwise(edges)
    ]


def _by_tiles(stage: list[nn.Module], x: Tensor) -> Tensor:
    """``stage``, a layer of which may halve or double the resolution, of x (1, C, h, w)."""
    up, down = (any(isinstance(m, kind) for m in stage) for kind in (Upsample2D, Downsample2D))
    tile, ratio = (TILE // 2, 2.0) if up else (TILE, 0.5 if down else 1.0)
    # each convolution sees a pixel further, in its own resolution; a halving begins at even pixels
    modules = (module for layer in stage for module in layer.modules())
    reach = sum(m.kernel_size[0] // 2 for m in modules if isinstance(m, nn.Conv2d))
    halo = -(-reach // 2) * (1 if up else 2)
    tiles = list(itertools.product(*(_spans(side, tile, halo) for side in x.shape[2:])))
    norms, y = _GroupNorms(), None
    while y is None:
        for rows, columns in tiles:
            part = norms.run(stage, x[..., slice(*rows.seen), slice(*columns.seen)], rows, columns)
            if part is None:
                continue
            if y is None:
                y = part.new_empty(*part.shape[:2], *(int(side * ratio) for side in x.shape[2:]))
            y[..., rows.scaled(ratio), columns.scaled(ratio)] = _own(part, rows, columns)
        norms.end_pass()
    return y


def _own(seen: Tensor, rows: _Span, columns: _Span) -> Tensor:
    height, width = seen.shape[2:]
    return seen[..., rows.within(height), columns.within(width)]


class _Unknown(Exception):
    """Ends a tile's computation at a norm whose statistics are being gathered."""


class _GroupNorms(TorchFunctionMode):
    """GroupNorms of a whole picture seen tile by tile, known by the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self._known: list[_Moments] = []
        self._gathered: _Moments | None = None

    def run(
        self, layers: Iterable[nn.Module], x: Tensor, rows: _Span, columns: _Span
    ) -> Tensor | None:
        """``layers`` of what a tile sees, or None where they reach a norm that is not known yet."""
        self._tile, self._calls = (rows, columns), iter(self._known)
        try:
            with self:
                for layer in layers:
                    x = layer(x, None) if isinstance(layer, ResnetBlock2D) else layer(x)
        except _Unknown:
            return None
        return x

    def end_pass(self) -> None:
        """To be called when all tiles have run: what they gathered is known from now on."""
        if self._gathered is not None:
            self._known.append(self._gathered)
            self._gathered = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        call = self._group_norm if func is F.group_norm else func
        return call(*args, **(kwargs or {}))

    def _group_norm(
        self,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        moments = next(self._calls, None)
        if moments is None:
            own = _own(x, *self._tile).reshape(num_groups, -1).to(wide)
            self._gathered = _Moments.of(own).merged(self._gathered)
            raise _Unknown
        per_group = x.shape[1] // num_groups
        mean, variance = (m.repeat_interleave(per_group) for m in moments.mean_and_variance())
        weight, bias = (p if p is None else p.to(wide) for p in (weight, bias))
        # with statistics of each channel that are given, it is the same formula
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)


@dataclass(frozen=True)
class _Moments:
    """Count, means (G,) and sums of squared deviations (G,) of values in G groups."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> _Moments:
        variance, mean = torch.var_mean(values, dim=1, correction=0)
        return cls(values.shape[1], mean, variance * values.shape[1])

    def merged(self, other: _Moments | None) -> _Moments:
        """Of both together (Chan, Golub and LeVeque, 1979), which cancels no digits."""
        if other is None:
            return self
        count, apart = self.count + other.count, other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = apart**2 * (self.count * other.count / count)
        return _Moments(count, mean, self.squares + other.squares + between)

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.squares / self.count

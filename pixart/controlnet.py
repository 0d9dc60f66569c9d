"""ControlNet: a PixArt that draws along an image, such as edges."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

import pixart_kernels as pk
from pixart.checkpoints.files import read_tensors, safetensors_writer
from pixart.files import write_complete
from pixart.model import GATE_MLP, Block, Pending, PixArt

# of the 28 blocks of a published model
COPIES = 13
FILE = "controlnet.safetensors"


class ControlBlock(nn.Module):
    """A trainable copy of a block, and the projections, zero at first, into and out of it."""

    def __init__(self, block: Block, first: bool) -> None:
        super().__init__()
        self.copied_block = copy.deepcopy(block).requires_grad_(True)
        width = block.mlp.fc2.out_features
        if first:
            self.before_proj = _zero_linear(width)
        self.after_proj = _zero_linear(width)


class ControlledPixArt(nn.Module):
    """A frozen PixArt with ControlNet-Transformer (PixArt-delta, arXiv:2401.05252, section 4).

    Copies of the first blocks see the tokens of the base model's first block and the control's;
    what copy i makes of them is added to what base block i + 1 gets. As what it is added by is
    zero at first, training begins with the base model's output. The parameters carry the names of
    the official code's ControlPixArtHalf.

    Args:
        base: the model, which is frozen in place.
        copies: of how many blocks, fewer than the base has.

    Raises ValueError where there are not as many blocks.
    """

    def __init__(self, base: PixArt, copies: int = COPIES) -> None:
        super().__init__()
        if not 1 <= copies < len(base.blocks):
            raise ValueError(
                f"`copies` is {copies}; accepted: 1 to {len(base.blocks) - 1}, as the model has "
                f"{len(base.blocks)} blocks"
            )
        self.base_model = base.requires_grad_(False)
        self.controlnet = nn.ModuleList(
            ControlBlock(cast(Block, base.blocks[i]), first=i == 0) for i in range(copies)
        ).to(next(base.parameters()))

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        caption: Tensor,
        caption_mask: Tensor | None = None,
        image_size: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        *,
        control: Tensor,
    ) -> Tensor:
        """As the base model's, with ``control`` (B or 1, C, H, W): an image's clean latents.

        Raises ValueError where its shape is not that of ``latents``.
        """
        if control.shape[1:] != latents.shape[1:] or len(control) not in (1, len(latents)):
            raise ValueError(
                f"`control` is {tuple(control.shape)}; accepted: the shape of latents, "
                f"{tuple(latents.shape)}, or one for all"
            )
        base = self.base_model
        p = base.config.patch_size
        grid = (latents.shape[2] // p, latents.shape[3] // p)
        tokens = base.x_embedder(control.to(base.x_embedder.proj.weight.dtype))
        tokens = tokens + base.position_embedding(grid, tokens.device).to(tokens.dtype)
        after = self._after_block(tokens)
        hooks = [
            block.register_forward_hook(after)
            for block, _ in zip(base.blocks, self.controlnet, strict=False)
        ]
        try:
            return base(latents, timestep, caption, caption_mask, image_size, aspect_ratio)
        finally:
            for hook in hooks:
                hook.remove()

    def _after_block(self, control_BND: Tensor) -> Callable[..., tuple[Tensor, Pending | None]]:
        copies = iter(self.controlnet)
        stream: list[Tensor] = []

        def after(
            _block: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Pending | None]
        ) -> tuple[Tensor, Pending | None]:
            (x, pending), (_, _, *shared) = output, inputs
            control: Any = next(copies)
            if not stream:
                stream.append(_whole(x, pending) + control.before_proj(control_BND))
            stream[0] = _whole(*control.copied_block(stream[0], None, *shared))
            # what x lacks yet is added later, to the sum of both
            return x + control.after_proj(stream[0]).to(x.dtype), pending

        return after

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``controlnet.safetensors``, without the base model; complete or not at all."""
        state = {f"controlnet.{name}": x for name, x in self.controlnet.state_dict().items()}
        write_complete((Path(folder) / FILE, safetensors_writer(state)))

    @classmethod
    def from_pretrained(cls, base: PixArt, path: str | Path) -> ControlledPixArt:
        """Reads what :meth:`save_pretrained` or the official training wrote, a folder or a file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds no ControlNet, or one of another model.
        """
        path = Path(path)
        tensors = read_tensors(path / FILE if path.is_dir() else path)
        state = {
            name.removeprefix("controlnet."): tensor
            for name, tensor in tensors.items()
            if name.startswith("controlnet.")
        }
        if not state:
            raise ValueError(f"{path}: holds no ControlNet; its tensors are named controlnet.…")
        model = cls(base, len({name.split(".")[0] for name in state}))
        try:
            model.controlnet.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path}: no ControlNet of this model: {error}") from error
        return model


def _whole(x: Tensor, pending: Pending | None) -> Tensor:
    """A block's output with what it lacks."""
    if pending is None:
        return x
    branch, (table, t) = pending
    return pk.gated_residual(x, branch, table, t, gate_row=GATE_MLP)


def _zero_linear(width: int) -> nn.Linear:
    linear = nn.Linear(width, width)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear

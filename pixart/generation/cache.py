"""What the steps of a picture share is computed once, and their launches may be one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pixart_kernels as pk
from pixart.model import PixArt, Text, Time

Forward = Callable[[Tensor, Time, Text], Tensor]


class Cached:
    """A model for ``pixart.diffusion.sample`` that embeds a prompt and the timesteps once.

    Each block's keys and values come from the layer and the shapes that would compute them at
    every step: the same bits. Timesteps are embedded in one batch, not each for all samples: the
    same numbers but for a matrix product's rounding in another shape.

    Args:
        model: any PixArt with captions, in eval mode.
        forward: what runs it, the model itself or :class:`CudaGraphs` of it; None: the model.
    """

    def __init__(self, model: PixArt, forward: Forward | None = None) -> None:
        self.model, self.forward = model, forward or model
        self._timesteps: Tensor | None = None
        self._conditions: tuple[Tensor | None, ...] = ()

    def prepare(self, timesteps: Tensor) -> None:
        """Names the timesteps (calls,) that calls will be made with."""
        self._timesteps, self._conditions = timesteps, ()

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        caption: Tensor,
        caption_mask: Tensor | None = None,
        image_size: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        """As the model's ``forward``. The conditions are known by identity, not by value.

        After :meth:`prepare`, a timestep that it did not name, or samples at different ones, give
        NaN: finding out here would wait for the device.
        """
        conditions = caption, caption_mask, image_size, aspect_ratio
        if not self._conditions or any(
            a is not b for a, b in zip(conditions, self._conditions, strict=True)
        ):
            self._embed(*conditions)
            self._conditions = conditions
        if self._timesteps is None:
            time = self.model.embed_time(timestep, image_size, aspect_ratio)
        else:
            time = self._prepared(timestep)
        return self.forward(latents, time, self._text)

    def _embed(
        self,
        caption: Tensor,
        caption_mask: Tensor | None,
        image_size: Tensor | None,
        aspect_ratio: Tensor | None,
    ) -> None:
        text, lengths = self.model.embed_text(caption, caption_mask)
        blocks = zip(self.model.blocks, text, strict=True)
        self._text = Text([b.cross_attn.keys_values(tokens) for b, tokens in blocks], lengths)
        if self._timesteps is None:
            return
        steps, rows = len(self._timesteps), 1
        if image_size is not None and aspect_ratio is not None:
            rows = len(caption)
            image_size = image_size.repeat(steps, 1)
            aspect_ratio = aspect_ratio.reshape(-1).repeat(steps)
        time = self.model.embed_time(
            self._timesteps.repeat_interleave(rows), image_size, aspect_ratio
        )
        self._times = [x if x is None else x.unflatten(0, (steps, rows)) for x in time]

    def _prepared(self, timestep: Tensor) -> Time:
        assert self._timesteps is not None
        at = (self._timesteps[:, None] == timestep).all(1)
        index = at.to(torch.uint8).argmax().view(1)

        def row(of_steps: Tensor | None) -> Tensor | None:
            if of_steps is None:
                return None
            found = of_steps.index_select(0, index)[0]
            return torch.where(at.any(), found, torch.nan).expand(len(timestep), -1)

        t, t0 = map(row, self._times)
        assert t is not None
        return Time(t, t0)


class CudaGraphs:
    """Replays a model's forward from CUDA graphs, one for each shape of latents and text.

    Graphs read inputs from buffers of their own; those of the text, which all graphs share, are
    filled once per prompt. Weights may change in place; when they moved, graphs are captured anew
    at the next prompt. What else a forward depends on, such as hooks and autocast, must stay as it
    was. Not for several threads at once.
    """

    def __init__(self, model: PixArt) -> None:
        self.model = model
        self._graphs: dict[tuple, _Graph] = {}
        self._texts: dict[torch.Size, Text] = {}  # by shape of a block's keys and values
        self._text: Text | None = None
        self._weights: list[int] = []
        self._pool: Any = None

    # buffers outlive a caller's inference mode, whose tensors nobody else may write to
    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, latents: Tensor, time: Time, text: Text) -> Tensor:
        with torch.cuda.device_of(latents):
            if text is not self._text:
                self._take(text)
            of_text = text.of_blocks[0].shape
            key = latents.shape, latents.dtype, of_text, pk.current_backend()
            if key not in self._graphs:
                if latents.is_cuda and self._pool is None:
                    self._pool = torch.cuda.graph_pool_handle()
                inputs = latents, time, self._texts[of_text]
                self._graphs[key] = _Graph(self.model, *inputs, self._pool)
            return self._graphs[key](latents, time)

    def _take(self, text: Text) -> None:
        weights = [parameter.data_ptr() for parameter in self.model.parameters()]
        if weights != self._weights:
            self._graphs.clear()
            self._texts.clear()
        self._text, self._weights = text, weights
        buffers = self._texts.get(text.of_blocks[0].shape)
        if buffers is None:
            blocks = [keys_values.clone() for keys_values in text.of_blocks]
            self._texts[blocks[0].shape] = Text(blocks, text.lengths_B.clone())
        else:
            torch._foreach_copy_(list(buffers.of_blocks), list(text.of_blocks))
            buffers.lengths_B.copy_(text.lengths_B)


class _Graph:
    def __init__(self, model: PixArt, latents: Tensor, time: Time, text: Text, pool: Any) -> None:
        self.latents = latents.clone()
        self.time = Time(time.t_BD.clone(), None if time.t0 is None else time.t0.clone())
        # the graph reads them, and the model keeps them for a limited number of grids
        p = model.config.patch_size
        grid = (latents.shape[2] // p, latents.shape[3] // p)
        self.positions = model.position_embedding(grid, latents.device)
        self.replay, self.output = capture(lambda: model(self.latents, self.time, text), pool)

    def __call__(self, latents: Tensor, time: Time) -> Tensor:
        self.latents.copy_(latents)
        self.time.t_BD.copy_(time.t_BD)
        if self.time.t0 is not None and time.t0 is not None:
            self.time.t0.copy_(time.t0)
        self.replay()
        # the next replay writes there again, and in shared memory the next graph's
        return self.output.clone()


def capture(run: Callable[[], Tensor], pool: Any = None) -> tuple[Callable[[], None], Tensor]:
    """``run`` as a CUDA graph: what replays it, and the tensor that a replay fills.

    Graphs of one ``pool`` (``torch.cuda.graph_pool_handle``) share their memory, so that a replay
    may overwrite another's output.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # kernels are compiled and libraries choose theirs before anything is recorded
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = run()
    return graph.replay, output

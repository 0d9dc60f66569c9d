"""Tokens shared by processes: the output and the gradients of one that has them all."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import run_apart

from pixart import PixArt, PixArtConfig
from pixart.sequence import SharedTokens

SMALL = {
    "hidden_size": 32, "depth": 2, "num_heads": 4, "caption_channels": 6, "max_caption_tokens": 5,
    "input_size": 16, "caption_dropout": 0.0,
}  # fmt: skip


def compressed(sampling: str) -> dict:
    return {"kv_compression": {"sampling": sampling, "scale_factor": 2, "layers": [1]}}


CONFIGS = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "conv": compressed("conv"),
    "conv, qk_norm": {**compressed("conv"), "qk_norm": True},
    "ave": compressed("ave"),
    "uniform_every": compressed("uniform_every"),
}
# of tokens: rows that no number of processes divides, an odd last row, and an odd count of tokens
GRIDS = [(11, 3), (10, 5), (9, 7)]


def compare() -> None:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    for name, changes in CONFIGS.items():
        for height, width in GRIDS:
            torch.manual_seed(height)
            model = PixArt(PixArtConfig(**SMALL, **changes))
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
            model.double()
            model.gradient_checkpointing = ["selective", True, False][height % 3]
            latents = torch.randn(2, 4, 2 * height, 2 * width, dtype=torch.float64)
            inputs = latents, torch.tensor([3, 700]), torch.randn(2, 5, 6)
            mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
            weights = torch.randn_like(model(*inputs, mask))
            found = []
            for shared in (None, group):
                model.share_tokens(shared)
                model.zero_grad()
                output = model(*inputs, mask)
                (output * weights).sum().backward()
                gradients = [parameter.grad for parameter in model.parameters()]
                if shared is not None:
                    for gradient in gradients:
                        dist.all_reduce(gradient)
                        gradient /= dist.get_world_size()
                found.append([output.detach(), *(gradient.clone() for gradient in gradients)])
            wrong = partial("{}, {} rows: {}".format, name, height)
            for one, several in zip(*found, strict=True):
                torch.testing.assert_close(several, one, rtol=1e-9, atol=1e-9, msg=wrong)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, 4])
def test_tokens_are_shared_exactly(tmp_path: Path, processes: int) -> None:
    run_apart(compare, output=tmp_path / "out", processes=processes)


def test_rows_are_dealt_out_evenly_in_whole_windows() -> None:
    def shares(height: int, processes: int, rows: int) -> list[int]:
        group = SimpleNamespace(rank=lambda: 0, size=lambda: processes)
        return [height for height, _ in SharedTokens(group, rows).grids((height, 3))]

    assert shares(8, 4, 2) == [2, 2, 2, 2]
    assert shares(11, 4, 2) == [2, 4, 2, 3]
    assert shares(5, 2, 1) == [2, 3]
    with pytest.raises(ValueError, match="6 rows.*cannot be shared by 4.*multiples of 2 rows"):
        shares(6, 4, 2)


def test_heads_must_be_shared_evenly() -> None:
    model = PixArt(PixArtConfig(**SMALL))
    with pytest.raises(ValueError, match="3 processes cannot share 4 heads"):
        model.share_tokens(SimpleNamespace(rank=lambda: 0, size=lambda: 3))

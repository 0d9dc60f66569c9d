"""KV compression: the reference against a loop over windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import pixart_kernels as pk


def arguments(B: int, height: int, width: int, D: int, ratio: int) -> tuple:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    kv = leaf(B, height * width, 2, D)
    return kv, height, width, leaf(D, 1, ratio, ratio), leaf(D), leaf(D), leaf(D)


# 5 x 7: the last row and column fill no window
@pytest.mark.parametrize(("height", "width", "ratio"), [(4, 6, 2), (5, 7, 2), (8, 4, 4), (3, 3, 1)])
def test_each_window_is_convolved_and_normalised(height: int, width: int, ratio: int) -> None:
    kv, _, _, weight, bias, norm_weight, norm_bias = args = arguments(2, height, width, 12, ratio)
    out = pk.compress_kv(*args, ratio=ratio)
    grid = kv.view(2, height, width, 2, 12)
    expected = []
    for row in range(height // ratio):
        for column in range(width // ratio):
            top, left = row * ratio, column * ratio
            window = grid[:, top : top + ratio, left : left + ratio]
            token = torch.einsum("bijcd,dij->bcd", window, weight[:, 0]) + bias
            centred = token - token.mean(-1, keepdim=True)
            variance = centred.square().mean(-1, keepdim=True)
            expected.append(centred / (variance + 1e-5).sqrt() * norm_weight + norm_bias)
    torch.testing.assert_close(out, torch.stack(expected, dim=1))


def test_gradients() -> None:
    args = arguments(2, 3, 5, 4, 2)
    tensors = (args[0], *args[3:])
    assert gradcheck(lambda kv, *rest: pk.compress_kv(kv, 3, 5, *rest, ratio=2), tensors)


def test_reads_the_packed_projection_and_keeps_heads() -> None:
    kv, height, width, *rest = (
        a.detach() if isinstance(a, Tensor) else a for a in arguments(2, 4, 4, 12, 2)
    )
    qkv = torch.cat([torch.randn(2, 16, 1, 12, dtype=torch.float64), kv], dim=2)
    out = pk.compress_kv(qkv[:, :, 1:], height, width, *rest, ratio=2)
    assert torch.equal(out, pk.compress_kv(kv, height, width, *rest, ratio=2))
    heads = pk.compress_kv(kv.unflatten(-1, (3, 4)), height, width, *rest, ratio=2)
    assert torch.equal(heads.flatten(3), out)


def test_wrong_argument_is_named() -> None:
    args = arguments(1, 4, 4, 8, 2)
    with pytest.raises(ValueError, match="`kv` is .1, 16, 2, 8.; accepted: 4 x 5 = 20 tokens"):
        pk.compress_kv(args[0], 4, 5, *args[3:], ratio=2)
    with pytest.raises(ValueError, match="`ratio` is 5; accepted: 1 to 4"):
        pk.compress_kv(*args, ratio=5)
    with pytest.raises(ValueError, match="`weight`"):
        pk.compress_kv(*args, ratio=3)
    with pytest.raises(TypeError, match="`ratio` is 2.0, a float; accepted: an integer"):
        pk.compress_kv(*args, ratio=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`weight` is .8,.; accepted: .D, 1, 2, 2."):
        pk.compress_kv(*args[:3], args[4], *args[4:], ratio=2)
    with pytest.raises(ValueError, match="`weight` is .0, 1, 2, 2."):
        pk.compress_kv(*arguments(1, 4, 4, 0, 2), ratio=2)

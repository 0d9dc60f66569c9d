"""Attention ops: the reference against the textbook formula, and what wrong input gets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import pixart_kernels as pk
from pixart_kernels import _extension, _triton, dispatch


def textbook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


# awkward lengths; 72 is PixArt's head dimension
@pytest.mark.parametrize(("B", "N", "H", "d"), [(1, 1, 1, 8), (2, 63, 3, 72), (3, 65, 2, 24)])
def test_self_attention_is_the_formula(B: int, N: int, H: int, d: int) -> None:
    qkv = leaf(B, N, 3 * H * d)
    q, k, v = qkv.view(B, N, 3, H, d).unbind(2)
    weight = torch.randn(B, N, H * d, dtype=torch.float64)
    expected = textbook(q, k, v).reshape(B, N, H * d)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), qkv)
    out = pk.self_attention(qkv, H)
    (grad,) = torch.autograd.grad((out * weight).sum(), qkv)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_self_attention_reads_strided_input() -> None:
    wide = torch.randn(2, 7, 2 * 3 * 16)
    assert torch.equal(
        pk.self_attention(wide[..., :48], 2), pk.self_attention(wide[..., :48].clone(), 2)
    )


def test_attention_with_fewer_keys() -> None:
    q, k, v = leaf(2, 9, 2, 8), leaf(2, 4, 2, 8), leaf(2, 4, 2, 8)
    torch.testing.assert_close(pk.attention(q, k, v), textbook(q, k, v))
    assert gradcheck(pk.attention, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cross_attention_attends_real_tokens_alone(dtype: torch.dtype) -> None:
    q, kv = torch.randn(3, 5, 2, 8, dtype=dtype), torch.randn(3, 6, 2, 2, 8, dtype=dtype)
    lengths = torch.tensor([6, 1, 3], dtype=torch.int32)
    out = pk.cross_attention(q, kv, lengths)
    for b, length in enumerate(lengths.tolist()):
        k, v = kv[b : b + 1, :length].double().unbind(2)
        expected = textbook(q[b : b + 1].double(), k, v)
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            out[b : b + 1].double(), expected, rtol=tolerance, atol=tolerance
        )
    assert out.dtype == dtype


def test_cross_attention_never_reads_padding() -> None:
    q, kv = leaf(3, 4, 2, 8), torch.randn(3, 5, 2, 2, 8, dtype=torch.float64)
    lengths = torch.tensor([2, 0, 5], dtype=torch.int32)
    expected = pk.cross_attention(q, kv, lengths)
    poisoned = kv.clone()
    poisoned[0, 2:] = poisoned[1] = float("nan")
    poisoned.requires_grad_()
    out = pk.cross_attention(q, poisoned, lengths)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    assert poisoned.grad[0, :2].any() and not poisoned.grad[0, 2:].any()
    # a row without text: 0, and zero gradients
    assert not out[1].any() and not poisoned.grad[1].any() and not q.grad[1].any()
    assert q.grad.isfinite().all() and poisoned.grad.isfinite().all()


def test_cross_attention_without_text_ignores_its_query() -> None:
    q = torch.full((1, 3, 2, 8), float("nan"), requires_grad=True)
    out = pk.cross_attention(q, torch.randn(1, 4, 2, 2, 8), torch.zeros(1, dtype=torch.int32))
    out.sum().backward()
    assert not out.any() and not q.grad.any()


def test_cross_attention_gradients_and_no_text_at_all() -> None:
    q, kv = leaf(2, 3, 2, 4), leaf(2, 4, 2, 2, 4)
    lengths = torch.tensor([3, 0], dtype=torch.int32)
    assert gradcheck(lambda q, kv: pk.cross_attention(q, kv, lengths), (q, kv))
    empty = leaf(2, 0, 2, 2, 4)
    out = pk.cross_attention(q, empty, torch.zeros(2, dtype=torch.int32))
    out.sum().backward()
    assert not out.any() and not q.grad.any()


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: pk.self_attention(torch.zeros(2, 3, 10), 2), ValueError, "`qkv` is .2, 3, 10."),
        (lambda: pk.self_attention(torch.zeros(2, 3, 12).long(), 2), TypeError, "floating"),
        (
            lambda: pk.attention(torch.zeros(2, 3, 2, 8), *[torch.zeros(2, 3, 1, 8)] * 2),
            ValueError,
            "`k` is .2, 3, 1, 8.; accepted: .2, Nk, 2, 8.",
        ),
        (
            lambda: pk.cross_attention(
                torch.zeros(1, 3, 2, 8), torch.zeros(1, 4, 2, 2, 8), torch.tensor([4])
            ),
            TypeError,
            "`kv_lengths` is torch.int64; accepted: int32",
        ),
        (
            lambda: pk.cross_attention(
                torch.zeros(1, 3, 2, 8), torch.zeros(1, 4, 2, 16), torch.tensor([4]).int()
            ),
            ValueError,
            "`kv` is",
        ),
        (
            lambda: pk.cross_attention(
                torch.zeros(1, 3, 2, 8),
                torch.zeros(1, 4, 2, 2, 8),
                [4],  # type: ignore[arg-type]
            ),
            TypeError,
            "`kv_lengths` is a list; accepted: an int32 tensor",
        ),
        (
            lambda: pk.self_attention(torch.zeros(2, 3, 12), "4"),  # type: ignore[arg-type]
            TypeError,
            "`num_heads` is '4', a str; accepted: an integer",
        ),
        (
            lambda: pk.self_attention(torch.zeros(2, 3, 12), 0),
            ValueError,
            "`num_heads` is 0; accepted: 1 or more",
        ),
    ],
)
def test_wrong_argument_is_named(call, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        call()


def on_gpu(dtype: torch.dtype) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device("cuda:0"), dtype=dtype)


@pytest.mark.parametrize("op", ["self_attention", "attention"])
def test_cuda_kernels_take_heads_of_72_in_16_bits(op: str, monkeypatch) -> None:
    monkeypatch.setattr(_extension, "why_not_cuda", lambda x, only: None)
    for dtype in (torch.bfloat16, torch.float16):
        assert dispatch.why_not(op, "cuda", on_gpu(dtype), head_dim=72) is None
        # the benefit of the doubt: doctor knows of no heads
        assert dispatch.why_not(op, "cuda", on_gpu(dtype)) is None
        for d in (0, 64, 80):
            reason = dispatch.why_not(op, "cuda", on_gpu(dtype), head_dim=d)
            assert reason == f"heads have {d} elements; attention's cuda kernels take 72"
    reason = dispatch.why_not(op, "cuda", on_gpu(torch.float32), head_dim=72)
    assert reason == "x is torch.float32; attention's cuda kernels take bfloat16 and float16"


@pytest.mark.parametrize("op", ["self_attention", "attention", "cross_attention"])
def test_triton_kernels_take_heads_up_to_128(op: str, monkeypatch) -> None:
    monkeypatch.setattr(_triton, "why_not_triton", lambda x: None)
    for d in (None, 1, 72, 128):
        assert dispatch.why_not(op, "triton", on_gpu(torch.float32), head_dim=d) is None
    for d in (0, 129, 136):
        reason = dispatch.why_not(op, "triton", on_gpu(torch.float32), head_dim=d)
        assert reason == f"heads have {d} elements; triton kernels take 1 to 128"


def test_auto_passes_over_kernels_for_other_heads(monkeypatch) -> None:
    monkeypatch.setattr(_triton, "why_not_triton", lambda x: None)
    proof = dispatch.Verification("abc", "cpu/attention.jsonl")
    monkeypatch.setitem(dispatch.VERIFIED, ("self_attention", "triton", "cpu"), proof)
    x = torch.zeros(1, 2, 2, 136)
    assert pk.chosen_backend("self_attention", x, head_dim=128) == "triton"
    assert pk.chosen_backend("self_attention", x, head_dim=136) == "reference"
    assert pk.self_attention(x.repeat(1, 1, 1, 3).flatten(2), 2).shape == (1, 2, 272)
    with pytest.raises(RuntimeError, match="heads have 136 elements"):
        pk.self_attention(x.repeat(1, 1, 1, 3).flatten(2), 2, backend="triton")
    with pytest.raises(RuntimeError, match="heads have 136 elements"):
        pk.attention(x, x, x, backend="triton")
    with pytest.raises(RuntimeError, match="heads have 136 elements"):
        lengths = torch.ones(1, dtype=torch.int32)
        pk.cross_attention(x, torch.stack([x, x], 2), lengths, backend="triton")


@pytest.mark.parametrize("op", ["self_attention", "attention", "cross_attention"])
def test_results_have_q_s_dtype_under_autocast(op: str) -> None:
    x = torch.randn(2, 3, 2, 8)
    arguments = {
        "self_attention": (torch.randn(2, 3, 48), 2),
        "attention": (x, x, x),
        "cross_attention": (x, torch.stack([x, x], 2), torch.tensor([3, 1], dtype=torch.int32)),
    }[op]
    with torch.autocast("cpu", torch.bfloat16):
        assert getattr(pk, op)(*arguments, backend="reference").dtype == torch.float32

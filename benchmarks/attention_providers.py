"""Who computes attention: PyTorch's backends by name, other libraries' kernels, and ours."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pixart_kernels as pk
from benchmarks.providers import in_short

if TYPE_CHECKING:
    from benchmarks.attention import AttentionCase

SDPA = "SDPA"  # called as models call it: PyTorch picks
OURS = ("triton", "cuda")
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
# name -> where a library keeps a function of q, k and v, (B, N, H, d) each
LIBRARIES = {
    "flash-attn 2": ("flash_attn", "flash_attn_func"),
    "flash-attn 3": ("flash_attn_interface", "flash_attn_func"),
    "flash-attn 4": ("flash_attn.cute", "flash_attn_func"),
    "xformers": ("xformers.ops", "memory_efficient_attention"),
}


@dataclass(frozen=True)
class Layout:
    """How a provider wants q, k and v, (B, N, H, d) each, and how it returns its output."""

    pack: Callable[[Tensor, Tensor, Tensor], list[Tensor]]
    unpack: Callable[..., tuple[Tensor, ...]]  # gradients of what was packed -> of q, k and v
    heads: Callable[[Tensor], Tensor]  # its output -> (B, N, H, d)
    like_output: Callable[[Tensor], Tensor]  # (B, N, H, d) -> as its output lies


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


TOKENS_FIRST = Layout(
    lambda *qkv: [x.contiguous() for x in qkv],
    lambda *grads: grads,
    lambda out: out,
    lambda out: out.contiguous(),
)
HEADS_FIRST = Layout(
    lambda *qkv: [_heads_first(x) for x in qkv],
    lambda *grads: tuple(x.transpose(1, 2) for x in grads),
    lambda out: out.transpose(1, 2),
    _heads_first,
)


def packed(heads: int) -> Layout:
    """(B, N, 3*H*d), as one linear layer writes it."""
    return Layout(
        lambda *qkv: [torch.stack(qkv, 2).flatten(2)],
        lambda grad: grad.unflatten(2, (3, heads, -1)).unbind(2),
        lambda out: out.unflatten(2, (heads, -1)),
        lambda out: out.flatten(2),
    )


@dataclass(frozen=True)
class Provider:
    layout: Layout
    run: Callable[..., Tensor]

    def call(self, *tensors: Tensor) -> tuple[Tensor]:
        return (self.run(*tensors),)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of (B, N, H, d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _packed_sdpa(heads: int) -> Callable[[Tensor], Tensor]:
    # unbound before it is transposed: the gradient is then packed in one copy, not two
    return lambda qkv: _sdpa(*qkv.unflatten(2, (3, heads, -1)).unbind(2)).flatten(2)


def ours(case: AttentionCase, heads: int, backend: str) -> Provider:
    if case.op == "self_attention":
        return Provider(packed(heads), lambda qkv: pk.self_attention(qkv, heads, backend=backend))
    return Provider(TOKENS_FIRST, lambda q, k, v: pk.attention(q, k, v, backend=backend))


def for_cpu(case: AttentionCase, heads: int) -> dict[str, Provider | str]:
    """What `auto` takes, and what it must not be slower than: a call without it."""
    if case.op == "self_attention":
        direct = Provider(packed(heads), _packed_sdpa(heads))
    else:
        direct = Provider(TOKENS_FIRST, _sdpa)
    return {SDPA: direct, "auto": ours(case, heads, "auto")}


def _named(backend: SDPBackend) -> Provider:
    # cuDNN's and the plain products want whole heads, the others whole tokens
    heads_first = backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
    function = F.scaled_dot_product_attention if heads_first else _sdpa

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return function(q, k, v)

    return Provider(HEADS_FIRST if heads_first else TOKENS_FIRST, run)


def _library(module: str, name: str) -> Provider | str:
    try:
        function = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    # a library for another torch or GPU may fail at import in its own way
    except Exception as error:
        return f"cannot be imported: {in_short(error)}"

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v)
        # some versions return the softmax's statistics as well
        return out[0] if isinstance(out, tuple) else out

    return Provider(TOKENS_FIRST, run)


def _flex() -> Provider | str:
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError as error:
        return f"cannot be imported: {in_short(error)}"
    # not compiled, it would be timed as if it were: fullgraph makes that an error
    return Provider(HEADS_FIRST, torch.compile(flex_attention, dynamic=False, fullgraph=True))


def for_gpu(case: AttentionCase, heads: int) -> dict[str, Provider | str]:
    """Everyone, by name; or why there is no such provider here."""
    found: dict[str, Provider | str] = {SDPA: Provider(TOKENS_FIRST, _sdpa)}
    found |= {name: _named(backend) for name, backend in BACKENDS.items()}
    found["FlexAttention"] = _flex()
    found |= {name: _library(*place) for name, place in LIBRARIES.items()}
    if case.ours:
        found |= {backend: ours(case, heads, backend) for backend in OURS}
    return found

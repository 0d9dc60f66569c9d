"""Cross-attention on the CPU: PyTorch's flash attention over each sample's real tokens, unmasked.

Lengths lie on the host, and a sample's tokens are a view: padding costs nothing, where a mask
costs the products with all L tokens. Neighbours of one length share a call.
"""

# no `annotations` import: torch.library reads the annotations of ops as objects
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from pixart_kernels._triton import dense_rows
from pixart_kernels.attention.cross_autograd import CROSS_KERNELS, CrossKernels, register_fakes

# what scaled_dot_product_attention runs on the CPU; called by name, it leaves its lse
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def why_not_native(x: Tensor, head_dim: int | None = None) -> str | None:
    """Why these cannot run on ``x``, or None; heads may have any size."""
    if x.device.type == "cpu":
        return None
    return f"per-sample attention reads the lengths on the host and x is on {x.device}"


def _runs(kv_lengths: Tensor, L: int) -> Iterator[tuple[slice, int]]:
    """Neighbouring samples of one length, and that length."""
    begin = 0
    for length, samples in groupby(kv_lengths.clamp(0, L).tolist()):
        end = begin + len(list(samples))
        yield slice(begin, end), length
        begin = end


def _heads_first(x: Tensor) -> Tensor:
    return dense_rows(x).transpose(1, 2)


def _whole(parts: list[Tensor]) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


# derivatives are CrossAttentionFunction's: called as ops, these must not record their own
@torch.no_grad()
def cross_attention_fwd(q: Tensor, kv: Tensor, kv_lengths: Tensor) -> tuple[Tensor, Tensor]:
    B, N, H, d = q.shape
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    if q.numel() == 0:
        return q.new_empty(q.shape), q.new_empty((B, H, N), dtype=lse_dtype)
    outs, lses = [], []
    for samples, length in _runs(kv_lengths, kv.shape[1]):
        if length == 0:
            empty = samples.stop - samples.start
            outs.append(q.new_zeros((empty, N, H, d)))
            lses.append(q.new_zeros((empty, H, N), dtype=lse_dtype))
            continue
        k, v = kv[samples, :length].unbind(2)
        out, lse = _flash(*map(_heads_first, (q[samples], k, v)))
        outs.append(out.transpose(1, 2))
        lses.append(lse)
    return _whole(outs), _whole(lses)


@torch.no_grad()
def cross_attention_bwd(
    dout: Tensor, q: Tensor, kv: Tensor, kv_lengths: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    dq, dkv = q.new_empty(q.shape), kv.new_empty(kv.shape)
    if q.numel() == 0:
        return dq, dkv.zero_()
    for samples, length in _runs(kv_lengths, kv.shape[1]):
        dkv[samples, length:] = 0
        if length == 0:
            dq[samples] = 0
            continue
        k, v = kv[samples, :length].unbind(2)
        operands = map(_heads_first, (dout[samples], q[samples], k, v, out[samples]))
        gradients = _flash_backward(*operands, lse[samples], 0.0, False)
        dk, dv = dkv[samples, :length].unbind(2)
        for gradient, found in zip((dq[samples], dk, dv), gradients, strict=True):
            gradient.copy_(found.transpose(1, 2))
    return dq, dkv


_library = torch.library.Library("pixart_kernels_cpu", "FRAGMENT")
for _function in (cross_attention_fwd, cross_attention_bwd):
    _library.define(_function.__name__ + torch.library.infer_schema(_function, mutates_args=()))
    _library.impl(_function.__name__, _function, "CPU")
register_fakes(_library.ns)
# ops even in eager mode: the lengths of a fake tensor cannot be read
CROSS_KERNELS["native"] = CrossKernels(
    *(getattr(torch.ops.pixart_kernels_cpu, name).default for name in CrossKernels._fields)
)

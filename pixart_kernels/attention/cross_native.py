"""Cross-attention on the CPU: PyTorch's flash attention over each sample's real tokens, unmasked.

Lengths lie on the host, and a sample's tokens are a view: padding costs nothing, where a mask
costs the products with all L tokens. Neighbours of one length share a call; so do all samples of
one length where gathering them costs less than calls.
"""

# no `annotations` import: torch.library reads the annotations of ops as objects
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from pixart_kernels._triton import dense_rows
from pixart_kernels.attention.autograd import CROSS_KERNELS, CrossKernels, register_cross_fakes

# what scaled_dot_product_attention runs on the CPU; called by name, it leaves its lse
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def why_not_native(x: Tensor, head_dim: int | None = None) -> str | None:
    """Why these cannot run on ``x``, or None; heads may have any size."""
    if x.device.type == "cpu":
        return None
    return f"per-sample attention reads the lengths on the host and x is on {x.device}"


# bytes of a sample's queries: up to here a copy takes less time than a call does
GATHERED = 64 << 10


def _groups(q: Tensor, kv_lengths: Tensor, L: int) -> Iterator[tuple[slice | Tensor, int]]:
    """Samples of one length, a view of them where they are neighbours, and that length."""
    lengths = kv_lengths.clamp(0, L).tolist()
    order = list(range(len(lengths)))
    if q[0].numel() * q.itemsize <= GATHERED:
        order.sort(key=lengths.__getitem__)
    for length, found in groupby(order, key=lengths.__getitem__):
        samples = list(found)
        first, end = samples[0], samples[-1] + 1
        neighbours = end - first == len(samples)
        yield slice(first, end) if neighbours else torch.tensor(samples), length


def _heads_first(x: Tensor) -> Tensor:
    return dense_rows(x).transpose(1, 2)


# derivatives are CrossAttentionFunction's: called as ops, these must not record their own
@torch.no_grad()
def cross_attention_fwd(q: Tensor, kv: Tensor, kv_lengths: Tensor) -> tuple[Tensor, Tensor]:
    B, N, H, _ = q.shape
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    if q.numel() == 0:
        return q.new_empty(q.shape), q.new_empty((B, H, N), dtype=lse_dtype)
    out, lse = q.new_empty(q.shape), q.new_empty((B, H, N), dtype=lse_dtype)
    for samples, length in _groups(q, kv_lengths, kv.shape[1]):
        if length == 0:
            out[samples], lse[samples] = 0, 0
            continue
        k, v = kv[samples, :length].unbind(2)
        found, found_lse = _flash(*map(_heads_first, (q[samples], k, v)))
        if len(found) == B:
            return found.transpose(1, 2).contiguous(), found_lse.contiguous()
        out[samples], lse[samples] = found.transpose(1, 2), found_lse
    return out, lse


@torch.no_grad()
def cross_attention_bwd(
    dout: Tensor, q: Tensor, kv: Tensor, kv_lengths: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    dq, dkv = q.new_empty(q.shape), kv.new_empty(kv.shape)
    if q.numel() == 0:
        return dq, dkv.zero_()
    for samples, length in _groups(q, kv_lengths, kv.shape[1]):
        dkv[samples, length:] = 0
        if length == 0:
            dq[samples] = 0
            continue
        k, v = kv[samples, :length].unbind(2)
        operands = map(_heads_first, (dout[samples], q[samples], k, v, out[samples]))
        found = _flash_backward(*operands, lse[samples], 0.0, False)
        dq[samples], dkv[samples, :length, 0], dkv[samples, :length, 1] = (
            gradient.transpose(1, 2) for gradient in found
        )
    return dq, dkv


_library = torch.library.Library("pixart_kernels_cpu", "FRAGMENT")
for _function in (cross_attention_fwd, cross_attention_bwd):
    _library.define(_function.__name__ + torch.library.infer_schema(_function, mutates_args=()))
    _library.impl(_function.__name__, _function, "CPU")
register_cross_fakes(_library.ns)
# ops even in eager mode: the lengths of a fake tensor cannot be read
CROSS_KERNELS["native"] = CrossKernels(
    *(getattr(torch.ops.pixart_kernels_cpu, name).default for name in CrossKernels._fields)
)

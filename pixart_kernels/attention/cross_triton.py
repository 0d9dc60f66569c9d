"""Cross-attention in Triton: the kernels of triton.py, whose loops end at each sample's length.

Lengths are read on the device, and tokens past them never are. A text has few keys, so programs
that own keys share out the queries; each leaves fp32 sums, added in order by a kernel of its own.
"""

# no `annotations` import: torch.library reads the launchers' annotations as objects
import torch
import triton
import triton.language as tl
from torch import Tensor

from pixart_kernels import _triton
from pixart_kernels._triton import dense_rows
from pixart_kernels.attention import config
from pixart_kernels.attention.autograd import CROSS_KERNELS, CrossKernels, register_cross_fakes
from pixart_kernels.attention.triton import _real_keys, backward, forward


@_triton.kernel
def _fold_kernel(
    sums,  # [B * splits, L, 2, H, D], dense
    dkv,  # [B, L, 2, H, D], dense
    lengths,  # [B]
    H: tl.int64,
    L: tl.int64,
    tiles: tl.int64,
    splits: tl.int64,
    D: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One program for SIZE elements of one sample; 0 past its length, where sums are unwritten."""
    i_program = tl.program_id(0).to(tl.int64)
    i_b, i_element = i_program // tiles, i_program % tiles * SIZE
    width = 2 * H * D
    o_element = i_element + tl.arange(0, SIZE)
    m_real = o_element < _real_keys(lengths, i_b, L) * width
    b_dkv = tl.zeros((SIZE,), tl.float32)
    for i_split in range(0, splits):
        p_sums = sums + (i_b * splits + i_split) * L * width
        b_dkv += tl.load(p_sums + o_element, mask=m_real, other=0.0)
    tl.store(dkv + i_b * L * width + o_element, b_dkv, mask=o_element < L * width)


def cross_attention_fwd(q: Tensor, kv: Tensor, kv_lengths: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape)
    k, v = dense_rows(kv).unbind(2)
    return out, forward(dense_rows(q), k, v, out, kv_lengths.contiguous())


def cross_attention_bwd(
    dout: Tensor, q: Tensor, kv: Tensor, kv_lengths: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    B, L, _, H, d = kv.shape
    dq, dkv = q.new_empty(q.shape), kv.new_empty(kv.shape)
    splits = config.splits(q.shape[1])
    sums = dkv if splits == 1 else q.new_empty((B * splits, *kv.shape[1:]), dtype=torch.float32)
    lengths = kv_lengths.contiguous()
    dout, q, kv = map(dense_rows, (dout, q, kv))
    (k, v), (dk, dv) = kv.unbind(2), sums.unbind(2)
    backward(dout, q, k, v, out, lse, dq, dk, dv, lengths)
    if splits > 1:
        tiles = triton.cdiv(L * 2 * H * d, config.FOLDED)
        with torch.cuda.device_of(dkv):
            _fold_kernel[(B * tiles,)](
                *(sums, dkv, lengths, H, L, tiles, splits, d, config.FOLDED), num_warps=4
            )
    return dq, dkv


_library = torch.library.Library("pixart_kernels_triton", "FRAGMENT")
CROSS_KERNELS["triton"] = CrossKernels(
    *(_triton.op(_library, globals()[name]) for name in CrossKernels._fields)
)
register_cross_fakes(_library.ns)

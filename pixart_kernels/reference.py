"""Every op in plain PyTorch, same signatures: what each op means, on any device."""

from pixart_kernels.adaln.reference import (
    adaln_modulate,
    adaln_single,
    gated_residual,
    gated_residual_adaln,
)
from pixart_kernels.attention.reference import attention, cross_attention, self_attention
from pixart_kernels.came.reference import came_step
from pixart_kernels.kv_compression.reference import compress_kv
from pixart_kernels.mlp.reference import bias_gelu

__all__ = [
    "adaln_modulate",
    "adaln_single",
    "attention",
    "bias_gelu",
    "came_step",
    "compress_kv",
    "cross_attention",
    "gated_residual",
    "gated_residual_adaln",
    "self_attention",
]

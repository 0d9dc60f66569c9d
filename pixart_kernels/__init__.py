"""Fused kernels for the operations a PixArt transformer is made of, forward and backward."""

# above the imports, because the extension is checked against it while they run
__version__ = "0.1.0"

from pixart_kernels import reference
from pixart_kernels.adaln import (
    adaln_modulate,
    adaln_single,
    gated_residual,
    gated_residual_adaln,
)
from pixart_kernels.attention import attention, cross_attention, self_attention
from pixart_kernels.dispatch import chosen as chosen_backend
from pixart_kernels.dispatch import use_backend
from pixart_kernels.kv_compression import compress_kv
from pixart_kernels.mlp import bias_gelu

__all__ = [
    "adaln_modulate",
    "adaln_single",
    "attention",
    "bias_gelu",
    "chosen_backend",
    "compress_kv",
    "cross_attention",
    "gated_residual",
    "gated_residual_adaln",
    "reference",
    "self_attention",
    "use_backend",
]

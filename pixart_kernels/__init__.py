"""Fused kernels for the operations a PixArt transformer is made of, forward and backward."""

# above the imports, because the extension is checked against it while they run
__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

from pixart_kernels import reference
from pixart_kernels.adaln import (
    adaln_modulate,
    adaln_single,
    gated_residual,
    gated_residual_adaln,
)
from pixart_kernels.attention import attention, cross_attention, self_attention
from pixart_kernels.came import came_step
from pixart_kernels.dispatch import chosen as chosen_backend
from pixart_kernels.dispatch import current_backend, use_backend
from pixart_kernels.kv_compression import compress_kv
from pixart_kernels.mlp import bias_gelu

if TYPE_CHECKING:
    from pixart_kernels.integrations.diffusers import patch, unpatch

__all__ = [
    "adaln_modulate",
    "adaln_single",
    "attention",
    "bias_gelu",
    "came_step",
    "chosen_backend",
    "compress_kv",
    "cross_attention",
    "current_backend",
    "gated_residual",
    "gated_residual_adaln",
    "patch",
    "reference",
    "self_attention",
    "unpatch",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # diffusers takes seconds to import, and nothing else here needs it
    if name in ("patch", "unpatch"):
        from pixart_kernels.integrations import diffusers

        return getattr(diffusers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

from pixart_kernels.adaln.functional import (
    adaln_modulate,
    adaln_single,
    gated_residual,
    gated_residual_adaln,
)

__all__ = ["adaln_modulate", "adaln_single", "gated_residual", "gated_residual_adaln"]

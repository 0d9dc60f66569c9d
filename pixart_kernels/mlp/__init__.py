from pixart_kernels.mlp.functional import bias_gelu

__all__ = ["bias_gelu"]

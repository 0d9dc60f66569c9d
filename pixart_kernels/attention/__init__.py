from pixart_kernels.attention.functional import attention, cross_attention, self_attention

__all__ = ["attention", "cross_attention", "self_attention"]

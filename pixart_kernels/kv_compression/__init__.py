from pixart_kernels.kv_compression.functional import compress_kv

__all__ = ["compress_kv"]

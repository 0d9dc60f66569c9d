from pixart_kernels.came.functional import came_step

__all__ = ["came_step"]

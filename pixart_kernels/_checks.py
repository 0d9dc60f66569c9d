"""Messages for wrong arguments: one wording for every op, raised before anything is launched."""

from __future__ import annotations

import torch
from torch import Tensor


def wrong(op: str, argument: str, got: object, accepted: str) -> ValueError:
    return ValueError(f"{op}: `{argument}` is {got}; accepted: {accepted}")


def shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}"


def check_floating(op: str, **tensors: Tensor) -> None:
    """Raises TypeError for what is no floating tensor, ValueError for different devices."""
    device = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            got = type(tensor).__name__
            raise TypeError(f"{op}: `{name}` is a {got}; accepted: a floating tensor")
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            accepted = "a floating dtype of 16 bits or more"
            raise TypeError(f"{op}: `{name}` has dtype {tensor.dtype}; accepted: {accepted}")
        if device is not None and tensor.device != device:
            raise wrong(op, name, f"on {tensor.device}", f"a tensor on {device}, like the others")
        device = tensor.device


def check_integer(op: str, name: str, value: int, least: int = 1) -> None:
    """Raises TypeError for what is no integer, ValueError below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        got = type(value).__name__
        raise TypeError(f"{op}: `{name}` is {value!r}, a {got}; accepted: an integer")
    if value < least:
        raise wrong(op, name, value, f"{least} or more")


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp32 for 16-bit inputs; fp32 and fp64 stay (fp64 is what gradcheck needs)."""
    return torch.promote_types(tensor.dtype, torch.float32)

"""What every op's autograd Function needs before it is applied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether a derivative will be asked for: a Function costs more than a small kernel."""
    # a Function refuses the tangent of forward-mode differentiation; a bare kernel would drop it
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def narrow(*tensors: Tensor) -> Any:
    """fp64 operands beside an x that is not are read as fp32, as the reference reads them."""
    return tuple(t.float() if t.dtype is torch.float64 else t for t in tensors)


def distinct(*arguments: Any) -> tuple:
    """Under torch.compile, each tensor once: Dynamo refuses the same one twice in a Function.

    The usual case is one (table, t) pair that gives the gate and the next modulation.
    """
    if not torch.compiler.is_compiling():
        return arguments
    seen: list[Tensor] = []
    result: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            if any(argument is tensor for tensor in seen):
                argument = argument.view_as(argument)
            seen.append(argument)
        result.append(argument)
    return tuple(result)

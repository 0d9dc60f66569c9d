"""The nearest kernels of other libraries, where installed. None computes what PixArt's blocks do.

Each is held against its own definition, since it does not have ours. What none of them has:
a gate (so `gated_residual` and `gated_residual_adaln` have no rival here; the RMSNorms with a
residual add it ungated), rows composed from a table and t, or a bias with an ungated tanh-GELU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Rival:
    definition: Callable[..., Outputs]  # what it computes, in plain PyTorch
    run: Callable[..., Outputs]


def _import(name: str):
    try:
        return importlib.import_module(name)
    # a library for another torch or GPU may fail at import in its own way
    except Exception:
        return None


def _layer_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    return (F.layer_norm(x, x.shape[-1:], scale[0], shift[0], 1e-6),)


def _rms_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    return (F.rms_norm(x, x.shape[-1:], scale[0], 1e-6) + shift[0],)


def _modulated_rms_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    return (F.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None],)


def rivals(op: str) -> dict[str, Rival]:
    """Rivals of ``op`` that can be imported, by a name that says what they compute."""
    if op != "adaln_modulate":
        return {}
    found = {}
    liger, liger_modulated, quack = map(
        _import,
        ("liger_kernel.ops.layer_norm", "liger_kernel.ops.modulated_rms_norm", "quack"),
    )
    if liger is not None:
        apply = liger.LigerLayerNormFunction.apply
        found["Liger LayerNorm, one scale for all samples"] = Rival(
            _layer_norm, lambda x, shift, scale: (apply(x, scale[0], shift[0], 1e-6),)
        )
    if liger_modulated is not None:
        modulated = liger_modulated.LigerModulatedRMSNormFunction.apply
        # fp32 statistics; not in place, which would overwrite the incoming gradient
        options = (1e-6, 0.0, "llama", False)
        found["Liger modulated RMSNorm (atomics)"] = Rival(
            _modulated_rms_norm,
            lambda x, shift, scale: (modulated(x, None, scale, shift, *options),),
        )
    if quack is not None:
        found["quack RMSNorm, one scale for all samples"] = Rival(
            _rms_norm, lambda x, shift, scale: (quack.rmsnorm(x, scale[0], shift[0], eps=1e-6),)
        )
    return found

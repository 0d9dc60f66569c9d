"""What others run in place of our ops: the official formulas, and other libraries' kernels.

``OFFICIAL`` is what official and diffusers code runs in 16 bits: every step in x's dtype, where
our reference computes in fp32 and rounds once.

The nearest kernels of other libraries, where installed: none computes what PixArt's blocks do. Each
is held against its own definition, since it does not have ours. What none of them has:
a gate (so `gated_residual` and `gated_residual_adaln` have no rival here; the RMSNorms with a
residual add it ungated), rows composed from a table and t, or a bias with an ungated tanh-GELU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Rival:
    definition: Callable[..., Outputs]  # what it computes, in plain PyTorch
    run: Callable[..., Outputs]


EAGER_16BIT = "eager, 16-bit"


def baseline(row: dict) -> str:
    """Whose time a result's speed-ups are over: what is run where our ops are not."""
    return EAGER_16BIT if EAGER_16BIT in row["timings"] else "eager"


def _row(x: Tensor, table: Tensor, t: Tensor, row: int) -> Tensor:
    return (table.to(x.dtype)[row] + t.reshape(len(t), *table.shape)[:, row])[:, None]


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _adaln_single(x: Tensor, table: Tensor, t: Tensor) -> Outputs:
    return (_modulate(x, _row(x, table, t, 0), _row(x, table, t, 1)),)


def _gated_residual(x: Tensor, branch: Tensor, table: Tensor, t: Tensor) -> Outputs:
    return (x + _row(x, table, t, 2) * branch,)


def _gated_residual_adaln(x: Tensor, branch: Tensor, table: Tensor, t: Tensor) -> Outputs:
    (x_new,) = _gated_residual(x, branch, table, t)
    return x_new, _modulate(x_new, _row(x, table, t, 3), _row(x, table, t, 4))


def _adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    return (_modulate(x, shift[:, None], scale[:, None]),)


def _bias_gelu(x: Tensor, bias: Tensor) -> Outputs:
    return (F.gelu(x + bias.to(x.dtype), approximate="tanh"),)


def _compress_kv(kv: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Outputs:
    D, side = kv.shape[-1], isqrt(kv.shape[1])

    def compressed(tokens: Tensor) -> Tensor:
        image = tokens.transpose(1, 2).unflatten(2, (side, side))
        windows = F.conv2d(image, weight, bias, stride=weight.shape[2], groups=D)
        return F.layer_norm(windows.flatten(2).transpose(1, 2), (D,), *norm)

    return (torch.stack([compressed(tokens) for tokens in kv.unbind(2)], dim=2),)


# op -> its formula on the tensors that the registry gives it
OFFICIAL: dict[str, Callable[..., Outputs]] = {
    "adaln_single": _adaln_single,
    "gated_residual": _gated_residual,
    "gated_residual_adaln": _gated_residual_adaln,
    "adaln_modulate": _adaln_modulate,
    "bias_gelu": _bias_gelu,
    "compress_kv": _compress_kv,
}


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

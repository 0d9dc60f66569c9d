"""Public CAME step: argument checks, then whichever backend `dispatch` selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pixart_kernels import _triton
from pixart_kernels._checks import check_floating, wrong
from pixart_kernels._checks import shape as shape_of
from pixart_kernels._extension import DTYPES
from pixart_kernels.came import native, reference
from pixart_kernels.came.reference import Reduce
from pixart_kernels.dispatch import register, select

OP = "came_step"


@torch.no_grad()
def came_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    state: Mapping[str, Sequence[Tensor]],
    *,
    lr: float,
    betas: Sequence[float],
    eps: Sequence[float],
    clip_threshold: float,
    weight_decay: float,
    shape: torch.Size | None = None,
    reduce: Reduce | None = None,
    backend: str | None = None,
) -> None:
    """One step of CAME for weights of one shape, in place.

    Luo et al. 2023, arXiv:2307.02047, algorithm 2, with the results of ``came-pytorch``.

    Args:
        weights: tensors of one shape, dtype and device.
        gradients: one for each weight, of its shape and all of one dtype.
        state: by ``came-pytorch``'s names, fp32 averages, a list of one for each weight: "exp_avg"
            of the weight's shape, and of weights with two dimensions or more, (*, R, C),
            "exp_avg_sq_row" and "exp_avg_res_row" (*, R), "exp_avg_sq_col" and "exp_avg_res_col"
            (*, C); of others "exp_avg_sq". All start as zeros.
        lr: learning rate.
        betas: three decays, of the moment, of squared gradients and of squared deviations.
        eps: two numbers, added to squared gradients and to squared deviations.
        clip_threshold: largest root mean square of an update before the moment.
        weight_decay: share of a weight, times ``lr``, that a step takes away.
        shape: of a whole weight, if ``weights`` are shards, cut along the first dimension. The
            shards' averages are cut with them, but for columns of a matrix.
        reduce: sums a small tensor over the shards, in place.
        backend: see :func:`pixart_kernels.use_backend`.

    Arithmetic is fp32; a 16-bit weight is rounded after its decay and after its update.

    Raises:
        ValueError, TypeError: naming the argument, what was got and what is accepted.
        RuntimeError: ``backend`` was named and cannot run, with every reason.
    """
    if len(weights) == 0:
        return
    averages = {name: list(tensors) for name, tensors in state.items()}
    lists = {"weights": list(weights), "gradients": list(gradients), **averages}
    whole = _check(lists, betas, eps, shape)
    if reduce is None and whole != lists["weights"][0].shape:
        raise wrong(OP, "reduce", None, f"what sums over the shards of {tuple(whole)}")
    if whole.numel() == 0:
        return
    if len(whole) == 0:
        whole = torch.Size((1,))
        lists = {name: [x.view(1) for x in tensors] for name, tensors in lists.items()}
    weights, gradients = lists.pop("weights"), lists.pop("gradients")
    in_place = [x for tensors in (weights, *lists.values()) for x in tensors]
    contiguous = all(x.is_contiguous() for x in in_place)
    run = select(OP, weights[0], backend, contiguous=contiguous, sharded=reduce is not None)
    run(
        weights,
        gradients,
        lists,
        lr=lr,
        betas=betas,
        eps=eps,
        clip_threshold=clip_threshold,
        weight_decay=weight_decay,
        shape=whole,
        reduce=reduce,
    )
    # kernels write behind autograd's back: a backward that needs an old weight must notice
    torch.autograd.graph.increment_version(in_place)


def _check(
    lists: dict[str, list[Tensor]],
    betas: Sequence[float],
    eps: Sequence[float],
    shape: torch.Size | None,
) -> torch.Size:
    """Raises for whatever does not fit the first weight; the shape of a whole one."""
    if len(betas) != 3:
        raise wrong(OP, "betas", betas, "three numbers")
    if len(eps) != 2:
        raise wrong(OP, "eps", eps, "two numbers")
    first = lists["weights"][0]
    check_floating(OP, weights=first)
    local, whole = first.shape, first.shape if shape is None else torch.Size(shape)
    if len(whole) != len(local) or whole[1:] != local[1:]:
        raise wrong(OP, "shape", tuple(whole), f"that of which {tuple(local)} is a shard")
    expected = {"weights": local, "gradients": local, "exp_avg": local}
    if len(local) < 2:
        expected["exp_avg_sq"] = local
    for kind in ("sq", "res") if len(local) > 1 else ():
        expected[f"exp_avg_{kind}_row"] = local[:-1]
        expected[f"exp_avg_{kind}_col"] = local[:-2] + local[-1:]
    if lists.keys() != expected.keys():
        given, wanted = (", ".join(list(names)[2:]) for names in (lists, expected))
        raise wrong(OP, "state", given or "empty", f"{wanted} for weights {tuple(local)}")
    for name, tensors in lists.items():
        if len(tensors) != len(lists["weights"]):
            count = len(lists["weights"])
            raise wrong(OP, name, f"a list of {len(tensors)}", f"{count}, one for each weight")
        size, dtype = expected[name], torch.float32
        if name in ("weights", "gradients"):
            check_floating(OP, **{name: tensors[0]})
            dtype = tensors[0].dtype
            if dtype not in (first.dtype, *DTYPES):
                raise TypeError(f"{OP}: `{name}` have dtype {dtype}; accepted: {first.dtype}")
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                got = type(tensor).__name__
                raise TypeError(f"{OP}: `{name}[{i}]` is a {got}; accepted: a tensor")
            if tensor.layout != torch.strided:
                raise wrong(OP, f"{name}[{i}]", tensor.layout, "a dense tensor")
            if tensor.shape != size:
                raise wrong(OP, f"{name}[{i}]", shape_of(tensor), str(tuple(size)))
            if tensor.dtype != dtype or tensor.device != first.device:
                got = f"{tensor.dtype} on {tensor.device}"
                raise wrong(OP, f"{name}[{i}]", got, f"{dtype} on {first.device}")
    return whole


def _why_not_triton(x: Tensor, *, contiguous: bool = True, sharded: bool = False) -> str | None:
    return _triton.why_not_triton(x) if contiguous else native.NOT_CONTIGUOUS


def _triton_step(*arguments: Any, **settings: Any) -> None:
    from pixart_kernels.came import triton

    triton.came_step(*arguments, **settings)


register(OP, "reference", reference.came_step)
register(OP, "native", native.came_step, native.why_not)
register(OP, "triton", _triton_step, _why_not_triton)

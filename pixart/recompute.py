"""Tensors that cost little to make again are not kept for the backward.

A linear layer keeps its input for its weight's gradient. Where that input is an elementwise
function of what the backward has anyway, the graph keeps how to make it instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Make = Callable[..., Tensor | tuple[Tensor, ...]]


class Recipe:
    """Makes tensors again, once for all that ask in one backward."""

    def __init__(self, make: Make, tensors: tuple[Tensor, ...], source: Recipe | None) -> None:
        self.make, self.source = make, source
        self.strides = [tensor.stride() for tensor in tensors]
        self.users = self.waiting = 0
        self.made: tuple[Tensor, ...] | None = None
        if source is not None:
            source.users += 1

    def __call__(self) -> tuple[Tensor, ...]:
        made = self.made
        if made is None:
            sources = () if self.source is None else self.source()
            with torch.no_grad():
                result = self.make(*sources)
            made = result if isinstance(result, tuple) else (result,)
            if [tensor.stride() for tensor in made] != self.strides:
                raise RuntimeError("a tensor was made again with other strides than before")
            self.made, self.waiting = made, self.users
        self.waiting -= 1
        if self.waiting <= 0:
            self.made = None
        return made


class _Saved:
    """What the graph holds in place of a tensor: an alias, or how to make it."""

    def __init__(self, tensor: Tensor) -> None:
        # an alias, because an output that holds itself would never be freed
        self.tensor: Tensor | None = tensor.detach()
        # autograd compares versions of what it holds itself, not of what hooks hold
        self.version = tensor._version
        self.recipe: tuple[Recipe, int] | None = None

    def forget(self, recipe: Recipe, index: int) -> None:
        assert self.tensor is not None
        saved, self.tensor, self.recipe = self.tensor, None, (recipe, index)
        self.layout = saved.shape, saved.stride(), saved.storage_offset()
        recipe.users += 1

    def unpack(self) -> Tensor:
        if self.recipe is not None:
            recipe, index = self.recipe
            return recipe()[index].as_strided(*self.layout)
        assert self.tensor is not None
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)}, which the backward needs, was "
                "modified in place after the forward"
            )
        return self.tensor


Again = Callable[..., Recipe | None]


@contextmanager
def recomputing() -> Iterator[Again]:
    """Yields ``again(make, *tensors, source=None)``: ``tensors`` need not be kept.

    Whatever autograd saves of their memory before the ``with`` block ends, it makes by ``make()``
    in the backward, or by ``make(*source's tensors)``. ``make`` must return the same tensors, bit
    for bit and with the same strides, whatever `pk.use_backend` says by then; what it refers to
    stays in memory in their place.

    Everything is kept as usual where no gradient is asked for, under torch.compile (which decides
    for itself what to recompute), and where other hooks on saved tensors are at work, such as
    those of torch's checkpointing, which recompute these tensors and more.
    """
    if not _possible():
        yield lambda make, *tensors, source=None: None
        return
    saved: list[_Saved] = []
    # with the tensor itself, so that until the end no other takes its address, and its version
    recipes: dict[int, tuple[Recipe, int, Tensor, int]] = {}

    def pack(tensor: Tensor) -> _Saved:
        saved.append(_Saved(tensor))
        return saved[-1]

    def again(make: Make, *tensors: Tensor, source: Recipe | None = None) -> Recipe:
        recipe = Recipe(make, tensors, source)
        for index, tensor in enumerate(tensors):
            recipes[_address(tensor)] = recipe, index, tensor, tensor._version
        return recipe

    with saved_tensors_hooks(pack, _Saved.unpack):
        yield again
    for entry in saved:
        assert entry.tensor is not None
        if found := recipes.get(_address(entry.tensor)):
            recipe, index, tensor, version = found
            # what somebody's hook changed in place, `make` would not return
            if tensor._version == version:
                entry.forget(recipe, index)
    # the hooks live on in the graph, and `again` wherever it went
    saved.clear()
    recipes.clear()


def _address(tensor: Tensor) -> int:
    # not data_ptr, which is 0 for every empty tensor and does not exist for fake ones
    return tensor.untyped_storage()._cdata


def _possible() -> bool:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    # torch has no public way to ask; of several pairs of hooks the innermost alone would be used
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is None or hooks[1] is _Saved.unpack

"""What the tests of every kernel share: the error rule, and allocations poisoned with NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def assert_within_eager_error(
    actual: Tensor,
    fp32_reference: Tensor,
    eager_low_precision: Tensor,
    factor: float = 2.0,
    *,
    terms: int = 1,
) -> None:
    """``actual`` may be off by at most ``factor`` times what eager PyTorch is off by.

    ``fp32_reference`` is the result computed in fp32 (or fp64) from the same, already rounded,
    inputs; ``eager_low_precision`` is plain PyTorch in the precision that ``actual`` was
    computed in. Errors are the largest absolute difference.

    The floor, for results where eager is exact or lucky: one unit in the last place of
    ``actual``'s dtype, and sqrt(``terms``) fp32 units for sums of that many products, whose
    order is free; both at the reference's largest magnitude.

    Raises AssertionError with both errors and the bound.
    """
    assert actual.dtype == eager_low_precision.dtype, (actual.dtype, eager_low_precision.dtype)
    assert actual.shape == fp32_reference.shape, (actual.shape, fp32_reference.shape)
    if actual.numel() == 0:
        return
    exact = fp32_reference.double()
    error = (actual.double() - exact).abs().max().item()
    eager_error = (eager_low_precision.double() - exact).abs().max().item()
    unit = torch.finfo(actual.dtype).eps + terms**0.5 * torch.finfo(torch.float32).eps
    floor = unit * exact.abs().max().item()
    bound = max(factor * eager_error, floor)
    # written so that a NaN fails
    assert error <= bound, (
        f"error {error:.3e} exceeds {bound:.3e}: {factor} x eager's {eager_error:.3e}, "
        f"or the floor, {floor:.3e}"
    )


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Every uninitialised allocation starts as NaN, inside C++ ops as well.

    A kernel that leaves part of an output unwritten, or reads scratch before writing it, shows.
    """
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(was_deterministic, warn_only=warn_only)

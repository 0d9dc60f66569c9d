"""What the tests of every kernel share: the error rule, allocations poisoned with NaN, and what
a Triton kernel becomes when it is compiled."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Launch:
    """A call of a Triton kernel: ``kernel[grid](*arguments, **options)``."""

    kernel: Any
    arguments: tuple
    options: dict


@dataclass(frozen=True)
class Resources:
    """What one compiled Triton kernel takes of a multiprocessor."""

    registers: int  # of each thread
    stack: int  # bytes of each thread; more than none are registers that spilled
    shared: int  # bytes of each program
    loads: tuple[int, ...]  # bytes that each instruction reads from global memory at once
    products: tuple[str, ...]  # kinds of instructions for tensor cores


@contextmanager
def recorded_launches(*kernels: Any) -> Iterator[list[Launch]]:
    """Collects the launches of Triton ``kernels`` in place of making them.

    Their callers run as usual, on tensors of the meta device if need be.
    """
    launches: list[Launch] = []

    def record(kernel):
        def run(*arguments, grid, warmup, **options):
            launches.append(Launch(kernel, arguments, options))

        return run

    for kernel in kernels:
        kernel.run = record(kernel)
    try:
        yield launches
    finally:
        for kernel in kernels:
            del kernel.run


def compiled_resources(launch: Launch, arch: int) -> Resources:
    """Compiles a Triton kernel as ``launch`` would, for compute capability ``arch`` (90: 9.0).

    Needs no GPU: the tools that read the result come with Triton. Tensors are taken to begin at
    multiples of 16 bytes, and integers to be any number of their annotated type.

    Raises RuntimeError where kernels are interpreted: they cannot be compiled there.
    """
    import triton
    from triton._utils import type_canonicalisation_dict
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 is set: start a process without it")
    types, constants, aligned = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[i]
        if parameter.is_constexpr or value is None:
            types[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            types[parameter.name] = "*" + type_canonicalisation_dict[dtype]
            aligned[i,] = [["tt.divisibility", 16]]
        else:
            default = "fp32" if isinstance(value, float) else "i32"
            types[parameter.name] = parameter.annotation_type or default
    source = ASTSource(launch.kernel, types, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    counts = dict(re.findall(r"(\w+):(\d+)", usage))
    ptx = compiled.asm["ptx"]
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfus](\d+) ", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (\w+)", ptx)
    return Resources(
        registers=int(counts["REG"]),
        stack=int(counts["STACK"]),
        shared=compiled.metadata.shared,
        loads=(
            *(int(vector or 1) * int(bits) // 8 for vector, bits in loads),
            *(int(size, 0) for size in copies),
        ),
        products=tuple(sorted(set(re.findall(r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx)))),
    )

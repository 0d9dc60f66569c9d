"""Every kernel once, forward and backward, at awkward shapes: what a memory checker is run on.

``compute-sanitizer --tool racecheck python -m benchmarks.sanitize``; without a GPU it runs the
CPU's kernels, for a checker of CPUs. Says nothing of results: the tests do.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.providers import leaves_of
from benchmarks.registry import BF16, FAMILIES, FP32, MIXED, Case
from pixart_kernels import dispatch

# one token; an odd number of rows; a width that no vector divides; nothing at all
SHAPES = ((1, 1, 1152), (3, 7, 1152), (2, 33, 136), (2, 5, 37), (2, 0, 64))


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ops = {case.op.name: case.op for family in FAMILIES.values() for case in family(device.type)}
    ran = 0
    for backend in dispatch.PRIORITY:
        if backend == "reference":
            continue
        for op in ops.values():
            for precision in (FP32, BF16, MIXED):
                for shape in SHAPES:
                    leaves = leaves_of(Case(op, shape, precision).inputs(device))
                    reason = dispatch.why_not(op.name, backend, leaves[0])
                    if reason is not None:
                        continue
                    outputs = op.call(backend, *leaves)
                    torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
                    ran += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{ran} forwards and backwards on {device}")
    if ran == 0:
        sys.exit("no kernel can run here: python -m pixart_kernels.doctor says why")


if __name__ == "__main__":
    main()

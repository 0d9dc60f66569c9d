"""Whether this GPU can run the kernels: ``python -m benchmarks.kernels``.

Where it cannot, the tests that need a GPU are skipped, which must not look like having passed.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import pixart_kernels  # noqa: F401  registers the ops
from pixart_kernels import dispatch


def reasons(x: Tensor) -> list[str]:
    """Why kernels cannot run on ``x``; empty when both kinds can."""
    found = {
        backend: dispatch.why_not("adaln_single", backend, x) for backend in ("cuda", "triton")
    }
    return [f"{backend}: {reason}" for backend, reason in found.items() if reason is not None]


def main() -> None:
    sys.exit("\n".join(reasons(torch.zeros(1, 1, 1152, device="cuda"))) or None)


if __name__ == "__main__":
    main()

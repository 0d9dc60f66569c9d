"""Which implementation of an op runs, and why the others do not.

Each op has up to four implementations, one per backend. ``auto`` takes the first of
``PRIORITY`` that can run on the given tensor and that a measured run has verified on this kind
of device (``VERIFIED``); ``reference`` needs no verification, being the definition. A backend
asked for by name runs or raises: it is never replaced silently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# fastest first
PRIORITY = ("cuda", "triton", "native", "reference")
BACKENDS = ("auto", *PRIORITY)


@dataclass(frozen=True)
class Verification:
    """The run that verified and timed an implementation on one architecture."""

    commit: str
    results: str  # file under benchmarks/results/


# (op, backend, architecture) -> the run that proved it correct and worth choosing
_ADALN_CPU = Verification("66f8f4793a6a", "cpu/adaln.jsonl")
VERIFIED: dict[tuple[str, str, str], Verification] = {
    ("adaln_modulate", "native", "cpu"): _ADALN_CPU,
    ("adaln_single", "native", "cpu"): _ADALN_CPU,
    ("came_step", "native", "cpu"): Verification("eb30b2cf0979", "cpu/optimizer.jsonl"),
    ("compress_kv", "native", "cpu"): Verification("4791c8142439", "cpu/kv_compression.jsonl"),
    ("cross_attention", "native", "cpu"): Verification("4791c8142439", "cpu/cross_attention.jsonl"),
    ("bias_gelu", "native", "cpu"): Verification("66f8f4793a6a", "cpu/mlp.jsonl"),
    ("gated_residual", "native", "cpu"): _ADALN_CPU,
    ("gated_residual_adaln", "native", "cpu"): _ADALN_CPU,
}


@dataclass(frozen=True)
class Implementation:
    """One op on one backend; ``reason(x)`` says why it cannot run on ``x``, or None.

    Attention's reasons take ``head_dim`` as well, which x may not show, or None where it is not
    known: such facts are handed on by every function below.
    """

    function: Callable
    reason: Callable[..., str | None]


_implementations: dict[str, dict[str, Implementation]] = {}


def register(
    op: str,
    backend: str,
    function: Callable,
    reason: Callable[..., str | None] = lambda x, **facts: None,
) -> None:
    _implementations.setdefault(op, {})[backend] = Implementation(function, reason)


def ops() -> list[str]:
    return sorted(_implementations)


def architecture(device: torch.device) -> str:
    """``"cpu"`` or ``"sm_90"``-like: the granularity at which kernels are verified."""
    kind = device.type
    if kind != "cuda":
        return kind
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _checked(backend: str, name: str = "backend") -> str:
    if backend not in BACKENDS:
        raise ValueError(f"`{name}` is {backend!r}; accepted: {', '.join(BACKENDS)}")
    return backend


# process-wide on purpose: torch.compile guards on a plain global, and a server's worker
# threads must all see the backend that main() chose
_backend = _checked(os.environ.get("PIXART_KERNELS_BACKEND", "auto"), "PIXART_KERNELS_BACKEND")


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Runs every op on ``backend`` inside the ``with`` block, for the whole process.

    ``backend``: ``"auto"``, ``"reference"``, ``"native"``, ``"triton"`` or ``"cuda"``. The
    environment variable ``PIXART_KERNELS_BACKEND`` sets the starting value, and an op's own
    ``backend=`` argument wins over both. A name must have every op that is called: ``triton`` and
    ``reference`` have them all. Where checkpoints compute a forward again, cover the backward too.

    Raises ValueError for an unknown name, here; and in the op, when the backend cannot run.
    """
    global _backend
    previous, _backend = _backend, _checked(backend)
    try:
        yield
    finally:
        _backend = previous


def current_backend() -> str:
    """What :func:`use_backend` chose last: the backend of ops that are given none."""
    return _backend


def why_not(op: str, backend: str, x: Tensor, **facts: int | None) -> str | None:
    """Why ``backend`` cannot run ``op`` on ``x``, or None when it can."""
    implementation = _implementations[op].get(backend)
    if implementation is None:
        return f"{op} has no {backend} implementation"
    return implementation.reason(x, **facts)


def why_not_auto(op: str, backend: str, x: Tensor, **facts: int | None) -> str | None:
    """Why ``auto`` passes over ``backend`` for ``op`` on ``x``, or None when it may take it."""
    reason = why_not(op, backend, x, **facts)
    if reason is None and backend != "reference":
        where = architecture(x.device)
        if (op, backend, where) not in VERIFIED:
            reason = f"not verified on {where} yet; runs when asked for by name"
    return reason


def chosen(op: str, x: Tensor, backend: str | None = None, **facts: int | None) -> str:
    """The name of the backend that would run ``op`` on ``x``, as ``pk.chosen_backend``.

    ``facts``: what x does not show; of attention ops ``head_dim``, the size of a head.

    Raises RuntimeError, listing every backend's reason, if the one asked for cannot run; ValueError
    for an op or a backend that does not exist.
    """
    if op not in _implementations:
        raise ValueError(f"`op` is {op!r}; accepted: {', '.join(ops())}")
    name = _backend if backend is None else _checked(backend)
    if name == "auto":
        # as why_not_auto, but without writing reasons that nobody reads: a small op would feel it
        where = architecture(x.device)
        for b in PRIORITY:
            if (op, b, where) in VERIFIED and why_not(op, b, x, **facts) is None:
                return b
        return "reference"
    reason = why_not(op, name, x, **facts)
    if reason is None:
        return name
    others = "\n".join(
        f"  {b}: {why_not(op, b, x, **facts) or 'can run'}" for b in PRIORITY if b != name
    )
    raise RuntimeError(
        f"backend {name!r} cannot run {op}: {reason}. The other backends here:\n{others}"
    )


def select(op: str, x: Tensor, backend: str | None = None, **facts: int | None) -> Callable:
    """The function that runs ``op`` on ``x``.

    Raises RuntimeError, listing every backend's reason, if the one asked for cannot run.
    """
    return _implementations[op][chosen(op, x, backend, **facts)].function

"""Who can run a case, and whether they are right: nothing wrong is ever timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.registry import Case, Outputs
from benchmarks.rivals import EAGER_16BIT, OFFICIAL, rivals
from pixart_kernels import dispatch
from pixart_kernels.testing import assert_within_eager_error

Provider = Callable[..., Outputs]


def providers(case: Case, x: Tensor) -> dict[str, tuple[Provider, Provider]]:
    """Each provider that can run on ``x``, with the plain PyTorch definition of what it does.

    Eager and compiled reference; each of our backends, alone and inside ``torch.compile`` (which
    must not be slower than leaving the op to Inductor); the official formula in x's dtype, if that
    has 16 bits; other libraries' nearest kernels.
    """
    # every provider, with gradients and without, compiles the same function anew: at the default
    # limit of 8 torch would go on in eager mode, and be timed as if compiled
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True

    def ours(backend: str) -> Provider:
        return lambda *tensors: case.op.call(backend, *tensors)

    torch._dynamo.reset()
    eager = ours("reference")
    found = {"eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    if x.is_cuda:
        # its CUDA graphs would nest inside ours; on a CPU it tunes matrix products alone
        found["max-autotune"] = torch.compile(
            ours("reference"), dynamic=False, mode="max-autotune-no-cudagraphs"
        )
    for backend in dispatch.PRIORITY:
        if backend != "reference" and dispatch.why_not(case.op.name, backend, x) is None:
            found[backend] = ours(backend)
            found[f"{backend}, compiled"] = torch.compile(ours(backend), dynamic=False)
    checked = {name: (run, eager) for name, run in found.items()}
    if x.dtype.itemsize == 2:
        official = OFFICIAL[case.op.name]
        checked[EAGER_16BIT] = official, official
    if x.is_cuda:
        for name, rival in rivals(case.op.name).items():
            checked[name] = rival.run, rival.definition
    return checked


def leaves_of(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def _random_like(outputs: Outputs, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype) for o in outputs]


def _outputs_and_gradients(
    run: Provider, leaves: list[Tensor], out_grads: list[Tensor]
) -> list[Tensor]:
    outputs = run(*leaves)
    grads = [g.to(o.dtype) for g, o in zip(out_grads, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def wrong(
    definition: Provider, run: Provider, tensors: list[Tensor], terms: int | None = None
) -> str | None:
    """What is wrong with ``run``'s outputs or gradients by the tests' error rule, or None.

    ``terms`` of the longest sum; None: over all rows, or over a row's elements.
    """
    with torch.no_grad():
        outputs = definition(*tensors)
    out_grads = _random_like(outputs, torch.Generator(tensors[0].device).manual_seed(1))
    exact = _outputs_and_gradients(definition, leaves_of(tensors, torch.float64), out_grads)
    low = _outputs_and_gradients(definition, leaves_of(tensors), out_grads)
    width = tensors[0].shape[-1]
    terms = terms or max(tensors[0].numel() // width, width)
    try:
        found = _outputs_and_gradients(run, leaves_of(tensors), out_grads)
        for actual, reference, eager in zip(found, exact, low, strict=True):
            assert_within_eager_error(actual, reference, eager, terms=terms)
    # one that cannot even run is a finding, not the end of a benchmark
    except Exception as error:
        return in_short(error)
    return None


def correct_providers(
    case: Case, tensors: list[Tensor]
) -> tuple[dict[str, Provider], dict[str, str]]:
    """The providers that are correct, and what is wrong with the others."""
    correct: dict[str, Provider] = {}
    failures: dict[str, str] = {}
    for name, (run, definition) in providers(case, tensors[0]).items():
        problem = wrong(definition, run, tensors)
        if problem is None:
            correct[name] = run
        else:
            failures[name] = problem
    return correct, failures


def call_of(run: Provider, tensors: list[Tensor], which: str) -> Callable[[], object]:
    """One eager call of a pass: "forward" as inference runs it, or "forward+backward"."""
    if which == "forward":

        def forward() -> Outputs:
            with torch.no_grad():
                return run(*tensors)

        return forward
    leaves = leaves_of(tensors)
    with torch.no_grad():
        out_grads = [torch.randn_like(output) for output in run(*leaves)]
    return lambda: torch.autograd.grad(run(*leaves), leaves, out_grads)

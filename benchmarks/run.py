"""Times every provider of an op family: ``python -m benchmarks.run --op adaln --device cpu``.

Before anything is timed, each provider's outputs and gradients are held against the fp32
reference with the tests' error rule; a provider that fails is reported and not timed. Results go
to ``benchmarks/results/<device>/<family>.jsonl``, one line for each op, shape, dtype and pass.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.registry import FAMILIES, Case
from benchmarks.timing import Measurement, measure
from pixart_kernels import _extension, dispatch
from pixart_kernels.testing import assert_within_eager_error

DTYPES = (torch.float32, torch.bfloat16)
PASSES = ("forward", "forward+backward")
CLOCKS = {"cpu": ("wall", "cpu"), "cuda": ("wall",)}
Provider = Callable[..., tuple[Tensor, ...]]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """The commit, marked when the checkout differs from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return described.stdout.strip() or "uncommitted"


def environment(device: torch.device) -> dict:
    return {
        "device": _cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "extension": _extension.build_info.get("compiler"),
        "malloc": os.environ.get("MALLOC_MMAP_THRESHOLD_", "default"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def providers(case: Case, x: Tensor) -> dict[str, Provider]:
    """Eager and compiled reference, and each other backend that can run here."""

    def provider(backend: str) -> Provider:
        return lambda *tensors: case.call(backend, *tensors)

    torch._dynamo.reset()
    found = {"eager": provider("reference")}
    found["torch.compile"] = torch.compile(found["eager"], dynamic=False)
    for backend in dispatch.PRIORITY:
        if backend != "reference" and dispatch.why_not(case.op, backend, x) is None:
            found[backend] = provider(backend)
    return found


def _leaves(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def _outputs_and_gradients(
    run: Provider, leaves: list[Tensor], out_grads: list[Tensor]
) -> list[Tensor | None]:
    outputs = run(*leaves)
    grads = [g.to(o.dtype) for g, o in zip(out_grads, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads, allow_unused=True)]


def wrong(case: Case, run: Provider, tensors: list[Tensor]) -> str | None:
    """What is wrong with a provider's outputs or gradients, or None."""
    eager: Provider = lambda *leaves: case.call("reference", *leaves)  # noqa: E731
    generator = torch.Generator().manual_seed(1)
    out_grads = [
        torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in eager(*tensors)
    ]
    exact = _outputs_and_gradients(eager, _leaves(tensors, torch.float64), out_grads)
    low = _outputs_and_gradients(eager, _leaves(tensors), out_grads)
    found = _outputs_and_gradients(run, _leaves(tensors), out_grads)
    terms = max(tensors[0].shape[0] * tensors[0].shape[1], tensors[0].shape[2])
    for actual, reference, eager_low in zip(found, exact, low, strict=True):
        if actual is None or reference is None or eager_low is None:
            continue
        try:
            assert_within_eager_error(actual, reference, eager_low, terms=terms)
        except AssertionError as error:
            return str(error)
    return None


def _forward(run: Provider, tensors: list[Tensor]) -> Callable[[], object]:
    def call() -> None:
        with torch.no_grad():
            run(*tensors)

    return call


def _both_passes(run: Provider, tensors: list[Tensor]) -> Callable[[], object]:
    leaves = _leaves(tensors)
    used = [leaf for leaf in leaves if leaf.requires_grad]
    out_grads = [torch.randn_like(output) for output in run(*leaves)]

    def call() -> None:
        torch.autograd.grad(run(*leaves), used, out_grads, allow_unused=True)

    return call


def checked_providers(case: Case, tensors: list[Tensor]) -> tuple[dict[str, Provider], dict]:
    """The providers that are correct, and what is wrong with the others."""
    correct: dict[str, Provider] = {}
    failures: dict[str, str] = {}
    for name, run in providers(case, tensors[0]).items():
        problem = wrong(case, run, tensors)
        if problem is None:
            correct[name] = run
        else:
            failures[name] = problem
    return correct, failures


def time_case(case: Case, dtype: torch.dtype, device: torch.device, patience: float) -> list[dict]:
    tensors = case.make(dtype, device)
    rows = []
    all_threads = torch.get_num_threads()
    for clock in CLOCKS[device.type]:
        # before compiling: Inductor writes the number of threads into its code
        torch.set_num_threads(1 if clock == "cpu" else all_threads)
        correct, failures = checked_providers(case, tensors)
        for which in PASSES:
            prepare = _forward if which == "forward" else _both_passes
            calls = {name: prepare(run, tensors) for name, run in correct.items()}
            measured = measure(calls, clock, patience=patience)
            about = {
                "op": case.op,
                "shape": list(case.shape),
                "dtype": str(dtype).removeprefix("torch."),
                "pass": which,
            }
            rows.append({**about, "incorrect": failures, **measured.as_json()})
            print(_summary(about, measured, failures), flush=True)
    torch.set_num_threads(all_threads)
    return rows


def _summary(about: dict, measured: Measurement, failures: dict[str, str]) -> str:
    what = [*map(str, about.values()), measured.clock]
    parts = [f"{word:<{width}}" for word, width in zip(what, (20, 15, 8, 16, 4), strict=True)]
    parts += [f"{name} {timing.median:.2f}" for name, timing in measured.timings.items()]
    native = measured.timings.get("native")
    if native is not None:
        for rival in ("eager", "torch.compile"):
            if rival in measured.timings:
                ratio = measured.timings[rival].median / native.median
                parts.append(f"{ratio:.2f} x {rival}")
    parts.append("" if measured.quiet else f"(foreign {measured.foreign_cores:.2f})")
    parts += [f"WRONG {name}: {problem}" for name, problem in failures.items()]
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", required=True, choices=sorted(FAMILIES), help="op family")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", help="folder under benchmarks/results; default: the device")
    parser.add_argument("--only", help="one op of the family; nothing is written")
    parser.add_argument(
        "--patience", type=float, default=60.0, help="seconds to wait for a quiet CPU, per row"
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    folder = Path(__file__).parent / "results" / (arguments.name or device.type)
    about = environment(device)
    rows: list[dict] = []
    for case in FAMILIES[arguments.op]:
        if arguments.only not in (None, case.op):
            continue
        for dtype in DTYPES:
            rows += time_case(case, dtype, device, arguments.patience)
    if arguments.only is not None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({**row, **about}) + "\n" for row in rows)
    # whole or not at all
    partial = folder / f"{arguments.op}.jsonl.partial"
    partial.write_text(text)
    partial.replace(folder / f"{arguments.op}.jsonl")


if __name__ == "__main__":
    main()

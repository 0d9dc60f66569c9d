"""Where the Triton kernels are tested: on a GPU as they are, without one interpreted."""

from __future__ import annotations

import pytest
import torch

from pixart_kernels import _triton

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_triton = [
    pytest.mark.skipif(
        _triton.problem is not None or not (GPU or _triton.INTERPRETED),
        reason=_triton.problem or "no GPU, and TRITON_INTERPRET=1 is not set",
    ),
    *([pytest.mark.gpu] if GPU else []),
]
on_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")


def interpret_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without copies of all memory that a tensor spans, gaps and all, onto itself."""
    if _triton.INTERPRETED:
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *arguments: None)


def check_schema_is_that_of_the_compiled_op(name: str) -> None:
    compiled, own = (
        getattr(getattr(torch.ops, namespace), name).default._schema
        for namespace in ("pixart_kernels", "pixart_kernels_triton")
    )
    assert [(a.name, str(a.type)) for a in own.arguments] == [
        (a.name, str(a.type)) for a in compiled.arguments
    ]
    assert [str(r.type) for r in own.returns] == [str(r.type) for r in compiled.returns]

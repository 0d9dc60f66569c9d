"""Which backend runs, and what is said when one cannot."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import pixart_kernels as pk
from pixart_kernels import dispatch

QKV = torch.zeros(1, 3, 24)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch):
    """An op whose "triton" refuses 16-bit input and whose "native" always runs."""
    monkeypatch.setattr(dispatch, "_implementations", {})
    monkeypatch.setattr(dispatch, "VERIFIED", {})
    dispatch.register("toy", "reference", lambda x: "reference ran")
    dispatch.register("toy", "native", lambda x: "native ran")
    dispatch.register(
        "toy",
        "triton",
        lambda x: "triton ran",
        lambda x: None if x.dtype.itemsize > 2 else "16-bit",
    )
    return torch.zeros(1)


def test_every_public_op_has_a_reference_with_its_signature() -> None:
    import inspect

    for op in dispatch.ops():
        public = inspect.signature(getattr(pk, op)).parameters
        reference = inspect.signature(getattr(pk.reference, op)).parameters
        assert [name for name in public if name != "backend"] == list(reference)


def test_an_op_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="`op` is 'gelu'; accepted: .*bias_gelu"):
        pk.chosen_backend("gelu", QKV)


def test_auto_takes_only_what_was_verified(toy: torch.Tensor) -> None:
    assert dispatch.chosen("toy", toy) == "reference"
    assert "not verified on cpu" in dispatch.why_not_auto("toy", "native", toy)
    proof = dispatch.Verification("abc", "cpu/toy.jsonl")
    dispatch.VERIFIED["toy", "native", "cpu"] = proof
    assert dispatch.select("toy", toy)(toy) == "native ran"
    dispatch.VERIFIED["toy", "triton", "cpu"] = proof
    assert dispatch.chosen("toy", toy) == "triton"
    assert dispatch.chosen("toy", toy.half()) == "native"


def test_named_backend_runs_unverified(toy: torch.Tensor) -> None:
    assert dispatch.chosen("toy", toy, "triton") == "triton"
    with pk.use_backend("native"):
        assert dispatch.chosen("toy", toy) == "native"
        assert dispatch.chosen("toy", toy, "reference") == "reference"
        with pk.use_backend("triton"):
            assert dispatch.chosen("toy", toy) == "triton"
        assert dispatch.chosen("toy", toy) == "native"
    assert dispatch.chosen("toy", toy) == "reference"


def test_backend_that_cannot_run_raises_every_reason(toy: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="'triton' cannot run toy: 16-bit") as error:
        dispatch.select("toy", toy.half(), "triton")
    for line in ("cuda: toy has no cuda implementation", "native: can run", "reference: can run"):
        assert line in str(error.value)


def test_reasons_get_what_x_does_not_show(toy: torch.Tensor) -> None:
    """As attention's do, whose x may be a packed projection."""
    proof = dispatch.Verification("abc", "cpu/toy.jsonl")
    dispatch.VERIFIED["toy", "cuda", "cpu"] = proof
    dispatch.register(
        "toy",
        "cuda",
        lambda x: "cuda ran",
        lambda x, head_dim=None: f"heads of {head_dim}" if head_dim == 64 else None,
    )
    dispatch.register("toy", "triton", lambda x: "triton ran", lambda x, head_dim=None: None)
    dispatch.register("toy", "native", lambda x: "native ran", lambda x, head_dim=None: None)
    assert dispatch.select("toy", toy, head_dim=72)(toy) == "cuda ran"
    assert dispatch.chosen("toy", toy, "cuda") == "cuda"
    assert dispatch.chosen("toy", toy, head_dim=64) == "reference"
    assert dispatch.why_not("toy", "cuda", toy, head_dim=64) == "heads of 64"
    assert dispatch.why_not_auto("toy", "cuda", toy, head_dim=64) == "heads of 64"
    with pytest.raises(RuntimeError, match="'cuda' cannot run toy: heads of 64") as error:
        dispatch.select("toy", toy, "cuda", head_dim=64)
    assert "triton: can run" in str(error.value)


def test_use_backend_is_restored_after_an_error() -> None:
    before = dispatch._backend
    with pytest.raises(ZeroDivisionError), pk.use_backend("reference"):
        raise ZeroDivisionError
    assert dispatch._backend == before
    with pytest.raises(ValueError, match="'fast'; accepted: auto, cuda"), pk.use_backend("fast"):
        pass


def test_environment_sets_the_backend() -> None:
    code = "import pixart_kernels.dispatch as d; print(d._backend)"
    environment = {"PIXART_KERNELS_BACKEND": "reference", "PATH": "/usr/bin:/bin"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert out.stdout.strip() == "reference", out.stderr
    environment["PIXART_KERNELS_BACKEND"] = "fast"
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "`PIXART_KERNELS_BACKEND` is 'fast'" in out.stderr


def test_public_op_takes_a_backend() -> None:
    with pytest.raises(RuntimeError, match="self_attention has no native implementation"):
        pk.self_attention(QKV, 2, backend="native")
    assert torch.equal(pk.self_attention(QKV, 2, backend="reference"), torch.zeros(1, 3, 8))

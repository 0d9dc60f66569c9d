"""The definition of came_step against came-pytorch, and what wrong arguments are told."""

from __future__ import annotations

import came_cases as cases
import pytest
import torch
from came_cases import BF16, FP16, OTHERS, SETTINGS, drawn, fresh_state, per_shape

import pixart_kernels as pk
from pixart_kernels.came import reference


@per_shape
@pytest.mark.parametrize("settings", [{}, OTHERS], ids=["default", "others"])
def test_step_for_step(count, shape, settings):
    cases.check_came_pytorch("reference", count, shape, **settings)


@pytest.mark.parametrize("shape", [(5, 3), (7,)], ids=str)
def test_nothing_added_to_squares(shape):
    cases.check_came_pytorch("reference", 2, shape, steps=5, eps=(0.0, 0.0))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(33, 20), (70,)], ids=str)
def test_16_bits_are_rounded_as_came_pytorch_rounds(shape, dtype):
    cases.check_came_pytorch("reference", 2, shape, dtype=dtype)


def test_fp64_weights():
    weights, state = cases.walk("reference", 2, (5, 4), dtype=torch.float64)
    narrow, _ = cases.walk("reference", 2, (5, 4))
    assert weights[0].dtype == torch.float64 and state["exp_avg"][0].dtype == torch.float32
    torch.testing.assert_close(weights[1].float(), narrow[1])


def test_strided_gradients():
    cases.check_strided_gradients("reference")


@pytest.mark.parametrize("shape", [(4, 6), (6,)], ids=str)
def test_zeros_and_nan(shape):
    cases.check_zeros_and_nan("reference", shape)


def test_weights_that_do_not_fit_together_are_taken_in_parts(monkeypatch):
    whole = cases.walk("reference", 5, (6, 4))
    monkeypatch.setitem(reference.TOGETHER, "cpu", 2 * 6 * 4)
    cases.assert_same_bits(whole, cases.walk("reference", 5, (6, 4)))


def test_nothing_to_do():
    pk.came_step([], [], {}, **SETTINGS)
    weights, state = drawn(2, (0, 3)), fresh_state(2, (0, 3))
    pk.came_step(weights, drawn(2, (0, 3)), state, **SETTINGS)
    assert not any(torch.isnan(x).any() for tensors in state.values() for x in tensors)


def test_a_backward_that_needs_an_old_weight_notices():
    weights = [w.requires_grad_() for w in drawn(1, (3, 4))]
    loss = weights[0].square().sum()
    backend = None if pk.dispatch.why_not("came_step", "native", weights[0]) else "native"
    gradients, state = drawn(1, (3, 4), seed=1), fresh_state(1, (3, 4))
    pk.came_step(weights, gradients, state, **SETTINGS, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_auto_leaves_shards_and_strided_weights_to_the_definition():
    x = torch.zeros(3, 4)
    for facts in ({"sharded": True}, {"contiguous": False}):
        assert pk.chosen_backend("came_step", x, "auto", **facts) == "reference"
    weights = [w.t() for w in drawn(2, (4, 3))]
    dense = [w.contiguous() for w in weights]
    for some in (weights, dense):
        gradients, state = drawn(2, (3, 4), seed=1), fresh_state(2, (3, 4))
        pk.came_step(some, gradients, state, **SETTINGS)
    torch.testing.assert_close(weights, dense)
    for backend in ("native", "triton"):
        if pk.dispatch.why_not("came_step", backend, x) is None:
            with pytest.raises(RuntimeError, match="not contiguous"):
                pk.came_step(weights, gradients, state, **SETTINGS, backend=backend)


def wrong(**changes):
    given = {"weights": drawn(2, (3, 4)), "gradients": drawn(2, (3, 4)), **SETTINGS}
    given["state"] = fresh_state(2, (3, 4)) | changes.pop("state", {})
    given |= changes
    return given


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (wrong(gradients=drawn(1, (3, 4))), ValueError, "`gradients` is a list of 1; accepted: 2"),
        (wrong(gradients=[*drawn(1, (3, 4)), None]), TypeError, r"`gradients\[1\]` is a NoneType"),
        (wrong(weights=[*drawn(1, (3, 4)), *drawn(1, (4, 3))]), ValueError, r"`weights\[1\]` is"),
        (wrong(weights=[torch.ones(3, 4).int()] * 2), TypeError, "`weights` has dtype torch.int32"),
        (wrong(gradients=drawn(2, (3, 4), torch.float64)), TypeError, "`gradients` have dtype"),
        (wrong(state={"RMS": []}), ValueError, "`state` is exp_avg, .*RMS; accepted: exp_avg, "),
        (
            wrong(weights=drawn(2, (3,)), gradients=drawn(2, (3,))),
            ValueError,
            "exp_avg, exp_avg_sq",
        ),
        (
            wrong(state={"exp_avg": drawn(2, (3, 4), BF16)}),
            ValueError,
            r"`exp_avg\[0\]` is torch.bfloat16 on cpu; accepted: torch.float32 on cpu",
        ),
        (
            wrong(state={"exp_avg_sq_col": drawn(2, (3,))}),
            ValueError,
            r"`exp_avg_sq_col\[0\]` is \(3,\); accepted: \(4,\)",
        ),
        (wrong(betas=(0.9, 0.99)), ValueError, r"`betas` is \(0.9, 0.99\); accepted: three"),
        (wrong(eps=(1e-30,)), ValueError, "accepted: two numbers"),
        (wrong(shape=torch.Size((6, 5))), ValueError, r"`shape` is \(6, 5\); accepted: that of"),
        (wrong(shape=torch.Size((6, 4))), ValueError, "`reduce` is None; accepted: what sums over"),
        (wrong(backend="cuda"), RuntimeError, "came_step has no cuda implementation"),
    ],
)
def test_wrong_arguments_are_named(given, error, said):
    with pytest.raises(error, match=said):
        pk.came_step(given.pop("weights"), given.pop("gradients"), given.pop("state"), **given)

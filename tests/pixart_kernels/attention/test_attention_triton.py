"""The Triton kernels against the reference: on a GPU as they are, without one interpreted."""

from __future__ import annotations

import attention_cases as cases
import pytest
import torch
from attention_cases import BF16, FP16, FP32, attention, packed, per_dtype, run, separate
from triton_devices import DEVICE, interpret_in_place, needs_triton, on_gpu

from pixart_kernels import _triton, dispatch
from pixart_kernels.attention import config

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def little_to_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of each kind within few tokens, whose numbers of rows all differ."""
    if _triton.INTERPRETED:
        tiles = config.Tiles(
            config.Tile(32, 16, 1, 1), config.Tile(16, 32, 1, 1), config.Tile(64, 16, 1, 1)
        )
        monkeypatch.setattr(config, "tiles", lambda *key: tiles)


# one token; around a tile's edge; more than one tile; no tokens; no samples
@pytest.mark.parametrize(
    "B, N, H, d",
    [
        (2, 1, 2, 72),
        (1, 63, 1, 72),
        (1, 64, 2, 72),
        (2, 65, 2, 72),
        (1, 130, 1, 72),
        (2, 0, 2, 72),
        (0, 3, 2, 72),
    ],
    ids=str,
)
@per_dtype
def test_self_attention(B, N, H, d, dtype):
    cases.check_error_rule(cases.self_attention(H), packed(B, N, H, d, dtype, DEVICE), "triton")


# 1 and 73: nothing is a multiple of anything
@pytest.mark.parametrize("d", [1, 8, 16, 24, 40, 64, 72, 73, 80, 96, 112, 128])
def test_head_dimensions(d):
    leaves = packed(2, 33, 2, d, FP16, DEVICE)
    cases.check_error_rule(cases.self_attention(2), leaves, "triton")


# fewer keys, more keys, one of either, and none
@pytest.mark.parametrize("Nq, Nk", [(130, 33), (17, 65), (1, 64), (65, 1), (5, 0), (0, 5)], ids=str)
@per_dtype
def test_queries_and_keys_of_different_lengths(Nq, Nk, dtype):
    cases.check_error_rule(attention, separate(2, Nq, Nk, 2, 72, dtype, DEVICE), "triton")


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_tiles_as_shipped(dtype, monkeypatch):
    monkeypatch.undo()
    leaves = packed(1, 130, 2, 72, dtype, DEVICE)
    cases.check_error_rule(cases.self_attention(2), leaves, "triton")


@cases.per_layout
def test_strided_views_are_read_where_they_lie(layout):
    cases.check_strided_views(layout, "triton", DEVICE)


def test_heads_first_and_packed_keys():
    cases.check_heads_first_and_packed_keys("triton", DEVICE)


def test_expanded_inputs_and_gradients():
    cases.check_expanded("triton", DEVICE)


def test_addresses_beyond_32_bits(monkeypatch):
    interpret_in_place(monkeypatch)
    cases.check_addresses_beyond_32_bits("triton", DEVICE)


@on_gpu
def test_more_heads_than_a_grid_has_rows():
    leaves = packed(70_000, 1, 2, 8, device=DEVICE)
    cases.check_error_rule(cases.self_attention(2), leaves, "triton")


@on_gpu
@pytest.mark.parametrize("N", [256, 1000, 1024, 4095, 4096])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_lengths_of_the_model(N, dtype):
    leaves = packed(2, N, 16, 72, dtype, DEVICE)
    cases.check_error_rule(cases.self_attention(16), leaves, "triton")


@per_dtype
def test_large_scores(dtype):
    cases.check_large_scores(dtype, "triton", DEVICE)


def test_scores_at_the_limit_of_fp16():
    cases.check_scores_at_the_limit("triton", DEVICE)


# the weight of no key, before it is masked, or in its own row
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2", "ignore:invalid value")
def test_all_scores_far_below_zero():
    cases.check_all_scores_far_below_zero("triton", DEVICE)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_stays_in_its_row():
    cases.check_nan_stays_in_its_row("triton", DEVICE)


def test_lse_is_saved_in_base_2():
    q, k, v = separate(2, 33, 17, 2, 72, FP32, DEVICE)
    _, lse = torch.ops.pixart_kernels_triton.attention_fwd(q, k, v)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 72**0.5
    expected = torch.logsumexp(scores, -1) / torch.log(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch():
    leaves = packed(3, 33, 2, 24, BF16, DEVICE)
    cases.check_a_sample_alone(cases.self_attention(2), leaves, "triton")


# interpreted products are NumPy's, whose order depends on the number of rows
@on_gpu
def test_half_tiles_give_the_same_bits(monkeypatch):
    """The tiles that a row meets order its sums, not the rows beside it."""
    leaves = packed(2, 257, 1, 72, BF16, DEVICE)
    found = []
    for processors in (1, 10**6):
        monkeypatch.setattr(_triton, "processors", lambda device, number=processors: number)
        found.append(run(cases.self_attention(1), leaves, "triton"))
    cases.assert_same_bits(*found)


def test_bitwise_repeatable():
    B, N, times = (1, 65, 1) if _triton.INTERPRETED else (2, 1000, 100)
    leaves = packed(B, N, 2, 72, BF16, DEVICE)
    expected = run(cases.self_attention(2), leaves, "triton")
    for _ in range(times):
        cases.assert_same_bits(expected, run(cases.self_attention(2), leaves, "triton"))


def test_some_gradients():
    cases.check_some_gradients("triton", DEVICE)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(needs_grad):
    cases.check_opcheck(torch.ops.pixart_kernels_triton, needs_grad, DEVICE)


def test_compiles_as_one_graph_with_one_recompilation_for_other_lengths():
    cases.check_one_recompilation_for_other_lengths("triton", (3, 5, 7), DEVICE)


def test_compiles_with_one_tensor_thrice():
    cases.check_compiles_with_one_tensor_thrice("triton", DEVICE)


@on_gpu
def test_compiles_with_inductor_and_without_gradients():
    cases.check_compiles_with_inductor_and_without_gradients("triton", DEVICE)


@on_gpu
def test_captured_in_a_graph():
    leaves = packed(2, 257, 16, 72, BF16, DEVICE)
    op = cases.self_attention(16)
    expected = run(op, leaves, "triton")
    dout = cases.gradient_like(expected[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op, leaves, "triton", dout)
    graph.replay()
    cases.assert_same_bits(expected, captured)


@pytest.mark.parametrize("op", ["self_attention", "attention"])
def test_auto_leaves_it_alone_until_it_is_verified(op):
    x = torch.zeros(1, 2, 1, 24, device=DEVICE)
    reason = dispatch.why_not_auto(op, "triton", x)
    assert reason is not None and "not verified" in reason


def test_the_stride_of_a_single_element_does_not_narrow_loads():
    from pixart_kernels.attention.triton import _in_units

    x = torch.zeros(64).as_strided((1, 2, 1, 8), (3, 24, 5, 1))
    operands, unit = _in_units(x)
    assert (operands[1:], unit) == ([0, 3, 0], 8)


@pytest.mark.parametrize("d", range(1, 129))
def test_two_powers_of_two_hold_every_head(d):
    head, tail = config.split(d)
    assert all(width & (width - 1) == 0 and width != 8 for width in (head, tail))
    assert d <= head + tail < max(2 * d, 17)
    assert tail < head and (tail == 0 or head < d)


def test_the_head_of_the_model_takes_80_columns():
    assert config.split(72) == (64, 16)


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("heads, N", [(1, 1), (32, 256), (32, 4096), (10**6, 1)])
def test_half_tiles_where_whole_ones_leave_processors_idle(heads, N, processors):
    tile = config.Tile(128, 64, 8, 2)
    found = config.filling(tile, heads, N, processors)
    assert found.columns == tile.columns
    idle = heads * -(-N // 128) < processors
    assert (found.rows, found.num_warps) == ((64, 4) if idle else (128, 8))

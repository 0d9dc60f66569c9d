"""Attention's CUDA kernels on a GPU of compute capability 9.0, or emulated (test_cuda_emulated.py).

The emulated package alone has them for CPU tensors.
"""

from __future__ import annotations

from functools import partial

import attention_cases as cases
import pytest
import torch
from attention_cases import BF16, FP16, attention, packed, run, separate

import pixart_kernels as pk
from pixart_kernels import _extension, dispatch
from pixart_kernels.attention import autograd, native
from pixart_kernels.testing import assert_within_eager_error, poisoned_allocations

EMULATED = _extension.problem is None and torch._C._dispatch_has_kernel_for_dispatch_key(
    "pixart_kernels::attention_fwd", "CPU"
)
DEVICE = "cpu" if EMULATED else "cuda"


def _why_not() -> str | None:
    if EMULATED:
        return None
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return native.why_not_cuda(torch.zeros(1, device=DEVICE, dtype=BF16))


REASON = _why_not()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    *([] if EMULATED else [pytest.mark.gpu]),
]
on_gpu = pytest.mark.skipif(EMULATED, reason="says nothing where kernels are emulated")
per_16_bit = pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)

TILES = ["1x128", "2x128", "3x128", "2x176"]
per_tile = pytest.mark.parametrize("tile", TILES)
BACKWARD_TILES = ["1x128", "2x128", "2x64"]
per_backward_tile = pytest.mark.parametrize("tile", BACKWARD_TILES)


@pytest.fixture(autouse=True)
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, where the kernels are emulated: they have a reason not to run on the CPU."""
    if EMULATED:
        for op in ("self_attention", "attention"):
            able = dispatch.Implementation(
                partial(getattr(autograd, op), "cuda"), lambda x, **_: None
            )
            monkeypatch.setitem(dispatch._implementations[op], "cuda", able)


def forward(q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.pixart_kernels.attention_fwd(q, k, v)


# around a tile's edge; several tiles, whole and not; no tokens; no samples
@pytest.mark.parametrize(
    "B, N, H",
    [(2, 2, 2), (1, 63, 1), (1, 64, 2), (2, 65, 3), (1, 200, 1), (2, 257, 1), (2, 0, 2), (0, 3, 2)],
    ids=str,
)
@per_16_bit
def test_self_attention(B, N, H, dtype):
    cases.check_error_rule(cases.self_attention(H), packed(B, N, H, 72, dtype, DEVICE), "cuda")


@pytest.mark.parametrize("Nq, Nk", [(1, 257), (65, 2), (257, 64), (130, 200), (0, 3)], ids=str)
@per_16_bit
def test_queries_and_keys_of_different_lengths(Nq, Nk, dtype):
    cases.check_error_rule(attention, separate(2, Nq, Nk, 3, 72, dtype, DEVICE), "cuda")


def test_without_keys():
    q, k, v = leaves = separate(2, 3, 0, 3, 72, BF16, DEVICE)
    with poisoned_allocations():
        out, dq, *_ = run(attention, leaves, "cuda")
        _, lse = forward(q, k, v)
    assert not out.any() and not dq.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("Nq", [1, 65])
@per_16_bit
def test_one_key(Nq, dtype):
    """All weight is its own: dq and dk are what sums of one kind in two orders differ by."""
    leaves = separate(2, Nq, 1, 3, 72, dtype, DEVICE)
    out, dq, dk, dv = run(attention, leaves, "cuda")
    assert torch.equal(out, leaves[2].expand_as(out))
    assert dq.abs().max() < 1e-4 and dk.abs().max() < 1e-4
    exact, eager = (
        run(attention, [x.to(kind) for x in leaves], "reference", cases.gradient_like(out))[3]
        for kind in (torch.float64, dtype)
    )
    assert_within_eager_error(dv, exact, eager, terms=4 * Nq)


@per_tile
@per_16_bit
def test_tiles(tile, dtype, monkeypatch):
    """Whole and broken ones, more than a block of the grid takes at once."""
    monkeypatch.setenv("PIXART_ATTENTION_TILE", tile)
    for Nq, Nk in ((64, 128), (130, 352), (385, 353), (1100, 129)):
        q, k, v = separate(2, Nq, Nk, 1, 72, dtype, DEVICE)
        with poisoned_allocations():
            out = attention(q, k, v, "cuda")
        exact = attention(*(x.double() for x in (q, k, v)), "reference")
        eager = attention(q, k, v, "reference")
        assert_within_eager_error(out, exact, eager, terms=Nk)


def test_queries_of_a_tile_do_not_change_a_bit(monkeypatch):
    q, k, v = separate(2, 200, 300, 2, 72, BF16, DEVICE)
    found = []
    for tile in ("1x128", "2x128", "3x128"):
        monkeypatch.setenv("PIXART_ATTENTION_TILE", tile)
        found.append(forward(q, k, v))
    cases.assert_same_bits(found[0], found[1])
    cases.assert_same_bits(found[0], found[2])


def test_a_tile_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("PIXART_ATTENTION_TILE", "4x128")
    q, k, v = separate(1, 3, 3, 1, 72, BF16, DEVICE)
    with pytest.raises((RuntimeError, ValueError), match="'4x128'; accepted: 1x128, 2x128"):
        forward(q, k, v)


@per_backward_tile
@per_16_bit
def test_backward_tiles(tile, dtype, monkeypatch):
    """Short and whole ones, several to a block, and more steps than buffers."""
    monkeypatch.setenv("PIXART_ATTENTION_BWD_TILE", tile)
    for B, Nq, Nk, H in (
        (1, 63, 65, 1),
        (2, 64, 128, 1),
        (3, 1, 257, 1),
        (2, 130, 257, 3),
        (1, 600, 63, 1),
        (1, 63, 600, 1),
    ):
        cases.check_error_rule(attention, separate(B, Nq, Nk, H, 72, dtype, DEVICE), "cuda")


@on_gpu
@per_backward_tile
@pytest.mark.parametrize("N", [1000, 4096])
def test_backward_tiles_at_lengths_of_the_model(tile, N, monkeypatch):
    monkeypatch.setenv("PIXART_ATTENTION_BWD_TILE", tile)
    leaves = packed(2, N, 16, 72, BF16, DEVICE)
    cases.check_error_rule(cases.self_attention(16), leaves, "cuda")


def test_own_rows_of_a_backward_tile_do_not_change_a_bit(monkeypatch):
    leaves = separate(2, 257, 300, 1, 72, BF16, DEVICE)
    found = {}
    for tile in BACKWARD_TILES:
        monkeypatch.setenv("PIXART_ATTENTION_BWD_TILE", tile)
        found[tile] = run(attention, leaves, "cuda")
    cases.assert_same_bits(found["1x128"], found["2x128"])
    # other steps add in another order, and are another kernel
    pairs = zip(found["2x128"][1:], found["2x64"][1:], strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_a_backward_tile_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("PIXART_ATTENTION_BWD_TILE", "3x64")
    with pytest.raises((RuntimeError, ValueError), match="'3x64'; accepted: 1x128, 2x128, 2x64"):
        run(attention, separate(1, 3, 3, 1, 72, BF16, DEVICE), "cuda")


@pytest.mark.parametrize("alike", [(0,), (0, 1, 2)], ids=["samples", "samples, tokens, heads"])
def test_expanded_output_gradients(alike):
    leaves = separate(2, 65, 70, 3, 72, BF16, DEVICE)
    dout = cases.gradient_like(leaves[0])
    one = dout[tuple(slice(1) if i in alike else slice(None) for i in range(4))]
    expected = run(attention, leaves, "cuda", one.expand_as(dout).contiguous())
    cases.assert_same_bits(expected, run(attention, leaves, "cuda", one.expand_as(dout)))


def test_no_weight_exceeds_one_in_the_backward():
    """All weight is one key's, by scores whose last place is worth thousands."""
    q, k, v = separate(1, 65, 130, 1, 72, FP16, DEVICE)
    q[:], k[:] = 60000, 1
    q[:, ::2] = 59000
    k[:, 4] = 60000
    dout = cases.gradient_like(q)
    _, dq, dk, dv = run(attention, [q, k, v], "cuda", dout)
    assert dq.isfinite().all() and dk.isfinite().all()
    expected = torch.zeros_like(dv)
    expected[:, 4] = dout.double().sum(1)
    torch.testing.assert_close(dv, expected, rtol=1e-3, atol=1e-3)


@per_16_bit
def test_lse_is_saved_in_base_2(dtype):
    q, k, v = separate(2, 65, 257, 3, 72, dtype, DEVICE)
    _, lse = forward(q, k, v)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 72**0.5
    expected = torch.logsumexp(scores, -1) / torch.log(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)


@cases.per_layout
def test_strided_views(layout):
    cases.check_strided_views(layout, "cuda", DEVICE, d=72)


def test_heads_first_and_packed_keys():
    cases.check_heads_first_and_packed_keys("cuda", DEVICE, d=72)


def copies(q, k, v) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        forward(q, k, v)
    return sum(event.count for event in profile.key_averages() if event.key == "aten::copy_")


def test_only_what_tma_cannot_read_is_copied():
    (qkv,) = packed(2, 5, 2, 72, BF16, DEVICE)
    q, k, v = cases.sliced(qkv).unflatten(2, (3, 2, 72)).unbind(2)
    assert copies(q, k, v) == 0
    assert copies(q.transpose(1, 2).contiguous().transpose(1, 2), k, v) == 0
    # the strides of single elements are never used
    single = q[:1, :1].as_strided((1, 1, 2, 72), (3, 5, 72, 1))
    assert copies(single, k[:1], v[:1]) == 0
    assert copies(q, k[:1].expand(2, -1, -1, -1), v) == 1
    assert copies(cases.misaligned(q), cases.misaligned(k), cases.last_dimension_strided(v)) == 3


def test_expanded_inputs_and_gradients():
    cases.check_expanded("cuda", DEVICE, d=72, dtype=FP16, tolerance=2e-2)


@on_gpu
def test_addresses_beyond_32_bits():
    cases.check_addresses_beyond_32_bits("cuda", DEVICE, d=72)


@on_gpu
def test_more_heads_than_a_grid_has_rows():
    leaves = packed(70_000, 1, 2, 72, BF16, DEVICE)
    cases.check_error_rule(cases.self_attention(2), leaves, "cuda")


@on_gpu
@pytest.mark.parametrize("N", [256, 1000, 1024, 4095, 4096])
@per_16_bit
def test_lengths_of_the_model(N, dtype):
    leaves = packed(2, N, 16, 72, dtype, DEVICE)
    cases.check_error_rule(cases.self_attention(16), leaves, "cuda")


@on_gpu
@per_16_bit
def test_a_long_sequence(dtype):
    cases.check_error_rule(cases.self_attention(1), packed(1, 16384, 1, 72, dtype, DEVICE), "cuda")


@per_16_bit
def test_large_scores(dtype):
    cases.check_large_scores(dtype, "cuda", DEVICE, d=72)


def test_scores_at_the_limit_of_fp16():
    cases.check_scores_at_the_limit("cuda", DEVICE, d=72)


def test_all_scores_far_below_zero():
    cases.check_all_scores_far_below_zero("cuda", DEVICE, d=72)


def test_nan_stays_in_its_row():
    cases.check_nan_stays_in_its_row("cuda", DEVICE, d=72)


@pytest.mark.parametrize("N", [33, 257])
def test_a_sample_does_not_depend_on_its_batch(N):
    leaves = packed(3, N, 2, 72, BF16, DEVICE)
    cases.check_a_sample_alone(cases.self_attention(2), leaves, "cuda")


def test_same_bits_every_time():
    B, N, H, times = (1, 130, 1, 2) if EMULATED else (2, 1000, 16, 100)
    leaves = packed(B, N, H, 72, BF16, DEVICE)
    expected = run(cases.self_attention(H), leaves, "cuda")
    for _ in range(times):
        cases.assert_same_bits(expected, run(cases.self_attention(H), leaves, "cuda"))


def test_some_gradients():
    cases.check_some_gradients("cuda", DEVICE, d=72, dtype=BF16)


@on_gpu
def test_runs_on_the_current_stream():
    (qkv,) = packed(8, 1024, 16, 72, BF16, DEVICE)
    op = cases.self_attention(16)
    expected = run(op, [qkv], "cuda")
    dout = cases.gradient_like(expected[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # long before the input is ready, were it on another stream
        torch.cuda._sleep(10_000_000)
        actual = run(op, [qkv.clone()], "cuda", dout)
    torch.cuda.synchronize()
    cases.assert_same_bits(expected, actual)


@on_gpu
def test_captured_in_a_graph():
    leaves = packed(2, 257, 16, 72, BF16, DEVICE)
    op = cases.self_attention(16)
    expected = run(op, leaves, "cuda")
    dout = cases.gradient_like(expected[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op, leaves, "cuda", dout)
    graph.replay()
    cases.assert_same_bits(expected, captured)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(needs_grad):
    cases.check_opcheck(torch.ops.pixart_kernels, needs_grad, DEVICE, d=72)


def test_compiles_as_one_graph_with_one_recompilation_for_other_lengths():
    cases.check_one_recompilation_for_other_lengths("cuda", (3, 5, 7), DEVICE, d=72, dtype=BF16)


def test_compiles_with_one_tensor_thrice():
    cases.check_compiles_with_one_tensor_thrice("cuda", DEVICE, d=72, dtype=FP16, tolerance=1e-2)


@on_gpu
def test_compiles_with_inductor_and_without_gradients():
    cases.check_compiles_with_inductor_and_without_gradients("cuda", DEVICE, d=72)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors():
    leaves = packed(2, 9, 2, 72, BF16, "cuda:1")
    cases.check_error_rule(cases.self_attention(2), leaves, "cuda")


def test_ops_called_by_themselves_guard_memory():
    ops = torch.ops.pixart_kernels
    q, k, v = separate(2, 5, 3, 2, 72, BF16, DEVICE)
    (qkv,) = packed(2, 5, 2, 72, BF16, DEVICE)
    out, lse = forward(q, k, v)
    for call in (
        lambda: ops.attention_fwd(q.float(), k.float(), v.float()),
        lambda: ops.attention_fwd(q, k.half(), v),
        lambda: ops.attention_fwd(q, k, v[:, :2]),
        lambda: ops.attention_fwd(q[..., :64], k[..., :64], v[..., :64]),
        lambda: ops.attention_fwd(q[0], k[0], v[0]),
        lambda: ops.attention_bwd(out[:, :4], q, k, v, out, lse),
        lambda: ops.attention_bwd(out, q, k, v, out, lse[:1]),
        lambda: ops.attention_bwd(out, q, k, v, out, lse.half()),
        lambda: ops.self_attention_fwd(qkv, 3),
        lambda: ops.self_attention_fwd(qkv, 0),
        lambda: ops.self_attention_bwd(qkv, qkv, qkv, lse, 2),
    ):
        with pytest.raises(RuntimeError, match="must be|has another"):
            call()


@pytest.mark.parametrize("op", ["self_attention", "attention"])
def test_auto_leaves_it_alone_until_it_is_verified(op):
    x = torch.zeros(1, 2, 1, 72, device=DEVICE, dtype=BF16)
    reason = dispatch.why_not_auto(op, "cuda", x, head_dim=72)
    assert reason is not None and "not verified" in reason


@on_gpu
def test_other_heads_and_fp32_are_left_to_others():
    qkv = torch.zeros(1, 2, 3 * 64, device=DEVICE, dtype=BF16)
    with pytest.raises(RuntimeError, match="heads have 64 elements; .* take 72"):
        pk.self_attention(qkv, 1, backend="cuda")
    x = torch.zeros(1, 2, 1, 72, device=DEVICE)
    with pytest.raises(RuntimeError, match="x is torch.float32; .* bfloat16 and float16"):
        pk.attention(x, x, x, backend="cuda")

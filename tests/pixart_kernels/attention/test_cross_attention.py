"""Every backend of cross_attention against the reference; what is past a length is NaN throughout.

On a GPU, Triton kernels run as they are, without one interpreted.
"""

from __future__ import annotations

import attention_cases as cases
import pytest
import torch
from attention_cases import (
    BF16,
    FP16,
    FP32,
    assert_same_bits,
    gradient_like,
    per_dtype,
    random,
    run,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_devices import DEVICE, needs_triton, on_gpu

import pixart_kernels as pk
from pixart_kernels import _triton, dispatch
from pixart_kernels.attention import config, cross_native

DEVICES = {"native": "cpu", "triton": DEVICE}
triton_alone = pytest.mark.parametrize("backend", [pytest.param("triton", marks=needs_triton)])


@pytest.fixture(params=["native", pytest.param("triton", marks=needs_triton)])
def backend(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def little_to_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of each kind, and shares of the queries, within few tokens."""
    if _triton.INTERPRETED:
        tiles = config.Tiles(
            config.Tile(32, 16, 1, 1), config.Tile(16, 32, 1, 1), config.Tile(64, 16, 1, 1)
        )
        monkeypatch.setattr(config, "tiles", lambda *key: tiles)
        monkeypatch.setattr(config, "QUERIES", 48)
        monkeypatch.setattr(config, "FOLDED", 64)


def text(L: int, lengths: list[int], H=2, d=72, dtype=FP32, device="cpu") -> tuple[Tensor, Tensor]:
    """kv, whose padding is NaN, and its lengths."""
    kv = random(len(lengths), L, 2, H, d, dtype=dtype, device=device, seed=1)
    kv_lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    kv[torch.arange(L, device=device) >= kv_lengths[:, None]] = float("nan")
    return kv, kv_lengths


def inputs(N, L, lengths, H=2, d=72, dtype=FP32, backend="triton") -> tuple[list[Tensor], Tensor]:
    """Leaves, and the lengths that ``cross`` takes."""
    device = DEVICES[backend]
    kv, kv_lengths = text(L, lengths, H, d, dtype, device)
    return [random(len(lengths), N, H, d, dtype=dtype, device=device), kv], kv_lengths


def cross(kv_lengths: Tensor):
    def op(q: Tensor, kv: Tensor, backend: str) -> Tensor:
        return pk.cross_attention(q, kv, kv_lengths, backend=backend)

    return op


SHAPES = [
    (1, 2, 2, [1, 2]),
    (33, 40, 2, [40, 0, 17]),
    (17, 20, 2, [20, 20]),
    (65, 120, 1, [119, 120]),
    (17, 300, 1, [0, 1, 299, 300]),
    (17, 400, 1, [400]),
    (5, 8, 2, [0, 0]),
    (0, 7, 2, [3, 7]),
    (5, 0, 2, [0, 0]),
    (3, 4, 2, []),
]


@pytest.mark.parametrize("N, L, H, lengths", SHAPES, ids=str)
@per_dtype
def test_equals_the_reference(N, L, H, lengths, dtype, backend):
    leaves, kv_lengths = inputs(N, L, lengths, H, dtype=dtype, backend=backend)
    cases.check_error_rule(cross(kv_lengths), leaves, backend)


# 1 and 73: nothing is a multiple of anything
@pytest.mark.parametrize("d", [1, 8, 16, 40, 64, 73, 80, 96, 128])
def test_head_dimensions(d, backend):
    leaves, kv_lengths = inputs(50, 19, [19, 3], d=d, dtype=FP16, backend=backend)
    cases.check_error_rule(cross(kv_lengths), leaves, backend)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_tiles_as_shipped(dtype, monkeypatch, backend):
    monkeypatch.undo()
    leaves, kv_lengths = inputs(130, 77, [77, 20], H=1, dtype=dtype, backend=backend)
    cases.check_error_rule(cross(kv_lengths), leaves, backend)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("N", [256, 1024, 4095, 4096, 16384])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_lengths_of_the_model(N, dtype):
    leaves, kv_lengths = inputs(N, 300, [300, 1, 0, 119], H=16, dtype=dtype)
    cases.check_error_rule(cross(kv_lengths), leaves, "triton")


def test_a_length_out_of_range_is_the_nearest_in_range(backend):
    leaves, kv_lengths = inputs(50, 20, [20, 0], d=24, backend=backend)
    found = run(cross(torch.tensor([99, -3]).to(kv_lengths)), leaves, backend)
    assert_same_bits(run(cross(kv_lengths), leaves, backend), found)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_without_text_nothing_is_read(backend):
    leaves, kv_lengths = inputs(50, 20, [0, 5], d=24, backend=backend)
    leaves[0][0] = float("nan")
    dout = gradient_like(leaves[0])
    dout[0] = float("inf")
    out, dq, dkv = run(cross(kv_lengths), leaves, backend, dout)
    assert not out[0].any() and not dq[0].any() and not dkv[0].any()
    assert out.isfinite().all() and dq.isfinite().all() and dkv.isfinite().all()


def test_padding_changes_no_bit_and_gets_no_gradient(backend):
    (q, kv), kv_lengths = inputs(50, 40, [7, 33], d=24, dtype=BF16, backend=backend)
    out, dq, dkv = run(cross(kv_lengths), [q, kv], backend)
    assert_same_bits([out, dq, dkv[:, :33]], run(cross(kv_lengths), [q, kv[:, :33]], backend))
    assert not dkv[0, 7:].any() and not dkv[1, 33:].any()


@cases.per_layout
def test_strided_views_are_read_where_they_lie(layout, backend):
    leaves, kv_lengths = inputs(50, 20, [3, 20], d=24, dtype=BF16, backend=backend)
    expected = run(cross(kv_lengths), leaves, backend)
    views = [layout(leaf) for leaf in leaves]
    dout = layout(gradient_like(expected[0]))
    every_other = torch.stack([kv_lengths, -kv_lengths], 1)[:, 0]
    assert_same_bits(expected, run(cross(every_other), views, backend, dout))


def test_expanded_inputs_and_gradients(backend):
    """Stride 0: one text for all images, and sum() as the loss."""
    (q, kv), kv_lengths = inputs(50, 20, [13], d=24, backend=backend)
    grads = []
    for name in ("reference", backend):
        leaves = [leaf.detach().requires_grad_() for leaf in (q, kv)]
        expanded = [leaf.expand(3, *leaf.shape[1:]) for leaf in leaves]
        out = cross(kv_lengths.expand(3))(*expanded, backend=name)
        # a weight of its own for each sample keeps the gradients from vanishing
        grads.append(torch.autograd.grad(out.sum() + out[0].square().sum(), leaves))
    for expected, actual in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# the weight of no key, before it is masked
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2", "ignore:invalid value")
def test_all_scores_far_below_zero(backend):
    """Keys past the end score 0, which must not count, nor its weight overflow."""
    (q, kv), kv_lengths = inputs(50, 40, [19, 40], d=24, dtype=FP16, backend=backend)
    q = q.abs() + 20
    kv[:, :, 0] = -kv[:, :, 0].abs() - 20
    assert all(x.isfinite().all() for x in run(cross(kv_lengths), [q, kv], backend))
    cases.check_error_rule(cross(kv_lengths), [q, kv], backend)


def test_a_sample_does_not_depend_on_its_batch(backend):
    leaves, kv_lengths = inputs(65, 20, [20, 7, 7], d=24, dtype=BF16, backend=backend)
    dout = gradient_like(leaves[0])
    together = run(cross(kv_lengths), leaves, backend, dout)
    alone = run(cross(kv_lengths[1:2]), [leaf[1:2] for leaf in leaves], backend, dout[1:2])
    assert_same_bits([tensor[1:2] for tensor in together], alone)


def test_bitwise_repeatable(backend):
    N, times = (4096, 100) if DEVICES[backend] == "cuda" else (65, 1)
    leaves, kv_lengths = inputs(N, 70, [70, 19], H=1, dtype=BF16, backend=backend)
    expected = run(cross(kv_lengths), leaves, backend)
    for _ in range(times):
        assert_same_bits(expected, run(cross(kv_lengths), leaves, backend))


def test_some_gradients(backend):
    """Each gradient is the same whether or not the other is asked for."""
    leaves, kv_lengths = inputs(17, 5, [5, 2], d=8, backend=backend)
    _, *expected = run(cross(kv_lengths), leaves, backend)
    for i, gradient in enumerate(expected):
        some = [leaf.detach().requires_grad_(i == j) for j, leaf in enumerate(leaves)]
        out = cross(kv_lengths)(*some, backend=backend)
        out.backward(gradient_like(out))
        assert torch.equal(some[i].grad, gradient) and some[1 - i].grad is None


def test_native_derivatives_in_fp64():
    leaves, kv_lengths = inputs(3, 4, [3, 0], d=4, dtype=torch.float64, backend="native")
    leaves[1] = leaves[1].nan_to_num()
    leaves = [leaf.requires_grad_() for leaf in leaves]
    op = cross(kv_lengths)
    assert torch.autograd.gradcheck(lambda q, kv: op(q, kv, "native"), leaves)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("lengths", [[3, 1], [3, 3], [0, 0]], ids=str)
def test_opcheck(lengths, needs_grad, backend):
    namespace = {"native": "pixart_kernels_cpu", "triton": "pixart_kernels_triton"}[backend]
    ops = getattr(torch.ops, namespace)
    leaves, kv_lengths = inputs(5, 3, lengths, d=8, dtype=FP16, backend=backend)
    out, lse = ops.cross_attention_fwd(*leaves, kv_lengths)
    q, kv = [leaf.requires_grad_(needs_grad) for leaf in leaves]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, arguments in (
        (ops.cross_attention_fwd, (q, kv, kv_lengths)),
        (ops.cross_attention_bwd, (out, q, kv, kv_lengths, out, lse)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=checks)


def test_compiles_as_one_graph_whatever_the_lengths(backend):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, example_inputs)

    torch._dynamo.reset()
    compiled = torch.compile(pk.cross_attention, fullgraph=True, backend=count)
    for lengths in ([3, 5], [0, 4], [5, 5]):
        leaves, kv_lengths = inputs(7, 5, lengths, d=8, backend=backend)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        expected = run(cross(kv_lengths), leaves, backend)
        out = compiled(*leaves, kv_lengths, backend=backend)
        assert_same_bits(expected, [out, *torch.autograd.grad(out, leaves, gradient_like(out))])
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "backend", ["native", pytest.param("triton", marks=[*needs_triton, on_gpu])]
)
def test_compiles_with_inductor_and_without_gradients(backend):
    leaves, kv_lengths = inputs(5, 7, [7, 2], d=8, dtype=BF16, backend=backend)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(pk.cross_attention, fullgraph=True)(
            *leaves, kv_lengths, backend=backend
        )
    assert torch.equal(found, cross(kv_lengths)(*leaves, backend=backend))


@on_gpu
@pytest.mark.gpu
def test_a_captured_graph_follows_the_lengths():
    leaves, kv_lengths = inputs(4096, 300, [300, 20], H=16, dtype=BF16)
    others = text(300, [119, 0], H=16, dtype=BF16, device="cuda")
    dout = gradient_like(leaves[0])
    run(cross(kv_lengths), leaves, "triton", dout)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(cross(kv_lengths), leaves, "triton", dout)
    for tensor, other in zip((leaves[1], kv_lengths), others, strict=True):
        tensor.copy_(other)
    graph.replay()
    assert_same_bits(run(cross(kv_lengths), leaves, "triton", dout), captured)


def test_native_runs_on_tensors_without_values():
    with FakeTensorMode():
        q, kv = torch.empty(2, 5, 2, 8), torch.empty(2, 3, 2, 2, 8)
        kv_lengths = torch.empty(2, dtype=torch.int32)
        found = run(cross(kv_lengths), [q, kv], "native")
    assert [tensor.shape for tensor in found] == [q.shape, q.shape, kv.shape]


def test_native_says_why_it_stays_on_the_cpu():
    reason = dispatch.why_not("cross_attention", "native", torch.zeros(1, device="meta"))
    assert reason is not None and "on meta" in reason


def test_heads_of_any_size_on_the_cpu():
    leaves, kv_lengths = inputs(5, 3, [3, 1], d=136, backend="native")
    cases.check_error_rule(cross(kv_lengths), leaves, "native")


@triton_alone
def test_wider_heads_are_refused(backend):
    leaves, kv_lengths = inputs(5, 3, [3, 1], d=136)
    with pytest.raises(RuntimeError, match="heads have 136 elements; triton kernels take 1 to 128"):
        cross(kv_lengths)(*leaves, backend=backend)


@triton_alone
def test_auto_leaves_triton_alone_until_it_is_verified(backend):
    x = torch.zeros(1, device=DEVICES[backend])
    reason = dispatch.why_not_auto("cross_attention", backend, x)
    assert reason is not None and "not verified" in reason


@pytest.mark.parametrize("N, expected", [(0, 1), (1, 1), (2048, 1), (2049, 2), (16384, 8)])
def test_queries_are_shared_out_by_their_number(N, expected, monkeypatch):
    monkeypatch.undo()
    assert config.splits(N) == expected


def test_samples_of_one_length_share_a_call_where_they_are_small(monkeypatch):
    lengths = [3, 5, 3, 0, 5, 3]
    leaves, kv_lengths = inputs(4, 7, lengths, d=24, backend="native")
    calls, flash = [], cross_native._flash
    monkeypatch.setattr(cross_native, "_flash", lambda *heads: calls.append(1) or flash(*heads))
    gathered = run(cross(kv_lengths), leaves, "native")
    assert len(calls) == 2
    cases.check_error_rule(cross(kv_lengths), leaves, "native")
    monkeypatch.setattr(cross_native, "GATHERED", 0)
    calls.clear()
    assert_same_bits(gathered, run(cross(kv_lengths), leaves, "native"))
    assert len(calls) == 5

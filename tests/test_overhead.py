"""What an eager call of each op costs where there is nothing to compute.

``pytest tests/test_overhead.py --benchmark-enable`` measures; otherwise each runs once. No time is
asserted: figures belong to `benchmarks`, which knows how quiet the machine was.
"""

from __future__ import annotations

import pytest
import torch

import pixart_kernels as pk

B, N, D, H = 1, 4, 64, 4


def _calls() -> dict:
    torch.manual_seed(0)
    x, branch = torch.randn(B, N, D), torch.randn(B, N, D)
    table, t = torch.randn(6, D), torch.randn(B, 6 * D)
    qkv = torch.randn(B, N, 3 * D)
    q, k, v = (part.unflatten(-1, (H, -1)) for part in qkv.chunk(3, dim=-1))
    kv, lengths = torch.stack([k, v], dim=2), torch.tensor([3], dtype=torch.int32)
    conv = torch.randn(D, 1, 2, 2), torch.randn(D), torch.randn(D), torch.randn(D)
    flat_kv = kv.flatten(3)

    def came_step(**o) -> torch.Tensor:
        shapes = {"exp_avg": (4, D), "exp_avg_sq_row": (4,), "exp_avg_sq_col": (D,)}
        shapes |= {"exp_avg_res_row": (4,), "exp_avg_res_col": (D,)}
        state = {name: [torch.zeros(shape)] for name, shape in shapes.items()}
        settings = {"lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16)}
        weight = table[:4].clone()
        pk.came_step([weight], [x[0]], state, **settings, clip_threshold=1.0, weight_decay=0.0, **o)
        return weight

    return {
        "adaln_single": lambda **o: pk.adaln_single(x, table, t, shift_row=0, scale_row=1, **o),
        "adaln_modulate": lambda **o: pk.adaln_modulate(x, t[:, :D], t[:, D : 2 * D], **o),
        "gated_residual": lambda **o: pk.gated_residual(x, branch, table, t, gate_row=2, **o),
        "gated_residual_adaln": lambda **o: pk.gated_residual_adaln(
            x, branch, gate=(table, t, 2), modulation=(table, t, 3, 4), **o
        ),
        "self_attention": lambda **o: pk.self_attention(qkv, H, **o),
        "attention": lambda **o: pk.attention(q, k, v, **o),
        "cross_attention": lambda **o: pk.cross_attention(q, kv, lengths, **o),
        "compress_kv": lambda **o: pk.compress_kv(flat_kv, 2, 2, *conv, ratio=2, **o),
        "came_step": came_step,
        "bias_gelu": lambda **o: pk.bias_gelu(x, table[0], **o),
    }


CALLS = _calls()
BACKENDS = ("reference", "native")


def test_every_public_op_is_here() -> None:
    assert set(CALLS) == set(pk.dispatch.ops())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", CALLS)
def test_eager_call(benchmark, op: str, backend: str) -> None:
    reason = pk.dispatch.why_not(op, backend, torch.zeros(1))
    if reason is not None:
        pytest.skip(reason)
    benchmark.group = op
    with torch.no_grad():
        found = benchmark(CALLS[op], backend=backend)
        torch.testing.assert_close(found, CALLS[op](backend="reference"), rtol=1e-5, atol=1e-5)

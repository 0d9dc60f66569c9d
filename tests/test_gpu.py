"""What only a GPU can prove; skipped without one. docs/hardware.md says what it settled so far."""

from __future__ import annotations

import pytest
import torch

import pixart_kernels as pk

pytest.importorskip("safetensors")
from golden import NAMES, Golden, load_golden

from pixart import PixArt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def on_gpu(name: str) -> tuple[Golden, PixArt, dict[str, torch.Tensor]]:
    golden = load_golden(name)
    model = PixArt(golden.config)
    golden.state.pop("pos_embed")
    model.load_state_dict(golden.state)
    return golden, model.cuda(), {key: value.cuda() for key, value in golden.inputs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_model_equals_official_code(name: str) -> None:
    golden, model, inputs = on_gpu(name)
    output = model(**inputs)
    atol = 5e-6 * float(golden.output.abs().max())
    torch.testing.assert_close(output.cpu(), golden.output, rtol=0, atol=atol)
    (output * golden.loss_weight.cuda()).sum().backward()
    floor = 1e-6 * max(float(g.abs().max()) for g in golden.gradients.values())
    for key, parameter in model.named_parameters():
        expected = golden.gradients[key]
        atol = 2e-5 * float(expected.abs().max()) + floor
        torch.testing.assert_close(parameter.grad.cpu(), expected, rtol=0, atol=atol, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_never_waits_for_the_device(name: str) -> None:
    _, model, inputs = on_gpu(name)
    model(**inputs).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_captured_in_a_graph(name: str) -> None:
    _, model, inputs = on_gpu(name)
    with torch.no_grad():
        expected = model(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(**inputs)
        captured.zero_()
        graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_close(dtype: torch.dtype) -> None:
    golden, model, inputs = on_gpu("sigma_ms")
    with torch.autocast("cuda", dtype):
        output = model(**inputs)
    error = (output.float().cpu() - golden.output).abs().max()
    assert error < 0.05 * golden.output.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ops_mean_the_same_on_both_devices(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    D, H = 144, 2
    x, branch = (torch.randn(2, 63, D, dtype=dtype) for _ in range(2))
    table, t = torch.randn(6, D), torch.randn(2, 6 * D, dtype=dtype)
    qkv = torch.randn(2, 63, 3 * D, dtype=dtype)
    q, text = qkv[..., :D].unflatten(-1, (H, -1)), torch.randn(2, 9, 2, H, D // H, dtype=dtype)
    lengths = torch.tensor([0, 7], dtype=torch.int32)
    conv = (torch.randn(D, 1, 2, 2), torch.randn(D), torch.randn(D), torch.randn(D))
    calls = {
        "adaln_single": lambda d: pk.adaln_single(d(x), d(table), d(t), shift_row=0, scale_row=1),
        "gated_residual_adaln": lambda d: pk.gated_residual_adaln(
            d(x), d(branch), gate=(d(table), d(t), 2), modulation=(d(table), d(t), 3, 4)
        )[1],
        "self_attention": lambda d: pk.self_attention(d(qkv), H),
        "cross_attention": lambda d: pk.cross_attention(d(q), d(text), d(lengths)),
        "compress_kv": lambda d: pk.compress_kv(
            d(qkv).unflatten(-1, (3, D))[:, :, 1:], 7, 9, *map(d, conv), ratio=2
        ),
    }
    with pk.use_backend("reference"):
        for name, call in calls.items():
            here, there = call(lambda tensor: tensor), call(lambda tensor: tensor.cuda()).cpu()
            assert here.dtype == there.dtype, name
            tolerance = 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(there, here, rtol=tolerance, atol=4 * tolerance, msg=name)

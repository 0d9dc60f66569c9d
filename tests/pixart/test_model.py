"""The model against the official code's recordings, and what the recordings do not reach."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from golden import NAMES, load_golden
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import pixart_kernels as pk
from pixart import PixArt, PixArtConfig, presets

SMALL = PixArtConfig(
    input_size=8,
    hidden_size=72,
    depth=3,
    num_heads=2,
    caption_channels=10,
    max_caption_tokens=7,
    caption_dropout=0.0,
)


def randomized(config: PixArtConfig, seed: int = 0) -> PixArt:
    """A model in which no layer is left at zero."""
    torch.manual_seed(seed)
    model = PixArt(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def inputs(config: PixArtConfig, B: int = 2, L: int = 5, size: tuple[int, int] = (8, 8)) -> dict:
    generator = torch.Generator().manual_seed(1)
    arguments = {
        "latents": torch.randn(B, config.in_channels, *size, generator=generator),
        "timestep": torch.tensor([3.0, 871.5, 400.0])[:B],
    }
    if config.conditioning == "class":
        return {**arguments, "caption": torch.arange(B)}
    arguments["caption"] = torch.randn(B, L, config.caption_channels, generator=generator)
    if config.micro_conditioning:
        arguments["image_size"] = torch.tensor([[512.0, 640.0], [900.0, 33.0]])[:B]
        arguments["aspect_ratio"] = torch.tensor([[0.8], [2.1]])[:B]
    return arguments


def loss_gradients(model: PixArt, arguments: dict, weight: torch.Tensor) -> dict:
    """The output, and the gradient of each parameter that has one."""
    model.zero_grad()
    output = model(**arguments)
    (output * weight).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **grads}


def assert_close(actual: dict, expected: dict) -> None:
    """But for rounding, of which a key's bias has nothing else: it has no true gradient."""
    assert actual.keys() == expected.keys()
    floor = 1e-6 * max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        atol = 1e-5 * float(value.abs().max()) + floor
        torch.testing.assert_close(actual[name], value, rtol=0, atol=atol, msg=name)


@contextlib.contextmanager
def everything_kept():
    """Without recomputation, which gives way to the hooks of others."""
    with saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_equals_official_code_forward_and_every_gradient(name: str) -> None:
    golden = load_golden(name)
    model = PixArt(golden.config)
    positions = golden.state.pop("pos_embed")
    model.load_state_dict(golden.state)
    side = golden.config.input_size // golden.config.patch_size
    assert torch.equal(model.position_embedding((side, side), positions.device), positions)

    output = model(**golden.inputs)
    torch.testing.assert_close(output, golden.output, rtol=0, atol=2e-6 * golden.output.abs().max())
    (output * golden.loss_weight).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == golden.gradients.keys()
    # a key's bias shifts all scores of a query alike: its true gradient is 0, and what either
    # code returns is the rounding of sums as large as the other gradients
    floor = 1e-6 * max(g.abs().max() for g in golden.gradients.values())
    for key, expected in golden.gradients.items():
        torch.testing.assert_close(
            gradients[key],
            expected,
            rtol=0,
            atol=float(1e-5 * expected.abs().max() + floor),
            msg=key,
        )


def test_published_sizes() -> None:
    def count(name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in PixArt(presets[name]).parameters())

    assert count("sigma-1024") == count("alpha-512") == 610_856_096
    assert count("alpha-1024") == 611_349_152
    assert count("sigma-1024-kv") == 610_856_096 + 14 * 8_064
    # DiT-XL/2 counts its fixed position embedding too
    assert count("dit-256") + 256 * 1152 == 675_129_632
    # the paper rounds its adaLN ablation to 833M. 28 modulation layers and the final one in
    # place of the shared layer and the tables make 828.5M; what is left, 4.5M, is less than the
    # shared layer's 8.0M, which the ablation's code may have kept
    assert abs(count("adaln-256") / 833e6 - 1) < 0.01


@pytest.mark.parametrize("sampling", ["conv", "ave", "uniform", "uniform_every"])
def test_kv_compression_keeps_a_fraction_of_keys(sampling: str) -> None:
    kv = {"sampling": sampling, "scale_factor": 2, "layers": [1]}
    model = randomized(dataclasses.replace(SMALL, kv_compression=kv))
    # 5 x 3 tokens: odd sides
    tokens = torch.arange(15.0).view(1, 15, 1, 1).expand(1, 15, 2, 72)
    kept = model.blocks[1].attn.compress(tokens, (5, 3))
    if sampling == "conv":
        assert kept.shape == (1, 2, 2, 72)
    else:
        expected = {"uniform_every": [0, 2, 4, 6, 8, 10, 12]}.get(sampling, [0, 6])
        assert kept[0, :, 0, 0].tolist() == expected
    assert model(**inputs(model.config, size=(10, 6))).shape == (2, 8, 10, 6)
    assert model.blocks[0].attn.ratio == 1


def test_fresh_convolution_averages() -> None:
    kv = {"sampling": "conv", "scale_factor": 2, "layers": [0]}
    attn = PixArt(dataclasses.replace(SMALL, kv_compression=kv)).blocks[0].attn
    tokens = torch.randn(1, 16, 2, 72)
    average = tokens.view(1, 2, 2, 2, 2, 2, 72).mean((2, 4)).view(1, 4, 2, 72)
    expected = torch.nn.functional.layer_norm(average, (72,))
    torch.testing.assert_close(attn.compress(tokens, (4, 4)), expected)


CONFIGS = {
    "adaln_single": SMALL,
    "qk_norm": dataclasses.replace(SMALL, qk_norm=True),
    "micro": dataclasses.replace(SMALL, micro_conditioning=True),
    "gated": dataclasses.replace(SMALL, gated_cross_attention=True),
    "adaln": dataclasses.replace(SMALL, conditioning="adaln"),
    "class": dataclasses.replace(SMALL, conditioning="class", num_classes=4),
    "kv_conv": dataclasses.replace(
        SMALL, kv_compression={"sampling": "conv", "scale_factor": 2, "layers": [0, 2]}
    ),
    "kv_uniform": dataclasses.replace(
        SMALL, kv_compression={"sampling": "uniform", "scale_factor": 2, "layers": [1]}
    ),
    "kv_conv, qk_norm": dataclasses.replace(
        SMALL,
        qk_norm=True,
        kv_compression={"sampling": "conv", "scale_factor": 2, "layers": [1]},
    ),
}


per_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@per_config
def test_every_parameter_learns(config: PixArtConfig) -> None:
    model = randomized(config)
    found = loss_gradients(model, inputs(config), torch.randn(2, 8, 8, 8))
    del found["output"]
    assert found.keys() == dict(model.named_parameters()).keys()
    dead = [name for name, gradient in found.items() if not gradient.abs().max() > 0]
    assert not dead


@per_config
def test_kernels_equal_their_definitions_in_the_model(config: PixArtConfig) -> None:
    # 5 x 3 tokens: odd sides
    model, arguments = randomized(config), inputs(config, size=(10, 6))
    weight = torch.randn(2, 8, 10, 6)
    if config.conditioning != "class":
        arguments["caption_mask"] = torch.tensor([[1, 1, 1, 0, 1], [0, 0, 0, 0, 0]])
    with pk.use_backend("reference"), everything_kept():
        expected = loss_gradients(model, arguments, weight)
    assert_close(loss_gradients(model, arguments, weight), expected)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@per_config
def test_what_the_backward_makes_again_has_the_same_bits(
    config: PixArtConfig, autocast: bool
) -> None:
    model, arguments, weight = randomized(config), inputs(config), torch.randn(2, 8, 8, 8)

    def found() -> dict:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return loss_gradients(model, arguments, weight)

    with everything_kept():
        expected = found()
    for mode in (False, "selective"):
        model.gradient_checkpointing = mode
        actual = found()
        assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
    if not autocast:
        # here h is made apart from the residual: the same sums in another order
        model.gradient_checkpointing = True
        assert_close(found(), expected)


@pytest.mark.parametrize(
    "mode, crosses, selves, matrices", [(False, 1, 1, 0), ("selective", 2, 1, 4), (True, 2, 2, 7)]
)
def test_what_the_backward_computes_again(
    mode: bool | str, crosses: int, selves: int, matrices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def count(name: str) -> None:
        op = getattr(pk, name)
        monkeypatch.setattr(pk, name, lambda *args: calls.append(name) or op(*args))

    count("cross_attention")
    count("self_attention")
    model = randomized(SMALL)
    model.gradient_checkpointing = mode
    products = 0

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            nonlocal products
            products += op.overloadpacket.__name__ in ("mm", "addmm")
            return op(*args, **(kwargs or {}))

    with Products():
        loss = model(**inputs(SMALL)).square().sum()
        forward, products = products, 0
        loss.backward()
    assert calls.count("cross_attention") == 3 * crosses
    assert calls.count("self_attention") == 3 * selves
    # a backward has two for each layer; the timestep's sinusoids and the caption have no gradient
    assert products == 2 * forward - 2 + 3 * matrices


def test_checkpointing_keeps_one_tensor_for_each_block() -> None:
    def saved_bytes(checkpointing: bool) -> int:
        model, total = randomized(SMALL), 0
        model.gradient_checkpointing = checkpointing
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(**inputs(SMALL))
            total = sum(seen.values())
        del output
        return total

    residual = 2 * 16 * 72 * 4
    assert saved_bytes(True) < 0.25 * saved_bytes(False)
    # besides the residual stream of 3 blocks and the head's input: text, modulation, timestep
    assert saved_bytes(True) < 16 * residual


class Copies(TorchDispatchMode):
    """Shapes of tensors that are no more than others laid out or rounded otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        if name in ("clone", "copy_", "_to_copy", "cat", "stack", "where", "index_select"):
            self.shapes.append((name, tuple(result.shape)))
        return result


@pytest.mark.parametrize("name", ["adaln_single", "kv_conv", "qk_norm", "class"])
def test_nothing_is_copied_between_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # in place of ops whose definitions copy, and whose kernels read where things lie
    monkeypatch.setattr(pk, "cross_attention", lambda q, kv, lengths: q * kv.mean((1, 2))[:, None])
    monkeypatch.setattr(pk, "compress_kv", lambda kv, *_, ratio: kv[:, ::ratio])
    model = randomized(CONFIGS[name])
    block, x, branch, t = model.blocks[0], *torch.randn(3, 2, 16, 72).requires_grad_()
    text, lengths = torch.randn(2, 5, 72), torch.tensor([5, 5], dtype=torch.int32)
    t0 = model.t_block(t[:, 0]) if name != "class" else None
    pending = branch, block.modulation(t[:, 0], t0)
    with Copies() as found:
        block(x, pending, (4, 4), text, lengths, t[:, 0], t0)
    assert found.shapes == []


@per_config
def test_no_host_sync_in_forward_and_backward(config: PixArtConfig) -> None:
    # a fake tensor has no value: .item(), .tolist() or a data-dependent shape raises
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, arguments = PixArt(config), inputs(config)
        if config.conditioning != "class":
            arguments["caption_mask"] = torch.ones(2, 5)
        model.train()
        model(**arguments).sum().backward()


def test_adaln_equals_its_definition() -> None:
    model = randomized(dataclasses.replace(SMALL, conditioning="adaln"))
    block, t = model.blocks[0], torch.randn(2, 72)
    table, rows = block.modulation(t, None)
    expected = block.adaLN_modulation(t).view(2, 6, 72)
    torch.testing.assert_close(table + rows.view(2, 6, 72), expected)


def test_mask_of_any_pattern_attends_just_its_tokens() -> None:
    model = randomized(SMALL).eval()
    arguments = inputs(SMALL)
    mask = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 1, 0]])
    masked = model(**arguments, caption_mask=mask)
    for b in range(2):
        alone = {name: value[b : b + 1] for name, value in arguments.items()}
        alone["caption"] = alone["caption"][:, mask[b].bool()]
        torch.testing.assert_close(masked[b : b + 1], model(**alone), rtol=1e-4, atol=1e-5)


def test_empty_text_is_no_text() -> None:
    model = randomized(SMALL).eval()
    arguments = inputs(SMALL)
    with torch.no_grad():
        for block in model.blocks:
            block.cross_attn.proj.bias.zero_()
    nothing = model(**arguments, caption_mask=torch.zeros(2, 5))
    assert nothing.isfinite().all()
    with torch.no_grad():
        for block in model.blocks:
            block.cross_attn.proj.weight.zero_()
    torch.testing.assert_close(nothing, model(**arguments))


def test_caption_dropout_uses_the_null_caption_in_training_only() -> None:
    config = dataclasses.replace(SMALL, caption_dropout=0.9)
    model, arguments = randomized(config), inputs(config)
    null = {**arguments, "caption": model.y_embedder.y_embedding[None, :5].expand(2, -1, -1)}
    model.eval()
    with_text, without = model(**arguments), model(**null)
    assert not torch.allclose(with_text[0], without[0])
    model.train()
    torch.manual_seed(0)
    seen = [model(**arguments)[0] for _ in range(20)]
    dropped = sum(torch.allclose(out, without[0], atol=1e-5) for out in seen)
    kept = sum(torch.allclose(out, with_text[0], atol=1e-5) for out in seen)
    assert dropped + kept == 20
    assert dropped > kept > 0


def test_gated_cross_attention_starts_closed_and_can_open() -> None:
    model = PixArt(dataclasses.replace(SMALL, gated_cross_attention=True))
    gates = [block.cross_attn.gate for block in model.blocks]
    assert all(gate.item() == 0 for gate in gates)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    model(**inputs(SMALL)).square().sum().backward()
    assert all(gate.grad.abs() > 0 for gate in gates)


def test_the_gate_is_a_tanh() -> None:
    config = dataclasses.replace(SMALL, gated_cross_attention=True)
    cross = randomized(config).blocks[0].cross_attn
    x, text, lengths = torch.randn(1, 3, 72), torch.randn(1, 4, 72), torch.tensor([4]).int()
    outputs = []
    for value in (2.0, 20.0):
        torch.nn.init.constant_(cross.gate, value)
        outputs.append(cross(x, text, lengths))
    ratio = torch.tensor(2.0).tanh() / torch.tensor(20.0).tanh()
    torch.testing.assert_close(outputs[0], ratio * outputs[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert cross(x, text, lengths).dtype == torch.bfloat16


def test_hooks_see_the_first_mlp_layer() -> None:
    """And what it is expected to give them, although its bias may be added with the GELU."""
    mlp, x, seen = randomized(SMALL).blocks[1].mlp, torch.randn(2, 3, 72), []
    expected = mlp(x)
    mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(mlp(x), expected)
    torch.testing.assert_close(seen[0], x @ mlp.fc1.weight.T + mlp.fc1.bias)


def test_the_mlp_fuses_where_a_kernel_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, bias_gelu = [], pk.bias_gelu
    monkeypatch.setattr(pk, "bias_gelu", lambda *a, **k: calls.append(a) or bias_gelu(*a, **k))
    mlp, x = randomized(SMALL).blocks[0].mlp, torch.randn(2, 3, 72)
    mlp(x)
    assert len(calls) == (pk.chosen_backend("bias_gelu", x) != "reference")
    with pk.use_backend("reference"):
        mlp(x)
    assert len(calls) <= 1


class Adapter(torch.nn.Module):
    """As adapters for fine-tuning wrap a layer."""

    def __init__(self, base_layer: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)


def copied(linear: torch.nn.Linear) -> torch.nn.Linear:
    """As quantisers replace a layer."""
    other = torch.nn.Linear(linear.in_features, linear.out_features)
    other.load_state_dict(linear.state_dict())
    return other


@pytest.mark.parametrize("change", [Adapter, copied])
def test_a_changed_first_mlp_layer_has_its_bias_added_once(change) -> None:
    mlp, x = randomized(SMALL).blocks[0].mlp, torch.randn(2, 3, 72)
    expected = mlp(x)
    mlp.fc1 = change(mlp.fc1)
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_mlp_stays_in_autocasts_dtype(dtype: torch.dtype) -> None:
    mlp, seen = randomized(SMALL).blocks[0].mlp, []
    mlp.fc2.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype):
        assert mlp(torch.randn(2, 3, 72)).dtype == dtype
    assert seen == [dtype]


def test_fresh_model_predicts_zero() -> None:
    assert not PixArt(SMALL)(**inputs(SMALL)).any()


def test_positions_are_computed_once_per_grid() -> None:
    model = PixArt(SMALL)
    device = torch.device("cpu")
    first = model.position_embedding((4, 6), device)
    assert model.position_embedding((4, 6), device) is first
    # twice as many tokens cover the same range
    assert torch.equal(model.position_embedding((8, 12), device)[0, ::2][:6], first[0, :6])
    assert not any("position" in key for key in model.state_dict())


def test_positions_kept_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PixArt(SMALL)
    device = torch.device("cpu")
    monkeypatch.setattr("pixart.model.MAX_CACHED_BYTES", 3 * 24 * SMALL.hidden_size * 4)
    first = model.position_embedding((4, 6), device)
    for grid in [(6, 4), (3, 8), (8, 3)]:
        assert model.position_embedding((4, 6), device) is first or grid == (8, 3)
        model.position_embedding(grid, device)
    assert model.position_embedding((4, 6), device) is not first
    # a graph that is captured needs those that it has just been warmed up with
    large = model.position_embedding((40, 40), device)
    assert model.position_embedding((40, 40), device) is large
    assert len(model._positions) == 1


def test_bf16_keeps_timesteps_apart() -> None:
    model = randomized(SMALL).to(torch.bfloat16)
    # 871 and 872 are the same number in bf16
    t871, t872 = (model.t_embedder(torch.tensor([t])) for t in (871, 872))
    assert not torch.equal(t871, t872)


@pytest.mark.parametrize("config", [SMALL, CONFIGS["kv_conv"]], ids=["plain", "kv_conv"])
def test_autocast_close_to_fp32(config: PixArtConfig) -> None:
    model, arguments = randomized(config), inputs(config)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**arguments)
    expected = model(**arguments)
    assert (low - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("mode", [False, "selective"])
def test_compiles_to_one_graph(mode: bool | str) -> None:
    config = dataclasses.replace(SMALL, depth=2)
    model, arguments, weight = randomized(config), inputs(config), torch.randn(2, 8, 8, 8)
    model.gradient_checkpointing = mode
    arguments["caption_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    expected = loss_gradients(model, arguments, weight)
    model.compile(fullgraph=True, backend="aot_eager")
    assert_close(loss_gradients(model, arguments, weight), expected)


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("latents", torch.zeros(2, 4, 7, 8), "sides multiples of 2"),
        ("latents", torch.zeros(2, 3, 8, 8), r"\(B, 4, height, width\)"),
        ("timestep", torch.zeros(3), r"`timestep` is \(3,\)"),
        ("caption", torch.zeros(2, 5, 9), r"\(2, L, 10\)"),
        ("caption_mask", torch.zeros(2, 1, 1, 5), r"accepted: \(2, 5\)"),
    ],
)
def test_wrong_argument_is_named(argument: str, value: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PixArt(SMALL)(**{**inputs(SMALL), argument: value})


def test_what_another_model_embedded_is_refused() -> None:
    model, arguments = PixArt(SMALL), inputs(SMALL)
    time, text = model.embed_time(arguments["timestep"]), model.embed_text(arguments["caption"])
    for name, value, said in [
        ("timestep", time._replace(t0=None), "this model's embed_time made"),
        ("caption", text._replace(of_blocks=[]), "this model's embed_text made"),
        ("caption_mask", torch.ones(2, 5), "None beside a Text"),
    ]:
        given = {**arguments, "timestep": time, "caption": text, name: value}
        with pytest.raises(ValueError, match=f"`{name}` is .*{said}"):
            model(**given)


def test_micro_conditioning_is_asked_for() -> None:
    model = PixArt(CONFIGS["micro"])
    arguments = inputs(SMALL)
    with pytest.raises(ValueError, match="`image_size` is None"):
        model(**arguments)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 70),
        ("input_size", 9),
        ("conditioning", "adaLN"),
        ("kv_compression", {"sampling": "max", "scale_factor": 2, "layers": [0]}),
        ("kv_compression", {"sampling": "conv", "scale_factor": 2, "layers": [3]}),
        ("caption_dropout", 1.0),
        ("caption_dropout", "abc"),
        ("depth", "four"),
        ("depth", 2.5),
        ("qk_norm", "maybe"),
        ("caption_channels", 0),
        ("mlp_ratio", -1.0),
        ("kv_compression", {"sampling": "conv", "scale_factor": 2, "layers": 3}),
    ],
)
def test_wrong_config_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"PixArtConfig: `{field}`"):
        dataclasses.replace(SMALL, **{field: value})


def test_config_survives_json(tmp_path) -> None:
    import json

    config = CONFIGS["kv_conv"]
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert PixArtConfig.from_json(tmp_path / "config.json") == config
    with pytest.raises(ValueError, match="unknown \\['n_heads'\\]"):
        PixArtConfig.from_dict({"n_heads": 3})

"""Optimisers: CAME against came-pytorch, its state, its shards, and what a recipe asks for."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_runs import log, recipe, run, train_apart, write_features
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import pixart_kernels as pk
from pixart.training import TrainRecipe
from pixart.training.optimizers import CAME, make_optimizer
from pixart.training.recipe import Optimizer

came_pytorch = pytest.importorskip("came_pytorch")

# tables, biases, weights, convolutions, a scalar gate; rows that only one process of two gets
SHAPES = [(6, 8), (3, 5), (3, 5), (7,), (7,), (1,), (), (1, 4), (4, 1), (5, 3, 2, 2), (2, 3, 4)]


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Of sizes far apart, so that updates are clipped at some steps and not at others."""
    generator = torch.Generator().manual_seed(1000 + step)
    scale = 10.0 ** (step % 5 - 3)
    return [scale * torch.randn(s, generator=generator).to(dtype) for s in SHAPES]


def advance(optimizer: torch.optim.Optimizer, steps: range, dtype=torch.float32) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        for p, gradient in zip(parameters, gradients(step, dtype), strict=True):
            p.grad = gradient
        optimizer.step()


def assert_same_state(
    state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rounding: float = 1e-5
) -> None:
    """Moments pass zero, so what they may differ by is relative to the largest."""
    for name, value in state.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        assert whole.dtype == torch.float32
        assert whole.shape == expected[name].shape
        error = (whole - expected[name]).abs().max()
        assert error <= rounding * expected[name].abs().max(), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1},
        {"betas": (0.5, 0.8, 0.7), "eps": (1e-3, 1e-2), "clip_threshold": 0.3},
    ],
    ids=["default", "decay", "all"],
)
def test_came_is_came_pytorch_step_for_step(settings: dict) -> None:
    ours, theirs = weights(), weights()
    came = CAME(ours, 1e-2, **settings)
    reference = came_pytorch.CAME(theirs, lr=1e-2, **settings)
    for step in range(60):
        advance(came, range(step, step + 1))
        advance(reference, range(step, step + 1))
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    for p, q in zip(ours, theirs, strict=True):
        assert_same_state(came.state[p], reference.state[q])


def test_came_in_bfloat16_rounds_only_the_weights() -> None:
    ours, theirs = weights(dtype=torch.bfloat16), weights(dtype=torch.bfloat16)
    came = CAME(ours, 1e-2, weight_decay=0.1)
    reference = came_pytorch.CAME(theirs, lr=1e-2, weight_decay=0.1)
    advance(came, range(50), torch.bfloat16)
    advance(reference, range(50), torch.bfloat16)
    for p, q in zip(ours, theirs, strict=True):
        # a sum that falls between two bf16 numbers may round to either
        torch.testing.assert_close(p, q, rtol=2**-6, atol=2**-8)
        assert_same_state(came.state[p], reference.state[q])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_came_resumes_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = weights(dtype=dtype)
    optimizer = CAME(whole, 1e-2)
    advance(optimizer, range(5), dtype)
    parts = [nn.Parameter(p.detach().clone()) for p in whole]
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    advance(optimizer, range(5, 10), dtype)

    resumed = CAME(parts, 0.5)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    advance(resumed, range(5, 10), dtype)
    for p, q in zip(whole, parts, strict=True):
        assert torch.equal(p, q)


def test_came_goes_on_from_came_pytorchs_state() -> None:
    theirs = weights()
    reference = came_pytorch.CAME(theirs, lr=1e-2)
    advance(reference, range(5))
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    came = CAME(ours, 1e-2)
    came.load_state_dict(copy.deepcopy(reference.state_dict()))
    advance(reference, range(5, 10))
    advance(came, range(5, 10))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_came_leaves_what_has_no_gradient() -> None:
    used, unused = (nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    optimizer = CAME([used, unused], 1e-2, weight_decay=0.5)
    used.grad = torch.ones(2, 3)
    assert optimizer.step(lambda: 7) == 7
    assert torch.equal(unused, torch.ones(2, 3)) and not torch.equal(used, unused)
    assert unused not in optimizer.state


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (0.9, 0.99)}, "three numbers"),
        ({"betas": (0.9, 0.99, 1.0)}, r"in \[0, 1\)"),
        ({"clip_threshold": 0.0}, "above 0"),
    ],
)
def test_came_names_a_wrong_number(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CAME(weights(), **{"lr": 1e-2, **settings})


def _many_uneven(cut: Callable[[torch.Tensor], DTensor]) -> None:
    """Of more elements than are updated together, in shards of different sizes."""
    drawn = torch.Generator().manual_seed(0)
    whole = [torch.randn(3, 100_000, generator=drawn) for _ in range(4)]
    found = [torch.randn(3, 100_000, generator=drawn) for _ in range(4)]
    parts, whole = [nn.Parameter(cut(p)) for p in whole], [nn.Parameter(p) for p in whole]
    for p, q, gradient in zip(whole, parts, found, strict=True):
        p.grad, q.grad = gradient, cut(gradient)
    with pk.use_backend("reference"):
        CAME(whole, 1e-2).step()
        CAME(parts, 1e-2).step()
    for p, q in zip(whole, parts, strict=True):
        torch.testing.assert_close(q.full_tensor(), p, rtol=1e-5, atol=1e-6)


def _shard(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (world_size,))

    def cut(x: torch.Tensor) -> DTensor:
        return distribute_tensor(x.detach(), mesh, [Shard(0)])

    def walk(backend: str, steps: int) -> None:
        whole = [p for p in weights() if p.ndim]
        parts = [nn.Parameter(cut(p)) for p in whole]
        optimizer = CAME(whole, 1e-2, weight_decay=0.1)
        sharded = CAME(parts, 1e-2, weight_decay=0.1)
        for step in range(steps):
            found = [g for g in gradients(step) if g.ndim]
            for p, q, gradient in zip(whole, parts, found, strict=True):
                p.grad, q.grad = gradient, cut(gradient)
            optimizer.step()
            with pk.use_backend(backend):
                sharded.step()
        for p, q in zip(whole, parts, strict=True):
            torch.testing.assert_close(q.full_tensor(), p, rtol=1e-5, atol=1e-6)
            assert q.to_local().numel() < p.numel() or len(p) == 1
            assert_same_state(sharded.state[q], optimizer.state[p])

    walk("auto", 12)
    # its kernels are interpreted
    if pk.dispatch.why_not("came_step", "triton", torch.zeros(1)) is None:
        walk("triton", 2)
    _many_uneven(cut)
    columns = nn.Parameter(distribute_tensor(torch.ones(2, 4), mesh, [Shard(1)]))
    columns.grad = distribute_tensor(torch.ones(2, 4), mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"shape \(2, 4\) is laid out as .*accepted: replicated"):
        CAME([columns], 1e-2).step()
    # one that ends while the other still sends aborts it
    dist.barrier()
    dist.destroy_process_group()


def test_came_of_shards_is_came_of_the_whole(tmp_path: Path) -> None:
    """Two processes; of a matrix with one row, one of them has nothing."""
    torch.multiprocessing.spawn(_shard, args=(2, str(tmp_path)), nprocs=2)


def test_a_run_with_came_goes_on_on_another_number_of_processes(tmp_path: Path) -> None:
    write_features(tmp_path / "features")

    def of(name: str, **changes: object) -> TrainRecipe:
        settings = {
            "optimizer": {"name": "came", "lr": 1e-3},
            "schedule": {"name": "constant", "warmup_steps": 0},
            "checkpoint_every": 2,
        }
        return recipe(tmp_path / name, tmp_path / "features", **settings, **changes)

    run(of("whole", steps=4, gradient_accumulation=2))
    # sharded over two processes, and then by one
    train_apart(of("parts", steps=2, parallel={"strategy": "fsdp"}), processes=2)
    run(of("parts", steps=4))
    for row, expected in zip(log(tmp_path / "parts"), log(tmp_path / "whole"), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_the_recipe_reaches_came() -> None:
    p = nn.Parameter(torch.ones(2, 3))
    frozen = nn.Parameter(torch.ones(2, 3), requires_grad=False)
    settings = Optimizer.model_validate({"name": "came", "lr": 1e-3, "weight_decay": 0.2})
    (group,) = make_optimizer([p, frozen], settings, 256).param_groups
    assert group["params"] == [p]
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.2)
    assert group["betas"] == (0.9, 0.999, 0.9999)
    # came-pytorch's, which the official configuration repeats
    assert group["eps"] == (1e-30, 1e-16)


@pytest.mark.parametrize("name", ["adamw", "came"])
def test_learning_rate_follows_the_root_of_the_batch(name: str) -> None:
    settings = Optimizer.model_validate({"name": name, "lr": 2e-5, "base_batch_size": 256})
    (group,) = make_optimizer(weights(), settings, 1024).param_groups
    assert group["lr"] == pytest.approx(4e-5)
    plain = Optimizer.model_validate({"name": name, "lr": 2e-5})
    assert make_optimizer(weights(), plain, 1024).param_groups[0]["lr"] == 2e-5


def test_every_parameter_decays() -> None:
    """As the official training has it: biases and modulation tables too."""
    parameters = [nn.Parameter(torch.ones(shape)) for shape in [(2, 3), (3,), ()]]
    optimizer = make_optimizer(parameters, Optimizer(lr=0.1, weight_decay=0.5), 1)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p in parameters:
        torch.testing.assert_close(p, torch.full_like(p, 0.95))


def test_8bit_adamw_gets_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict = {}

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, parameters, **settings):
            seen.update(settings)
            super().__init__(parameters, **settings)

    package, module = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim")
    module.AdamW8bit = AdamW8bit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    values = {"name": "adamw-8bit", "lr": 1e-3, "betas": [0.8, 0.9], "eps": 1e-7}
    assert isinstance(make_optimizer(weights(), Optimizer.model_validate(values), 1), AdamW8bit)
    assert seen == {"lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.03}


def test_8bit_adamw_follows_adamw(tmp_path: Path) -> None:
    """The real one, where it is installed: near AdamW, and resumed as it was."""
    pytest.importorskip("bitsandbytes")
    # smaller parameters are kept in 32 bits
    exact = [nn.Parameter(torch.randn(64, 128))]
    rounded = [nn.Parameter(exact[0].detach().clone())]
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    pair = [
        make_optimizer(parameters, Optimizer.model_validate({"name": name, **settings}), 1)
        for parameters, name in ((exact, "adamw"), (rounded, "adamw-8bit"))
    ]
    for _ in range(10):
        gradient = torch.randn(64, 128)
        for (p,), optimizer in zip((exact, rounded), pair, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    assert pair[1].state[rounded[0]]["state1"].dtype == torch.uint8
    assert (exact[0] - rounded[0]).abs().mean() < 0.05 * 10 * 1e-2
    torch.save(pair[1].state_dict(), tmp_path / "state.pt")
    again = [nn.Parameter(rounded[0].detach().clone())]
    resumed = make_optimizer(again, Optimizer.model_validate({"name": "adamw-8bit", **settings}), 1)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for (p,), optimizer in ((rounded, pair[1]), (again, resumed)):
        p.grad = torch.ones(64, 128)
        optimizer.step()
    assert torch.equal(rounded[0], again[0])


def test_8bit_adamw_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="pip install bitsandbytes"):
        make_optimizer(weights(), Optimizer(name="adamw-8bit"), 1)

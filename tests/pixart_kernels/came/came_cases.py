"""What every backend of came_step is held to."""

from __future__ import annotations

import itertools

import pytest
import torch

import pixart_kernels as pk
from pixart_kernels.testing import assert_within_eager_error, poisoned_allocations

FP32, BF16, FP16 = DTYPES = torch.float32, torch.bfloat16, torch.float16
SETTINGS = {
    "lr": 1e-2,
    "betas": (0.9, 0.999, 0.9999),
    "eps": (1e-30, 1e-16),
    "clip_threshold": 1.0,
    "weight_decay": 0.1,
}
# updates are always clipped, and averages and eps weigh more
OTHERS = {"betas": (0.5, 0.8, 0.7), "eps": (1e-3, 1e-2), "clip_threshold": 0.3, "weight_decay": 0.0}

# (count, shape): a scalar; vectors, the last longer than what is summed at once; one row; one
# column; odd sizes; more rows than a block, a row longer than what is summed at once; a patch
# embedding, the convolution of KV compression, and matrices of three dimensions
SHAPES = [
    (2, ()),
    (1, (1,)),
    (3, (7,)),
    (2, (9001,)),
    (2, (1, 37)),
    (2, (37, 1)),
    (4, (5, 3)),
    (2, (300, 137)),
    (1, (9, 16391)),
    (2, (6, 4, 2, 2)),
    (1, (5, 1, 3, 3)),
    (3, (2, 3, 4)),
]
per_shape = pytest.mark.parametrize("count, shape", SHAPES, ids=str)

State = dict[str, list[torch.Tensor]]


def fresh_state(count: int, shape: tuple[int, ...], device="cpu") -> State:
    sizes = {"exp_avg": shape}
    if len(shape) < 2:
        sizes["exp_avg_sq"] = shape
    else:
        for kind in ("sq", "res"):
            sizes[f"exp_avg_{kind}_row"] = shape[:-1]
            sizes[f"exp_avg_{kind}_col"] = shape[:-2] + shape[-1:]
    return {
        name: [torch.zeros(size, device=device) for _ in range(count)]
        for name, size in sizes.items()
    }


def drawn(count, shape, dtype=FP32, seed=0, scale=1.0, device="cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [scale * torch.randn(shape, generator=generator) for _ in range(count)]
    return [x.to(device, dtype) for x in found]


def gradients(step: int, count, shape, dtype=FP32, device="cpu") -> list[torch.Tensor]:
    """Of sizes far apart, so that updates are clipped at some steps and not at others."""
    return drawn(count, shape, dtype, 1000 + step, 10.0 ** (step % 5 - 3), device)


def walk(backend, count, shape, steps=3, dtype=FP32, device="cpu", gradient_dtype=None, **settings):
    """Weights and state after some steps."""
    weights, state = drawn(count, shape, dtype, device=device), fresh_state(count, shape, device)
    for step in range(steps):
        found = gradients(step, count, shape, gradient_dtype or dtype, device)
        with poisoned_allocations():
            pk.came_step(weights, found, state, **{**SETTINGS, **settings}, backend=backend)
    return weights, state


def official(count, shape, steps, dtype, given=None, **settings):
    """The same by came-pytorch; with ``given`` from values rounded to that dtype."""
    came_pytorch = pytest.importorskip("came_pytorch")
    weights = [torch.nn.Parameter(w.to(dtype)) for w in drawn(count, shape, given or dtype)]
    optimizer = came_pytorch.CAME(weights, **{**SETTINGS, **settings})
    for step in range(steps):
        for w, g in zip(weights, gradients(step, count, shape, given or dtype), strict=True):
            w.grad = g.to(dtype)
        optimizer.step()
    names = fresh_state(0, shape)
    return weights, {name: [optimizer.state[w][name] for w in weights] for name in names}


def flat(walked) -> list[torch.Tensor]:
    weights, state = walked
    return [x for tensors in (weights, *state.values()) for x in tensors]


def assert_same_bits(expected, actual) -> None:
    for one, other in zip(flat(expected), flat(actual), strict=True):
        assert torch.equal(one, other)


def check_came_pytorch(backend, count, shape, steps=50, dtype=FP32, device="cpu", **settings):
    """The backend against came-pytorch in fp64, given the error of came-pytorch itself."""
    actual = walk(backend, count, shape, steps, dtype, device, **settings)
    exact = official(count, shape, steps, torch.float64, given=dtype, **settings)
    eager = official(count, shape, steps, dtype, **settings)
    for found, wanted, plain in zip(*map(flat, (actual, exact, eager)), strict=True):
        assert_within_eager_error(found.cpu(), wanted.detach(), plain.detach(), terms=steps)
    if dtype.itemsize == 2:
        same = [(a.cpu() == b).float().mean() for a, b in zip(actual[0], eager[0], strict=True)]
        # a sum that falls between two numbers may round to either
        assert min(same) > 0.9


def per_dtypes(test):
    """Of weights and of gradients, of a matrix and of a vector."""
    pairs = itertools.product(DTYPES, repeat=2)
    test = pytest.mark.parametrize("dtype, gradient_dtype", pairs, ids=str)(test)
    return pytest.mark.parametrize("shape", [(33, 20), (70,)], ids=str)(test)


def check_dtypes(backend, shape, dtype, gradient_dtype, device="cpu"):
    actual, expected = (
        walk(one, 2, shape, dtype=dtype, gradient_dtype=gradient_dtype, device=device)
        for one in (backend, "reference")
    )
    for found, wanted in zip(actual[0], expected[0], strict=True):
        # a sum that falls between two numbers may round to either
        torch.testing.assert_close(found, wanted, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def check_strided_gradients(backend, device="cpu"):
    """Read as they lie, or copied: expanded as sum() leaves them, and transposed."""
    count, shape = 2, (12, 20)
    found = {
        "expanded": [torch.full((1, 1), 0.3, device=device).expand(shape) for _ in range(count)],
        "transposed": [x.t() for x in drawn(count, shape[::-1], device=device)],
    }
    for strided in found.values():
        results = []
        for given in (strided, [g.contiguous() for g in strided]):
            results.append((drawn(count, shape, device=device), fresh_state(count, shape, device)))
            pk.came_step(results[-1][0], given, results[-1][1], **SETTINGS, backend=backend)
        assert_same_bits(*results)


def check_zeros_and_nan(backend, shape, device="cpu"):
    """No gradient leaves a weight to its decay; NaN goes where came-pytorch has it."""
    zeros = [torch.zeros(shape, device=device)] * 2
    weights, state = drawn(2, shape, device=device), fresh_state(2, shape, device)
    before = [w.clone() for w in weights]
    pk.came_step(weights, zeros, state, **SETTINGS, backend=backend)
    for w, old in zip(weights, before, strict=True):
        torch.testing.assert_close(w, old * (1 - 0.1 * 1e-2))

    came_pytorch = pytest.importorskip("came_pytorch")
    for value in (torch.nan, torch.inf):
        weights, state = drawn(2, shape, device=device), fresh_state(2, shape, device)
        theirs = [torch.nn.Parameter(w.cpu().clone()) for w in weights]
        bad = drawn(2, shape, seed=1, device=device)
        bad[0].view(-1)[-1] = value
        for p, g in zip(theirs, bad, strict=True):
            p.grad = g.cpu()
        optimizer = came_pytorch.CAME(theirs, **SETTINGS)
        optimizer.step()
        pk.came_step(weights, bad, state, **SETTINGS, backend=backend)
        for i, (w, p) in enumerate(zip(weights, theirs, strict=True)):
            torch.testing.assert_close(w.cpu(), p.detach(), equal_nan=True)
            for name, tensors in state.items():
                wanted = optimizer.state[p][name]
                torch.testing.assert_close(tensors[i].cpu(), wanted, equal_nan=True)


def check_a_weight_does_not_depend_on_the_others(backend, device="cpu"):
    for shape in ((70, 33), (67,)):
        all_of_them = walk(backend, 5, shape, device=device)
        weights, state = drawn(5, shape, device=device), fresh_state(5, shape, device)
        for step in range(3):
            found = gradients(step, 5, shape, device=device)
            for i in range(5):
                one = {name: tensors[i : i + 1] for name, tensors in state.items()}
                pk.came_step(weights[i : i + 1], found[i : i + 1], one, **SETTINGS, backend=backend)
        assert_same_bits(all_of_them, (weights, state))

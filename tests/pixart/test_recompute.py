"""What is not kept comes back with the same bits, once, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import pixart_kernels as pk
from pixart import PixArt, PixArtConfig
from pixart.recompute import recomputing


class Times:
    """``x * factor``, counting its calls."""

    def __init__(self, factor: float) -> None:
        self.factor, self.calls = factor, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.factor


def memory_of(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (0, 4)], ids=str)
def test_made_once_for_all_that_ask_in_one_backward(shape: tuple[int, int]) -> None:
    x, weight = torch.randn(shape), torch.randn(shape[1], 7, requires_grad=True)
    double = Times(2)
    with recomputing() as again:
        h = double(x)
        again(lambda: double(x), h)
        # the second asks for the same memory with other strides
        loss = (h @ weight).sum() + (weight.T @ h.T).square().sum()
    memory = memory_of(h)
    plain = ((x * 2) @ weight).sum() + (weight.T @ (x * 2).T).square().sum()
    (expected,) = torch.autograd.grad(plain, weight)
    del h
    assert memory.expired()
    for calls in (2, 3):
        assert torch.equal(torch.autograd.grad(loss, weight, retain_graph=True)[0], expected)
        assert double.calls == calls


def test_a_chain_is_made_from_its_source() -> None:
    x, weight = torch.randn(4, 3), torch.randn(3, 3, requires_grad=True)
    double, triple = Times(2), Times(3)
    with recomputing() as again:
        a = double(x)
        b = triple(a)
        doubled = again(lambda: double(x), a)
        again(triple, b, source=doubled)
        loss = (a @ weight).sum() + (b @ weight).sum()
    memory = memory_of(a), memory_of(b)
    del a, b
    assert all(m.expired() for m in memory)
    (found,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(found, (x * 8).sum(0)[:, None].expand(3, 3))
    assert (double.calls, triple.calls) == (2, 2)


def test_what_a_function_keeps_of_its_output_is_made_again() -> None:
    x = torch.randn(4, requires_grad=True)
    with recomputing() as again:
        y = x.exp()
        again(lambda: x.exp(), y)
        loss = y.sum()
    memory = memory_of(y)
    del y
    assert memory.expired()
    loss.backward()
    assert torch.equal(x.grad, x.detach().exp())


def test_other_tensors_do_not_take_a_place_that_became_free() -> None:
    x, weight = torch.randn(64), torch.ones(64, requires_grad=True)
    with recomputing() as again:
        for _ in range(50):
            again(lambda: torch.full_like(x, torch.nan), x * 2)
        loss = torch.stack([weight * (x * 3) for _ in range(50)]).sum()
    loss.backward()
    assert weight.grad.isfinite().all()


def test_nothing_stays_after_the_backward() -> None:
    x, weight = torch.randn(4, 3), torch.randn(3, 3, requires_grad=True)
    with recomputing() as again:
        h = x * 2
        again(lambda x=x: x * 2, h)
        loss = (h @ weight).sum()
    memory = memory_of(x)
    del x, h, again
    assert not memory.expired()  # the recipe needs it
    loss.backward()
    assert memory.expired()


def test_nothing_stays_without_a_backward() -> None:
    x = torch.randn(4, requires_grad=True)
    with recomputing():
        y = x.exp()  # kept by the node that made it
    memory = memory_of(y)
    del y
    assert memory.expired()


def test_what_is_kept_goes_with_its_own_node() -> None:
    x = torch.randn(4, requires_grad=True)
    with recomputing():
        y = x.exp()
        z = y.exp()
    memory = memory_of(z)
    del z
    # although y's node still holds the hooks
    assert memory.expired() and y.requires_grad


def refuses(context) -> bool:
    with context, recomputing() as again:
        return again(lambda: None, torch.zeros(1)) is None


def test_stands_back_where_it_would_be_wrong() -> None:
    def identity(tensor: Tensor) -> Tensor:
        return tensor

    assert refuses(torch.no_grad())
    assert refuses(saved_tensors_hooks(identity, identity))
    assert refuses(torch.autograd.graph.disable_saved_tensors_hooks("not now"))
    assert not refuses(torch.enable_grad())
    with recomputing():
        assert not refuses(torch.enable_grad())


def test_checkpoints_keep_what_they_kept() -> None:
    x, weight = torch.randn(4, 3), torch.randn(3, 3, requires_grad=True)
    made = []

    def region(x: Tensor) -> Tensor:
        with recomputing() as again:
            h = x * 2
            made.append(memory_of(h))
            again(lambda: x * 2, h)
            return (h @ weight).exp()

    checkpoint(region, x, use_reentrant=False).sum().backward()
    assert len(made) == 2 and made[0].expired()
    torch.testing.assert_close(weight.grad, torch.autograd.grad(region(x).sum(), weight)[0])


def test_what_was_edited_in_place_before_it_is_saved_is_kept() -> None:
    x, weight = torch.randn(4, 3), torch.randn(3, 3, requires_grad=True)
    with recomputing() as again:
        h = x * 2
        again(lambda: x * 2, h)
        loss = (h.mul_(3) @ weight).sum()
    (found,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(found, (x * 6).sum(0)[:, None].expand(3, 3))


def test_an_edit_after_the_forward_is_noticed() -> None:
    x, weight = torch.randn(4, 3), torch.randn(3, 3, requires_grad=True)
    with recomputing():
        loss = (x @ weight).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match=r"\(4, 3\).*modified in place"):
        loss.backward()


@pytest.mark.parametrize(
    ("forward", "backward"), [("reference", "auto"), ("auto", "reference")], ids=str
)
def test_made_again_by_the_backend_that_made_it(forward: str, backward: str) -> None:
    torch.manual_seed(0)
    config = PixArtConfig(
        input_size=8, hidden_size=24, depth=2, num_heads=2, caption_channels=6, max_caption_tokens=5
    )
    model = PixArt(config).eval()  # captions are dropped at random in training
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 500.0]), torch.randn(2, 5, 6)

    def gradients(backward: str) -> list[Tensor]:
        with pk.use_backend(forward):
            loss = model(*inputs).square().sum()
        with pk.use_backend(backward):
            return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))

    for found, expected in zip(gradients(backward), gradients(forward), strict=True):
        assert (found is None and expected is None) or torch.equal(found, expected)

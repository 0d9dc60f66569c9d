"""A stock diffusers PixArt on these kernels, in place: ``pk.patch`` and ``pk.unpatch``.

Three kinds of forward are replaced on each instance, underneath whatever hooks it carries: the
model's, which prepares a call; its blocks', which fuse adaLN, the residuals and the MLP's
bias + GELU; and its attentions'. They call the submodules that are there, so that adapters,
quantised layers, hooks and processors keep working, and leave to the stock code whatever no kernel
runs. Parameters, module tree and configuration stay as they are.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from diffusers.models.activations import GELU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
)
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from pixart_kernels import dispatch
from pixart_kernels.adaln import adaln_single, gated_residual, gated_residual_adaln
from pixart_kernels.attention import attention, cross_attention, self_attention
from pixart_kernels.mlp import bias_gelu

STOCK_MODEL = PixArtTransformer2DModel.forward
STOCK_BLOCK = BasicTransformerBlock.forward
STOCK_ATTENTION = Attention.forward

# rows of a block's scale_shift_table
SHIFT_ATTN, SCALE_ATTN, GATE_ATTN, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)

ADALN = frozenset({"adaln_single", "gated_residual", "gated_residual_adaln"})
ATTENTION = frozenset({"attention", "self_attention", "cross_attention"})

# they compute attention and nothing else; any other processor is called as it is
PROCESSORS = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0)

# a model's attribute, and the entry of cross_attention_kwargs by which a call reaches its blocks
KEY = "_pixart_kernels"

# fp32 is compared as if it were TF32, in which a GPU may multiply it
TF32_EPS = 2.0**-10


@dataclass
class _Kind:
    """Calls of one kind: whether they were compared with the stock code, and who differed."""

    compared: bool = False
    differ: set[nn.Module] = field(default_factory=set)


@dataclass
class _State:
    kinds: dict[tuple, _Kind] = field(default_factory=dict)
    # the float mask last looked at, its version, and whether it does no more than keep or discard
    mask: tuple[Callable[[], Tensor | None], int, bool] = (lambda: None, 0, False)

    def __reduce__(self) -> tuple:
        # a copy, or what is pickled, begins anew
        return _State, ()


class _Call(NamedTuple):
    ops: frozenset[str]  # those that replace stock code
    lengths: Tensor | None  # (B,) int32, real text tokens, which come first
    comparing: _Kind | None


@dataclass(frozen=True)
class Site:
    """Where an op stands in a patched model."""

    op: str
    count: int
    backend: str  # "stock" where the stock code stays
    reason: str  # why it does


@dataclass(frozen=True)
class Report:
    """What :func:`patch` found and replaced, to be printed."""

    model: str
    blocks: int
    device: torch.device
    dtype: torch.dtype
    sites: tuple[Site, ...]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [f"{self.model}, {self.blocks} blocks, on {self.device} in {dtype}"]
        for site in self.sites:
            why = f": {site.reason}" if site.reason else ""
            lines.append(f"  {site.count:>3} {site.op:<21} {site.backend}{why}")
        return "\n".join(lines)


def patch(model_or_pipeline: Any) -> Report:
    """Makes a stock diffusers PixArt run on these kernels, in place.

    What ``auto`` has no kernel for on the device stays stock code;
    :func:`pixart_kernels.use_backend` applies as to any op. The first call of each new kind
    (shapes, dtype, mask, processors, backend, with gradients or without) runs each block's stock
    forward too and compares: after a mismatch such calls run stock code, with one warning.
    Gradients are not compared, nor is what ``torch.compile`` or a CUDA graph records.

    Args:
        model_or_pipeline: a ``PixArtTransformer2DModel``, or any pipeline that has one as
            ``transformer``: with adapters, hooks, fused projections, quantised layers or without,
            and inside what torch.compile, DistributedDataParallel or peft put around it.

    Returns:
        What was replaced, by which backend, and why the rest was not. A second patch changes
        nothing and reports again.

    Raises:
        TypeError: there is no ``PixArtTransformer2DModel``.
        ValueError: its blocks are not PixArt's.
        RuntimeError: something else replaced a forward before; or the backend asked for by name
            cannot run.
    """
    model = _transformer(model_or_pipeline)
    for index, block in enumerate(_blocks(model)):
        _check_block(index, block)
    report = _report(model, _execution_device(model_or_pipeline, model))
    slots = [(*_innermost(module), module, ours) for module, ours in _targets(model)]
    for owner, name, module, ours in slots:
        found = getattr(owner, name).__func__
        if found is not ours and found is not ours.__wrapped__:
            raise RuntimeError(
                f"pk.patch: the forward of a {type(module).__name__} was replaced by "
                f"{found.__module__}.{found.__qualname__}; accepted: the stock one"
            )
    for owner, name, module, ours in slots:
        setattr(owner, name, MethodType(ours, module))
    vars(model).setdefault(KEY, _State())
    return report


def unpatch(model_or_pipeline: Any) -> None:
    """Undoes :func:`patch`, underneath hooks that were added since; nothing if there is no patch.

    Raises TypeError if there is no ``PixArtTransformer2DModel``.
    """
    model = _transformer(model_or_pipeline)
    for module, ours in _targets(model):
        owner, name = _innermost(module)
        if getattr(owner, name).__func__ is not ours:
            continue
        if owner is module and name == "forward":
            del module.forward
        else:
            setattr(owner, name, MethodType(ours.__wrapped__, module))
    vars(model).pop(KEY, None)


def _transformer(model_or_pipeline: Any) -> PixArtTransformer2DModel:
    model = getattr(model_or_pipeline, "transformer", model_or_pipeline)
    while isinstance(model, nn.Module) and not isinstance(model, PixArtTransformer2DModel):
        if hasattr(model, "get_base_model"):  # of peft
            model = model.get_base_model()
        else:  # torch.compile, or DistributedDataParallel
            model = getattr(model, "_orig_mod", getattr(model, "module", None))
    if not isinstance(model, PixArtTransformer2DModel):
        raise TypeError(
            f"pk.patch: `model_or_pipeline` is a {type(model_or_pipeline).__name__}; accepted: a "
            "PixArtTransformer2DModel, or a pipeline that has one as `transformer`"
        )
    return model


def _blocks(model: PixArtTransformer2DModel) -> list[nn.Module]:
    # inside those that torch.compile was given
    return [getattr(block, "_orig_mod", block) for block in model.transformer_blocks]


def _execution_device(model_or_pipeline: Any, model: PixArtTransformer2DModel) -> torch.device:
    """Where calls run: offloaded weights are elsewhere, or nowhere."""
    device = getattr(model_or_pipeline, "_execution_device", None)
    for module in model.modules() if device is None else ():
        hook = getattr(module, "_hf_hook", None)  # of accelerate
        for part in (hook, *getattr(hook, "hooks", ())):
            if getattr(part, "execution_device", None) is not None:
                return torch.device(part.execution_device)
    return torch.device(device or model.device)


def _check_block(index: int, block: nn.Module) -> None:
    if not isinstance(block, BasicTransformerBlock):
        found = f"a {type(block).__name__}"
    elif block.norm_type != "ada_norm_single" or block.pos_embed is not None:
        found = f"one with norm_type {block.norm_type!r}, pos_embed {block.pos_embed}"
    elif block.norm1.weight is not None or block.norm2.weight is not None:
        found = "one whose norms have weights (norm_elementwise_affine)"
    elif type(block.attn1) is not Attention or type(block.attn2) is not Attention:
        found = f"one with {type(block.attn1).__name__} and {type(block.attn2).__name__}"
    else:
        return
    raise ValueError(
        f"pk.patch: block {index} is {found}; accepted: a BasicTransformerBlock with norm_type "
        "'ada_norm_single', norms without weights, and self- and cross-attention"
    )


def _targets(model: PixArtTransformer2DModel) -> Iterator[tuple[Any, Any]]:
    """Every module whose forward is replaced, and by what."""
    yield model, _model_forward
    for block in _blocks(model):
        yield block, _block_forward
        yield block.attn1, _attention_forward
        yield block.attn2, _attention_forward


def _innermost(module: nn.Module) -> tuple[Any, str]:
    """Who holds the forward that all hooks come down to, and under which name.

    The hooks of accelerate and diffusers replace ``module.forward`` and keep what was there.
    """
    slots = [(module, "_old_forward")]
    for reference in getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ()):
        slots += [(reference, "original_forward"), (reference, "forward")]
    for owner, name in [*slots, (module, "forward")]:
        bound = getattr(owner, name, None)
        if isinstance(bound, MethodType) and bound.__self__ is module:
            return owner, name
    raise RuntimeError(
        f"pk.patch: the forward of a {type(module).__name__} was replaced by {module.forward!r}; "
        "accepted: the stock one, and hooks of accelerate and diffusers"
    )


def _watched(module: nn.Module) -> bool:
    """Whether somebody expects to see what goes into ``module`` or comes out."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
    )


def _why_not_adaln(block: BasicTransformerBlock) -> str | None:
    if _watched(block.norm1) or _watched(block.norm2):
        return "hooks on a norm"
    return None if block._chunk_size is None else "chunked feed-forward"


def _why_not_gelu(block: BasicTransformerBlock) -> str | None:
    ff = block.ff
    first = ff.net[0] if type(ff) is FeedForward else None
    if type(first) is not GELU or first.approximate != "tanh":
        return "not a FeedForward with tanh-GELU"
    proj = first.proj
    if type(proj) is not nn.Linear or type(proj.weight) is not nn.Parameter or proj.bias is None:
        return "not a plain linear layer with a bias"
    if _watched(ff) or _watched(first) or _watched(proj):
        return "hooks on it or on its first layer"
    return _why_not_adaln(block)


def _why_not_attention(attn: Attention) -> str | None:
    processor = type(attn.processor)
    return None if processor in PROCESSORS else f"processor {processor.__name__}"


def _sites(block: BasicTransformerBlock) -> Iterator[tuple[str, str | None]]:
    """The ops that a block has a place for, and what stands in the way."""
    for op in ("adaln_single", "gated_residual", "gated_residual_adaln", "gated_residual"):
        yield op, _why_not_adaln(block)
    yield "bias_gelu", _why_not_gelu(block)
    packed = type(block.attn1.processor) is FusedAttnProcessor2_0
    yield "self_attention" if packed else "attention", _why_not_attention(block.attn1)
    yield "cross_attention", _why_not_attention(block.attn2)


def _facts(op: str, model: PixArtTransformer2DModel) -> dict[str, Any]:
    return {"head_dim": model.config.attention_head_dim} if op in ATTENTION else {}


def _replacing(model: PixArtTransformer2DModel, x: Tensor) -> frozenset[str]:
    """The ops that replace stock code: those with a kernel, or all if a backend was named."""
    named = dispatch.current_backend() != "auto"
    ops = {
        op
        for op in (*ADALN, *ATTENTION, "bias_gelu")
        if dispatch.chosen(op, x, **_facts(op, model)) != "reference" or named
    }
    # the MLP is taken apart by the forward that fuses adaLN
    return frozenset(ops if ops >= ADALN else ops & ATTENTION)


def _report(model: PixArtTransformer2DModel, device: torch.device) -> Report:
    x = torch.empty((1, 1, model.inner_dim), device=device, dtype=model.dtype)
    ops, sites = _replacing(model, x), []
    found = Counter(site for block in _blocks(model) for site in _sites(block))
    for (op, reason), count in found.items():
        backend, facts = "stock", _facts(op, model)
        if reason is None and op in ops:
            backend = dispatch.chosen(op, x, **facts)
        elif reason is None:
            kernels = [name for name in dispatch.PRIORITY if name != "reference"]
            reasons = {name: dispatch.why_not_auto(op, name, x, **facts) for name in kernels}
            reason = "; ".join(f"{name}: {why}" for name, why in reasons.items() if why)
        sites.append(Site(op, count, backend, reason or ""))
    blocks = len(model.transformer_blocks)
    return Report(type(model).__name__, blocks, device, model.dtype, tuple(sites))


@functools.wraps(STOCK_MODEL)
def _model_forward(
    self: PixArtTransformer2DModel,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    timestep: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    attention_mask: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    return_dict: bool = True,
) -> Any:
    text, mask, call = encoder_hidden_states, encoder_attention_mask, None
    # what other kwargs mean is the stock code's affair
    if text is not None and not cross_attention_kwargs:
        text, mask, call = _prepare(self, hidden_states, text, mask)
    output = STOCK_MODEL(
        self,
        hidden_states,
        encoder_hidden_states=text,
        timestep=timestep,
        added_cond_kwargs=added_cond_kwargs,
        cross_attention_kwargs=cross_attention_kwargs if call is None else {KEY: call},
        attention_mask=attention_mask,
        encoder_attention_mask=mask,
        return_dict=return_dict,
    )
    if call is not None and call.comparing is not None:
        call.comparing.compared = True
        if call.comparing.differ:
            warnings.warn(
                f"pk.patch: {len(call.comparing.differ)} blocks differ from stock code at latents "
                f"{tuple(hidden_states.shape)} in {hidden_states.dtype} with "
                f"{', '.join(sorted(call.ops))}; such calls run stock code from now on",
                stacklevel=2,
            )
    return output


def _prepare(
    model: PixArtTransformer2DModel, latents: Tensor, text: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, _Call | None]:
    """Text and mask with the real tokens first, where that serves, and what blocks shall do."""
    state, compiling = vars(model)[KEY], torch.compiler.is_compiling()
    ops = _replacing(model, latents)
    if not ops:
        return text, mask, None
    attentions = [part for b in _blocks(model) for part in (b.attn1, b.attn2)]
    real = None
    # a processor of somebody else's may know tokens by their places
    if "cross_attention" in ops and not any(map(_why_not_attention, attentions[1::2])):
        real = _real_tokens(state, mask, text)
    kind = None
    if not compiling:
        kind = state.kinds.setdefault(
            (
                ops, dispatch.current_backend(), real is None,
                torch.is_grad_enabled(), model.training,
                latents.shape, latents.dtype, latents.device, text.shape, text.dtype,
                None if mask is None else (mask.dim(), mask.dtype),
                torch.is_autocast_enabled(latents.device.type)
                and torch.get_autocast_dtype(latents.device.type),
                tuple(type(attn.processor) for attn in attentions),
            ),
            _Kind(),
        )  # fmt: skip
        if kind.compared and kind.differ:
            return text, mask, None
        if kind.compared or _capturing(latents) or _random(model):
            kind = None
    lengths = None
    if real is not None:
        # attention does not care about the order of keys: so moved, any mask becomes lengths,
        # and the host need not ask the device for them
        order = torch.argsort(real.to(torch.int8), dim=1, descending=True, stable=True)
        text = text.gather(1, order[..., None].expand_as(text))
        mask = mask.gather(-1, order.view(mask.shape))
        lengths = real.sum(1, dtype=torch.int32)
    return text, mask, _Call(ops, lengths, kind)


def _real_tokens(state: _State, mask: Tensor | None, text: Tensor) -> Tensor | None:
    """(B, L) bool; None without a mask, or for one that does more than keep or discard.

    The stock code adds ``(1 - mask) * -10000`` to scores if the mask is 2-D, and itself if 3-D.
    """
    B, L = text.shape[:2]
    if mask is None or L == 0 or mask.shape not in ((B, L), (B, 1, L)):
        return None
    if mask.is_floating_point():
        if not _keeps_or_discards(state, mask):
            return None
    elif mask.dim() == 3:
        return None
    # of whole numbers, too, the largest wins; a row of zeros attends to all its tokens
    return mask == mask.amax(dim=1, keepdim=True) if mask.dim() == 2 else mask[:, 0] == 0


def _keeps_or_discards(state: _State, mask: Tensor) -> bool:
    """Whether a float mask does nothing else; asks the device once for each mask."""
    if torch.compiler.is_compiling():
        return False
    known, version, answer = state.mask
    # an inference tensor has no version, and may have changed
    if known() is mask and not mask.is_inference() and version == mask._version:
        return answer
    if _capturing(mask):
        return False
    if mask.dim() == 2:
        answer = bool(((mask == 0) | (mask == 1)).all())
    else:
        # bf16 rounds -10000 to -9984; without a 0 in its row, it would discard nothing
        good = ((mask == 0) | (mask < -9000)).all() & (mask == 0).any(dim=2).all()
        answer = bool(good)
    state.mask = weakref.ref(mask), 0 if mask.is_inference() else mask._version, answer
    return answer


def _capturing(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _random(model: nn.Module) -> bool:
    """Whether two forwards differ by themselves."""
    return model.training and any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()
    )


@functools.wraps(STOCK_BLOCK)
def _block_forward(
    self: BasicTransformerBlock,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    x, text, text_mask, t = hidden_states, encoder_hidden_states, encoder_attention_mask, timestep

    def stock(kwargs: dict[str, Any] | None) -> Tensor:
        rest = (text, text_mask, t, kwargs, class_labels, added_cond_kwargs)
        return STOCK_BLOCK(self, x, attention_mask, *rest)

    call = (cross_attention_kwargs or {}).get(KEY)
    if call is None:
        return stock(cross_attention_kwargs)

    def ours() -> Tensor:
        if ADALN <= call.ops and _why_not_adaln(self) is None:
            return _fused_block(self, call, x, attention_mask, text, text_mask, t)
        return stock({KEY: call})

    kind = None if torch.compiler.is_compiling() else call.comparing
    # a checkpointed block is computed again when comparing is over
    if kind is not None and not kind.compared:
        # nothing of this is for the backward: a checkpoint around it must not see it either
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            candidate = ours()
        with torch.no_grad():
            expected = stock(None)
        if not _agree(candidate, expected, x, t):
            kind.differ.add(self)
        elif not torch.is_grad_enabled():
            return candidate
    return stock(None) if kind is not None and self in kind.differ else ours()


def _agree(ours: Tensor, stock: Tensor, x: Tensor, t: Tensor) -> bool:
    """Token by token, but for roundings of what the block adds to x and of the sum."""
    if ours.shape != stock.shape or ours.dtype != stock.dtype:
        return False
    eps = max(torch.finfo(ours.dtype).eps, torch.finfo(t.dtype).eps, TF32_EPS)
    ours, stock, x = ours.detach().float(), stock.float(), x.detach().float()
    allowed = eps * (8 * (stock - x).norm(dim=-1) + stock.norm(dim=-1))
    # no NaN of ours is below it; where the stock code overflows, there is nothing to compare with
    fine = (ours - stock).norm(dim=-1) <= allowed
    return bool((fine | ~stock.isfinite().all(dim=-1)).all())


def _fused_block(
    block: BasicTransformerBlock,
    call: _Call,
    x: Tensor,  # (B, N, D)
    mask: Tensor | None,
    text: Tensor,  # (B, L, D)
    text_mask: Tensor | None,
    t: Tensor,  # (B, 6*D)
) -> Tensor:
    table, kwargs = block.scale_shift_table, {KEY: call}
    # under autocast, the stock code's residual stream leaves the first block in fp32
    x = x.to(torch.promote_types(x.dtype, torch.promote_types(table.dtype, t.dtype)))
    rows = {"shift_row": SHIFT_ATTN, "scale_row": SCALE_ATTN}
    h = adaln_single(x, table, t, **rows, eps=block.norm1.eps)
    attn = block.attn1(h, attention_mask=mask, **kwargs)
    x = gated_residual(x, attn, table, t, gate_row=GATE_ATTN)
    # neither normalised nor modulated: x itself asks the text
    cross = block.attn2(x, encoder_hidden_states=text, attention_mask=text_mask, **kwargs)
    before_mlp = (table, t, SHIFT_MLP, SCALE_MLP)
    x, h = gated_residual_adaln(x, cross, modulation=before_mlp, eps=block.norm2.eps)
    return gated_residual(x, _mlp(block, call, h), table, t, gate_row=GATE_MLP)


def _mlp(block: BasicTransformerBlock, call: _Call, h: Tensor) -> Tensor:
    if "bias_gelu" not in call.ops or _why_not_gelu(block) is not None:
        return block.ff(h)
    first, *rest = block.ff.net
    h = bias_gelu(F.linear(h, first.proj.weight), first.proj.bias)
    for module in rest:
        h = module(h)
    return h


@functools.wraps(STOCK_ATTENTION)
def _attention_forward(
    self: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    call = kwargs.pop(KEY, None)
    output = None
    if call is not None and _why_not_attention(self) is None:
        output = _attend(self, call, hidden_states, encoder_hidden_states, attention_mask)
    if output is None:
        inputs = (hidden_states, encoder_hidden_states, attention_mask)
        return STOCK_ATTENTION(self, *inputs, **kwargs)
    for module in self.to_out:
        output = module(output)
    return output


def _attend(
    attn: Attention, call: _Call, x: Tensor, text: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """(B, N, D) before the last projection, or None where the stock code is needed."""
    H, packed = attn.heads, type(attn.processor) is FusedAttnProcessor2_0
    if mask is not None:
        op = "cross_attention" if text is not None and call.lengths is not None else None
    else:
        op = "self_attention" if text is None and packed else "attention"
    if op not in call.ops:
        return None
    if op == "self_attention":
        return self_attention(attn.to_qkv(x), H)
    q = attn.to_q(x).unflatten(-1, (H, -1))
    if packed:
        kv = attn.to_kv(text).unflatten(-1, (2, H, -1))
        k, v = kv.unbind(2)
    else:
        source = x if text is None else text
        k, v = (proj(source).unflatten(-1, (H, -1)) for proj in (attn.to_k, attn.to_v))
    if op == "attention":
        return attention(q, k, v).flatten(2)
    return cross_attention(q, kv if packed else torch.stack([k, v], dim=2), call.lengths).flatten(2)

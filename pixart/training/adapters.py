"""Adapters beside frozen weights: LoRA and DoRA, through peft."""

from __future__ import annotations

from typing import cast

import torch

from pixart.model import PixArt
from pixart.training.recipe import Lora


def add_lora(model: PixArt, settings: Lora) -> None:
    """Freezes a model's weights and puts adapters beside those of some layers, in place.

    At first they change nothing: LoRA (arXiv:2106.09685, section 4.1) starts one of its two
    matrices at zero, DoRA (arXiv:2402.09353, section 4.1) the magnitudes at those of the weights.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: no layer is named so, or what is has no adapter; or DoRA is asked for on a
            layer with rows of zeros, as fresh models have them, whose direction is 0 / 0.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("lora: needs peft: pip install 'pixart-kernels[lora]'") from error
    if any("adaLN_modulation" in layer for layer in settings.layers):
        raise ValueError("lora.layers: adaLN_modulation is used by its weights, not as a layer")
    dtype = getattr(torch, settings.base_dtype)
    # DoRA's magnitudes are of the rounded weights, and not rounded themselves
    model.to(dtype).float()
    # peft says int, and divides by the rank: halves are as good
    alpha = cast(int, settings.rank if settings.alpha is None else settings.alpha)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=alpha,
        use_dora=settings.dora,
        target_modules=settings.layers,
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ValueError(f"lora.layers: {error}") from error
    for name, parameter in model.named_parameters():
        layer, _, magnitude = name.partition(".lora_magnitude_vector")
        if magnitude and not parameter.is_meta and not parameter.all():
            raise ValueError(
                f"lora.dora: {layer} has rows of zeros, which have no direction. Begin with a "
                "trained model (model.init), or leave dora out"
            )
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)

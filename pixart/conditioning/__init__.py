"""What the transformer is conditioned on and works in: text features, VAE latents, their cache."""

from pixart.conditioning.cache import CacheMetadata, CacheWriter, FeatureCache, collate
from pixart.conditioning.encode import (
    EncodeReport,
    TooManyBadSamplesError,
    bucket_table,
    encode_dataset,
    encoded_rows,
)
from pixart.conditioning.files import CorruptCacheError
from pixart.conditioning.text import TextEncoder
from pixart.conditioning.vae import VAE

__all__ = [
    "VAE",
    "CacheMetadata",
    "CacheWriter",
    "CorruptCacheError",
    "EncodeReport",
    "FeatureCache",
    "TextEncoder",
    "TooManyBadSamplesError",
    "bucket_table",
    "collate",
    "encode_dataset",
    "encoded_rows",
]

"""A packed cache of caption features and VAE moments, so that training runs neither encoder.

Layout of a cache folder:

    index.json                 metadata, and one entry per file: name, samples, bytes, checksums
    null-caption.safetensors   the features of "", padded to max_tokens
    shard-000000.safetensors   "text" (sum of L_i, C): the real tokens of every caption, end to end
                               "latent_mean", "latent_std" (sum of C*h*w,): flat, end to end
                               header: key, caption, token count, latent shape, size of each sample,
                               and what tells its version from others: fingerprint and stamp
    stamps.json                newer stamps of samples whose fingerprints were found to be the same
    skipped.jsonl              samples the last encoding run could not use, with reasons; of other
                               processes than the first, skipped-1.jsonl and so on

Padding every caption to 300 tokens of T5-XXL costs 2.5 MB a caption; real captions are far shorter,
so only real tokens are stored. Files appear under their final names only when they are complete and
synced to disk, and the index names a shard only after that, so a run killed at any instant
continues with the first sample that is in no shard. Of many processes each writes shards of its
own, and the first one the index; a next run takes in what a killed one had not named there yet.

The order of the samples means nothing, nor does a sample that no source has any more: a picture
that is changed is added once more, beside its older version, and whoever reads the cache for a
source asks `pixart.conditioning.encode.encoded_rows` where its samples are.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch.utils.data import Dataset

from pixart.conditioning.files import (
    FORMAT,
    INDEX,
    VERSION,
    corrupt,
    describe,
    header_length,
    lock,
    pack,
    parse_header,
    read_header,
    read_index,
    verify,
)
from pixart.files import PARTIAL, write_atomically
from pixart.together import Together

NULL_CAPTION = "null-caption.safetensors"
_TEXT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Normalised latents stay far below float16's range and need its 11 bits more than bfloat16's reach.
_LATENT_DTYPE = torch.float16
# The sample table is the safetensors header, which the format limits to 100 MB.
_MAX_SAMPLES_PER_SHARD = 16384


# of each key, the fingerprints of its versions, each with its stamp
Samples = dict[str, dict[str | None, str | None]]


@dataclass(frozen=True)
class CacheMetadata:
    """What every sample of one cache shares; a cache is never continued with anything else."""

    text_encoder: str  # TextEncoder.identity
    vae: str  # VAE.identity
    dtype: str  # of the caption features: "float16" or "bfloat16"
    max_tokens: int
    caption_channels: int
    latent_channels: int


class CacheWriter:
    """Adds samples to a cache folder, new or begun earlier; a context manager.

    Samples are buffered until a shard is full. Leaving the `with` block normally writes the last,
    partial shard; leaving it with an exception drops the buffer, as a kill would.

    Args:
        folder: created where it does not exist.
        metadata: must equal that of the samples already in the folder.
        null_caption: (max_tokens, C) features of "".
        null_length: how many of its rows are real tokens.
        samples_per_shard: 1 to 16384; one shard is held in memory twice while it is written.
        together: processes that fill the folder together, each with other samples: all of them
            must open and leave the writer. None: this one alone.

    Attributes:
        samples: of each key in complete shards, the fingerprints of its versions, each with its
            stamp; `add` refuses them. What other processes add meanwhile is not among them.

    Raises:
        ValueError: the folder was begun with other metadata, or an argument is out of range.
        CorruptCacheError: a shard of the folder is damaged. A shard that was deleted is simply
            forgotten, and its keys are missing from `samples`.
        RuntimeError: another process is writing to the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        metadata: CacheMetadata,
        null_caption: torch.Tensor,
        null_length: int,
        *,
        samples_per_shard: int = 512,
        together: Together | None = None,
    ) -> None:
        if metadata.dtype not in _TEXT_DTYPES:
            raise ValueError(
                f"metadata.dtype={metadata.dtype!r}: {' or '.join(_TEXT_DTYPES)} is accepted"
            )
        if not 1 <= samples_per_shard <= _MAX_SAMPLES_PER_SHARD:
            raise ValueError(
                f"samples_per_shard={samples_per_shard}: 1 to {_MAX_SAMPLES_PER_SHARD} is accepted"
            )
        expected = (metadata.max_tokens, metadata.caption_channels)
        if tuple(null_caption.shape) != expected or not 0 <= null_length <= metadata.max_tokens:
            raise ValueError(
                f"null_caption has shape {tuple(null_caption.shape)} and null_length is "
                f"{null_length}; shape {expected} (max_tokens, channels) and a length of at most "
                f"{metadata.max_tokens} are accepted; pass what TextEncoder.encode_null gives"
            )
        self.folder = Path(folder)
        self.metadata = metadata
        self.samples_per_shard = samples_per_shard
        self.samples: Samples = {}
        self._shards: dict[str, dict[str, Any]] = {}  # file name -> entry of the index
        self._table: list[dict[str, Any]] = []
        self._text: list[torch.Tensor] = []
        self._mean: list[torch.Tensor] = []
        self._std: list[torch.Tensor] = []
        self._buffered: Samples = {}

        # of numbers that are this process's alone, the lowest first, so that a deleted shard comes
        # back under its own name
        self._together = together or Together()
        numbers = itertools.count(self._together.rank, self._together.count)
        names = (f"shard-{number:06d}.safetensors" for number in numbers)
        self._free_names = (name for name in names if name not in self._shards)

        def begin() -> tuple[dict[str, dict[str, Any]], Samples]:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.folder)
            try:
                self._open(null_caption, null_length)
                if self._together.count > 1:
                    lock(self.folder, shared=True, held=self._lock)
            except BaseException:
                self._lock.close()
                raise
            return self._shards, self.samples

        self._shards, self.samples = self._together.first(begin)
        if self._together.rank > 0:
            # while one of them lives, nobody else begins to encode what is missing
            self._lock = lock(self.folder, shared=True)

    def _open(self, null_caption: torch.Tensor, null_length: int) -> None:
        for leftover in self.folder.glob(f"*{PARTIAL}"):
            leftover.unlink()
        index = read_index(self.folder) if (self.folder / INDEX).exists() else None
        if index is not None:
            _require_same(self.folder / INDEX, index["metadata"], self.metadata)
            for entry in index["shards"]:
                if (self.folder / entry["file"]).exists():
                    self._shards[entry["file"]] = entry
                    _note(self.samples, read_header(self.folder, entry)["samples"])
        # shards without an entry: the first process died before it had named them in the index
        paths = sorted(self.folder.glob("shard-*.safetensors"))
        unnamed = [path for path in paths if path.name not in self._shards]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for path, (entry, table) in zip(unnamed, pool.map(self._read, unnamed), strict=True):
                repeated = sum(
                    row.get("fingerprint") in self.samples.get(row["key"], ()) for row in table
                )
                if repeated:
                    raise corrupt(path, f"it repeats {repeated} samples of other shards", 0)
                self._shards[path.name] = entry
                _note(self.samples, table)

        null_path = self.folder / NULL_CAPTION
        if index is not None and null_path.exists():
            self._null = index["null_caption"]
            read_header(self.folder, self._null)
        else:
            caption = self._caption_features(null_caption, NULL_CAPTION)
            self._null = self._write(NULL_CAPTION, {"text": caption}, {"length": null_length}, 0)
        self._write_index()

    def _read(self, path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A shard's entry of the index, and its table of samples."""
        try:
            with safe_open(path, "pt"):  # checks that header and file length agree
                pass
            with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as blob:
                header = parse_header(blob[: header_length(blob[:8])])
                entry = describe(path.name, blob, len(header["samples"]))
            metadata, table = header["cache"], header["samples"]
        except Exception as error:
            raise corrupt(path, f"it is not a readable shard ({error})", 0) from error
        _require_same(path, metadata, self.metadata)
        return entry, table

    def add(
        self,
        *,
        key: str,
        text: str,
        caption: torch.Tensor,
        latent_mean: torch.Tensor,
        latent_std: torch.Tensor,
        image_size: tuple[int, int],
        fingerprint: str | None = None,
        stamp: str | None = None,
    ) -> None:
        """Add one sample; writes a shard when it is full.

        Args:
            key: with the fingerprint, unique in the cache.
            text: the caption.
            caption: (L_i, C) features of its real tokens.
            latent_mean, latent_std: (C, h, w), normalised.
            image_size: (height, width) in pixels of the original image.
            fingerprint, stamp: `ImageSource.fingerprint` and `ImageSource.stamp` of what was
                encoded. None: it is taken for whatever a source has under that key.

        Raises:
            ValueError: the key is taken, a shape does not fit the metadata, or a value is not
                finite in the stored dtype.
            OSError: the shard could not be written; says what to do.
        """
        if any(fingerprint in held.get(key, ()) for held in (self.samples, self._buffered)):
            raise ValueError(
                f"key={key!r} is already in {self.folder}; skip the versions that are in `samples`"
            )
        meta = self.metadata
        if (
            caption.ndim != 2
            or caption.shape[0] > meta.max_tokens
            or caption.shape[1] != meta.caption_channels
        ):
            raise ValueError(
                f"caption of {key!r} has shape {tuple(caption.shape)}; (tokens, channels) with at "
                f"most {meta.max_tokens} tokens and {meta.caption_channels} channels is accepted"
            )
        if (
            latent_mean.ndim != 3
            or latent_mean.shape[0] != meta.latent_channels
            or latent_mean.shape != latent_std.shape
        ):
            raise ValueError(
                f"latent_mean and latent_std of {key!r} have shapes {tuple(latent_mean.shape)} and "
                f"{tuple(latent_std.shape)}; the same ({meta.latent_channels}, h, w) is accepted"
            )
        packed_caption = self._caption_features(caption, key)
        packed_mean = _finite(latent_mean, _LATENT_DTYPE, f"latent_mean of {key!r}", "the VAE")
        packed_std = _finite(latent_std, _LATENT_DTYPE, f"latent_std of {key!r}", "the VAE")
        self._text.append(packed_caption)
        self._mean.append(packed_mean.flatten())
        self._std.append(packed_std.flatten())
        row = {
            "key": key,
            "text": text,
            "tokens": caption.shape[0],
            "latent": list(latent_mean.shape),
            "size": [int(side) for side in image_size],
            "fingerprint": fingerprint,
            "stamp": stamp,
        }
        self._table.append(row)
        _note(self._buffered, [row])
        if len(self._table) >= self.samples_per_shard:
            self.flush()

    def flush(self) -> None:
        """Write the buffered samples as a shard; no-op without any.

        The first process names its own in the index at once, and those of others in `close`.
        """
        if not self._table:
            return
        name = next(self._free_names)
        tensors = {
            "text": torch.cat(self._text),
            "latent_mean": torch.cat(self._mean),
            "latent_std": torch.cat(self._std),
        }
        header = {"samples": self._table}
        self._shards[name] = self._write(name, tensors, header, len(self._table))
        if self._together.rank == 0:
            self._write_index()
        _note(self.samples, self._table)
        self._table, self._text, self._mean, self._std = [], [], [], []
        self._buffered = {}

    def close(self) -> None:
        """Write what is buffered and let other writers in.

        Waits for the processes that fill the folder as well; RuntimeError where one was lost.
        """
        try:
            self.flush()
            if self._together.count > 1:
                for shards in self._together.gather(self._shards):
                    self._shards |= shards
                self._together.first(self._write_index)
        finally:
            self._lock.close()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._lock.close()

    def _caption_features(self, caption: torch.Tensor, key: str) -> torch.Tensor:
        dtype = _TEXT_DTYPES[self.metadata.dtype]
        hint = "the text encoder and dtype=torch.bfloat16 for the cache"
        return _finite(caption, dtype, f"caption of {key!r}", hint)

    def _write(
        self, name: str, tensors: dict[str, torch.Tensor], header: Mapping[str, Any], samples: int
    ) -> dict[str, Any]:
        blob = pack(tensors, {"cache": asdict(self.metadata), **header})
        write_atomically(self.folder / name, lambda file: file.write(blob))
        return describe(name, blob, samples)

    def _write_index(self) -> None:
        index = {
            "format": FORMAT,
            "version": VERSION,
            "metadata": asdict(self.metadata),
            "null_caption": self._null,
            "shards": [self._shards[name] for name in sorted(self._shards)],
        }
        blob = json.dumps(index, indent=1).encode()
        write_atomically(self.folder / INDEX, lambda file: file.write(blob))


class FeatureCache(Dataset[dict[str, Any]]):
    """A cache folder as a map-style data set, safe to hand to DataLoader workers.

    Items are dicts, tensors in the dtype they are stored in (latents float16):
        key str, text str, caption (L_i, C), latent_mean and latent_std (C, h, w),
        image_size (2,) float32: height and width in pixels of the original image.

    A shard is checksummed when it is first read from, once per process, and memory-mapped.

    Attributes:
        metadata: `CacheMetadata` of all samples.
        null_caption: (max_tokens, C) features of "" in the stored dtype, padded positions included.
        null_length: how many of its rows are real tokens.

    Raises:
        FileNotFoundError: the folder holds no cache.
        CorruptCacheError: a file is missing or damaged; says what to do. Also raised by items.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise FileNotFoundError(
                f"folder={str(folder)!r} holds no feature cache (no {INDEX}); write one with "
                "encode_dataset"
            )
        index = read_index(self.folder)
        self.metadata = CacheMetadata(**index["metadata"])
        self._entries: list[dict[str, Any]] = index["shards"]
        self._ends = list(itertools.accumulate(entry["samples"] for entry in self._entries))
        self._open_shards: dict[int, _Shard] = {}

        null = index["null_caption"]
        verify(self.folder, null)
        self.null_length = int(read_header(self.folder, null)["length"])
        with safe_open(self.folder / null["file"], "pt") as file:
            self.null_caption: torch.Tensor = file.get_tensor("text")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index={index} is out of range for {len(self)} samples")
        index %= len(self)
        number = bisect.bisect_right(self._ends, index)
        first = self._ends[number - 1] if number else 0
        return self._shard(number).sample(index - first)

    def keys(self) -> list[str]:
        """The key of every sample, in order; reads the shards' headers alone."""
        return [row["key"] for entry in self._entries for row in self._rows(entry)]

    def versions(self) -> list[tuple[str | None, str | None]]:
        """Fingerprint and stamp of every sample, in order; reads the shards' headers alone."""
        return [
            (row.get("fingerprint"), row.get("stamp"))
            for entry in self._entries
            for row in self._rows(entry)
        ]

    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(C, h, w) of every sample, in order, for bucketing; reads the shards' headers alone."""
        return [tuple(row["latent"]) for entry in self._entries for row in self._rows(entry)]

    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of every original image, in order; reads headers alone."""
        return [tuple(row["size"]) for entry in self._entries for row in self._rows(entry)]

    def _rows(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        return read_header(self.folder, entry)["samples"]

    def _shard(self, number: int) -> _Shard:
        if number not in self._open_shards:
            entry = self._entries[number]
            verify(self.folder, entry)
            self._open_shards[number] = _Shard(self.folder / entry["file"], self._rows(entry))
        return self._open_shards[number]

    def __getstate__(self) -> dict[str, Any]:
        # memory maps do not travel between processes; a worker opens what it reads
        return {**self.__dict__, "_open_shards": {}}


class _Shard:
    """One memory-mapped shard."""

    def __init__(self, path: Path, rows: list[dict[str, Any]]) -> None:
        self._file = safe_open(path, "pt")
        self._rows = rows
        self._tokens = [0, *itertools.accumulate(row["tokens"] for row in rows)]
        self._latents = [0, *itertools.accumulate(math.prod(row["latent"]) for row in rows)]

    def sample(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        latent = slice(self._latents[index], self._latents[index + 1])
        return {
            "key": row["key"],
            "text": row["text"],
            "caption": self._read("text", slice(self._tokens[index], self._tokens[index + 1])),
            "latent_mean": self._read("latent_mean", latent).view(row["latent"]),
            "latent_std": self._read("latent_std", latent).view(row["latent"]),
            "image_size": torch.tensor(row["size"], dtype=torch.float32),
        }

    def _read(self, name: str, rows: slice) -> torch.Tensor:
        # the slice is a view of the whole map: without the copy, a worker would send all of it
        return self._file.get_slice(name)[rows].clone()


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batch samples of a `FeatureCache` whose latents have one shape.

    Returns:
        latent_mean, latent_std (B, C, h, w) float32; caption (B, L, C) in its stored dtype, L the
        longest caption, zeros behind each caption's end; caption_mask (B, L) bool, true on real
        tokens; image_size (B, 2) float32; keys, a list of B.

    Raises:
        ValueError: no samples, or latents of different shapes.
    """
    if not samples:
        raise ValueError("samples=[]: at least one sample is needed")
    shapes = {tuple(sample["latent_mean"].shape) for sample in samples}
    if len(shapes) > 1:
        raise ValueError(
            f"samples have latents of different shapes: {', '.join(map(str, sorted(shapes)))}; one "
            "batch holds one shape: use buckets, that is, a batch sampler that groups samples by "
            "FeatureCache.latent_shapes()"
        )
    lengths = torch.tensor([sample["caption"].shape[0] for sample in samples])
    longest = int(lengths.max())
    first = samples[0]["caption"]
    caption = first.new_zeros(len(samples), longest, first.shape[1])
    for row, sample in zip(caption, samples, strict=True):
        row[: sample["caption"].shape[0]] = sample["caption"]
    return {
        "latent_mean": torch.stack([sample["latent_mean"] for sample in samples]).float(),
        "latent_std": torch.stack([sample["latent_std"] for sample in samples]).float(),
        "caption": caption,
        "caption_mask": torch.arange(longest) < lengths[:, None],
        "image_size": torch.stack([sample["image_size"] for sample in samples]),
        "keys": [sample["key"] for sample in samples],
    }


def _note(samples: Samples, table: Sequence[Mapping[str, Any]]) -> None:
    for row in table:
        # caches from before there were fingerprints have none
        samples.setdefault(row["key"], {})[row.get("fingerprint")] = row.get("stamp")


def _finite(tensor: torch.Tensor, dtype: torch.dtype, what: str, hint: str) -> torch.Tensor:
    # a copy, so that a caption's view does not keep its padded batch alive until the shard is full
    stored = tensor.detach().to("cpu", dtype, copy=True)
    if not torch.isfinite(stored).all():
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{what} is not finite in {name}, so a value overflowed; use bfloat16 or float32 for "
            f"{hint}"
        )
    return stored


def _require_same(path: Path, found: Mapping[str, Any], wanted: CacheMetadata) -> None:
    """Refuse to mix features, naming each field with both values."""
    differences = [
        f"{field}={found.get(field)!r} there, {value!r} in this run"
        for field, value in asdict(wanted).items()
        if found.get(field) != value
    ]
    if differences:
        raise ValueError(
            f"{path} was written with other metadata: {'; '.join(differences)}. One cache holds "
            "one kind of features: use the same encoders and settings, or another folder"
        )

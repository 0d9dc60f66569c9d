"""Fills a feature cache from a source of captioned images, with as many processes as there are."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    track,
)
from rich.table import Table

from pixart.conditioning.cache import CacheMetadata, CacheWriter, FeatureCache, Samples
from pixart.conditioning.files import MissingFileError
from pixart.conditioning.text import TextEncoder
from pixart.conditioning.vae import VAE
from pixart.data.sources import BadSample, ImageSample, ImageSource
from pixart.files import write_atomically
from pixart.together import Together, all_processes

SKIPPED = "skipped.jsonl"
STAMPS = "stamps.json"
# so many bad samples are listed before a run gives up, that they can be mended all at once
_LISTED = 100
# samples that a thread looks at in one go
_PART = 256
# Decoded images kept back to fill batches of one size; bounds memory when every size differs.
_MAX_WAITING_BATCHES = 8
# Of a batch: an autoencoder's first layers keep 128 channels or so for each.
_MAX_BATCH_PIXELS = 16 * 512**2


class TooManyBadSamplesError(RuntimeError):
    """More samples of the source failed than the run accepts."""


@dataclass(frozen=True)
class EncodeReport:
    """What one `encode_dataset` run did, in all its processes."""

    encoded: int
    already_present: int
    skipped: int


def encode_dataset(
    source: ImageSource,
    vae: VAE,
    text_encoder: TextEncoder,
    folder: str | Path,
    *,
    batch_size: int = 16,
    samples_per_shard: int = 512,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float16,
    progress: bool = True,
    max_bad_fraction: float = 0.05,
) -> EncodeReport:
    """Encode every sample of `source` into the cache at `folder`, continuing where one was begun.

    A sample whose picture or caption is another than was encoded is encoded once more, whatever
    its key; the older version stays, for a source that still has it. Images of one size share
    batches. Samples that fail are left out, listed in `skipped.jsonl` and tried again by the next
    run that has anything to encode: see `encoded_rows`.

    Where torch.distributed is initialised all processes must call this: each encodes its share of
    what is missing, and it returns when the last one is done. They need the same source, and a
    folder that all see. The number of processes may change from run to run.

    Args:
        source: e.g. an `ImageFolder`; read from several threads, in order.
        batch_size: images, and captions, per forward pass; fewer where images are above 512
            pixels square, so that 2K and 4K fit the same device.
        samples_per_shard: what a kill can cost each process at most, and the size of one file.
        device: where to move both encoders; None leaves them where they are.
        dtype: of the stored caption features, float16 or bfloat16.
        progress: show a progress bar, in the first process and of its share.
        max_bad_fraction: largest tolerated share of failed samples of the whole source.

    Raises:
        TooManyBadSamplesError: more failed; complete shards are kept.
        ValueError: an argument is out of range, the folder was begun with other encoders, or the
            processes do not have the same source and encoders.
        CorruptCacheError: a shard of the folder is damaged; says what to do.
        RuntimeError: another process was lost; complete shards are kept.
    """
    if len(source) == 0:
        raise ValueError("source is empty; pass a source with at least one sample")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least 1 is accepted")
    if not 0.0 <= max_bad_fraction <= 1.0:
        raise ValueError(f"max_bad_fraction={max_bad_fraction}: 0 to 1 is accepted")
    if device is not None:
        vae.to(device)
        text_encoder.to(device)
    metadata = CacheMetadata(
        text_encoder=text_encoder.identity,
        vae=vae.identity,
        dtype=str(dtype).removeprefix("torch."),
        max_tokens=text_encoder.max_tokens,
        caption_channels=text_encoder.channels,
        latent_channels=vae.channels,
    )
    together = all_processes()
    names = hashlib.sha256(json.dumps(list(source.keys)).encode()).hexdigest()
    if len(set(together.gather((metadata, names)))) > 1:
        raise ValueError(
            "the processes do not see the same samples, or have different encoders: all of them "
            "need the same folders and the same settings"
        )
    null_caption, null_mask = text_encoder.encode_null()
    encoded = 0
    first_of = _first_of(source)
    with ExitStack() as stack:
        writer = stack.enter_context(
            CacheWriter(
                folder,
                metadata,
                null_caption,
                int(null_mask.sum()),
                samples_per_shard=samples_per_shard,
                together=together,
            )
        )
        found = together.first(lambda: _match(source, writer.samples, writer.folder, progress))
        bar = stack.enter_context(
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[skipped]} skipped"),
                TimeRemainingColumn(),
                disable=not progress or together.rank > 0,
            )
        )
        missing = [i for i in range(len(source)) if i not in found]
        present = len(found)
        todo = missing[together.rank :: together.count]

        before = present // together.count
        what = "encoding" if together.count == 1 else f"encoding 1/{together.count} of all"
        task = bar.add_task(what, total=before + len(todo), completed=before, skipped=0)
        skipped = _Skipped(Path(folder), len(source), max_bad_fraction, together)
        waiting: dict[tuple[int, int], list[_Loaded]] = {}  # by image size

        def fullness(size: tuple[int, int]) -> float:
            """Of a batch of the samples that wait."""
            full = max(1, min(batch_size, _MAX_BATCH_PIXELS // math.prod(size)))
            return len(waiting[size]) / full

        def encode_group(size: tuple[int, int]) -> None:
            nonlocal encoded
            group = waiting.pop(size)
            _encode_batch(group, vae, text_encoder, writer, dtype)
            encoded += len(group)
            bar.update(task, advance=len(group))

        for loaded in _load_ahead(source, todo, window=2 * batch_size):
            sample = loaded.sample
            if not isinstance(sample, BadSample):
                repeated = first_of[sample.key] != loaded.number
                sample = _reject(sample, repeated, vae.factor) or sample
            if isinstance(sample, BadSample):
                skipped.add(sample, loaded.stamp)
                bar.update(task, advance=1, skipped=len(skipped.rows))
                continue
            size = (sample.image.shape[1], sample.image.shape[2])
            waiting.setdefault(size, []).append(loaded)
            if fullness(size) == 1:
                encode_group(size)
            elif sum(map(fullness, waiting)) >= _MAX_WAITING_BATCHES:
                encode_group(max(waiting, key=fullness))
        for size in list(waiting):
            encode_group(size)
    return EncodeReport(
        encoded=sum(together.gather(encoded)), already_present=present, skipped=skipped.merge()
    )


def encoded_rows(
    source: ImageSource,
    folder: str | Path,
    *,
    max_bad_fraction: float = 0.05,
    progress: bool = True,
) -> list[int] | None:
    """Where the samples of `source`, as they are now, are in the cache at `folder`.

    Their order is that of their keys, however the cache came to be, and whatever else is in it.

    Returns:
        Indices for `FeatureCache`; None where `encode_dataset` has anything to do, that is, where
        more is lacking than samples that were bad and have not changed.

    Raises:
        CorruptCacheError: a shard of the folder is damaged; says what to do.
    """
    try:
        cache = FeatureCache(folder)
        keys, versions = cache.keys(), cache.versions()
    except (FileNotFoundError, MissingFileError):
        return None
    samples: Samples = {}
    for key, (fingerprint, stamp) in zip(keys, versions, strict=True):
        samples.setdefault(key, {})[fingerprint] = stamp
    found = _match(source, samples, Path(folder), progress)
    missing = [i for i in range(len(source)) if i not in found]
    tried = _read_skipped(Path(folder) / SKIPPED)
    if len(missing) > max_bad_fraction * len(source) or any(
        (source.keys[i], source.stamp(i)) not in tried for i in missing
    ):
        return None
    names = zip(keys, (fingerprint for fingerprint, _ in versions), strict=True)
    rows = {name: row for row, name in enumerate(names)}
    return [rows[source.keys[i], found[i]] for i in sorted(found, key=lambda i: source.keys[i])]


def _first_of(source: ImageSource) -> dict[str, int]:
    """Of each key, the sample that has it; any other with the same key is bad."""
    first: dict[str, int] = {}
    for i, key in enumerate(source.keys):
        first.setdefault(key, i)
    return first


def _match(
    source: ImageSource, samples: Samples, folder: Path, progress: bool
) -> dict[int, str | None]:
    """The samples of `source` that are in a cache with `samples`, each with its fingerprint.

    Pictures are not read where their stamps are as they were, and otherwise once: their new stamps
    are then kept in the folder. A fingerprint is of the content, because names, sizes and dates of
    two data sets may well agree, and because a copied one is still the same.
    """
    path = folder / STAMPS
    # of each key, a fingerprint and its latest stamp
    renewed: dict[str, list[str]] = {}
    if path.exists():
        with suppress(ValueError):
            renewed = json.loads(path.read_bytes())

    def look(some: Sequence[int]) -> tuple[dict[int, str | None], dict[str, list[str]]]:
        found: dict[int, str | None] = {}
        read: dict[str, list[str]] = {}
        for i in some:
            key, stamp = source.keys[i], source.stamp(i)
            versions = samples[key]
            # one without a fingerprint is taken for what the source has
            same = [f for f, at in versions.items() if f is None or at == stamp]
            if same:
                found[i] = same[0]
                continue
            fingerprint, at = renewed.get(key, ("", ""))
            if at != stamp:
                fingerprint = source.fingerprint(i)
            if fingerprint in versions:
                found[i] = fingerprint
                if at != stamp:
                    read[key] = [fingerprint, stamp]
        return found, read

    known = [i for key, i in _first_of(source).items() if key in samples]
    parts = [known[i : i + _PART] for i in range(0, len(known), _PART)]
    found: dict[int, str | None] = {}
    read: dict[str, list[str]] = {}
    hidden = not progress or len(parts) < 2
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        done = pool.map(look, parts)
        for some, newer in track(
            done, "looking for changes", len(parts), transient=True, disable=hidden
        ):
            found |= some
            read |= newer
    if read:
        text = json.dumps(renewed | read).encode()
        # on a read-only disk they are read each time
        with suppress(OSError):
            write_atomically(path, lambda file: file.write(text))
    return found


def _read_skipped(path: Path) -> set[tuple[str, str | None]]:
    """The bad samples' keys, and stamps when they were tried."""
    tried = set()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        # a run may have been killed in the midst of a row
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            tried.add((row["key"], row.get("stamp")))
    return tried


class _Skipped:
    """The bad samples of a run: listed as they are found, and no more than a share of all."""

    def __init__(self, folder: Path, samples: int, accepted: float, together: Together) -> None:
        self.samples, self.accepted, self.together = samples, accepted, together
        self.rows: list[dict[str, str]] = []
        # each process has its own until all are done
        self.path = folder / (f"skipped-{together.rank}.jsonl" if together.rank else SKIPPED)

        def begin() -> None:
            for old in folder.glob("skipped*.jsonl"):
                old.unlink()
            self.path.touch()

        together.first(begin)

    def add(self, bad: BadSample, stamp: str) -> None:
        """Raises TooManyBadSamplesError where this process has found too many, and some more."""
        self.rows.append({"key": bad.key, "reason": bad.reason, "stamp": stamp})
        self._list(self.rows[-1:])
        if len(self.rows) >= _LISTED:
            self._check()

    def merge(self) -> int:
        """Lists those of all processes in the first one's file, and counts them.

        Raises TooManyBadSamplesError where all together have found too many.
        """
        mine = len(self.rows)
        self.rows = [row for rows in self.together.gather(self.rows) for row in rows]
        if self.together.rank == 0:
            self._list(self.rows[mine:])
        else:
            self.path.unlink(missing_ok=True)
            self.path = self.path.with_name(SKIPPED)
        self._check()
        return len(self.rows)

    def _list(self, rows: list[dict[str, str]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def _check(self) -> None:
        if len(self.rows) > self.accepted * self.samples:
            last = self.rows[-1]
            raise TooManyBadSamplesError(
                f"{len(self.rows)} of {self.samples} samples failed, more than "
                f"max_bad_fraction={self.accepted}; the last: {last['key']}: {last['reason']}. See "
                f"{self.path}, repair or remove those samples, and rerun: complete shards are kept"
            )


def bucket_table(cache: FeatureCache, rows: Sequence[int], factor: int) -> Table:
    """What a cache holds, by the size of the encoded images: for people.

    Args:
        rows: of the samples to count.
        factor: pixels per latent pixel along each side: `VAE.factor`.
    """
    shapes, sizes = cache.latent_shapes(), cache.image_sizes()
    buckets = [(factor * shapes[row][1], factor * shapes[row][2]) for row in rows]
    enlarged = Counter(
        bucket
        for bucket, (height, width) in zip(buckets, (sizes[row] for row in rows), strict=True)
        if min(height / bucket[0], width / bucket[1]) < 1
    )
    counts = Counter(buckets)
    table = Table("width x height", "images", "share", "enlarged")
    for bucket in sorted(counts, key=lambda size: size[0] / size[1]):
        count, (height, width) = counts[bucket], bucket
        share = f"{count / len(buckets):.1%}"
        table.add_row(f"{width} x {height}", f"{count:,}", share, f"{enlarged[bucket]:,}")
    skipped = cache.folder / SKIPPED
    if skipped.exists() and (bad := skipped.read_text(encoding="utf-8").splitlines()):
        table.caption = f"{len(bad):,} more were skipped: {SKIPPED}"
    return table


class _Loaded(NamedTuple):
    number: int
    stamp: str
    fingerprint: str
    sample: ImageSample | BadSample


def _reject(sample: ImageSample, repeated: bool, factor: int) -> BadSample | None:
    height, width = sample.image.shape[1:]
    if repeated:
        return BadSample(sample.key, "the key appears twice in the source")
    if height % factor or width % factor:
        return BadSample(
            sample.key, f"{width}x{height} is not divisible by the VAE's {factor}; set a size"
        )
    return None


def _load_ahead(source: ImageSource, indices: Sequence[int], window: int) -> Iterator[_Loaded]:
    """In order, decoded in threads up to `window` ahead of the encoders."""

    def load(index: int) -> _Loaded:
        # before the sample: a file that is still being written is another one afterwards
        stamp, fingerprint = source.stamp(index), source.fingerprint(index)
        try:
            return _Loaded(index, stamp, fingerprint, ImageSample(*source[index]))
        except BadSample as bad:
            return _Loaded(index, stamp, fingerprint, bad)

    threads = min(8, os.cpu_count() or 1)
    ahead: deque[Future[_Loaded]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for index in indices:
                ahead.append(pool.submit(load, index))
                if len(ahead) >= window:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _encode_batch(
    group: Sequence[_Loaded],
    vae: VAE,
    text_encoder: TextEncoder,
    writer: CacheWriter,
    dtype: torch.dtype,
) -> None:
    samples = [loaded.sample for loaded in group if isinstance(loaded.sample, ImageSample)]
    means, stds = vae.moments(torch.stack([sample.image for sample in samples]))
    features, mask = text_encoder.encode([sample.caption for sample in samples])
    # one transfer per batch; a sum past the range of dtype shows up as inf and is refused in add
    means, stds, features = means.cpu(), stds.cpu(), features.to(dtype).cpu()
    lengths = mask.sum(1).tolist()
    for i, (loaded, sample) in enumerate(zip(group, samples, strict=True)):
        writer.add(
            key=sample.key,
            text=sample.caption,
            caption=features[i, : lengths[i]],
            latent_mean=means[i],
            latent_std=stds[i],
            image_size=sample.size,
            fingerprint=loaded.fingerprint,
            stamp=loaded.stamp,
        )

"""The files of a feature cache: written whole or not at all, described, and checked when read.

An entry of the index describes one file: its name, samples, bytes and two SHA-256 checksums.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Mapping
from mmap import mmap
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import save

from pixart.files import digest

INDEX = "index.json"
FORMAT = "pixart-feature-cache"
VERSION = 1
_FIELDS = "pixart"


class CorruptCacheError(RuntimeError):
    """A file of the cache is missing or is not what was written."""


class MissingFileError(CorruptCacheError):
    """It is missing, and whoever encodes again puts another one in its place."""


_AGAIN = "rerun the encoding with the same folder (`pixart data encode`, with data.images)"


def corrupt(path: Path, what: str, samples: int) -> CorruptCacheError:
    """The error for a damaged file that holds `samples` samples (0: the null caption)."""
    lost = f"its {samples} samples" if samples else "what it held"
    return CorruptCacheError(
        f"{path} is damaged: {what}. Delete it and {_AGAIN}; only {lost} will be encoded again"
    )


def lock(folder: Path, *, shared: bool = False, held: IO[str] | None = None) -> IO[str]:
    """Keep other writers out of `folder` until the returned file is closed.

    The system drops the lock with the process, however that ends. A shared one lets those in that
    ask for a shared one; `held` becomes what is asked for.

    Raises:
        RuntimeError: another writer has it.
    """
    # over NFS a lock needs a file that can be written, or if shared be read
    file = held or (folder / ".lock").open("a+")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RuntimeError(
            f"another writer has the cache {folder} open; wait for it or use another folder"
        ) from None
    return file


def describe(name: str, blob: bytes | mmap, samples: int) -> dict[str, Any]:
    """The index entry of a safetensors file."""
    return {
        "file": name,
        "samples": samples,
        "bytes": len(blob),
        "sha256": hashlib.sha256(blob).hexdigest(),
        # apart from the whole, so that keys and shapes can be trusted without reading the data
        "header_sha256": hashlib.sha256(blob[: header_length(blob[:8])]).hexdigest(),
    }


def header_length(start: bytes) -> int:
    """Bytes of a safetensors header with its length prefix, a little-endian uint64."""
    return 8 + int.from_bytes(start[:8], "little")


def pack(tensors: dict[str, torch.Tensor], fields: Mapping[str, Any]) -> bytes:
    """A safetensors file of tensors with JSON fields beside them; equal input gives equal bytes."""
    # one entry for all fields: safetensors writes several in a random order
    return save(tensors, {_FIELDS: json.dumps(fields)})


def parse_header(header: bytes) -> dict[str, Any]:
    """The fields that `pack` put into a header."""
    return json.loads(json.loads(header[8:])["__metadata__"][_FIELDS])


def read_header(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """`parse_header` of the file that `entry` describes, after checking size and header.

    Raises:
        CorruptCacheError: the file is missing, has another size, or its header was changed.
    """
    path = folder / entry["file"]
    _check_size(path, entry)
    with path.open("rb") as file:
        prefix = file.read(8)
        # a damaged prefix may name any length
        header = prefix + file.read(min(header_length(prefix), entry["bytes"]) - 8)
    if hashlib.sha256(header).hexdigest() != entry["header_sha256"]:
        raise corrupt(path, "the checksum of its header does not match", entry["samples"])
    return parse_header(header)


def verify(folder: Path, entry: dict[str, Any]) -> None:
    """Read the whole file that `entry` describes and compare its checksum.

    Raises:
        CorruptCacheError: the file is missing or is not what was written.
    """
    path = folder / entry["file"]
    _check_size(path, entry)
    if digest(path) != entry["sha256"]:
        raise corrupt(path, "its checksum does not match", entry["samples"])


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a cache folder.

    Raises:
        CorruptCacheError: it is not JSON.
        ValueError: it is not the index of a cache of this version.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptCacheError(
            f"{path} is damaged ({error}). Delete it and {_AGAIN}; the index is rebuilt from the "
            "shards"
        ) from error
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        raise ValueError(
            f"{path} has format={index.get('format')!r} and version={index.get('version')!r}; "
            f"{FORMAT!r} version {VERSION} is accepted; encode into another folder"
        )
    return index


def _check_size(path: Path, entry: dict[str, Any]) -> None:
    samples = entry["samples"]
    if not path.is_file():
        lost = f"only its {samples} samples are encoded again" if samples else "it is restored"
        raise MissingFileError(f"{path} is missing. To get it back, {_AGAIN}; {lost}")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise corrupt(path, f"it has {size} bytes instead of {entry['bytes']}", samples)

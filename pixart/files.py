"""Files and folders that are complete under their final name, or not there."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

# what has this ending was interrupted, and may be deleted
PARTIAL = ".partial"


def write_complete(*files: tuple[Path, Callable[[Path], object]]) -> None:
    """Writes files that belong together; each function is given the path to write to.

    All are written and synced under temporary names before any takes its own. The last file is
    the one that counts: it comes last, and when another one changes, the old last one goes first,
    so that at no instant do files of two different saves look like one.

    Raises:
        OSError: a file could not be written, with what to do; nothing is left behind.
    """
    partials = [path.with_name(f"{path.name}{PARTIAL}") for path, _ in files]
    paths = [path for path, _ in files]
    try:
        for path, partial, (_, write) in zip(paths, partials, files, strict=True):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write(partial)
                sync(partial)
            except (OSError, RuntimeError, SafetensorError) as error:
                raise OSError(
                    f"cannot write {path}: {error}. What was there before is untouched; free some "
                    "space or choose another place, then run it again"
                ) from error
        companions = zip(paths[:-1], partials[:-1], strict=True)
        if any(not _same(path, partial) for path, partial in companions):
            paths[-1].unlink(missing_ok=True)
        for path, partial in zip(paths, partials, strict=True):
            os.replace(partial, path)
    finally:
        # a read-only disk refuses even where there is none
        for partial in partials:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
    for folder in {path.parent for path in paths}:
        sync(folder)


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Calls ``write`` with a binary file, which becomes ``path`` once it is complete and on disk.

    Raises OSError as :func:`write_complete`; ``path`` is then as it was.
    """

    def to_file(partial: Path) -> None:
        with partial.open("wb") as file:
            write(file)

    write_complete((path, to_file))


def unfinished_folder(final: Path) -> Path:
    """An empty folder beside ``final`` to write into before :func:`finish_folder`."""
    partial = final.with_name(f".{final.name}.unfinished")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_folder(final: Path) -> None:
    """Gives what was written into ``unfinished_folder(final)`` its final name."""
    partial = final.with_name(f".{final.name}.unfinished")
    for file in partial.rglob("*"):
        if file.is_file():
            sync(file)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    # a folder cannot replace another in one step: for an instant there is none
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _same(path: Path, other: Path) -> bool:
    return path.is_file() and path.read_bytes() == other.read_bytes()


def remove_folder(folder: Path) -> None:
    """Deletes a folder such that, interrupted, it is not left half there under its name."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's entries, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

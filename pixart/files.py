"""Files and folders that are complete under their final name, or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Calls ``write`` with a binary file; it becomes ``path`` once it is complete and on disk.

    Raises what ``write`` raises, and OSError; ``path`` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.unfinished")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


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


def remove_folder(folder: Path) -> None:
    """Deletes a folder such that, interrupted, it is not left half there under its name."""
    doomed = folder.with_name(f".{folder.name}.old")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's entries, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

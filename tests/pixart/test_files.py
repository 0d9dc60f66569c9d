"""Files and folders that are complete under their final name, or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pixart.files import finish_folder, remove_folder, unfinished_folder, write_atomically


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fails(file) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="cannot write .*deep/file.*free some space"):
        write_atomically(path, fails)
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_disk_that_takes_nothing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    # a read-only disk says so of a file that is not there, too
    for name in (call, "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(OSError, match="cannot write .*file: .*Read-only.*another place"):
        write_atomically(tmp_path / "file", lambda file: file.write(b"new"))


def test_a_folder_appears_whole_and_replaces_the_old(tmp_path: Path) -> None:
    final = tmp_path / "model"
    for content in ("one", "two"):
        partial = unfinished_folder(final)
        (partial / "sub").mkdir()
        (partial / "sub" / "weights").write_text(content)
        if content == "one":
            assert not final.exists()
        finish_folder(final)
        assert (final / "sub" / "weights").read_text() == content
    assert os.listdir(tmp_path) == ["model"]


def test_an_interrupted_folder_is_started_afresh(tmp_path: Path) -> None:
    final = tmp_path / "model"
    (unfinished_folder(final) / "stale").write_text("from a killed run")
    (unfinished_folder(final) / "weights").write_text("new")
    finish_folder(final)
    assert os.listdir(final) == ["weights"]
    remove_folder(final)
    assert os.listdir(tmp_path) == []

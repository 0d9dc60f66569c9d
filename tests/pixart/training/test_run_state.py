"""A run's folder says what a repetition needs."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from pixart.training.run_state import RunFolder, commit_of


def test_each_start_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.orig_argv", ["pixart", "train", "my recipe.yaml"])
    run = RunFolder(tmp_path)
    for step in (0, 7):
        run.record_start(step, 2, torch.device("cpu"))
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [start["after_step"] for start in starts] == [0, 7]
    assert starts[0]["processes"] == 2
    assert starts[0]["versions"]["torch"] == torch.__version__
    assert starts[0]["command"] == "pixart train 'my recipe.yaml'"
    assert starts[0]["date"].endswith("+00:00")


def test_a_start_that_was_half_recorded_spoils_no_other(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.record_start(0, 1, torch.device("cpu"))
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"date": "20')
    run.record_start(7, 1, torch.device("cpu"))
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [start["after_step"] for start in starts] == [0, 7]


def test_the_commit_is_that_of_the_code(tmp_path: Path) -> None:
    """And not of a repository that the code happens to lie in."""

    def git(*arguments: str) -> None:
        command = ["git", "-c", "user.name=a", "-c", "user.email=b", "-C", str(tmp_path)]
        subprocess.run([*command, *arguments], check=True, capture_output=True)

    code = tmp_path / "package" / "code.py"
    code.parent.mkdir()
    code.write_text("")
    assert commit_of(code) is None
    git("init")
    git("commit", "--allow-empty", "-m", "another's")
    assert commit_of(code) is None
    git("add", "package")
    git("commit", "-m", "ours")
    commit = commit_of(code)
    assert commit is not None and re.fullmatch("[0-9a-f]{40}", commit)
    code.write_text("changed")
    assert commit_of(code) == f"{commit}-dirty"

from __future__ import annotations

import subprocess
import sys

import torch

import pixart_kernels
from pixart_kernels import _extension, dispatch, doctor


def test_report_names_versions_the_extension_and_every_op():
    report = doctor.report()
    for expected in (pixart_kernels.__version__, torch.__version__, _extension.status()):
        assert expected in report
    for op in dispatch.ops():
        assert op in report
    assert "has no triton implementation" in report or "not triton: " in report


def test_report_says_what_auto_takes_whatever_backend_is_selected():
    expected = doctor.report()
    with dispatch.use_backend("reference"):
        assert doctor.report() == expected


def test_report_explains_each_backend_that_auto_passes_over(monkeypatch):
    monkeypatch.setattr(dispatch, "VERIFIED", {})
    lines = doctor.report().splitlines()
    where = next(i for i, line in enumerate(lines) if line.split()[:1] == ["adaln_single"])
    assert lines[where].split() == ["adaln_single", "reference"]
    reasons = "\n".join(lines[where + 1 : where + 4])
    assert "not cuda: " in reasons and "not native: " in reasons
    if _extension.problem is None:
        assert "not native: not verified on cpu yet" in reasons


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "pixart_kernels.doctor"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == doctor.report()

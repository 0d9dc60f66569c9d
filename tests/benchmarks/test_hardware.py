"""The one command for a GPU: a stage that fails neither hides the next nor goes unnoticed."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import hardware, sanitize
from benchmarks.__main__ import COMMANDS
from benchmarks.hardware import Stage, run_all, run_stage, stages


def python(name: str, code: str, **more) -> Stage:
    return Stage(name, [sys.executable, "-c", code], more.pop("environment", {}), 1, **more)


def test_every_stage_runs_whatever_became_of_the_last(capsys) -> None:
    rows = run_all(
        [
            python("good", "print('fine')"),
            python("bad", "print('what was wrong'); raise SystemExit(3)"),
            Stage("missing", ["no-such-program"], {}, 1),
            python(
                "set", "import os; print(os.environ['OF_STAGE'])", environment={"OF_STAGE": "x"}
            ),
        ],
        60.0,
    )
    outcomes = {row["stage"]: row["outcome"] for row in rows}
    assert outcomes["good"] == outcomes["set"] == "passed"
    assert outcomes["bad"] == "failed with status 3"
    assert outcomes["missing"].startswith("did not start")
    assert rows[3]["output"] == "x\n"
    assert "what was wrong" in capsys.readouterr().out


def test_a_stage_that_hangs_is_stopped() -> None:
    row = run_stage(python("slow", "print('begun', flush=True); import time; time.sleep(60)"), 2.0)
    assert row["outcome"] == "stopped after 2 s"
    assert row["output"] == "begun\n"
    assert row["seconds"] < 30


def test_a_timing_stage_is_told_what_is_left() -> None:
    stage = python("timed", "import sys; print(sys.argv[1:])", timed=True)
    assert run_stage(stage, hardware.MARGIN + 40)["output"] == "['--budget', '40']\n"


def test_stages_cover_the_house_and_write_beside_each_other(tmp_path) -> None:
    found = {stage.name: stage.command for stage in stages(tmp_path)}
    assert list(found) == ["doctor", "tests", "memcheck", "racecheck", "adaln", "mlp", "block"]
    assert all(str(tmp_path) in found[name] for name in ("adaln", "mlp", "block"))
    assert {"run", "block"} <= set(COMMANDS)


@pytest.mark.parametrize("status", [0, 1])
def test_exit_status_and_file(tmp_path, monkeypatch, capsys, status: int) -> None:
    several = [python("first", f"raise SystemExit({status})"), python("second", "pass")]
    monkeypatch.setattr(hardware, "stages", lambda output: several)
    monkeypatch.setattr(hardware, "environment", lambda device: {"commit": "abc"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as ended:
        hardware.main(["--output", str(tmp_path)])
    assert ended.value.code == bool(status)
    rows = [json.loads(line) for line in (tmp_path / "hardware.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["first", "second"]
    assert rows[1]["commit"] == "abc"
    assert "second" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        hardware.main([])


def test_the_checker_s_script_runs_what_there_is(monkeypatch, capsys) -> None:
    # without a GPU, tests interpret Triton's kernels: too slow for every shape
    monkeypatch.setattr(sanitize.dispatch, "PRIORITY", ("native", "reference"))
    x = torch.zeros(1, 1, 8)
    if sanitize.dispatch.why_not("adaln_single", "native", x) is not None:
        pytest.skip("the extension is not built")
    sanitize.main()
    count = int(capsys.readouterr().out.split()[0])
    assert count % (3 * len(sanitize.SHAPES)) == 0 and count > 0
    monkeypatch.setattr(sanitize.dispatch, "why_not", lambda *arguments: "not here")
    with pytest.raises(SystemExit, match="no kernel"):
        sanitize.main()

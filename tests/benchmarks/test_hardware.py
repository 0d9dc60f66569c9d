"""The one command for a GPU: a stage that fails neither hides the next nor goes unnoticed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import hardware, kernels, sanitize
from benchmarks.__main__ import COMMANDS
from benchmarks.environment import read
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


def test_a_stopped_stage_leaves_no_process_behind() -> None:
    sleep = "import time; time.sleep(60)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', '{sleep}'])"
    row = run_stage(python("parent", f"{code}; print(p.pid, flush=True); p.wait()"), 2.0)
    assert row["outcome"] == "stopped after 2 s"
    assert row["seconds"] < 30  # the grandchild held the pipe
    status = Path(f"/proc/{int(row['output'])}/status")
    deadline = time.monotonic() + 10
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_only_the_timings_need_rich() -> None:
    code = "import sys; sys.modules['rich'] = None; import benchmarks.hardware"
    subprocess.run([sys.executable, "-c", code], cwd=hardware.ROOT, check=True)


def test_the_checker_is_found_off_the_path(tmp_path, monkeypatch) -> None:
    def checker() -> str:
        return {stage.name: stage.command[0] for stage in stages(tmp_path)}["memcheck"]

    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert checker() == "/usr/local/cuda/bin/compute-sanitizer"
    monkeypatch.setattr(shutil, "which", lambda name: f"/here/{name}")
    assert checker() == "/here/compute-sanitizer"


def test_a_gpu_without_kernels_is_a_failure(monkeypatch) -> None:
    x = torch.zeros(1, 1, 8)
    (cuda,) = [reason for reason in kernels.reasons(x) if reason.startswith("cuda: ")]
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(size))
    with pytest.raises(SystemExit, match="cuda: ") as ended:
        kernels.main()
    assert cuda in str(ended.value.code)
    monkeypatch.setattr(kernels.dispatch, "why_not", lambda *arguments: None)
    with pytest.raises(SystemExit) as ended:
        kernels.main()
    assert ended.value.code is None


def test_a_timing_stage_is_told_what_is_left() -> None:
    stage = python("timed", "import sys; print(sys.argv[1:])", timed=True)
    assert run_stage(stage, hardware.MARGIN + 40)["output"] == "['--budget', '40']\n"


def test_stages_cover_the_house_and_write_beside_each_other(tmp_path) -> None:
    found = {stage.name: stage.command for stage in stages(tmp_path)}
    assert list(found) == [
        *("kernels", "doctor", "attention-rivals", "tests", "attention-tests"),
        *("memcheck", "racecheck", "adaln", "mlp", "attention", "cross_attention"),
        *("kv_compression", "optimizer", "block", "model", "generation", "conditioning"),
    ]
    assert "--continue-on-collection-errors" in found["tests"]
    timed = [name for name, command in found.items() if "benchmarks" in command]
    timed = [name for name in timed if name != "kernels" and "--device" in found[name]]
    assert all(str(tmp_path) in found[name] for name in timed)
    assert {"run", "optimizer", "block", "model", "generation", "conditioning"} <= set(COMMANDS)
    resumed = {stage.name for stage in stages(tmp_path, True) if "--resume" in stage.command}
    assert resumed == set(timed) - {"block"}
    assert not any("--resume" in command for command in found.values())


@pytest.fixture
def as_if_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(hardware, "environment", lambda device: {"commit": "abc"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize("status", [0, 1])
def test_exit_status_and_file(tmp_path, monkeypatch, capsys, as_if_on_a_gpu, status: int) -> None:
    several = [python("first", f"raise SystemExit({status})"), python("second", "pass")]
    monkeypatch.setattr(hardware, "stages", lambda output, resume=False: several)
    with pytest.raises(SystemExit) as ended:
        hardware.main(["--output", str(tmp_path)])
    assert ended.value.code == bool(status)
    rows = read(tmp_path / "hardware.jsonl")
    assert [row["stage"] for row in rows] == ["first", "second"]
    assert rows[1]["commit"] == "abc"
    assert "second" in capsys.readouterr().out.splitlines()[-1]


def test_some_stages_take_all_the_time_and_keep_the_others_lines(
    tmp_path, monkeypatch, as_if_on_a_gpu
) -> None:
    several = [python(name, f"print('{name}')") for name in ("first", "second", "third")]
    monkeypatch.setattr(hardware, "stages", lambda output, resume=False: several)
    given = []
    real = hardware.run_stage
    monkeypatch.setattr(
        hardware, "run_stage", lambda stage, seconds: given.append(seconds) or real(stage, seconds)
    )
    options = ["--output", str(tmp_path), "--budget", "60", "--stages"]
    for names in ("third", "first", "third"):
        with pytest.raises(SystemExit):
            hardware.main([*options, names])
        monkeypatch.setattr(hardware, "environment", lambda device: {"commit": "def"})
    rows = read(tmp_path / "hardware.jsonl")
    assert [(row["stage"], row["commit"]) for row in rows] == [("first", "def"), ("third", "def")]
    assert min(given) > 59
    with pytest.raises(SystemExit):
        hardware.main([*options, "second"])
    rows = read(tmp_path / "hardware.jsonl")
    assert [row["stage"] for row in rows] == ["first", "second", "third"]


def test_an_unknown_stage_is_an_error_that_lists_them(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        hardware.main(["--stages", "doctor,tset"])
    message = capsys.readouterr().err
    assert "no stage is called tset" in message
    assert "there are kernels, doctor, attention-rivals" in message


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
    ready = [
        call
        for call in sanitize.calls(torch.device("cpu"))
        if sanitize.dispatch.why_not(call.op, "native", call.tensors[0], **call.facts) is None
    ]
    assert count == len(ready)
    ops = {"adaln_single", "cross_attention", "compress_kv", "came_step"}
    assert {call.op for call in ready} >= ops
    calls = list(sanitize.calls(torch.device("cpu")))
    lengths = {call.tensors[0].dtype: [] for call in calls if "attention" in call.op}
    for call in calls:
        if "attention" in call.op:
            outputs = call.function("reference", *call.tensors)
            assert sanitize.dispatch.why_not(call.op, "reference", *outputs, **call.facts) is None
            lengths[outputs[0].dtype].append(outputs[0].shape[1])
    assert set(lengths) == {torch.float32, torch.bfloat16, torch.float16}
    self_attention = [N for _, N, _ in sanitize.LENGTHS]
    with_text = [*self_attention, 2049]
    assert all(sorted(found) == sorted(self_attention + with_text) for found in lengths.values())
    monkeypatch.setattr(sanitize.dispatch, "why_not", lambda *arguments, **facts: "not here")
    with pytest.raises(SystemExit, match="no kernel"):
        sanitize.main()

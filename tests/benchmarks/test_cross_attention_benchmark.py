"""Cross-attention's benchmark: its rival computes the same, its bytes are those of real tensors."""

from __future__ import annotations

import pytest
import torch

import pixart_kernels as pk
from benchmarks import cross_attention
from benchmarks.cross_attention import (
    FAMILIES,
    MASKED,
    CrossCase,
    bias_of,
    masked_sdpa,
    time_case,
)
from benchmarks.environment import write
from benchmarks.op_tables import cross_attention_table
from benchmarks.timing import Measurement, Timing
from pixart_kernels import dispatch

CPU = torch.device("cpu")
CASE = CrossCase(N=5, L=4, lengths=(4, 1), dtype=torch.float32)


def test_masked_sdpa_is_the_same_attention() -> None:
    q, kv = CASE.inputs(CPU)
    lengths = torch.tensor(CASE.lengths, dtype=torch.int32)
    bias = bias_of(kv.shape[1], lengths, q.dtype)
    torch.testing.assert_close(masked_sdpa(q, kv, bias), pk.cross_attention(q, kv, lengths))


def test_bytes_are_those_of_the_tensors_involved() -> None:
    q, kv = CASE.inputs(CPU)
    # of kv, 5 tokens of 8 are read, and all gradients written
    forward = 2 * q.nbytes + kv.nbytes * 5 // 8
    backward = 3 * q.nbytes + kv.nbytes * 5 // 8 + kv.nbytes
    found = [CASE.bytes_moved(which) for which in ("forward", "backward", "forward+backward")]
    assert found == [forward, backward, forward + backward]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_differ_and_fill_their_batch(device: str) -> None:
    cases = FAMILIES["cross_attention"](device)
    assert len({str(case.about()) for case in cases}) == len(cases)
    for case in cases:
        assert len(case.lengths) == case.about()["shape"][0]
        # without text, a masked softmax has no meaning to compare with
        assert 1 <= min(case.lengths) and max(case.lengths) <= case.L


def _called_once(calls, seconds) -> Measurement:
    for call in calls.values():
        call()
    return Measurement(timings={name: Timing(1.0, 1.0, 1.0, 1) for name in calls})


def test_a_wrong_provider_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(dispatch, "PRIORITY", ("native", "reference"))
    monkeypatch.setattr(cross_attention, "measure", _called_once)
    monkeypatch.setattr(cross_attention, "masked_sdpa", lambda q, kv, bias: q + 1)
    forward, both = time_case(CASE, CPU, seconds=0)
    for row in (forward, both):
        assert list(row["timings"]) == ["eager", "torch.compile", "native"]
        assert list(row["incorrect"]) == [MASKED]
        assert row["lengths"] == [4, 1]
    assert [forward["pass"], both["pass"]] == ["forward", "forward+backward"]


def test_table_shows_each_text_and_rivals_that_win(results) -> None:
    about = {"device": "a device", "torch": "2", "commit": "abc", "dtype": "float32"}

    def row(N: int, lengths: list[int], masked: float) -> dict:
        times = {"eager": 6.0, "torch.compile": 5.0, MASKED: masked, "native": 2.0}
        timings = {name: {"median": time} for name, time in times.items()}
        shape = [2, N, 300, 16, 72]
        return {**about, "shape": shape, "lengths": lengths, "pass": "forward", "timings": timings}

    rows = [row(64, [120, 20], 4.0), row(256, [120, 20], 5.0), row(64, [300, 300], 1.9)]
    file = results / "cross_attention.jsonl"
    write(file, rows)
    text = cross_attention_table(file)
    assert "| 120 and 20 of 300 tokens | 3.0 / 2.0–2.5 |" in text
    assert "| 300 of 300 tokens | 3.0 / **0.95** |" in text
    assert "2×64, 2×256" in text

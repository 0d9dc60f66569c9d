"""A few long cases, each in its share of a budget."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from benchmarks.cases import time_cases


@dataclass
class Named:
    name: str

    def about(self) -> dict:
        return {"name": self.name}


def test_a_row_for_each_case_whatever_becomes_of_it() -> None:
    saved: list[list[str]] = []
    fates = ("timings", "failed", "not_measured")

    def time_case(case, device, dtype, seconds: float) -> dict:
        if case.name == "second":
            raise RuntimeError("no")
        return {"timings": {}}

    def save(rows: list[dict]) -> None:
        saved.append([next(fate for fate in fates if fate in row) for row in rows])

    cases = [Named("first"), Named("second")]
    rows = time_cases(cases, time_case, torch.device("cpu"), torch.float32, 60.0, save)
    assert saved == [["timings", "not_measured"], ["timings", "failed"]]
    assert [row["name"] for row in rows] == ["first", "second"]


@pytest.mark.parametrize(
    ("seconds", "needed", "shares"),
    [
        pytest.param(400.0, 0.0, [200, 400], id="what the first leaves, the second has"),
        pytest.param(400.0, 240.0, [240, 400], id="more than its share where it needs more"),
        pytest.param(100.0, 240.0, [], id="none that would not be in time"),
        pytest.param(0.0, 0.0, [], id="none at all"),
    ],
)
def test_shares_of_a_budget(seconds: float, needed: float, shares: list[float]) -> None:
    given: list[float] = []

    def time_case(case, device, dtype, share: float) -> dict:
        given.append(share)
        return {"timings": {}}

    cases, on = [Named("first"), Named("second")], (torch.device("cpu"), torch.float32)
    rows = time_cases(cases, time_case, *on, seconds, needed=needed)
    assert given == [pytest.approx(share, abs=1) for share in shares]
    late = [row.get("not_measured") for row in rows]
    assert late == [None if shares else f"{seconds:g} s were over"] * 2

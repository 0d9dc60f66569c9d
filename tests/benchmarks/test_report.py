"""The pages' figures are those of the result files."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.environment import RESULTS, ROOT, write
from benchmarks.report import CPU, PAGES, cpu, updated
from pixart_kernels.dispatch import VERIFIED


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_up_to_date(name: str) -> None:
    page = (ROOT / name).read_text()
    again = updated(page, in_docs=name.startswith("docs/"))
    assert again == page, "run: python -m benchmarks report"


@pytest.mark.parametrize("name", PAGES)
def test_what_pages_link_to_is_there(name: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text()):
        assert "://" in link or ((ROOT / name).parent / link).exists(), link


def test_every_verification_has_its_results() -> None:
    for (op, backend, architecture), proof in VERIFIED.items():
        rows = (RESULTS / proof.results).read_text().splitlines()
        mine = [row for row in map(json.loads, rows) if row["op"] == op and "timings" in row]
        assert mine, op
        assert all(backend in row["timings"] and not row["incorrect"] for row in mine)
        assert {row["commit"] for row in mine} == {proof.commit}
        assert architecture == "cpu" or proof.results.startswith(architecture)


def test_only_marked_places_of_the_readme_change() -> None:
    assert updated("nothing is marked here") == "nothing is marked here"
    readme = "a\n<!-- gpu: begin -->\nold\n<!-- gpu: end -->\nb"
    assert updated(readme).startswith("a\n<!-- gpu: begin -->\n")
    assert updated(readme).endswith("\n<!-- gpu: end -->\nb")
    assert "old" not in updated(readme)


@pytest.mark.parametrize("name", CPU)
def test_without_a_run_there_is_no_table(name: str, tmp_path) -> None:
    assert cpu(name, tmp_path) == "No run is recorded yet."
    file = tmp_path / "cpu" / f"{CPU[name][0]}.jsonl"
    write(file, [{"not_measured": "1 s were over"}, {"failed": "RuntimeError: no"}])
    assert cpu(name, tmp_path) == "No run is recorded yet."

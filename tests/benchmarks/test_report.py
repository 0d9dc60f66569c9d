"""The README's figures are those of the result files."""

from __future__ import annotations

import json

from benchmarks.report import ROOT, table, updated_readme
from pixart_kernels.dispatch import VERIFIED


def test_readme_is_up_to_date() -> None:
    readme = (ROOT / "README.md").read_text()
    assert updated_readme(readme) == readme, "run: python -m benchmarks.report"


def test_every_verification_has_its_results() -> None:
    for (op, backend, architecture), proof in VERIFIED.items():
        rows = (ROOT / "benchmarks" / "results" / proof.results).read_text().splitlines()
        mine = [row for row in map(json.loads, rows) if row["op"] == op]
        assert mine, op
        assert all(backend in row["timings"] and not row["incorrect"] for row in mine)
        assert {row["commit"] for row in mine} == {proof.commit}
        assert architecture == "cpu" or proof.results.startswith(architecture)


def test_table_gives_the_range_over_shapes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.report.ROOT", tmp_path)
    about = {"device": "a CPU", "torch": "2", "commit": "abc", "clock": "wall", "threads": 2}
    rows = [
        {
            **about,
            "op": "an_op",
            "dtype": "float32",
            "pass": "forward",
            "shape": [1, size],
            "quiet": True,
            "timings": {
                "eager": {"median": size},
                "torch.compile": {"median": 3.0},
                "native": {"median": 2.0},
            },
        }
        for size in (4, 6)
    ]
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert "| `an_op` | 2.0–3.0 / 1.5 |" in table(file)

"""Tables of the Results pages are those of the records."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_exported_programs():
    record = ROOT / "benchmarks/results/export.md"
    page = (ROOT / "docs/results/export.md").read_text()
    rows = record.read_text().splitlines()[2:]
    assert len(rows) == len(json.loads(record.with_suffix(".json").read_text())["rows"]) == 13
    assert [row for row in rows if row not in page] == []

"""Tables of the Results pages are those of the records."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["export", "export_torch"])
def test_exported_programs(name):
    record = ROOT / f"benchmarks/results/{name}.md"
    page = (ROOT / "docs/results/export.md").read_text()
    rows = record.read_text().splitlines()[2:]
    assert len(rows) == len(json.loads(record.with_suffix(".json").read_text())["rows"]) >= 13
    assert [row for row in rows if row not in page] == []

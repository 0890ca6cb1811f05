"""The matrix of docs/choose/index.md says what the code does and the records hold."""

import json

import pytest

from benchmarks import attention_matrix
from tests.helpers.doc_pages import ROOT

FORMS = attention_matrix.FORMS


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_operations_are_those_of_the_equations():
    """Projections 4 N C^2 for one shared projection, 8 N C^2 for three; between them the table of docs/choose/family.md."""
    n, c, h, p, m = 1024, 384, 6, 64, 64
    cbsa = h * (6 * n * m * p + 4 * m**2 * p)
    assert attention_matrix.operations(FORMS["`CBSA()`"], n) == 4 * n * c**2 + cbsa
    assert attention_matrix.operations(FORMS["`MSSA()`"], n) == 4 * n * c**2 + h * 4 * n**2 * p
    assert attention_matrix.operations(FORMS["`MHSA()`"], n) == 8 * n * c**2 + h * 4 * n**2 * p


def test_memory_is_that_of_the_benchmark():
    """Its rows have one token more."""
    rows = json.loads((ROOT / "benchmarks/results/layers_short.json").read_text())["rows"]
    recorded = {row["name"]: row["saved"] for row in rows if row["training"] and row["tokens"] == 4097}
    for name in ("`CBSA()`", "`TSSA()`", "`MSSA()`", "`MHSA()`"):
        assert attention_matrix.kept(FORMS[name]) == pytest.approx(recorded[FORMS[name].timed], rel=0.02)


def test_the_layers_that_compare_tokens_take_masks_of_queries():
    causal = {name for name, form in FORMS.items() if attention_matrix.takes(form, is_causal=True)}
    assert causal == {"`MSSA()`", "`MHSA()`"}


@pytest.mark.slow
def test_the_page_is_current():
    """If not: ``python -m benchmarks.attention_matrix``."""
    begin, end = attention_matrix.MARKERS
    page = (ROOT / attention_matrix.DOCS).read_text()
    written = page.split(begin)[1].split(end)[0].strip()
    assert written == f"{attention_matrix.costs()}\n\n{attention_matrix.abilities()}"

"""The notebooks are well formed, lead somewhere, run as they are, and show what they say."""

import json
import re

import pytest
import timm
from scripts.run_notebook import code_cells, run_notebook

from tests.helpers.doc_pages import ROOT, headings

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGE = ROOT / "docs/learn/notebooks.md"
CREATE = timm.create_model

CLAIMS = {
    "1-five-minutes": lambda n: n["softmax"][-1] > n["linear"][-1],
    "2-attention-maps": lambda n: n["read"].tolist() == n["digits"].target[[2, 3, 4, 8]].tolist(),
    "3-compress-lines": lambda n: (
        n["angles"][0] > 15 and n["angles"][-1] < 2 and n["rates"][-1] < n["rates"][0]
    ),
    "4-adapt-a-vit": lambda n: n["before"] < n["original"] - 10 and n["recovery"][-1][1] > n["original"] - 5,
    "5-zero-shot-segmentation": lambda n: (
        n["shares"][0] > max(40, 2 * n["shares"][1])
        and n["bright"]
        > max(n["found"].best["foreground"])
        > 1.5 * max(n["disc"], *n["by_chance"].best["foreground"])
    ),
}
"""What the words of each notebook say about its variables."""


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_it_is_well_formed(path):
    """Version 4.5 of the format: https://nbformat.readthedocs.io/en/latest/format_description.html."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook["metadata"] == {"kernelspec": kernel, "language_info": {"name": "python"}}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert cell["source"]
        assert all(isinstance(line, str) for line in cell["source"])
        assert cell["metadata"] == {}
        if cell["cell_type"] == "markdown":
            assert set(cell) == {"cell_type", "id", "metadata", "source"}
        else:
            assert set(cell) == {"cell_type", "execution_count", "id", "metadata", "outputs", "source"}
            assert (cell["execution_count"], cell["outputs"]) == (None, []), "stored without outputs"


def test_all_begin_with_the_same_installation(path):
    assert code_cells(path)[0] == code_cells(NOTEBOOKS[0])[0]


def test_links_lead_somewhere(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "".join(line for cell in cells if cell["cell_type"] == "markdown" for line in cell["source"])
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [link for link in links if not link.startswith("https://")]
    assert local
    for link in local:
        target, _, heading = link.partition("#")
        assert (path.parent / target).is_file(), link
        assert not heading or heading in headings(path.parent / target), link


def test_the_page_shows_it(path):
    assert f"](../../notebooks/{path.name})" in PAGE.read_text(encoding="utf-8")


# torch tensors in matplotlib, with NumPy 2; outside tests Python hides it
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_it_runs_and_shows_what_it_says(path, tmp_path, monkeypatch):
    def create(name, pretrained=False, **options):
        ours = name.startswith("cbt_")  # the weights of others are not downloaded
        return CREATE(name, pretrained=pretrained and ours, **options)

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.chdir(tmp_path)
    ran = run_notebook(path)
    assert ran.figures
    assert all(len(picture) > 2000 for pictures in ran.figures.values() for picture in pictures)
    assert CLAIMS[path.stem](ran.names)
    assert bool(ran.html) == (path.stem == "3-compress-lines"), "the movie"
    assert [*tmp_path.iterdir()] == [], "nothing is written"

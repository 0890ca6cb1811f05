"""The pages of docs/learn follow one another, and their pictures can be drawn."""

import itertools
import re
from pathlib import Path

import pytest
from scripts import learn_figures

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/learn").glob("[0-9]*.md"))


def test_pages_follow_one_another():
    for page, following in itertools.pairwise(PAGES):
        assert re.search(rf"^Next: \[.*\]\({following.name}\)", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", learn_figures.FIGURES)
def test_a_picture_is_drawn_and_shown(name, tmp_path):
    figure = learn_figures.FIGURES[name]()
    assert len(figure.axes) > 1
    figure.savefig(tmp_path / "drawn.png", dpi=20)
    file = f"learn_{name}.png"
    assert (ROOT / "docs/images" / file).is_file()
    assert any(f"](../images/{file})" in page.read_text() for page in PAGES)

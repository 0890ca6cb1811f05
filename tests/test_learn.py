"""The pages of docs/learn print what they say, and their pictures can be drawn."""

import contextlib
import io
import itertools
import re
from pathlib import Path

import pytest
from scripts import learn_figures

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/learn").glob("*.md"))
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_prints_what_stands_below_its_code(page):
    blocks = BLOCK.findall(page.read_text())
    assert len(blocks) > 2
    scope = {}
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), scope)
        assert printed.getvalue() == shown, code


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

"""The page in a real browser: nothing fails, nothing is fetched, the chooser works, a phone needs no scrolling."""

import pytest

from tests.helpers.browser import find_browser, visit

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")

USE = """
const root = document.querySelector(".maps"), canvas = () => document.querySelector(".tiles canvas");
const pixels = () => canvas().toDataURL();
const choose = (name, value) => {
  const element = document.querySelector(`.chooser [name=${name}]`);
  element.value = value;
  element.dispatchEvent(new Event("change"));
};
const options = (name) => [...root.querySelectorAll(`[name=${name}] option`)].map((o) => o.textContent);
const seen = (selector) => document.querySelector(selector).getClientRects().length > 0;
const last = pixels(), caption = document.querySelector(".caption").textContent;
choose("layer", 0);
const first = pixels(), firstCaption = document.querySelector(".caption").textContent;
choose("head", 2);
const head = pixels(), field = document.querySelector(".fields canvas");
const over = document.querySelector(".chooser [name=over]");
over.click();
return {
  last, first, head, caption, firstCaption,
  size: [canvas().width, canvas().height], layers: options("layer"), heads: options("head"),
  fields: root.querySelectorAll(".fields canvas").length, fieldSize: [field.width, field.height],
  chooserSeen: seen(".chooser"), staticSeen: seen(".static"),
  overlaid: Math.abs(canvas().getBoundingClientRect().left - document.querySelector(".tile img").getBoundingClientRect().left),
};
"""

NARROW = """
const frame = document.querySelector("iframe"), inside = frame.contentDocument;
const wide = [...inside.querySelectorAll("main *")].filter((element) => {
  if (element.closest(".scroll") && !element.matches(".scroll")) return false;  // tables scroll by themselves
  if (element.closest("svg") && !element.matches("svg")) return false;
  return element.getBoundingClientRect().right > 390.5;
});
return {
  width: frame.contentWindow.innerWidth,
  page: inside.documentElement.scrollWidth,
  wide: wide.map((element) => element.outerHTML.slice(0, 80)),
  panels: [...inside.querySelectorAll(".panels svg")].map((svg) => svg.getBoundingClientRect().width),
  live: inside.querySelectorAll(".maps.live").length,
};
"""


@pytest.fixture
def pages(full_report, full_comparison):
    return {"report": full_report.page, "compare": full_comparison.page}


@pytest.mark.parametrize("name", ["report", "compare"])
def test_the_chooser_changes_the_map_and_nothing_fails_or_is_fetched(pages, name, tmp_path):
    seen = visit(BROWSER, pages[name], tmp_path, USE)
    assert seen.problems == []
    assert seen.console == []
    assert seen.requests == []
    found = seen.found
    assert found["size"] == [8, 8]
    assert found["last"] != found["first"] != found["head"] != found["last"]
    assert found["caption"] == "layer 3 of 3, mean over heads (blocks.2.attn)"
    assert found["firstCaption"] == "layer 1 of 3, mean over heads (blocks.0.attn)"
    assert found["layers"] == ["1 (CBSA)", "2 (CBSA)", "3 (CBSA)"]
    assert found["heads"] == ["mean over heads", "head 1", "head 2"]
    assert (found["fields"], found["fieldSize"]) == (16, [8, 8])
    assert (found["chooserSeen"], found["staticSeen"]) == (True, False)
    assert found["overlaid"] < 1


@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_phone_needs_no_horizontal_scrolling(pages, name, tmp_path):
    wrapper = tmp_path / "phone.html"
    frame = f'<iframe src="{pages[name].resolve().as_uri()}" style="width: 390px; height: 800px; border: 0"></iframe>'
    wrapper.write_text(
        f'<!doctype html><html><head><link rel="icon" href="data:,"></head><body>{frame}</body></html>'
    )
    found = visit(BROWSER, wrapper, tmp_path, NARROW).found
    assert found["width"] == 390
    assert found["page"] <= 390
    assert found["wide"] == []
    assert min(found["panels"]) > 50  # a colour bar
    assert found["live"] > 0


COLUMNS = """
const columns = [...document.querySelectorAll(".columns")].map((grid) =>
  [...grid.querySelectorAll(":scope > section")].map((section) => section.getBoundingClientRect()));
const heads = [...document.querySelectorAll(".runs thead th")].slice(1).map((cell) => cell.textContent);
const keys = (root) => [...root.querySelectorAll(".key")].map((key) => key.style.background);
return {
  besides: columns.map((boxes) => boxes.every((box) => box.top === boxes[0].top && box.width > 300)),
  widths: columns.map((boxes) => boxes.length), heads,
  keys: keys(document.querySelector(".runs thead")),
  others: keys(document.querySelector("main")),
  page: document.documentElement.scrollWidth,
};
"""


def test_a_comparison_has_runs_side_by_side_in_their_colours(pages, tmp_path):
    found = visit(BROWSER, pages["compare"], tmp_path, COLUMNS).found
    assert found["page"] <= 1200
    assert found["widths"] == [2, 2, 2, 2, 3]  # reduced rates, steps, their effect, coherence, maps
    assert all(found["besides"])
    assert [name[:8] for name in found["heads"]] == ["cbt", "stem_vit", "a_hybrid"]
    assert len(set(found["keys"])) == 3
    assert set(found["others"]) == set(found["keys"])


def test_a_table_of_many_runs_scrolls_by_itself(pages, tmp_path):
    script = "return [document.documentElement.scrollWidth, document.querySelector('.runs').offsetWidth]"
    page, table = visit(BROWSER, pages["compare"], tmp_path, script, size="660,900").found
    assert table > 660 >= page


def test_without_scripts_a_static_panel_shows(pages, tmp_path):
    page = tmp_path / "static.html"
    text = pages["report"].read_text()
    start = text.rindex("<script>")
    page.write_text(text[:start] + text[text.index("</script>", start) + len("</script>") :])
    look = """
      const seen = (selector) => document.querySelector(selector).getClientRects().length > 0;
      return [seen(".static img"), seen(".chooser"), document.querySelector(".static img").naturalWidth > 100];
    """
    assert visit(BROWSER, page, tmp_path, look).found == [True, False, True]


def test_the_visit_notices_what_it_should(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><html><head></head><body><img src='https://example.org/a.png'>"
        "<script>console.log('said'); undefined.x</script></body></html>"
    )
    seen = visit(BROWSER, page, tmp_path, "return 1")
    assert any("undefined" in problem for problem in seen.problems)
    assert any("said" in line for line in seen.console)
    assert "https://example.org/a.png" in seen.requests

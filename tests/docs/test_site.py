"""The site is built without a warning, asks for nothing outside it, sets its formulas, and fits a phone."""

import fcntl
import json
import os
import re
import subprocess
import sys
from urllib.parse import unquote

import pytest

from tests.helpers.browser import find_browser, visit
from tests.helpers.doc_pages import PAGES, ROOT, error_messages, headings, read_blocks

BROWSER = find_browser()
USED = """
const field = document.querySelector("[data-md-component=search-query]");
document.querySelector("[data-md-toggle=search]").click();
field.value = "certified";
field.dispatchEvent(new Event("focus"));
field.dispatchEvent(new Event("keyup"));
const found = () => document.querySelectorAll(".md-search-result__item").length;
for (let i = 0; i < 300 && !found(); i++) await new Promise((go) => setTimeout(go, 100));
return {
  found: found(),
  set: document.querySelectorAll(".arithmatex .katex").length,
  all: document.querySelectorAll(".arithmatex").length,
  fonts: [...document.fonts].filter((font) => font.status === "loaded").map((font) => font.family),
};
"""
PASTED = """
const field = document.querySelector("[data-md-component=search-query]");
document.querySelector("[data-md-toggle=search]").click();
field.dispatchEvent(new Event("focus"));
const missed = {};
for (const [text, where] of Object.entries(TEXTS)) {
  field.value = text;
  field.dispatchEvent(new InputEvent("input", { inputType: "insertFromPaste", bubbles: true }));
  const links = () => [...document.querySelectorAll(".md-search-result__link")].map((link) => new URL(link.href));
  const [page, heading] = where.split("#");
  const here = () => !heading || links().some((link) => link.hash === "#" + heading);
  const right = () => links()[0]?.pathname.endsWith(page) && here();
  for (let i = 0; i < 60 && !right(); i++) await new Promise((go) => setTimeout(go, 100));
  if (!right()) missed[text] = links().map((link) => link.pathname.split("/").pop() + link.hash);
}
return missed;
"""
"""Searches for TEXTS: those for which their page is not the first, with the heading if they have one; and what is found."""
EVERY_PAGE = """
const frame = document.querySelector("iframe");
const faults = {};
for (const page of PAGES) {
  await new Promise((loaded) => { frame.onload = loaded; frame.src = page; });
  const inside = frame.contentDocument;
  const found = {
    width: Math.max(0, inside.documentElement.scrollWidth - frame.clientWidth),
    unset: inside.querySelectorAll(".arithmatex:not(:has(.katex))").length,
    broken: [...inside.images].filter((image) => !image.naturalWidth).map((image) => image.src).join(" "),
  };
  if (found.width || found.unset || found.broken) faults[page] = found;
}
return faults;
"""
"""Of PAGES on a phone: pixels that are beyond the screen, formulas that are not set, images that are not there."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that ``make docs`` makes, once for all processes of a run of the tests."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, warned = shared / "site", shared / "site.log"
    with (shared / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not warned.exists():
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            warned.write_text(done.stderr)
    assert "WARNING" not in warned.read_text()
    return folder


@pytest.mark.slow  # building the site takes half a minute
def test_pages_load_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        tags = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", page.read_text(encoding="utf-8"))
        assert [tag for tag in tags if re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag)] == []


@pytest.mark.slow  # building the site takes half a minute
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_formulas_and_search_work_without_a_request_elsewhere(site):
    seen = visit(BROWSER, site / "index.html", site, USED)
    assert seen.problems == []
    assert seen.console == []
    assert [address for address in seen.requests if not address.startswith(site.as_uri())] == []
    assert seen.found["set"] == seen.found["all"] > 0
    assert seen.found["found"] > 0
    assert any("KaTeX" in family for family in seen.found["fonts"])


@pytest.mark.slow  # building the site takes half a minute
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_searching_leads_from_a_message_to_its_remedy_and_from_a_topic_to_its_page(site):
    messages = {
        "which less 0 or 1 prefix tokens is not a square grid": "the-tokens-are-no-square-grid",
        "this attention forms no N x N matrix": "a-mask-from-query-to-query",
        "no images found in": "no-images-no-classes-no-splits",
        "the loss became nan in epoch": "the-loss-becomes-nan",
        "does not say of what model it is": "the-file-says-too-little",
        # with characters that the search takes for operators
        "such as torch.linalg.qr(basis).Q; B^T B differs from I by": "an-option-that-takes-others-with-it",
        "go on with: cbsa train --output runs/photos --resume": "the-run-was-interrupted",
        # in words that other pages have in their titles
        "--models: no model cbt_tinny": "no-such-command-model-recipe-or-setting",
        "is_causal must be False: CBSA summarises all tokens before": "a-mask-from-query-to-query",
    }
    topics = {"export onnx": "use/export.html", "coding rate": "learn/1-coding-rate.html"}
    assert all(any(text in message for message in error_messages()) for text in messages)
    texts = {text: f"reference/errors.html#{heading}" for text, heading in messages.items()} | topics
    seen = visit(BROWSER, site / "index.html", site, PASTED.replace("TEXTS", json.dumps(texts)))
    assert seen.found == {}


@pytest.mark.slow  # building the site takes half a minute
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_every_page_fits_a_phone_and_is_whole(site, tmp_path):
    made = [page for page in sorted(site.rglob("*.html")) if not re.match("probed_|404", page.name)]
    pages = [page.as_uri() for page in made]
    wrapper = tmp_path / "phone.html"
    frame = '<iframe style="width: 390px; height: 800px; border: 0"></iframe>'
    wrapper.write_text(f'<html><head><link rel="icon" href="data:,"></head><body>{frame}</body></html>')
    seen = visit(BROWSER, wrapper, tmp_path, EVERY_PAGE.replace("PAGES", json.dumps(pages)))
    assert seen.found == {}
    assert seen.console == []
    assert [address for address in seen.requests if not address.startswith(site.as_uri())] == []


def test_lines_of_code_fit_beside_the_navigation():
    blocks = [
        (page, block)
        for page in PAGES[1:]  # without README
        for language in ("python", "bash", "text", "yaml")
        for block in read_blocks(page, language)
    ]
    lines = [
        (f"{page}:{block.line + i}", line)
        for page, block in blocks
        for i, line in enumerate(block.text.splitlines())
    ]
    assert [line for line in lines if len(line[1]) > 92] == []  # what docs/assets/site.css has room for


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_of_files_outside_the_site_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        if not re.match(r"https?:|#", link):
            path, _, heading = unquote(link).partition("#")
            assert (ROOT / path).exists(), link
            assert not heading or heading in headings(ROOT / path), link

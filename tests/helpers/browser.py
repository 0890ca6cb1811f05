"""A real Chromium without a driver: a script is put into a copy of the page and writes what it finds into it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

PROBE = """<script>
addEventListener("error", (event) => { (window.problems ??= []).push(String(event.message || event.type)); }, true);
addEventListener("load", async () => {
  let found;
  try { found = await (async () => { %s })(); } catch (error) { found = {error: String(error)}; }
  const out = document.createElement("pre");
  out.id = "found-by-the-test";
  out.textContent = JSON.stringify({problems: window.problems ?? [], found});
  document.body.append(out);
});
</script>"""


class Visit(NamedTuple):
    """What came of opening a page."""

    found: Any
    """What the script returned."""
    problems: list[str]
    """Errors of the page, and of what it loads."""
    console: list[str]
    """Lines of the browser's console."""
    requests: list[str]
    """Addresses that were asked for, the page's own left out."""


def find_browser() -> str | None:
    """The first installed one, by name."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def visit(browser: str, page: Path, folder: Path, script: str, *, size: str = "1200,900") -> Visit:
    """Open a copy of ``page`` and run ``script``, the body of an async function, when it has loaded.

    Args:
        browser: the program.
        page: an HTML file.
        folder: for the copy and the browser's profile.
        script: may return what JSON can hold.
        size: of the window, "width,height"; the browser makes no window narrower than about 500 pixels.
    """
    text = page.read_text(encoding="utf-8")
    probe = PROBE % script
    # First of all scripts, so that it hears every error.
    copy = folder / f"probed_{page.name}"
    copy.write_text(re.sub(r"<head>", lambda match: match[0] + probe, text, count=1), encoding="utf-8")
    log = folder / "net.json"
    command = [
        browser,
        "--headless",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--allow-file-access-from-files",  # the wrapper of a narrow page reads it
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-extensions",
        "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        f"--log-net-log={log}",
        f"--window-size={size}",
        "--virtual-time-budget=60000",
        "--dump-dom",
        copy.resolve().as_uri(),
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.insert(1, "--no-sandbox")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    match = re.search(r'<pre id="found-by-the-test">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, f"the page did not finish: {done.stdout[-500:]} {done.stderr[-2000:]}"
    result = json.loads(html.unescape(match[1]))
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Visit(result["found"], result["problems"], console, _requests(log, copy))


def _requests(log: Path, page: Path) -> list[str]:
    """Addresses of requests that the page caused: the browser asks for some on its own, from no origin."""
    text = log.read_text(encoding="utf-8", errors="replace")
    asked = re.findall(r'"initiator":"([^"]+)"[^\n]*?"url":"([^"]+)"', text)
    own = page.resolve().as_uri()
    return sorted({a for origin, a in asked if origin != "not an origin" and not a.startswith(("data:", own))})

"""The page in a real browser: pictures are there, the console is silent, nothing is asked for from outside."""

import json
import os
import re
import shutil
import subprocess
from html import unescape

import pytest

from dyncomp.report.page import write_report

pytestmark = pytest.mark.peers
NAMES = ("chromium", "chromium-browser", "google-chrome")
PROBE = """<script>addEventListener("load", () => {
  const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  const found = {
    images: [...document.images].map(i => i.naturalWidth),
    drawings: [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect().width),
    fetched: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
    wide };
  document.body.insertAdjacentHTML("beforeend", "<pre id=probe></pre>");
  document.getElementById("probe").textContent = JSON.stringify(found); });</script>"""
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--enable-logging=stderr",
)  # fmt: skip


@pytest.fixture
def browser():
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None and os.environ.get("CI"):
        pytest.fail("no chromium; install it")
    return found or pytest.skip("no chromium on this machine")


def visit(browser, page, tmp_path, size):
    """What the probe saw, and the console's lines."""
    options = [*QUIET, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}"]
    done = subprocess.run(
        [browser, *options, "--virtual-time-budget=5000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    probe = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert probe, done.stderr[-2000:]
    return json.loads(unescape(probe[1])), re.findall(r".*CONSOLE.*", done.stderr)


def with_probe(page, extra=""):
    """The page with the probe let through its own policy, which keeps refusing everything else."""
    text = page.read_text()
    assert "default-src 'none'; " in text
    text = text.replace("default-src 'none'; ", "default-src 'none'; script-src 'unsafe-inline'; ")
    page.write_text(text.replace("</main>", f"{extra}</main>{PROBE}"))
    return page


@pytest.mark.parametrize("size", ["1200,900", "500,900"])
def test_opens_whole_and_alone(browser, make_run, tmp_path, size):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", shift=0.5, pictures="images")]
    page = with_probe(write_report(runs, tmp_path / "report.html"))
    seen, console = visit(browser, page, tmp_path, size)
    assert len(seen["images"]) == 3 and min(seen["images"]) > 0
    assert len(seen["drawings"]) == 1 + 3 + 2 and min(seen["drawings"]) > 100
    assert seen["fetched"] == [] and console == [] and not seen["wide"]


def test_the_check_can_fail(browser, make_run, tmp_path):
    page = write_report([make_run(tmp_path / "one")], tmp_path / "report.html")
    page = with_probe(page, '<img src="http://127.0.0.1:9/x.png">')
    seen, console = visit(browser, page, tmp_path, "1200,900")
    assert 0 in seen["images"] and any("Content Security Policy" in line for line in console)

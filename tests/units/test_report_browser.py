"""The report in a real headless Chromium: no console error, both themes, wide and narrow screens readable."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from regauge.report.page import write
from regauge.report.run import of_run
from regauge.report.view import Sample, of_receipt
from tests.units.test_report import POINTS, a_receipt, a_site
from tests.units.test_report_run import a_run

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    view = of_run(a_run(), a_receipt(notes=tuple(f"blocks.{block}: few tokens" for block in range(3))))
    sample = Sample("def area(", "width, height):\n    return width * height", "w, h):\n    return w * h" + "x" * 300)
    full = type(view)(**{**vars(view), "points": POINTS, "samples": (sample,)})
    return write(full, tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        if os.environ.get("REGAUGE_REQUIRE_BROWSER"):
            pytest.fail("REGAUGE_REQUIRE_BROWSER is set, but chromium or chromedriver is not installed")
        pytest.skip("no chromium and chromedriver on this machine (Debian: chromium, chromium-driver)")
    options = Options()
    options.binary_location = binary
    for flag in FLAGS:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


def opened(browser: webdriver.Chrome, page: Path, width: int, theme: str = "light") -> None:
    browser.get_log("browser")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 800},
    )
    preferred = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": preferred})
    browser.get(page.as_uri())


def test_no_console_message_and_every_chart_drawn(browser: webdriver.Chrome, page: Path) -> None:
    opened(browser, page, 1280)
    assert browser.get_log("browser") == []
    for name in ("frontier", "bits", "error"):
        assert browser.find_element(By.CSS_SELECTOR, f"#{name} svg").size["height"] > 50, name
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [url for url in asked if url.startswith("http")] == []


def test_a_name_is_drawn_as_it_is_written(browser: webdriver.Chrome, tmp_path: Path) -> None:
    name = "<a href='https://example.org'>q</a><!--<script>&lt;b&gt;"
    receipt = a_receipt(sites=(a_site(name, name, 4.0),))
    opened(browser, write(of_receipt(receipt), tmp_path / "report.html"), 1280)
    drawn = "return [...document.querySelectorAll('#bits .side')].map(e => e.textContent)"
    assert browser.execute_script(drawn) == [name]
    assert browser.find_elements(By.CSS_SELECTOR, "#bits a") == []
    assert name in browser.execute_script("return document.querySelector('#bits title').textContent")


LUMINANCE = """
const channels = color => color.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const light = color => { const [r, g, b] = channels(color); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const page = light(getComputedStyle(document.body).backgroundColor);
const contrast = color => { const one = light(color);
    return (Math.max(one, page) + 0.05) / (Math.min(one, page) + 0.05); };
const found = [...document.querySelectorAll('h1, h2, p.say, dt, dd, td, th, summary, code')]
    .map(e => contrast(getComputedStyle(e).color));
const drawn = [...document.querySelectorAll('svg text')].map(e => contrast(getComputedStyle(e).fill));
return [page, Math.min(...found, ...drawn)];
"""


@pytest.mark.parametrize("width", [400, 1280])
def test_both_themes_can_be_read(browser: webdriver.Chrome, page: Path, width: int) -> None:
    """Contrast as WCAG 2 counts it; 4.5 is its least for text. The switch gives the other theme, and this one again."""
    for theme, dark in (("light", False), ("dark", True)):
        opened(browser, page, width, theme)
        for now in (dark, not dark, dark):
            ground, least = browser.execute_script(LUMINANCE)
            assert (ground < 0.2) == now, theme
            assert least >= 4.5
            browser.find_element(By.ID, "theme").click()


OVERLAPPING = """
document.querySelectorAll('details').forEach(e => e.open = true);
const boxes = [];
for (const box of document.querySelectorAll('svg text')) boxes.push([box.textContent, box.getBoundingClientRect()]);
const walker = document.createTreeWalker(document.querySelector('body'), NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
    const node = walker.currentNode, within = node.parentElement;
    if (!node.textContent.trim() || within.closest('svg, script')) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) boxes.push([node.textContent.trim().slice(0, 30), box]);
}
const found = [];
for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
    const [a, b] = [boxes[i][1], boxes[j][1]];
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (wide > 2 && high > 4) found.push(boxes[i][0] + ' over ' + boxes[j][0]);
}
return [boxes.length, found];
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_overlaps_and_nothing_scrolls_sideways(
    browser: webdriver.Chrome, page: Path, width: int, theme: str
) -> None:
    opened(browser, page, width, theme)
    count, found = browser.execute_script(OVERLAPPING)
    assert count > 200
    assert found == []
    inner, scroll = browser.execute_script("return [window.innerWidth, document.documentElement.scrollWidth]")
    assert (inner, scroll <= inner) == (width, True)

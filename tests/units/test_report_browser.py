"""The report in a real headless Chromium: no console error, hover and legend work, a narrow screen is readable."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

from regauge.report.page import write
from regauge.report.view import Sample, of_receipt
from tests.units.test_report import POINTS, a_receipt, a_site

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
    view = of_receipt(a_receipt())
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


def opened(browser: webdriver.Chrome, page: Path, width: int) -> None:
    browser.get_log("browser")
    browser.set_window_size(width, 1000)
    browser.get(page.as_uri())
    deadline = time.monotonic() + 20
    while len(browser.find_elements(By.CSS_SELECTOR, ".chart .main-svg")) < 3:
        assert time.monotonic() < deadline, "the charts did not draw"
        time.sleep(0.05)


def test_no_console_message_and_every_chart_drawn(browser: webdriver.Chrome, page: Path) -> None:
    opened(browser, page, 1200)
    assert browser.get_log("browser") == []
    for name in ("frontier", "bits", "error"):
        assert browser.find_elements(By.CSS_SELECTOR, f"#{name} .main-svg"), name
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [url for url in asked if url.startswith("http")] == []


def test_hover_shows_the_site(browser: webdriver.Chrome, page: Path) -> None:
    opened(browser, page, 1200)
    chart = browser.find_element(By.CSS_SELECTOR, "#bits .nsewdrag")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    ActionChains(browser).move_to_element(chart).perform()
    deadline = time.monotonic() + 10
    while not browser.find_elements(By.CSS_SELECTOR, "#bits .hoverlayer .hovertext"):
        assert time.monotonic() < deadline, "no hover label appeared"
        box = chart.size
        ActionChains(browser).move_to_element_with_offset(chart, -box["width"] // 8, 0).perform()
        time.sleep(0.1)
        ActionChains(browser).move_to_element_with_offset(chart, box["width"] // 8, 0).perform()
        time.sleep(0.1)
    assert "bits a weight" in browser.find_element(By.CSS_SELECTOR, "#bits .hoverlayer").text


def test_a_name_is_drawn_as_it_is_written(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """On the axes too, where plotly reads tags and entities."""
    name = "<a href='https://example.org'>q</a><!--<script>&lt;b&gt;"
    receipt = a_receipt(sites=(a_site(name, name, 4.0),))
    browser.get(write(of_receipt(receipt), tmp_path / "report.html").as_uri())
    drawn = "return [...document.querySelectorAll('#bits .ytick text')].map(e => e.textContent)"
    deadline = time.monotonic() + 20
    while not (found := browser.execute_script(drawn)):
        assert time.monotonic() < deadline, "the chart did not draw"
        time.sleep(0.05)
    assert found == [name]
    assert browser.find_elements(By.CSS_SELECTOR, "#bits .ytick a") == []


def test_the_legend_hides_a_trace(browser: webdriver.Chrome, page: Path) -> None:
    opened(browser, page, 1200)
    shown = "return document.getElementById('frontier').data.filter(t => t.visible === 'legendonly').length"
    assert browser.execute_script(shown) == 0
    toggle = browser.find_element(By.CSS_SELECTOR, "#frontier .legendtoggle")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", toggle)
    ActionChains(browser).move_to_element(toggle).click().perform()
    deadline = time.monotonic() + 10
    while browser.execute_script(shown) != 1:
        assert time.monotonic() < deadline, "a click on the legend hid nothing"
        time.sleep(0.1)


def test_a_narrow_screen_needs_no_sideways_scrolling(browser: webdriver.Chrome, page: Path) -> None:
    opened(browser, page, 500)  # the least window that headless Chromium opens
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 375, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    browser.get(page.as_uri())
    time.sleep(0.5)
    inner, scroll = browser.execute_script("return [window.innerWidth, document.documentElement.scrollWidth]")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert inner == 375
    assert scroll <= inner

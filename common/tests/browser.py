"""Debian's Chromium, driven by Playwright, for the tests of pages. Import `chromium` to have the fixture `browser`.

A module that imports this is skipped where Playwright is absent, and its tests that take `browser` where Chromium is.
"""

from __future__ import annotations

from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra dev")
expect = playwright.expect
CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = ("no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync")
PHONE, WIDE = {"width": 390, "height": 844}, {"width": 1280, "height": 800}


@pytest.fixture(name="browser", scope="module")
def chromium():
    if not CHROMIUM.exists():
        pytest.skip("the page is tested in Chromium, which apt-get install chromium brings")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[f"--{each}" for each in ARGUMENTS])
        yield browser
        browser.close()

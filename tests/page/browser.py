"""Headless Chromium over WebDriver: the page as a person sees it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_S = 60.0
"""Far above what anything on the page takes; a test that waits so long has failed."""


def missing() -> str | None:
    """Why there is no browser to test with; None where there is one."""
    try:
        import selenium.webdriver  # noqa: F401
    except ImportError:
        return "selenium is not installed: `make test-page` installs it"
    if not any(map(shutil.which, NAMES)) or not shutil.which("chromedriver"):
        return "Chromium or its driver is missing: on Debian, `apt-get install chromium chromium-driver`"
    return None


@contextmanager
def browser(*, width: int = 1280, height: int = 900, scale: float = 1.0) -> Iterator[Browser]:
    """A browser of its own, without history, that takes its window's size exactly."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = next(found for found in map(shutil.which, NAMES) if found)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The sandbox needs what containers do not give; the page under test is our own.
        for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = Chrome(options=options, service=ChromeService(shutil.which("chromedriver")))
        try:
            found = Browser(driver)
            found.resize(width, height, scale)
            yield found
        finally:
            driver.quit()


class Browser:
    """What the tests do with it."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        """The viewport, in CSS pixels; windows have a least width, viewports do not."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})

    def prefer(self, scheme: str) -> None:
        """Lets the system be `light` or `dark`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self, url: str) -> None:
        """Opens the page and waits for its first frame."""
        self.driver.get(url)
        self.until(lambda: self.run("return document.documentElement.dataset.frames > 0"))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> WebElement:
        """The one element that a CSS selector finds, once it is there."""
        return self.until(lambda: next(iter(self.all(selector)), None))

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector))

    def click(self, selector: str) -> None:
        """Clicks where the element is; the script's click would also press what is hidden."""
        element = self.find(selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def until(self, reached: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
        """The first true value of `reached()`; elements may be replaced while it looks."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.wait import WebDriverWait

        wait = WebDriverWait(self.driver, patience_s, 0.05, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda _: reached())

    def complaints(self) -> list[str]:
        """Errors and warnings of the console since the last call: scripts that fail, files that are not there, and what
        the Content-Security-Policy forbade."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]  # type: ignore[no-untyped-call]

    def picture(self, path: Path, selector: str | None = None) -> None:
        """A PNG of the viewport, or of one element with a margin around it."""
        clip = {}
        if selector is not None:
            box = self.run(
                "const r = document.querySelector(arguments[0]).getBoundingClientRect();"
                "return [r.x + scrollX, r.y + scrollY, r.width, r.height]",
                selector,
            )
            x, y, width, height = box
            clip = {"clip": {"x": x - 12, "y": y - 12, "width": width + 24, "height": height + 24, "scale": 1}}
        import base64

        shot = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": bool(clip), **clip}
        )
        path.write_bytes(base64.b64decode(shot["data"]))

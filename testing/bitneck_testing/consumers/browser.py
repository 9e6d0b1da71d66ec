"""A real browser without a window: Debian's Chromium, driven by Selenium."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

__all__ = ["BROWSER", "Browser", "browser"]

BROWSER = shutil.which("chromium"), shutil.which("chromedriver")
"""Where both programs are; None for one that is not installed."""
_WAIT_S = 60.0


class Browser:
    """A window of the browser.

    Args:
        driver: of the browser.
    """

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        """Open a page, and wait until it has loaded."""
        self.driver.get(address)

    def find(self, selector: str) -> WebElement:
        """The first visible element of a CSS selector, once it is there."""

        def visible(_driver: Any) -> WebElement | None:
            found = self.driver.find_elements("css selector", selector)
            return next((each for each in found if each.is_displayed()), None)

        waited: WebElement = self._wait(visible, f"no {selector} is shown")
        return waited

    def labelled(self, text: str) -> WebElement:
        """The field with a label, once it is shown."""
        return self.find_by(f"//label[contains(., {text!r})]//*[self::input or self::select]")

    def button(self, text: str) -> WebElement:
        """The button with a text, or a label, once it is shown."""
        return self.find_by(f"//button[normalize-space()={text!r} or @aria-label={text!r}]")

    def find_by(self, path: str) -> WebElement:
        """The first visible element of an XPath, once it is there."""

        def visible(_driver: Any) -> WebElement | None:
            found = self.driver.find_elements("xpath", path)
            return next((each for each in found if each.is_displayed()), None)

        waited: WebElement = self._wait(visible, f"no {path} is shown")
        return waited

    def until_text(self, text: str, selector: str = "body") -> None:
        """Wait until an element shows a text."""

        def shown(_driver: Any) -> bool:
            return any(text in each.text for each in self.driver.find_elements("css selector", selector))

        self._wait(shown, f"{selector} does not show {text!r}")

    def run(self, script: str, *arguments: Any) -> Any:
        """What a JavaScript function body returns in the page."""
        return self.driver.execute_script(script, *arguments)

    def origins(self) -> set[str]:
        """Origins of everything that the page has loaded or called."""
        names = self.run("return performance.getEntriesByType('resource').map(entry => new URL(entry.name).origin)")
        return set(names)

    def errors(self) -> list[str]:
        """What the page has written to the console as errors, since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]  # type: ignore[no-untyped-call]

    def picture(self, path: Path) -> None:
        """Save what is shown as a PNG."""
        self.driver.save_screenshot(str(path))

    def _wait(self, condition: Any, message: str) -> Any:
        return WebDriverWait(self.driver, _WAIT_S).until(condition, message)


@contextlib.contextmanager
def browser(width: int = 1280, height: int = 900, *, dark: bool = False) -> Iterator[Browser]:
    """A fresh browser with a profile of its own, which is gone afterwards.

    Args:
        width: of the window, pixels.
        height: likewise.
        dark: whether the system's colours are dark.
    """
    program, driver = BROWSER
    assert program is not None
    assert driver is not None
    options = ChromeOptions()
    options.binary_location = program
    with tempfile.TemporaryDirectory() as profile:
        for argument in (
            "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--no-proxy-server", f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
        ):  # fmt: skip
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        chrome = Chrome(options, ChromeService(driver))
        try:
            chrome.execute_cdp_cmd(
                "Emulation.setEmulatedMedia",
                {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
            )
            chrome.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
            )
            yield Browser(chrome)
        finally:
            chrome.quit()

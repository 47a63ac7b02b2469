"""Helpers for all tests: the project folder, folder contents, one-line errors, and pages in a browser."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def content(folder):
    """Everything below a folder by path: the bytes of files, None for others. Does not follow links."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_fifo()
    }


def refused(call, *said):
    """Assert that call() raises a one-line ValueError that contains all of `said` -> the line"""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    assert all(str(word) in message for word in said), message
    return message


class BrowserPage:
    """A newly opened page in a browser; messages of earlier pages are cleared from the console."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get_log("browser")
        browser.get(address)

    def get(self, name):
        return self.browser.find_element("id", name)

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def console(self):
        return self.browser.get_log("browser")

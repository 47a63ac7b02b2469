"""What several tests need: the project's folder, a folder's content, one line of refusal, and pages."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def content(folder):
    """Everything below a folder, links not followed: files with their bytes, others with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_fifo()
    }


def refused(call, *said):
    """call() is one ValueError line that says all of this -> the line"""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    assert all(str(word) in message for word in said), message
    return message


class BrowserPage:
    """A page in a browser, opened afresh: what earlier pages left in the console is gone."""

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

"""The site builds without a warning, and no link in it is broken."""

import html.parser
import importlib
import itertools
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
from mkdocs.exceptions import PluginError

from tests.helpers import ROOT, BrowserPage

BUILD = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # the theme's, about a later mkdocs
    done = subprocess.run(
        [*BUILD, "-d", str(folder)], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stdout + done.stderr
    return folder


class Page(html.parser.HTMLParser):
    """A page's links, the files it loads, and its anchors."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.places = [], [], {""}
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.places.add(attributes.get("id"))
        self.places.add(attributes.get("name"))
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        if tag == "link" and attributes.get("rel") != "canonical":
            self.loads.append(attributes["href"])
        if tag in ("script", "img", "iframe") and "src" in attributes:
            self.loads.append(attributes["src"])


@pytest.mark.long
def test_every_link_leads_to_a_page_and_an_anchor_in_it(site):
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    broken, links = [], 0
    for path, page in pages.items():
        for link in page.links + page.loads:
            if link.startswith(("http://", "https://", "data:", "javascript:")):
                continue
            links += 1
            where, _, place = unquote(link).partition("#")
            to = (path.parent / where).resolve() if where else path
            to = to / "index.html" if to.is_dir() else to
            if not to.exists() or (to in pages and place not in pages[to].places):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken and links > 5000


@pytest.mark.long
def test_no_page_loads_a_file_from_another_host(site):
    for path in site.rglob("*.html"):
        assert not [what for what in Page(path).loads if "://" in what], path


@pytest.mark.long
def test_a_page_shows_its_formulas_and_links_to_lines_of_code(site):
    page = (site / "reading" / "v3.html").read_text("utf-8")
    source = (ROOT / "moe" / "router.py").read_text("utf-8").splitlines()
    line = 1 + next(n for n, text in enumerate(source) if "# V3 eq. 15" in text)
    assert f'href="../code/moe/router.py.html#L-0-{line}"' in page
    assert page.count('display="block"') == 11 and "math" not in re.findall(r'class="language-(\w+)', page)


@pytest.fixture
def window(browser):
    """A function (width, scheme) -> the browser with this window; reset after the test."""

    def sized(width, scheme="light"):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        return browser

    yield sized
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


LESSONS = [path.stem for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]
EXPLORERS = [
    path.stem for path in sorted((ROOT / "docs" / "explorers").glob("*.html")) if path.suffixes == [".html"]
]
IN_NAVIGATION = [
    *(f"notebooks/{name}.html" for name in LESSONS),
    *(f"explorers/{name}.html" for name in EXPLORERS),
]


STILL = "*, ::before, ::after { transition: none !important; animation: none !important }"


@pytest.mark.long
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("target", IN_NAVIGATION)
def test_a_lesson_or_explorer_is_reached_from_the_navigation(site, window, target, width):
    page = BrowserPage(window(width), (site / "tour.html").as_uri())
    run(
        page,
        "document.head.append(Object.assign(document.createElement('style'), {textContent: arguments[0]}))",
        STILL,
    )
    if width == 390:
        page.all("label.md-header__button[for=__drawer]")[0].click()
        group = "Lessons" if target.startswith("notebooks") else "Interactive pages"
        (label,) = (one for one in page.all("label.md-nav__link") if group in one.get_property("innerText"))
        press(page, label)
    (link,) = page.all(f".md-nav--primary a[href='{target}']")
    press(page, link)
    wait(lambda: page.browser.current_url == (site / target).as_uri())


def test_every_lesson_and_explorer_is_among_the_tested():
    assert len(IN_NAVIGATION) > 10 and "explorers/cache.html" in IN_NAVIGATION


def press(page, element):
    """Click an element as soon as nothing covers it."""
    wait(lambda: on_top(page, element))
    element.click()


def run(page, script, *arguments):
    return page.browser.execute_script(script, *arguments)


def wait(done):
    """Wait until done() holds."""
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def on_top(page, element):
    """Whether a click in the middle of the element, scrolled to, reaches it."""
    return run(
        page,
        "arguments[0].scrollIntoView({block: 'center'});"
        "const box = arguments[0].getBoundingClientRect();"
        "const top = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);"
        "return arguments[0].contains(top)",
        element,
    )


@pytest.mark.long
@pytest.mark.parametrize("width", [1280, 390])
def test_no_page_is_wider_than_the_window(site, window, width):
    pages = [path for path in site.rglob("*.html") if path.relative_to(site).parts[0] != "code"]
    pages += (site / "code").glob("m*/*.html")
    wide = []
    for path in pages:
        page = BrowserPage(window(width), path.as_uri())
        needed, there = run(
            page, "const root = document.scrollingElement; return [root.scrollWidth, root.clientWidth]"
        )
        if needed > there:
            wide.append(f"{path.relative_to(site)}: {needed} of {there}")
    assert not wide and len(pages) > 40


@pytest.mark.long
def test_lines_of_code_of_110_columns_are_not_cut_on_a_laptop(site, window):
    longest = 0
    for path in itertools.chain(
        site.glob("code/m*/*.html"), site.glob("reading/*.html"), site.glob("*.html")
    ):
        page = BrowserPage(window(1280), path.as_uri())
        cut = run(
            page,
            "return [...document.querySelectorAll('.md-typeset pre > code')]"
            ".filter(one => one.scrollWidth > one.clientWidth).map(one => one.innerText)",
        )
        assert not [code for code in cut if max(map(len, code.splitlines())) <= 110], path
        longest = max(
            longest, *(len(line) for one in page.all("pre > code")[:1] for line in one.text.splitlines()), 0
        )
    assert longest >= 108


@pytest.mark.long
@pytest.mark.parametrize("scheme, dark", [("light", False), ("dark", True), ("light", False)])
def test_the_site_follows_the_systems_colour_scheme(site, window, scheme, dark):
    for name in ("index.html", "code/moe/router.py.html", "explorers/cache.html"):
        page = BrowserPage(window(1280, scheme), (site / name).as_uri())
        colour = run(page, "return getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", colour)[:3])) < 100) == dark, name


@pytest.mark.long
def test_a_lesson_says_how_to_open_it(site):
    for name in LESSONS:
        text = (site / "notebooks" / f"{name}.html").read_text("utf-8")
        assert f".venv/bin/jupyter lab notebooks/{name}.ipynb" in text and "'.[lessons]'" in text
        assert (site / "notebooks" / f"{name}.ipynb").read_bytes() == (
            ROOT / f"notebooks/{name}.ipynb"
        ).read_bytes()
        assert f'href="{name}.ipynb" download' in text


def test_a_link_to_a_missing_page_fails_the_build():
    hooks = importlib.import_module("docs.hooks")
    there = {"code/moe/router.py.md"}
    files = SimpleNamespace(get_file_from_path=lambda path: path in there)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="tour.md"))
    made = hooks.on_page_markdown("[here](../moe/router.py#L7)", page, None, files)
    assert made == "[here](code/moe/router.py.md#L-0-7)"
    said = "docs/tour.md: links to ../moe/nothing.py, which is not on the site"
    with pytest.raises(PluginError, match=re.escape(said)):
        hooks.on_page_markdown("[here](../moe/nothing.py)", page, None, files)

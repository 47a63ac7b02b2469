"""The site builds without a warning, and no link in it is broken."""

import html.parser
import importlib
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
from mkdocs.exceptions import PluginError

from tests.helpers import ROOT

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

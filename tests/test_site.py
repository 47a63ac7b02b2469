"""The site builds without a warning, and every link in it leads somewhere."""

import html.parser
import importlib.util
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
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # of the theme, about a mkdocs to come
    done = subprocess.run(
        [*BUILD, "-d", str(folder)], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stdout + done.stderr
    return folder


class Page(html.parser.HTMLParser):
    """The links of a page, what it loads, and the places in it that may be linked to."""

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
def test_every_link_leads_to_a_page_and_a_place_in_it(site):
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
def test_nothing_is_fetched_from_elsewhere(site):
    for path in site.rglob("*.html"):
        assert not [what for what in Page(path).loads if "://" in what], path


@pytest.mark.long
def test_a_line_of_code_stands_beside_its_equation_as_it_is_in_the_source(site):
    page = (site / "reading" / "v3.html").read_text("utf-8")
    words = "".join(part.partition(">")[2] for part in page.split("<"))
    assert "weights = scores.gather(-1, experts)" in words and "[[" not in words
    source = (ROOT / "moe" / "router.py").read_text("utf-8").splitlines()
    line = 1 + next(n for n, text in enumerate(source) if "# V3 eq. 14" in text)
    assert f'href="../code/moe/router.py.html#L-0-{line}"' in page and "<math" in page


@pytest.mark.parametrize(
    "text, said",
    [
        ("[[V3 eq. 99]]", "no line of code for [[V3 eq. 99]]"),
        ("[[moe/router.py:sigmoid: cosh]]", "no line of code for [[moe/router.py:sigmoid: cosh]]"),
        ("`tests/moe/test_router.py::test_nothing`", "tests/moe/test_router.py: 0 functions test_nothing"),
        ("`tests/moe/test_nothing.py::test_it`", "docs/tour.md: there is no tests/moe/test_nothing.py"),
        (
            "[here](../moe/nothing.py)",
            "docs/tour.md: links to ../moe/nothing.py, which the site does not have",
        ),
    ],
)
def test_what_is_not_there_fails_the_build(text, said):
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    there = {"code/moe/router.py.md", "code/tests/moe/test_router.py.md"}
    files = SimpleNamespace(get_file_from_path=lambda path: path in there)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="tour.md"))
    right = "[[V3 eq. 14]]\n\n`tests/moe/test_router.py::test_bias_chooses_but_never_weighs`"
    assert "code/moe/router.py.md#L-0-" in hooks.on_page_markdown(right, page, None, files)
    with pytest.raises(PluginError, match=re.escape(said)):
        hooks.on_page_markdown(text, page, None, files)

"""README and docs say what the code does."""

import importlib.util
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_equations_page_is_current():
    assert (ROOT / "docs" / "equations.md").read_text() == script("equations").page()


def test_names_page_is_current():
    assert (ROOT / "docs" / "names.md").read_text() == script("names").page()


def test_claims_page_and_the_claims_of_the_readme_are_current():
    assert (ROOT / "docs" / "claims.md").read_text() == script("claims").page()
    assert (ROOT / "README.md").read_text() == script("claims").readme()


def test_equations_page_finds_the_line_of_a_tag(tmp_path):
    file = tmp_path / "part.py"
    method = '    def f(self):\n        """V3 eq. 9"""\n        return 1  # V3 eq. 5, 7-8; why\n'
    file.write_text("class A:\n" + method)
    assert script("equations").tags(file) == [("V3", n, "A.f", 4, "return 1") for n in (5, 7, 8)]


def test_every_equation_of_the_papers_that_is_built_has_a_line():
    page = script("equations").page()
    v2, v3 = page.split("## DeepSeek-V3")
    assert set(range(1, 21)) <= {int(n) for n in re.findall(r"^\| (\d+) \|", v3, re.M)}  # MLA 1-11, MoE 12-20
    assert {21, 22, *range(26, 32)} <= {int(n) for n in re.findall(r"^\| (\d+) \|", v2, re.M)}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_python_on_the_page_runs(page, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr


DOCS = ("docs/equations.md", "docs/checkpoints.md", "docs/claims.md", "docs/index.md", "docs/coursework.md")
PAGES = ("README.md", "CONTRIBUTING.md", "lm/corpus/README.md", *DOCS)


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_project_lead_somewhere(page):
    text = (ROOT / page).read_text()
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    missing = [target for target in targets if not ((ROOT / page).parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("path", ["README.md", "docs/performance.md"])
def test_figures_come_from_the_result_files(path):
    assert script("figures").page(path) == (ROOT / path).read_text()

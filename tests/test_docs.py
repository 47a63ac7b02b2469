"""README and docs match the code: generated pages are current, references point somewhere, examples run."""

import configparser
import importlib.util
import json
import re
import runpy
import subprocess
import sys
from collections import Counter

import pytest
import yaml

import lm
from lm import cli
from lm.tokenizer import ByteTokenizer
from tests.helpers import ROOT


def script(name):
    return importlib.import_module(f"docs.{name}")


def test_equations_page_is_current():
    assert (ROOT / "docs" / "equations.md").read_text() == script("equations").page()


def test_names_page_is_current():
    assert (ROOT / "docs" / "names.md").read_text() == script("names").page()


def test_claims_page_and_the_claims_of_the_readme_are_current():
    assert (ROOT / "docs" / "claims.md").read_text() == script("claims").page()
    assert (ROOT / "README.md").read_text() == script("claims").readme()


def test_a_result_without_a_verdict_is_shown_as_such(tmp_path, monkeypatch):
    claims = script("claims")
    found = json.loads((ROOT / "experiments" / "results" / "rope.json").read_text())
    found |= {"as_claimed": None, "no_verdict": "too few seeds"}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "rope.json").write_text(json.dumps(found))
    (tmp_path / "rope.py").write_text((ROOT / "experiments" / "rope.py").read_text())
    monkeypatch.setattr(claims, "EXPERIMENTS", tmp_path)
    assert "\n\n**No verdict: too few seeds.** With all dims turned" in claims.section("rope")


def test_pages_made_from_docs_source_are_current():
    pages = script("pages").pages()
    assert {name: (ROOT / name).read_text() for name in pages} == pages
    made = [path for path in ROOT.glob("docs/**/*.md") if path.read_text().startswith("<!-- Generated")]
    assert {path.relative_to(ROOT).as_posix() for path in made} == pages.keys()
    assert {"docs/tour.md", "docs/reading/v3.md"} <= pages.keys()


ROUTER = (ROOT / "moe" / "router.py").read_text().splitlines()
TOPK = 1 + next(n for n, line in enumerate(ROUTER) if "# V3 eq. 16" in line)
TEST = "`tests/moe/test_router.py::test_bias_chooses_but_never_weighs`"


def test_a_bracket_becomes_the_code_and_a_link_to_its_line():
    made = script("pages").filled("a\n\n[[V3 eq. 16]]\n\nb\n", "docs/reading/x.md")
    link = f"[moe/router.py:SigmoidRouter.forward](../../moe/router.py#L{TOPK})"
    assert made == f"a\n\n```python\n{ROUTER[TOPK - 1].strip()}\n```\n{link}\n\nb\n"


def test_successive_brackets_from_one_function_share_a_block():
    forward = "[[moe/router.py:SigmoidRouter.forward: topk]]\n[[V3 eq. 14]]\n"
    made = script("pages").filled(forward + "[[V3 eq. 1]]\n", "docs/tour.md")
    blocks = re.findall(r"```python\n(.*?)```\n\[[^]]+\]\(\.\./(.+?)#L(\d+)\)", made, re.S)
    assert [(file, len(code.splitlines())) for code, file, _ in blocks] == [
        ("moe/router.py", 2),
        ("mla/attention.py", 1),
    ]
    assert blocks[0][2] == str(TOPK)


def test_a_statement_of_several_lines_is_shown_whole():
    made = script("pages").filled("[[lm/train.py:Trainer.step: loss.training_losses]]\n", "docs/tour.md")
    code = made.partition("```python\n")[2].partition("```")[0]
    assert code.startswith("losses, counts = ") and code.endswith("\n)\n") and len(code.splitlines()) > 2


def test_the_name_of_a_test_becomes_a_link_to_it():
    made = script("pages").filled(TEST, "docs/tour.md")
    name, file, line = re.fullmatch(r"\[`(\w+)`\]\(\.\./(.+)#L(\d+)\)", made).groups()
    assert f"def {name}(" in (ROOT / file).read_text().splitlines()[int(line) - 1]


@pytest.mark.parametrize(
    "text, said",
    [
        ("[[V3 eq. 99]]\n", "no line of code for [[V3 eq. 99]]"),
        ("[[moe/router.py:sigmoid: cosh]]\n", "no line of code for [[moe/router.py:sigmoid: cosh]]"),
        ("[[moe/nothing.py:f: x]]\n", "no line of code for [[moe/nothing.py:f: x]]"),
        (f"{TEST[:-1]}_s`", f"no test {TEST[1:-1]}_s (did you mean {TEST[1:-1].partition('::')[2]!r}?)"),
        ("`tests/moe/test_nothing.py::test_it`", "no test tests/moe/test_nothing.py::test_it"),
    ],
)
def test_a_reference_to_missing_code_raises(text, said):
    with pytest.raises(ValueError, match=re.escape(f"docs/tour.md: {said}")):
        script("pages").filled(text, "docs/tour.md")


def test_equations_page_finds_the_line_of_a_tag(tmp_path):
    method = '    def f(self):\n        """V3 eq. 9"""\n        return 1  # V3 eq. 5, 7-8; why\n'
    (tmp_path / "part.py").write_text(f"class A:\n{method}b = 2  # as V3 eq. 5\n")
    expected = [("V3", n, False, "part.py", "A.f", 4, "return 1") for n in (5, 7, 8)]
    expected.append(("V3", 5, True, "part.py", "", 5, "b = 2"))
    assert script("equations").tags(tmp_path / "part.py", tmp_path) == expected


def test_a_second_line_stands_in_the_row_of_the_first():
    equations = script("equations")
    places = [(False, "m/a.py", 3), (True, "m/b.py", 7), (True, "m/c.py", 9)]
    tags = [equations.Tag("V3", 5, again, file, "f", line, "x | y") for again, file, line in places]
    assert equations.table(tags)[-1] == (
        "| 5 | `x \\| y` | [m/a.py:f](../m/a.py#L3) | [m/b.py:f](../m/b.py#L7), [m/c.py:f](../m/c.py#L9) |"
    )
    assert equations.table(tags[:1])[0] == "| equation | line | in |"


def test_each_equation_of_attention_and_experts_in_v3_has_one_line():
    tags = [tag for tag in script("equations").all_tags() if tag.paper == "V3" and not tag.again]
    numbers = range(1, 21)  # MLA 1-11, MoE 12-20
    assert Counter(tag.number for tag in tags) == dict.fromkeys(numbers, 1)
    fast = {"mla/paged.py", "moe/fast.py"}
    assert not [tag for tag in tags if tag.file in fast or tag.file.startswith("lm/")]


def test_each_second_line_repeats_a_first_one():
    tags = script("equations").all_tags()
    first = {tag[:2] for tag in tags if not tag.again}
    second = {tag[:2] for tag in tags if tag.again}
    assert second and second <= first


def test_the_equations_of_v2_that_differ_from_v3_have_a_line():
    numbers = {tag.number for tag in script("equations").all_tags() if tag.paper == "V2"}
    assert {21, 22, *range(26, 32)} <= numbers


def test_the_files_on_the_path_are_those_whose_functions_are_called():
    crossed = script("path").crossed
    lines = (ROOT / "lm" / "tokenizer.py").read_text().count("\n")
    assert crossed(lambda: ByteTokenizer().encode("a")) == [
        ("lm/tokenizer.py", lines, "ByteTokenizer.encode")
    ]
    assert crossed(lambda: runpy.run_path(str(ROOT / "lm" / "tokenizer.py"))) == []  # importing is no call


def test_a_forward_pass_crosses_at_most_9_files_and_1500_lines():
    path = script("path")
    forward, _ = path.passes()
    assert {file for file, *_ in forward} >= path.LAST
    read = [lines for file, lines, _ in forward if file not in path.LAST]
    assert 5 <= len(read) <= 9 and sum(read) <= 1500


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_python_on_the_page_runs(page, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr


TEXTS = ("README.md", "CONTRIBUTING.md", "lm/corpus/README.md", "exercises/README.md")
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))
PAGES = [page for page in (*TEXTS, *DOCS) if not page.startswith("docs/source/")]
FOLDERS = "moe|mla|lm|rl|docs|tests|experiments|benchmarks|exercises"
FILE = re.compile(rf"\b(?:{FOLDERS})/[\w./-]+\.(?:py|toml|md|html)\b")


@pytest.mark.parametrize("page", PAGES)
def test_no_link_within_the_project_is_broken(page):
    text = (ROOT / page).read_text()
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    missing = [target for target in targets if not ((ROOT / page).parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_files_named_on_a_page_exist(page):
    named = set(FILE.findall((ROOT / page).read_text()))
    mine = re.compile(r"/(test_)?my_\w+\.")  # files that a reader is to write
    assert not [name for name in named if not (ROOT / name).exists() and not mine.search(name)]


@pytest.mark.parametrize("path", ["README.md", "docs/performance.md"])
def test_figures_come_from_the_result_files(path):
    assert script("figures").page(path) == (ROOT / path).read_text()


def test_the_readmes_tables_have_at_most_twelve_words_a_cell():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    cells = [re.sub(r"\]\([^)]*\)", "]", cell) for row in rows for cell in row.strip("|").split("|")]
    assert len(cells) > 100 and not [cell for cell in cells if len(cell.split()) > 12]


def test_the_readme_lists_every_extra():
    table = (ROOT / "README.md").read_text().partition("| extra | ")[2].partition("\n\n")[0]
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert {*re.findall(r"^\| `(\w+)` \| ", table, re.M)} == {*config["options.extras_require"]}


def commands():
    """The shell commands that pages name, in blocks of code without a language and between backticks."""
    found = set()
    for page in PAGES:
        text = (ROOT / page).read_text()
        blocks = re.findall(r"^```\n(.*?)^```$", text, re.M | re.S)
        quoted = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
        lines = [line for block in blocks for line in block.splitlines()] + quoted
        found |= {re.split(r"\s+#|  ", line)[0].strip() for line in lines}
    return sorted(
        line for line in found if re.match(r"(\.venv/bin/)?(lm|make|pip|python|pytest|jupyter) ", line)
    )


def helped(words, capsys):
    """The help of an `lm` command."""
    try:
        status = cli.main([*words, "--help"])
    except SystemExit as stopped:
        status = stopped.code
    assert not status, words
    return capsys.readouterr().out


@pytest.mark.parametrize("command", commands())
def test_a_command_on_a_page_exists_with_its_options(command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    tool, first, *rest = command.removeprefix(".venv/bin/").split()
    options = [word for word in rest if word.startswith("--")]
    if tool == "lm":
        if first == "exercise" and rest[:1] == ["run"]:  # runs another command
            assert helped([first], capsys)
            first, rest = rest[1], []
        inner = first in ("exercise", "experiment", "new") and rest and rest[0].islower()
        text = helped([first, rest[0]] if inner else [first], capsys)
        assert all(option in text for option in options), text
        assert not inner or rest[0] in text
    elif tool == "make":
        assert re.search(rf"^{re.escape(first)}:", (ROOT / "Makefile").read_text(), re.M)
    elif tool == "pip":
        config = configparser.ConfigParser(interpolation=None)
        config.read(ROOT / "setup.cfg")
        extras = re.search(r"\.\[(.+)\]", command)[1].split(",")
        assert set(extras) <= set(config["options.extras_require"])
    elif tool == "python" and first == "-m":
        assert importlib.util.find_spec(rest[0])
    elif tool == "python":
        assert (ROOT / first).exists()


def test_the_pages_name_commands_of_each_kind():
    tools = Counter(command.removeprefix(".venv/bin/").partition(" ")[0] for command in commands())
    assert tools["lm"] > 25 and tools["make"] > 8 and tools["pip"] > 2


def metadata():
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    return config["metadata"]


def test_the_citation_has_the_fields_of_its_format_and_the_packages_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()  # what version 1.2.0 requires
    assert (cited["cff-version"], cited["type"]) == ("1.2.0", "software")
    assert (cited["version"], cited["license"]) == (lm.__version__, metadata()["license"])
    assert cited["title"].startswith(metadata()["name"] + ": ")
    for work in (cited, *cited["references"]):
        for author in work["authors"]:
            assert author.keys() in ({"name"}, {"family-names", "given-names"})


def test_the_citation_names_the_papers_that_have_a_reading_page():
    cited = {work["doi"] for work in yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]}
    pages = sorted((ROOT / "docs" / "reading").glob("*.md"))
    named = {re.search(r"arXiv (\d{4}\.\d{5})", page.read_text())[1] for page in pages}
    assert len(named) == 4 and cited == {f"10.48550/arXiv.{number}" for number in named}


def test_the_classifiers_name_the_systems_that_the_readme_calls_supported():
    systems = {
        "Operating System :: POSIX :: Linux": "Linux",
        "Operating System :: MacOS": "macOS",
        "Operating System :: Microsoft :: Windows": "Windows",
    }
    rows = re.findall(r"^\| (\w+).*? \| (.+) \|$", (ROOT / "README.md").read_text(), re.M)
    status = {name: told for name, told in rows if name in systems.values()}
    named = {line for line in metadata()["classifiers"].splitlines() if line.startswith("Operating System")}
    assert named == {key for key, name in systems.items() if status[name].startswith(("run", "supported"))}

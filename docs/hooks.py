"""What the site has beside the pages in docs: the code, the notebooks, formulas, and links to all of them.

A page may say, on a line of its own, `[[V3 eq. 16]]` or `[[moe/router.py:SigmoidRouter.forward: topk]]`: the
site shows the lines with that tag, or the first with that text in that function, as they are in the source. A
test named like `tests/moe/test_router.py::test_name` becomes a link to it. What is not there fails the build.
"""

import ast
import importlib.util
import posixpath
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from exercises.grader.exercise import load_all

ROOT = Path(__file__).parent.parent
CODE = ("moe", "mla", "lm", "experiments", "exercises", "benchmarks", "notebooks", "docs", "tests")
TEXTS = ("CONTRIBUTING.md", "exercises/README.md", "lm/corpus/README.md")
FILES = ("LICENSE", "exercises/gradescope/run_autograder")  # as they are, besides those with these endings:
ENDINGS = (".png", ".json", ".yml", ".sh")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
QUOTED = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.M | re.S)  # code, in which no formula or link is meant
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
LINES = re.compile(r"^\[\[(.+?)\]\]$", re.M)
NOTE = "*Double brackets name lines of code; the site, which `make docs` builds, shows the lines.*"
MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.S)

spec = importlib.util.spec_from_file_location("equations", ROOT / "docs" / "equations.py")
assert spec and spec.loader
equations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(equations)


def on_files(files: Any, config: Any) -> Any:
    """Add the texts of other folders, each file of code as a page, the notebooks, and pictures."""
    for name in TEXTS:
        files.append(File.generated(config, name, content=(ROOT / name).read_text("utf-8")))
    for name in FILES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in (".py", ".toml"):
                files.append(File.generated(config, code_page(name), content=code(path)))
            elif path.suffix == ".ipynb" and ".ipynb_checkpoints" not in name:
                add_notebook(files, config, path)
            elif path.suffix in ENDINGS and folder != "docs":
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Formulas, lines of code and links."""
    name = page.file.src_uri
    if name.startswith("code/"):
        return markdown
    here = name if name in TEXTS or name.startswith("notebooks/") else f"docs/{name}"
    for kind, table in (("lessons", lessons), ("exercises", exercises)):
        markdown = markdown.replace(f"<!-- {kind} -->", table() if f"<!-- {kind} -->" in markdown else "")
    markdown = markdown.replace(NOTE, "")
    markdown = LINES.sub(lambda found: shown_lines(found[1], here), markdown)
    markdown = TEST.sub(lambda found: f"[`{found[2]}`]({relative(found[1], here)}#{found[2]})", markdown)
    parts = QUOTED.split(markdown)
    for index in range(0, len(parts), 2):  # the others are code
        text = MATH.sub(formula, parts[index])
        parts[index] = LINK.sub(lambda found: target(found[1], found[2] or "", here, name, files), text)
    return "".join(parts)


def lessons() -> str:
    """A line for each notebook: its title is its question."""
    rows = []
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.py")):
        title = re.search(r"^# # (.+)$", path.read_text("utf-8"), re.M)
        if not title:
            raise PluginError(f"{path}: has no title")
        rows.append(f"- [{title[1]}](../notebooks/{path.stem}.ipynb)")
    return "\n".join(rows)


def exercises() -> str:
    """A line for each exercise."""
    rows = ["| exercise | function | from | what it teaches |", "| --- | --- | --- | --- |"]
    for exercise in load_all(ROOT / "exercises").values():
        place = f"[`{exercise.target}`](../{exercise.module.replace('.', '/')}.py)"
        rows.append(f"| {exercise.name} | {place} | {exercise.equation} | {exercise.learn} |")
    return "\n".join(rows)


def target(path: str, anchor: str, here: str, name: str, files: Any) -> str:
    """A link as it is in the project -> as it is on the site."""
    project = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
    if project.startswith("docs/") and files.get_file_from_path(project.removeprefix("docs/")):
        place = project.removeprefix("docs/")
    elif (ROOT / project).suffix in (".py", ".toml"):
        place, anchor = code_page(project), line_anchor(project, anchor)
    elif project.endswith(".ipynb"):
        place = project.removesuffix(".ipynb") + ".md"
    elif (ROOT / project).is_dir():
        place = folder_page(project)
    else:
        place = project
    if not files.get_file_from_path(place):
        raise PluginError(f"{here}: links to {path}, which the site does not have")
    return posixpath.relpath(place, posixpath.dirname(name) or ".") + anchor


def folder_page(project: str) -> str:
    """What stands for a folder: its README, or the first of its files."""
    if f"{project}/README.md" in TEXTS:
        return f"{project}/README.md"
    kinds = (".py", ".toml", ".png", ".json")
    first = next(path for path in sorted((ROOT / project).rglob("*")) if path.suffix in kinds)
    name = first.relative_to(ROOT).as_posix()
    return code_page(name) if first.suffix in (".py", ".toml") else name


def line_anchor(project: str, anchor: str) -> str:
    """#L15, or #function -> the place in the code's page"""
    word = anchor.removeprefix("#")
    if not word or re.fullmatch(r"L\d+", word):
        number = word.removeprefix("L")
    else:
        begins = re.compile(rf"\s*(def|class) {word}\b")
        text = (ROOT / project).read_text("utf-8").splitlines()
        lines = [number for number, line in enumerate(text, 1) if begins.match(line)]
        if len(lines) != 1:
            raise PluginError(f"{project}: {len(lines)} functions {word}")
        number = str(lines[0])
    return f"#L-0-{number}" if number else ""


def relative(project: str, here: str) -> str:
    """A file of the project, as a link from another."""
    if not (ROOT / project).is_file():
        raise PluginError(f"{here}: there is no {project}")
    return posixpath.relpath(project, posixpath.dirname(here) or ".")


def shown_lines(what: str, here: str) -> str:
    """Lines of the source, each with a link to where it stands."""
    found = []
    if tagged := re.fullmatch(r"(.+) (?:eq\.|line) (\d+)", what):
        for path in sorted(path for folder in CODE[:3] for path in (ROOT / folder).glob("*.py")):
            for paper, number, function, line, text in equations.tags(path):
                if (paper, number) == (tagged[1], int(tagged[2])):
                    found.append((path.relative_to(ROOT).as_posix(), function, line, text))
    else:
        name, _, rest = what.partition(":")
        function, _, text = rest.partition(": ")
        source = (ROOT / name).read_text("utf-8")
        tree = ast.parse(source)
        for line, code in enumerate(source.splitlines(), 1):
            if text in code and equations.enclosing(tree, line) == function and not found:
                found.append((name, function, line, code.strip()))
    if not found:
        raise PluginError(f"{here}: no line of code for [[{what}]]")
    blocks = []
    for name, function, line, text in found:
        text = re.sub(r"  # .*", "", text)
        blocks.append(f"```python\n{text}\n```\n\n[{name}:{function}]({relative(name, here)}#L{line})\n")
    return "\n".join(blocks)


def formula(found: re.Match[str]) -> str:
    """LaTeX -> MathML, which browsers show without a script."""
    display = "block" if found[1] else "inline"
    made = latex2mathml.converter.convert(found[1] or found[2], display=display)
    return f"\n\n<div>{made}</div>\n\n" if found[1] else f"<span>{made}</span>"


def code_page(name: str) -> str:
    return f"code/{name}.md"


def code(path: Path) -> str:
    """A file as a page, its lines numbered."""
    name, text = path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
    fence = "`" * (3 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    kind = {".py": "python", ".toml": "toml"}[path.suffix]
    return f'---\nsearch:\n  exclude: true\n---\n\n# {name}\n\n{fence}{kind} linenums="1"\n{text}\n{fence}\n'


def add_notebook(files: Any, config: Any, path: Path) -> None:
    """A notebook as a page with its outputs; its pictures as files beside it."""
    from nbconvert import MarkdownExporter

    name = path.relative_to(ROOT).with_suffix("").as_posix()
    resources = {"output_files_dir": posixpath.basename(name)}
    body, resources = MarkdownExporter().from_filename(str(path), resources)
    files.append(File.generated(config, f"{name}.md", content=body))
    files.append(File.generated(config, f"{name}.ipynb", abs_src_path=str(path)))
    for picture, content in resources["outputs"].items():
        files.append(File.generated(config, f"notebooks/{picture}", content=content))

"""What the site has besides the pages in docs: the code, the notebooks, formulas, and links to all of them.

A link to a file that is not on the site fails the build.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
CODE = ("moe", "mla", "lm", "rl", "experiments", "exercises", "benchmarks", "notebooks", "docs", "tests")
TEXTS = ("CONTRIBUTING.md", "exercises/README.md", "lm/corpus/README.md")
FILES = ("LICENSE", "exercises/gradescope/run_autograder")  # copied, as are files with these endings:
ENDINGS = (".png", ".json", ".yml", ".sh")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
QUOTED = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.M | re.S)  # code: without formulas and links
BLOCK = re.compile(r"^```math\n(.+?)\n```$", re.M | re.S)  # a display formula, as GitHub shows it best
MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.S)


LESSON = """!!! tip "Run this lesson"

    ```
    .venv/bin/pip install -c constraints.txt -e '.[lessons]'   # once, in the project's folder
    .venv/bin/jupyter lab {name}.ipynb
    ```

    [Start here](../docs/index.md#open-a-lesson) says how to create `.venv`.
    <a href="{stem}.ipynb" download>Download the notebook</a>

"""


def on_config(config: Any) -> Any:
    """List the notebooks in the navigation."""
    lessons = [path.stem for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]
    section = next(section for section in config.nav if "Lessons" in section)
    section["Lessons"] = [{lesson_title(stem): f"notebooks/{stem}.md"} for stem in lessons]
    return config


def lesson_title(stem: str) -> str:
    """02_the_cache -> 02 The cache"""
    number, _, words = stem.partition("_")
    return f"{number} {words.replace('_', ' ').capitalize()}"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of other folders, a page for each source file, the notebooks, and pictures."""
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
    """Put in formulas and links."""
    name = page.file.src_uri
    if name.startswith("code/"):
        return markdown
    here = name if name in TEXTS or name.startswith("notebooks/") else f"docs/{name}"
    markdown = BLOCK.sub(r"$$\1$$", markdown)
    parts = QUOTED.split(markdown)
    for index in range(0, len(parts), 2):  # the parts between are code
        text = MATH.sub(formula, parts[index])
        parts[index] = LINK.sub(lambda found: target(found[1], found[2] or "", here, name, files), text)
    return "".join(parts)


def target(path: str, anchor: str, here: str, name: str, files: Any) -> str:
    """A link between files of the project -> the same link on the site."""
    project = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
    if project.startswith("docs/") and files.get_file_from_path(project.removeprefix("docs/")):
        place = project.removeprefix("docs/")
    elif (ROOT / project).suffix in (".py", ".toml"):
        place, anchor = code_page(project), anchor.replace("#L", "#L-0-")
    elif project.endswith(".ipynb"):
        place = project.removesuffix(".ipynb") + ".md"
    elif (ROOT / project).is_dir():
        place = folder_page(project)
    else:
        place = project
    if not files.get_file_from_path(place):
        raise PluginError(f"{here}: links to {path}, which is not on the site")
    return posixpath.relpath(place, posixpath.dirname(name) or ".") + anchor


def folder_page(project: str) -> str:
    """The page that a link to a folder opens: its README, or its first file."""
    if f"{project}/README.md" in TEXTS:
        return f"{project}/README.md"
    kinds = (".py", ".toml", ".png", ".json")
    first = next(path for path in sorted((ROOT / project).rglob("*")) if path.suffix in kinds)
    name = first.relative_to(ROOT).as_posix()
    return code_page(name) if first.suffix in (".py", ".toml") else name


def formula(found: re.Match[str]) -> str:
    """LaTeX -> MathML, which browsers render without a script."""
    display = "block" if found[1] else "inline"
    made = latex2mathml.converter.convert(found[1] or found[2], display=display)
    return f'\n\n<div class="formula">{made}</div>\n\n' if found[1] else f"<span>{made}</span>"


def code_page(name: str) -> str:
    return f"code/{name}.md"


def code(path: Path) -> str:
    """A source file as a page with numbered lines."""
    name, text = path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
    fence = "`" * (3 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    kind = {".py": "python", ".toml": "toml"}[path.suffix]
    return f'---\nsearch:\n  exclude: true\n---\n\n# {name}\n\n{fence}{kind} linenums="1"\n{text}\n{fence}\n'


def add_notebook(files: Any, config: Any, path: Path) -> None:
    """A notebook as a page with its outputs, and its pictures as files beside it."""
    from nbconvert import MarkdownExporter

    name = path.relative_to(ROOT).with_suffix("").as_posix()
    resources = {"output_files_dir": posixpath.basename(name)}
    body, resources = MarkdownExporter().from_filename(str(path), resources)
    title, _, rest = body.lstrip().partition("\n")
    body = f"{title}\n\n{LESSON.format(name=name, stem=path.stem)}{rest}"
    files.append(File.generated(config, f"{name}.md", content=body))
    files.append(File.generated(config, f"{name}.ipynb", abs_src_path=str(path)))
    for picture, content in resources["outputs"].items():
        files.append(File.generated(config, f"notebooks/{picture}", content=content))

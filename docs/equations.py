"""Make docs/equations.md: where the code computes each equation of a paper, from its `# V3 eq. 15` tags."""

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAPERS = {
    "V2": "DeepSeek-V2 (arXiv 2405.04434)",
    "V3": "DeepSeek-V3 (arXiv 2412.19437)",
    "RoFormer": "RoFormer (arXiv 2104.09864)",
    "Switch Transformer": "Switch Transformer (arXiv 2101.03961)",
    "ST-MoE": "ST-MoE (arXiv 2202.08906)",
    "Noisy Top-K": "Sparsely-gated mixture of experts (arXiv 1701.06538)",
    "GShard": "GShard (arXiv 2006.16668), lines of algorithm 1",
    "Expert Choice": "Expert Choice (arXiv 2202.09368)",
    "Soft MoE": "Soft MoE (arXiv 2308.00951)",
}
TAG = re.compile(rf"({'|'.join(sorted(PAPERS, key=len, reverse=True))}) (?:eq\.|line) (\d+(?:(?:, |-)\d+)*)")


def tags(path: Path) -> list[tuple[str, int, str, int, str]]:
    """(paper, equation, function, line, code) for each equation that a file's comments name."""
    text = path.read_text(encoding="utf-8")
    tree, found = ast.parse(text), []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, code = token.start[0], token.line[: token.start[1]].strip()
        for paper, numbers in TAG.findall(token.string):
            for part in numbers.split(", "):
                first, _, last = part.partition("-")
                for equation in range(int(first), int(last or first) + 1):
                    found.append((paper, equation, enclosing(tree, line), line, code))
    return found


def enclosing(tree: ast.Module, line: int) -> str:
    """The dotted name of the innermost function or class that holds a line."""
    names: list[str] = []
    scope: ast.AST = tree
    while True:
        inner = [
            node
            for node in ast.iter_child_nodes(scope)
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and node.lineno <= line <= (node.end_lineno or 0)
        ]
        if not inner:
            return ".".join(names)
        scope = inner[0]
        names.append(inner[0].name)


def page() -> str:
    """The whole of docs/equations.md."""
    rows: dict[str, list[tuple[int, str, int, str]]] = {paper: [] for paper in PAPERS}
    for package in ("moe", "mla", "lm"):
        for path in sorted((ROOT / package).glob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for paper, equation, function, line, code in tags(path):
                place = f"[{name}:{function}](../{name}#L{line})"
                code = code.replace("|", "\\|")
                rows[paper].append((equation, name, line, f"| {equation} | `{code}` | {place} |"))
    lines = ["# Where is equation N?", ""]
    lines += ["Made by `make tables` from the tags in the code; do not edit.", ""]
    for paper, title in PAPERS.items():
        if rows[paper]:
            lines += [f"## {title}", "", "| equation | line | in |", "| --- | --- | --- |"]
            lines += [row for *_, row in sorted(rows[paper])]
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (ROOT / "docs" / "equations.md").write_text(page(), encoding="utf-8")

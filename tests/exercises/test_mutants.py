"""Wrong answers made by mutating each function mechanically: nearly all must fail, listed mistakes or not."""

import ast
import dataclasses
import itertools
import textwrap
from pathlib import Path

import pytest

from exercises.grader import exercise, homework, source, verdict
from tests.helpers import ROOT

EXERCISES = exercise.load_all(ROOT / "exercises")
LEFT_OUT = ("Bit", "Shift", "FloorDiv", "Mod", "Decorator", "Exception", "Variable")  # unlikely mistakes
SAME = (  # mutated lines that are equivalent to the original: correct answers
    "weights = weights / (weights.sum(-1, keepdim=True) - 1e-20)",
    *("if top_groups > num_groups:", "if top_groups >= num_groups:", "if top_groups is num_groups:"),
    "normalized = scores / (scores.sum(-1, keepdim=True) - 1e-20)",
    "total = real.sum(1, keepdim=True).clamp(min=1)",
    "total = real.sum(+1, keepdim=True).clamp(min=1)",
    "source = slots.new_zeros(num_rows).index_copy_( -1, rows, order // top_k)",
    "target = torch.empty_like(slots).index_copy_( -1, order, rows)",
    *(f"if visible is None and time {than}:" for than in ("> 0", ">= 1", "!= 1")),
    "visible = visible.unsqueeze(1) if visible.ndim >= 3 else visible",
    "self.entries[:, start[ -1] : total] = new",
    *(f"if min(start) {than} max(start):" for than in (">", ">=", "is")),
    *(f"p = chosen / chosen.sum({axis}, keepdim=True)" for axis in ("1", "+1")),
    *(f"total += float((1 / p.norm(dim={axis})).double().sum())" for axis in ("1", "+1")),
    *(f"centred = rewards - rewards.mean({axis}, keepdim=True)" for axis in ("1", "+1")),
    *(f"flat = (rewards == rewards[:, :1]).all({axis}, keepdim=True)" for axis in ("1", "+1")),
    *(f"centred = centred / (rewards.std({axis}, keepdim=True) + STD_EPS)" for axis in ("1", "+1")),
    *(
        f"return mean(-clipped(ratio, advantages.unsqueeze({axis}), low, high), mask, average, longest)"
        for axis in ("1", "+1")
    ),
    "return votes.most_common( 2)[0][0] if votes else None",
    "return votes.most_common(1)[ -1][0] if votes else None",
)
SAMPLE = 12  # mutants of each exercise; all of them: python -m tests.exercises.test_mutants


def mutants(about, text):
    """The function's body with each single mutation that cosmic-ray knows."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    start, stop = source.body_lines(text, about.function, about.begin)
    lines = text.splitlines(keepends=True)
    function = source.find(ast.parse(text), about.function)[1]
    before = textwrap.dedent("".join(lines[function.lineno - 1 : start]))
    body = textwrap.dedent("".join(lines[start:stop]))
    alone = before + textwrap.indent(body, "    ")
    seen = {body}
    for name in sorted(operator_names()):
        if any(word in name for word in LEFT_OUT):
            continue
        for occurrence in itertools.count():
            changed = mutate_code(alone.encode(), get_operator(name)(), occurrence)
            if changed is None:
                break
            changed = changed.decode() if isinstance(changed, bytes) else changed
            new = textwrap.dedent(changed.removeprefix(before))
            equivalent = any(line.partition("  #")[0].strip() in SAME for line in new.splitlines())
            if changed.startswith(before) and new not in seen and not equivalent:
                seen.add(new)
                yield new


def survivors(about, bodies, checker, folder):
    """The mutants that pass all checks."""
    text = (ROOT / homework.origin(about)).read_text()
    for body in bodies:
        path = folder / about.file
        path.write_text(about.with_body(text, body))
        try:
            if verdict.is_done(checker.check(about, path)):
                yield body
        except ValueError:  # no longer valid Python
            pass


@pytest.mark.long
def test_nearly_every_mutant_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    count, alive = 0, []
    with homework.Checker() as checker:
        for about in EXERCISES.values():
            about = dataclasses.replace(about, seconds=20)
            every = list(mutants(about, (ROOT / homework.origin(about)).read_text()))
            some = every[:: max(1, len(every) // SAMPLE)][:SAMPLE]
            count += len(some)
            alive += [(about.name, body) for body in survivors(about, some, checker, tmp_path)]
    assert count > 150 and len(alive) <= 0.05 * count, alive


if __name__ == "__main__":
    import sys
    import tempfile

    names = sys.argv[1:] or list(EXERCISES)
    with homework.Checker() as checker, tempfile.TemporaryDirectory() as place:
        for name in names:
            bodies = list(mutants(EXERCISES[name], (ROOT / homework.origin(EXERCISES[name])).read_text()))
            left = list(survivors(EXERCISES[name], bodies, checker, Path(place)))
            print(f"{name}: {len(bodies) - len(left)} of {len(bodies)} fail", flush=True)
            for body in left:
                print(textwrap.indent(body, "    | "), flush=True)

"""The exercises themselves: their edits apply to the package, and their checks work."""

import ast
import dataclasses
import importlib
import textwrap

import pytest

from exercises.grader import check, compare, exercise, homework, source, teacher, verdict
from tests.helpers import ROOT, refused

EXERCISES = exercise.load_all(ROOT / "exercises")
EACH = pytest.mark.parametrize("about", EXERCISES.values(), ids=EXERCISES)


def text_of(about):
    return (ROOT / homework.origin(about)).read_text()


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_exercises_are_numbered_without_gaps():
    assert len(EXERCISES) >= 14
    assert [about.number for about in EXERCISES.values()] == list(range(len(EXERCISES)))


@EACH
def test_every_edit_applies_to_the_source(about):
    text = text_of(about)
    tree = ast.parse(text)
    blank = about.blank(text)
    assert f'raise NotImplementedError("exercise {about.name}")' in blank
    assert len(source.find(tree, about.function)[1].body) < 25
    for number, (_, _, sentence) in enumerate(about.mistakes):
        wrong = about.with_mistakes(text, [number])
        assert wrong is not None, f"its text does not occur exactly once: {sentence}"
        assert ast.dump(ast.parse(wrong)) != ast.dump(tree)
    sentences = [sentence for _, _, sentence in about.mistakes]
    assert len(sentences) >= 9 and len(set(sentences)) == len(sentences)
    bodies = {ast.dump(ast.parse(about.with_body(text, textwrap.dedent(body)))) for body in about.right}
    assert len(bodies | {ast.dump(tree)}) >= 7  # six more, all different
    for test in about.tests:
        assert (ROOT / test.partition("::")[0]).is_file()


@EACH
def test_the_blank_does_not_give_the_answer_away(about):
    text = text_of(about)
    start, stop = source.body_lines(text, about.function, about.begin)
    lines = [line.split("#")[0].strip() for line in text.splitlines()[start:stop]]
    blank = about.blank(text)
    for line in lines:
        if len(line) > 50 and text.count(line) == 1:  # similar code may stand elsewhere
            assert line not in blank, line
    hints = " ".join(about.hints)
    assert not any(len(line) > 25 and line in hints for line in lines)


@EACH
def test_the_file_says_what_every_argument_may_be(about):
    text = text_of(about)
    function = source.find(ast.parse(text), about.function)[1]
    said = {name for names in about.expects for name in names.split(", ")}
    arguments = {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)} - {"self"}
    assert arguments <= said and "returns" in said
    blank = about.blank(text)
    for names, what in about.expects.items():
        assert f"# {names}: {what[:20]}" in blank
    optional = {
        node.arg
        for node in ast.walk(function.args)
        if isinstance(node, ast.arg) and node.annotation and "None" in ast.unparse(node.annotation)
    }
    for name in optional:
        assert "None" in next(what for names, what in about.expects.items() if name in names.split(", "))


def run_here(about, text, seed):
    """The outcome of the probe with this source, in this process."""
    path = (ROOT / homework.origin(about)).absolute()
    importlib.import_module(about.module)
    probe = check.functions_of(about.path)["probe"]
    return check.outcome(probe, check.fresh(about.module, path, text), about.function, seed, "")


@EACH
@pytest.mark.parametrize("seed", [1, 2])  # of check, of grade
def test_right_answers_agree_and_mistakes_differ_from_them_and_from_each_other(about, seed):
    text = text_of(about)
    right = run_here(about, text, seed)
    for body in about.right:
        found = run_here(about, about.with_body(text, textwrap.dedent(body)), seed)
        assert [row for row in compare.compare(found, right) if not row["passed"]] == []
    outcomes = [
        run_here(about, about.with_mistakes(text, [number]), seed) for number in range(len(about.mistakes))
    ]
    for number, wrong in enumerate(outcomes):
        sentence = about.mistakes[number][2]
        assert any(not row["passed"] for row in compare.compare(wrong, right)), sentence
        assert not any(compare.same(other, wrong) for other in outcomes[:number]), sentence


WRONG = {  # edits that no exercise lists -> what the report says
    "rms-norm": [
        ("+ eps)", "+ max(eps, 1e-5))", "y of small x"),
        ("weight).to(x.dtype)", "weight.to(x.dtype)).to(x.dtype)", "as if a step ran in float16 or bfloat16"),
        (
            "wide.square().mean(-1, keepdim=True) + eps",
            "wide.square().mean(-1, keepdim=True).clamp(min=eps)",
            "y differs in",
        ),
        (".to(x.dtype), scale", ".to(x.dtype), scale.half()", "its dtype is float16, expected float32"),
        (
            "wide * scale * weight",
            "wide * scale * weight.bfloat16()",
            "as if a step ran in float16 or bfloat16",
        ),
        ("wide.square().mean", "wide.bfloat16().square().mean", "mean runs in bfloat16"),
    ],
    "frequencies": [
        ("1.0 / theta **", "1.0 / int(theta) **", "of 6 features"),
        ("scaling.slow_down(turn, theta)", "scaling.slow_down(turn, dim)", "slowed down"),
        ("return turn if", "turn = turn.half()\n        return turn if", "its dtype is float16"),
    ],
    "rope": [
        (
            "return turned",
            "cos.mul_(2).div_(2).add_(1).sub_(1)\n        return turned",
            "cos is changed in place",
        ),
        ("cos - odd", "cos.bfloat16() - odd", "as if a step ran in float16 or bfloat16"),
        ("return turned", "x.zero_()\n        return turned", "leaf Variable"),
    ],
    "router": [
        ("+ 1e-20)", "+ 1e-9)", "tiny scores: weights"),
        ("scores = sigmoid(logits)", "scores = logits.detach().sigmoid()", "no gradient reaches it"),
        (
            "weights = scores.gather(-1, experts)",
            "weights = choice.gather(-1, experts) - self.bias.expand_as(choice).gather(-1, experts)",
            "tiny scores: weights",
        ),
        (
            "weights = scores.gather(",
            "weights = scores.data.gather(",
            "no gradient reaches it: look for detach",
        ),
        ("scores = sigmoid(logits)", "scores = sigmoid(logits.half()).float()", "exp runs in float16"),
        ("choice.topk(self.top_k).indices", "choice.topk(self.top_k).indices.int()", "int"),
        ("return Routing(", "self.bias += 0.01\n        return Routing(", "self.bias is changed in place"),
        ("return Routing(", "x.detach().neg_()\n        return Routing(", "x is changed in place"),
    ],
    "group-limit": [
        ('float("-inf")', "torch.finfo(choice.dtype).min", "expected -inf"),
        ("return grouped.masked_fill(", "return grouped.double().masked_fill(", "its dtype is float64"),
        ("group_scores = grouped.", "group_scores = grouped.half().", "close scores"),
        (
            "return grouped.",
            "choice.detach().clamp_(min=0)\n    return grouped.",
            "choice is changed in place",
        ),
    ],
    "balance-loss": [
        (
            "chosen.sum(1).to(scores.dtype)",
            "chosen.to(torch.uint8).sum(1, dtype=torch.uint8).to(scores.dtype)",
            "load of 5000 tokens",
        ),
        (
            "return load, share, real",
            "return load, share, real.float()",
            "its dtype is float32, expected bool",
        ),
        (
            "share = normalized.sum(1) / total",
            "share = normalized.half().sum(1) / total",
            "its dtype is float16",
        ),
        (
            "return load, share, real",
            "experts.clamp_(min=1)\n    return load, share, real",
            "routing is changed in place",
        ),
    ],
    "bias-update": [
        (
            "bias.add_(step.to(bias.dtype), alpha=rate)",
            "bias.set_(bias + rate * step.to(bias.dtype))",
            "the buffer itself",
        ),
        (
            "-violations(tokens_per_expert.to(bias.device), bias.dtype)",
            "(tokens_per_expert.float().mean() - tokens_per_expert) / tokens_per_expert.float().mean()",
            "bias after no tokens is infinite or NaN",
        ),
        ("bias.add_(", "tokens_per_expert.zero_()\n    bias.add_(", "tokens_per_expert is changed in place"),
        ("step.to(bias.dtype)", "step.half().to(bias.dtype)", "change, proportional"),
    ],
    "dispatch": [
        ("return Order(sizes", "return Order(sizes.int()", "sizes, as they are its dtype is int32"),
        ("return Order(sizes", "return Order(counts", "sizes, filled up"),
        (
            "target.view_as(experts)",
            "torch.tensor(target.view_as(experts).tolist())",
            "target of no tokens its shape is (0,)",
        ),
        ("target.view_as(experts)", "target.view_as(experts).short()", "its dtype is int16, expected int64"),
        ("source = ", "experts.clamp_(min=0)\n    source = ", "experts is changed in place"),
    ],
    "compress": [
        (
            "self.kv_norm(latent), k_rope",
            "torch.nn.functional.rms_norm(latent, latent.shape[-1:], self.kv_norm.weight, 1e-5), k_rope",
            "latent of small x",
        ),
        (
            "return self.kv_norm(latent), k_rope",
            "x.data.mul_(2)\n        return self.kv_norm(latent), k_rope",
            "x is changed in place",
        ),
        (
            "self.kv_norm(latent), k_rope",
            "self.kv_norm(latent.half()).type_as(x), k_rope",
            "as if a step ran in float16",
        ),
    ],
    "rotate": [
        (
            "self.rope(both, positions)",
            "self.rope(both.float(), positions).type_as(both)",
            "query of float64",
        ),
        (
            "return q_rope, k_rope.squeeze(2)",
            "return q_rope, k_rope.squeeze()",
            "key of one token its shape is",
        ),
        ("self.rope(both, positions)", "self.rope(both, positions.bfloat16())", "query of bf16"),
        (
            "self.rope(both, positions)",
            "self.rope(both.bfloat16(), positions).type_as(both)",
            "as if a step ran in",
        ),
        (
            "return q_rope, k_rope.squeeze(2)",
            "return q_rope.data, k_rope.squeeze(2)",
            "gradient of the query is zero everywhere",
        ),
    ],
    "expand": [
        (
            "self.scale, visible)",
            "self.scale, None if visible is None else visible.tril())",
            "masked differs",
        ),
        (
            "k_rope = k_rope.unsqueeze(2).expand(-1, -1, self.num_heads, -1)",
            "k_rope = k_rope.repeat(1, 1, self.num_heads).unflatten(-1, (-1, self.num_heads)).mT",
            "differs in",
        ),
        ("kv = self.kv_b(latent)", "kv = self.kv_b(latent.data)", "gradient of the latent"),
    ],
    "absorb": [
        ("scores.softmax(-1)", "scores.softmax(-1).bfloat16()", "as if a step ran in float16 or bfloat16"),
        ("scores.softmax(-1)", "scores.bfloat16().softmax(-1)", "softmax runs in bfloat16"),
        ("scores.softmax(-1)", "scores.half().softmax(-1)", "softmax runs in float16"),
        ("scores.softmax(-1)", "scores.softmax(-1, dtype=torch.bfloat16)", "softmax runs in bfloat16"),
        (
            "latent = entries[",
            "entries.data.mul_(2)\n        latent = entries[",
            "entries is changed in place",
        ),
    ],
    "cache": [
        (
            "return self.entries[:, :total]",
            "return self.entries[:, :total].detach()",
            "no gradient reaches it",
        ),
        (
            "self.lengths = [row + time for row in start]",
            "self.lengths = [float(row + time) for row in start]",
            "lengths",
        ),
        (
            "return self.entries[:, :total]",
            "self.kept = [new]\n        return self.entries[:, :total]",
            "self.kept shares memory with new",
        ),
        (
            "return self.entries[:, :total]",
            "return self.entries[:, :total] if any(start) else new.view_as(new)",
            "the result shares memory with new",
        ),
        ("return self.entries[:, :total]", "return self.entries[:, :total].half()", "its dtype is float16"),
    ],
    "yarn": [
        (
            "return turn / self.factor * (1 - kept) + turn * kept",
            "return (turn / self.factor * (1 - kept) + turn * kept).half().float()",
            "as if a step ran in float16",
        ),
        ("dim = 2 * len(turn)", "turn.mul_(1.5)\n        dim = 2 * len(turn)", "turn is changed in place"),
        ("return turn / self.factor", "return turn.half() / self.factor", "differs in"),
    ],
    "gate-scale": [
        ("return total / samples", "return torch.tensor(total / samples)", "the results are floats is False"),
        (
            "float((1 / p.norm(dim=-1)).double().sum())",
            "float((1 / p.norm(dim=-1)).half().sum())",
            "as if a step ran in float16",
        ),
        ("logits.sigmoid()", "logits.half().sigmoid()", "sigmoid runs in float16"),
        ("return total / samples", "return torch.tensor(total / samples).half().item()", "differs in"),
    ],
    "flops": [
        (
            "return 6 * in_products",
            "import numpy\n    return numpy.int64(6) * in_products",
            "is an int is False",
        ),
        ("return 6 * in_products", "return 6.0 * in_products", "its dtype is float32, expected int64"),
    ],
    "upcycle": [
        ("down.transpose(0, 1)", "down.transpose(0, 1).squeeze()", "down, 1 shard its shape is"),
        ("down.transpose(0, 1)", "down.data.neg_().transpose(0, 1)", "mlp.down.weight is changed in place"),
        ("down.transpose(0, 1)", "down.float().double().transpose(0, 1)", "as if a step ran in float32"),
    ],
    "expert-choice": [
        ("scores, logits)", "scores, logits.log_softmax(-1))", "logits, two sequences differs"),
        ("where(chosen, -1)", "where(chosen, -1).int()", "its dtype is int32"),
        ("logits.softmax(-1)", "logits.half().softmax(-1).float()", "softmax runs in float16"),
        ("scores.where(chosen, 0)", "scores.data.where(chosen, 0)", "no gradient reaches it"),
    ],
    "advantage": [
        ("rewards.std(", "rewards.half().std(", "as if a step ran in float16 or bfloat16"),
        ("rewards.mean(", "rewards.half().mean(", "mean runs in float16"),
        ("return centred", "return centred.double()", "its dtype is float64, expected float32"),
        ("return centred", "rewards.neg_()\n    return centred", "rewards is changed in place"),
        ("return centred", "return rewards.copy_(centred)", "the result shares memory with rewards"),
        (".all(-1, keepdim=True)", ".any(-1, keepdim=True)", "normalized is zero everywhere"),
    ],
    "k3": [
        ("gap.exp()", "gap.half().exp()", "exp runs in float16"),
        ("gap.exp() - gap", "gap.data.exp() - gap.data", "no gradient reaches it"),
        ("return gap", "log_probs.data.mul_(2)\n    return gap", "log_probs is changed in place"),
        ("gap - 1", "gap.double() - 1", "its dtype is float64, expected float32"),
        ("gap - 1", "gap.float() - 1", "as if a step ran in float32"),
    ],
    "grpo": [
        ("mask).exp()", "mask).half().exp()", "exp runs in float16"),
        ("mask).exp()", "mask).exp().bfloat16()", "as if a step ran in float16 or bfloat16"),
        ("return mean(", "old.nan_to_num_()\n    return mean(", "old is changed in place"),
        ("return mean(", "mask[0, 1] = False\n    return mean(", "mask is changed in place"),
        ("low, high), mask", "low, high).double(), mask", "its dtype is float64, expected float32"),
        ("log_ratio(log_probs, old, mask)", "(log_probs - old).nan_to_num()", "is infinite or NaN"),
    ],
    "majority": [
        ("most_common(1)[0][0]", "most_common(2)[-1][0]", "clear votes"),
        ("else None", "else 0", "the results are str or None is False"),
        ("answer for answer in answers if", "answer for answer in list(answers)[1:] if", "ties"),
        (
            "return votes",
            "answers[:] = dict.fromkeys(answers)\n    return votes",
            "the answers are unchanged",
        ),
    ],
}


@EACH
def test_faults_of_precision_memory_and_dtype_are_found_and_described(about):
    text = text_of(about)
    right = run_here(about, text, 1)
    start, stop = source.body_lines(text, about.function, about.begin)
    lines = text.splitlines(keepends=True)
    body = "".join(lines[start:stop])
    for old, new, said in WRONG[about.name]:
        assert body.count(old) == 1, old
        found = run_here(about, "".join([*lines[:start], body.replace(old, new), *lines[stop:]]), 1)
        problems = [
            f"{row['name']} {row['says']}" for row in compare.compare(found, right) if not row["passed"]
        ]
        problems += [found["raised"]["says"]] if "raised" in found else []
        assert any(said in problem for problem in problems), (new, problems)


@pytest.mark.parametrize(
    "change, said",
    [
        (("TARGET = ", "TARGET = 1 + "), "TARGET must be a literal, not an expression"),
        (("LEARN = ", "LEARNED = "), "learned"),
        (("EQUATION = ", "_EQUATION = "), "missing 1 required argument: 'equation'"),
        (('"mla.norm:rms_norm"', '"rms_norm"'), "TARGET 'rms_norm' must have the form module:function"),
        (("RIGHT = (", "RIGHT = (("), "never closed"),
    ],
)
def test_a_malformed_exercise_is_refused_in_one_line(tmp_path, change, said):
    path = tmp_path / "00_rms_norm.py"
    path.write_text((ROOT / "exercises" / path.name).read_text().replace(*change, 1))
    refused(lambda: exercise.load(path), path, said)


@pytest.mark.long
@EACH
def test_the_self_test_passes(about, tmp_path):
    with homework.Checker() as checker:
        assert teacher.problems(about, checker, tmp_path) == []


@pytest.mark.long
@EACH
def test_mistakes_are_recognised_on_the_inputs_of_grade(about, tmp_path):
    """`grade` uses another seed than `check`: the package passes, and mistakes are recognised there too."""
    text, path, seed = text_of(about), tmp_path / about.file, 2
    with homework.Checker() as checker:
        path.write_text(text)
        assert not [row for row in checker.check(about, path, seed)["checks"] if not row["passed"]]
        for number, (_, _, sentence) in enumerate(about.mistakes):
            path.write_text(about.with_mistakes(text, [number]))
            assert checker.check(about, path, seed)["mistakes"] == [sentence]


@pytest.mark.long
def test_two_mistakes_at_once_are_both_recognised(tmp_path):
    about = EXERCISES["router"]
    path = tmp_path / about.file
    path.write_text(about.with_mistakes(text_of(about), [0, 6]))
    with homework.Checker() as checker:
        found = checker.check(about, path)["mistakes"]
    assert found == [about.mistakes[0][2], about.mistakes[6][2]]


HOSTILE = {
    "loop": ("while True:\n    pass", "not finished after 3 s"),
    "sleep": ("import time\ntime.sleep(1000)", "not finished after 3 s"),
    "exit": ("raise SystemExit(0)", "SystemExit: 0"),
    "hard exit": ("import os\nos._exit(0)", "PermissionError: an answer may not use os._exit"),
    "interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
    "fork": ("import os\nwhile True:\n    os.fork()", "PermissionError: an answer may not use os.fork"),
    "process": (
        "import subprocess\nsubprocess.run(['sleep', '1000'])",
        "an answer may not use subprocess.Popen",
    ),
    "memory": ("return torch.zeros(25 * 10**9), None", "RuntimeError: "),
    "list": ("return [0] * (25 * 10**9), None", "MemoryError: "),
    "print": ("while True:\n    print('x' * 1000)", "OSError: [Errno 27] File too large"),
    "recursion": ("return rms_norm(x, weight, eps)", "RecursionError: maximum recursion depth exceeded"),
    "write": ("open('tests/mla/test_norm.py', 'w')", "an answer may not use open tests/mla/test_norm.py"),
    "low write": (
        "import os\nos.open('tests/mla/test_norm.py', os.O_RDWR)",
        "may not use open tests",
    ),
    "remove": ("import os\nos.remove('tests/mla/test_norm.py')", "an answer may not use os.remove"),
    "kill": ("import os\nos.kill(os.getppid(), 9)", "an answer may not use os.kill"),
    "crash": ("import ctypes\nctypes.string_at(0)", "killed by SIGSEGV"),
    "import": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
}


@pytest.mark.long
def test_a_hostile_answer_harms_only_itself_and_is_reported_with_its_line(tmp_path):
    about = dataclasses.replace(EXERCISES["rms-norm"], seconds=3)
    test = (ROOT / "tests" / "mla" / "test_norm.py").read_bytes()
    path = tmp_path / about.file
    with homework.Checker() as checker:
        for name, (body, said) in HOSTILE.items():
            path.write_text(about.with_body(text_of(about), body))
            report = checker.check(about, path)
            shown = verdict.shown(about, path, report)
            first = source.body_lines(path.read_text(), about.function)[0] + 1
            assert said in shown, f"{name}: {shown}"
            lines = range(first, first + body.count("\n") + 1)
            assert any(f"{path}:{line}: " in shown for line in lines), f"{name}: {shown}"
            assert not verdict.is_done(report) and verdict.points(report)[0] == 0
            assert len(report["output"]) < 2**21
        path.write_text(text_of(about))  # the checker still works
        assert verdict.is_done(checker.check(about, path))
    assert (ROOT / "tests" / "mla" / "test_norm.py").read_bytes() == test


def test_a_thread_of_an_answer_cannot_write_either(tmp_path):
    about, target = EXERCISES["rms-norm"], tmp_path / "written"
    body = (
        "import pathlib, threading\n"
        f"target = pathlib.Path({str(target)!r})\n"
        "thread = threading.Thread(target=pathlib.Path.write_text, args=(target, 'x'))\n"
        "thread.start()\nthread.join()\nreturn x"
    )
    path = tmp_path / about.file
    path.write_text(about.with_body(text_of(about), body))
    with homework.Checker() as checker:
        report = checker.check(about, path)
    assert not target.exists() and "an answer may not use open" in report["output"]

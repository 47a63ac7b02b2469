"""Lengths of thought with a model that writes by a script, votes by hand, pass@k by enumeration."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch

from rl import scaling, tasks
from rl.rollout import TOKENIZER, Sample, collect
from rl.scaling import answer_of, majority, pass_at_k, think
from rl.tasks import CLOSE, END, OPEN
from tests.helpers import refused


class Writer:
    """A model that writes what `script(problem, text so far)` says: some bytes, the likeliest first.

    While a thought is being closed for it, and after END, it writes z.
    """

    def __init__(self, script):
        self.script = script

    def new_caches(self, rows, length):
        self.length = length
        return [""] * rows

    def __call__(self, tokens, caches):
        logits = torch.full((*tokens.shape, 256), -100_000.0)
        for row, own in enumerate(tokens.tolist()):
            caches[row] += TOKENIZER.decode(own)
            assert len(caches[row]) <= self.length
            prompt, opened, text = (
                caches[row][: tasks.WIDTH],
                *caches[row][tasks.WIDTH :].partition(OPEN)[1:],
            )
            assert prompt.endswith("=") and opened
            thought, said = text.partition(CLOSE)[::2]
            idle = END in said or "<" in thought
            for place, character in enumerate("z" if idle else self.script(prompt, text)):
                logits[row, -1, ord(character)] = -1_000.0 * place
        return SimpleNamespace(logits=logits)


def follow(text):
    """A script that writes this text, with an x where its byte is not allowed."""
    return lambda prompt, so_far: text[len(so_far)] + "x"


PROBLEMS = tasks.problems("sums", 0, 5, 5)


def written(script, *limits, **more):
    """The completion of the first problem."""
    return think(Writer(script), PROBLEMS[:1], *limits, **more)[0]


def test_a_thought_has_at_most_the_asked_length():
    for most in (0, 1, 2, 5, 10):
        text = written(lambda prompt, so_far: "7" if CLOSE in so_far else "a", most)
        assert text == f"{OPEN}{'a' * most}{CLOSE}7777"


def test_a_thought_that_ends_early_stays_short():
    assert written(follow(f"abc{CLOSE}12{END}q"), 10) == f"{OPEN}abc{CLOSE}12"
    assert written(follow(f"abc{CLOSE}12{END}q"), 3) == f"{OPEN}abc{CLOSE}12"
    assert written(follow(f"ab{END}{CLOSE[1:]}12{END}"), 10) == f"{OPEN}ab{CLOSE}12"  # END closes it too
    assert written(follow(f"{CLOSE}12{END}"), 10) == f"{OPEN}{CLOSE}12"
    assert written(follow(f"ab<cd12345{END}"), 10).startswith(f"{OPEN}ab{CLOSE}")  # whatever follows the <


def test_a_thought_has_at_least_the_asked_length():
    def script(prompt, so_far):
        return f"12{END}"[len(so_far.partition(CLOSE)[2])] if CLOSE in so_far else "<x"

    for least in (0, 1, 3, 8):
        assert written(script, 8, least=least) == f"{OPEN}{'x' * least}{CLOSE}12"
    assert written(lambda prompt, so_far: f"{END}y", None, least=5) == f"{OPEN}yyyyy{CLOSE}"


def test_without_a_limit_the_model_closes_the_thought():
    for length in (0, 7, 33, 63, 64):
        assert written(follow("b" * length + f"{CLOSE}5{END}"), None) == f"{OPEN}{'b' * length}{CLOSE}5"
    assert written(lambda prompt, so_far: "b", None) == f"{OPEN}{'b' * 64}{CLOSE}bbbb"


def test_rows_close_at_their_own_time():
    places = {problem.prompt: place for place, problem in enumerate(PROBLEMS)}
    assert len(places) == 5

    def script(prompt, so_far):
        thought, closed, said = so_far.partition(CLOSE)
        if closed:
            return (str(places[prompt]) + END)[len(said)]
        return "<" if len(thought) == places[prompt] else "c"

    got = think(Writer(script), PROBLEMS, 3)
    assert got == [f"{OPEN}{'c' * min(place, 3)}{CLOSE}{place}" for place in range(5)]


def running(prompt):
    """The text of a right thought: every total in two digits."""
    totals = list(itertools.accumulate(map(int, re.findall(r"[+-]?\d", prompt))))
    return "".join(f"{total:02}" for total in totals[1:])


def thinker(prompt, so_far):
    """Writes the totals one by one, and answers with the last one that it has written."""
    thought, closed, said = so_far.partition(CLOSE)
    if closed:
        return (str(int(thought[-2:] or 0)) + END)[len(said)]
    return (running(prompt) + "<")[len(thought)]


def test_the_budget_curve_of_a_model_that_needs_every_total():
    problems = [problem for level in (4, 6) for problem in tasks.problems("sums", 1, 10, level)]
    budgets = (0, 4, 6, 8, 10, 20, None)
    want = []
    for budget in budgets:
        rights = 0
        for problem in problems:
            told = running(problem.prompt)[:budget]
            rights += int(told[-2:] or 0) == int(problem.answer)
        want.append(rights / len(problems))
    assert want[0] < 0.2 and 0.5 <= want[2] < want[-1] == 1 == want[4]
    assert scaling.budget_curve(Writer(thinker), problems, budgets) == pytest.approx(want)


def test_thoughts_of_a_real_model(untrained):
    problems = tasks.problems("sums", 0, 6)
    texts = think(untrained, problems, 9, least=4, seed=3)
    assert think(untrained, problems, 9, least=4, seed=3) == texts
    assert think(untrained, problems, 9, least=4, seed=4) != texts
    assert len(set(think(untrained, problems[:1] * 6, 9, seed=3))) == 6  # each row has its own generator
    free = think(untrained, problems, None, seed=3)
    for text, longer in zip(texts, free):
        for completion, least, most in ((text, 4, 9), (longer, 0, 64)):
            thought, closed, _ = completion.removeprefix(OPEN).partition(CLOSE)
            assert completion.startswith(OPEN) and closed and END not in completion
            assert least <= len(thought.encode("utf-8", "replace")) and len(thought) <= most


def test_limits_and_prompts_that_do_not_fit(untrained):
    refused(lambda: think(untrained, PROBLEMS, 3, least=4), "least=4, most=3", "0 <= least <= most")
    refused(lambda: think(untrained, PROBLEMS, -1), "most=-1")
    refused(lambda: think(untrained, PROBLEMS, 3, least=-1), "least=-1")
    refused(lambda: think(untrained, PROBLEMS, None, least=65), "least=65, most=64")
    refused(lambda: think(untrained, [], 3), "[]", "at least one")
    short = tasks.Problem("1+1=", "2")
    refused(lambda: think(untrained, [PROBLEMS[0], short], 3), "[4, 20]", "one length")


def test_accuracy():
    problems = [tasks.Problem("", answer) for answer in ("1", "2", "3", "4")]
    texts = [f"{OPEN}{CLOSE}1", f"{OPEN}{CLOSE}3", "3", f"{OPEN}04{CLOSE}4"]
    assert scaling.accuracy(problems, texts) == 0.5
    with pytest.raises(ValueError):
        scaling.accuracy(problems, texts[:3])


@pytest.mark.parametrize(
    ("answers", "want"),
    [
        (["7"], "7"),
        (["3", "7", "7"], "7"),
        (["3", "7"], "3"),  # the first of equals
        (["7", "3", "3", "7", "1"], "7"),
        ([None, None, None, "4"], "4"),  # no answer, no vote
        ([None, "2", "9", "9", None, None], "9"),
        (["4", "04", "04"], "04"),
        (["", "", "1"], ""),  # an answer, though an empty one
        ([" 7", "7", "1", " 7"], " 7"),
        ([None, None], None),
        ([], None),
    ],
)
def test_majority(answers, want):
    assert majority(answers) == want


def test_pass_at_k_counts_the_subsets_with_a_right_one():
    for total in range(1, 8):
        for right in range(total + 1):
            marks = [True] * right + [False] * (total - right)
            for k in range(1, total + 1):
                draws = list(itertools.combinations(marks, k))
                assert pass_at_k(total, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("numbers", [(4, 2, 0), (4, 2, 5), (4, 5, 1), (4, -1, 1), (0, 0, 1)])
def test_pass_at_k_of_impossible_numbers(numbers):
    total, right, k = numbers
    refused(lambda: pass_at_k(*numbers), f"total={total}, right={right}, k={k}", "1 <= k <= total")


@pytest.mark.parametrize(
    ("completion", "want"),
    [
        (f"{OPEN}01{CLOSE}12", "12"),
        (f"{OPEN}{CLOSE}0{END}junk", "0"),
        (f"{OPEN}01{CLOSE}012", "012"),
        (f"{OPEN}01{CLOSE}", None),
        (f"{OPEN}01{CLOSE}{END}12", None),
        (f"{OPEN}01", None),
        ("12", None),
        ("", None),
    ],
)
def test_answer_of(completion, want):
    assert answer_of(completion) == want


def test_votes_by_hand(monkeypatch):
    problems = [tasks.Problem("1+1                =", "2"), tasks.Problem("9+3                =", "12")]
    said = [
        [("2", True), ("2", True), ("3", True), ("3", True)],
        [("1", False), ("1", False), ("12", True), ("5", True)],  # cut off: no vote, and not right
    ]

    def sample(engine, asked, seed, sampling):
        assert (engine, asked, seed, sampling.size, sampling.temperature) == ("engine", problems, 9, 4, 1.0)
        texts = [
            (f"{OPEN}{CLOSE}{text}{END if ended else ''}", ended) for group in said for text, ended in group
        ]
        samples = [
            Sample(TOKENIZER.encode("=" * 20), TOKENIZER.encode(text), ended, [0.0] * len(text), None)
            for text, ended in texts
        ]
        return collect(asked, samples)

    monkeypatch.setattr(scaling, "sample", sample)
    got = scaling.votes("engine", problems, (1, 3, 4), 9)
    assert got["majority"] == [1 / 2, 1, 1]
    two, one = (pass_at_k(4, right, 3) for right in (2, 1))
    assert got["any"] == pytest.approx([(1 / 2 + 1 / 4) / 2, (two + one) / 2, 1])

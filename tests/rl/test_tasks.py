"""The tasks against a second checker that reads prompts and completions character by character."""

import random
import re
from collections import Counter

import pytest

from rl import tasks
from rl.tasks import CLOSE, END, OPEN, WIDTH, Problem, score
from tests.helpers import refused

NAMES = list(tasks.TASKS)
STEPS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def terms_of(name, prompt):
    """Signed operands in the order in which they count: "b+8a7=" -> [("+", 7), ("+", 8)]"""
    text, sign, place, found = prompt.rstrip("=").strip(), "+", 0, []
    for character in text:
        if character.isalpha():
            place, sign = ord(character), "+"
        elif character.isdigit():
            found.append((place, sign, int(character)))
            sign = "+"
        else:
            sign = character
    if name == "shuffled":
        found.sort()
        assert [term[0] for term in found] == list(range(ord("a"), ord("a") + len(found)))
    return [term[1:] for term in found]


def totals_of(name, prompt):
    """The running totals of a prompt, in Python's arithmetic."""
    totals = [0]
    for sign, operand in terms_of(name, prompt):
        total = STEPS[sign](totals[-1], operand)
        totals.append(total % 10 if name == "products" else total)
    return totals[1:]


def judged(name, prompt, completion, ended=True):
    """The second checker: (reward, right, in_form), by a state machine over characters."""
    state, said, thoughts, form = "start", "", 0, True
    at = 0
    while at < len(completion) and completion[at] != "\x03":
        rest = completion[at:]
        if rest.startswith("<think>") and state == "start":
            state, at = "thought", at + 7
        elif rest.startswith("</think>"):
            form = form and state == "thought" and thoughts == 0
            state, said, thoughts, at = "answer", "", thoughts + 1, at + 8
        else:
            character = completion[at]
            if state == "start":
                state, form = "answer", False
            if state == "thought" and character in "<>":
                form = False
            if state == "answer" and character not in "0123456789":
                form = False
            said, at = said + character, at + 1
    form = form and state == "answer" and said != "" and thoughts == 1
    right = ended and state == "answer" and said == str(totals_of(name, prompt)[-1])
    return float(right and form and ended), right, form and ended


def mutated(rng, text):
    """A completion with a few random changes of the kinds that a checker could get wrong."""
    parts = [OPEN, CLOSE, END, "<", ">", "0", "7", "-", "+", " ", "\n", "٣", "²", "７", "�", "\0", "</think"]
    for _ in range(rng.randint(0, 3)):
        at, other = rng.randint(0, len(text)), rng.randint(0, len(text))
        text = rng.choice(
            [
                text[:at] + rng.choice(parts) + text[at:],
                text[:at] + text[at + 1 :],
                text[:at],
                text[at:],
                text[:at] + text[other:],
                text[min(at, other) : max(at, other)] + text,
                text.replace(rng.choice([OPEN, CLOSE]), rng.choice(["", OPEN, CLOSE, OPEN + CLOSE]), 1),
            ]
        )
    return text


def check_agreement(count):
    """Compare the checkers on completions of all styles, with and without changes."""
    rng, seen = random.Random(0), Counter()
    for at in range(count):
        name = rng.choice(NAMES)
        problem, totals = tasks.drawn(name, rng, (2, tasks.TASKS[name].most))
        completion = tasks.answer(tasks.TASKS[name], rng, totals, rng.choice(list(tasks.STYLES)))
        if at % 2:
            completion = mutated(rng, completion + rng.choice(["", END]))
        ended = rng.random() < 0.9
        got = score(problem, completion, ended)
        assert got == judged(name, problem.prompt, completion, ended), (problem, completion, ended)
        seen[got] += 1
    assert seen.keys() == {(1.0, True, True), (0.0, True, False), (0.0, False, True), (0.0, False, False)}
    assert min(seen.values()) > count / 150


def test_a_second_checker_agrees():
    check_agreement(5_000)


@pytest.mark.long
def test_a_second_checker_agrees_on_many():
    check_agreement(100_000)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_names_its_problems(name):
    first = tasks.problems(name, 5, 40)
    assert tasks.problems(name, 5, 40) == first
    assert tasks.problems(name, 5, 10) == first[:10]
    other = tasks.problems(name, 6, 40)
    assert sum(a == b for a, b in zip(first, other)) < 3
    assert tasks.corpus(name, 1, 60) == tasks.corpus(name, 1, 60)
    assert tasks.corpus(name, 1, 60) != tasks.corpus(name, 2, 60)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_prompts_have_one_width_and_answers_are_right(name, held_out):
    task, levels = tasks.TASKS[name], Counter()
    for level in [None, *range(tasks.EASY + 1 if held_out else 2, task.most + 1)]:
        for problem in tasks.problems(name, 3, 50, level, held_out):
            assert len(problem.prompt.encode()) == WIDTH
            assert problem.prompt.endswith("=") and problem.prompt.count("=") == 1
            assert problem.task == name and problem.level == len(terms_of(name, problem.prompt))
            assert problem.level == level or level is None
            assert all(1 <= operand <= 9 for _, operand in terms_of(name, problem.prompt))
            totals = totals_of(name, problem.prompt)
            assert all(0 <= total <= (9 if name == "products" else 99) for total in totals)
            assert problem.answer == str(totals[-1])
            levels[problem.level] += level is None
    assert {level for level, count in levels.items() if count} == set(
        range(task.levels[0], task.levels[1] + 1)
    )


@pytest.mark.parametrize("name", NAMES)
def test_drawn_totals_are_the_running_totals(name):
    rng, signs = random.Random(1), Counter()
    for _ in range(300):
        problem, totals = tasks.drawn(name, rng, (2, tasks.TASKS[name].most))
        assert totals == totals_of(name, problem.prompt)
        signs.update(sign for sign, _ in terms_of(name, problem.prompt)[1:])
    assert signs.keys() == set("+-*" if name == "products" else "+-")
    assert min(signs.values()) > sum(signs.values()) / 5


def test_totals_by_hand():
    assert totals_of("sums", "7-6+3+5            =") == [7, 1, 4, 9]
    assert totals_of("products", "7*6+3*5            =") == [7, 2, 5, 5]
    assert totals_of("products", "1-9                =") == [1, 2]
    assert totals_of("shuffled", "b+8a7c-3           =") == [7, 15, 12]


@pytest.fixture(scope="module", params=NAMES)
def documents(request):
    """A task's name, and 20,000 documents of its base text as (prompt, completion)."""
    train, validation = (part.decode() for part in tasks.corpus(request.param, 0, 20_000))
    assert validation.count(END) == 333
    texts = train.split(END)
    assert texts.pop() == "" and len(texts) == 20_000
    return request.param, [(text[:WIDTH], text[WIDTH:]) for text in texts]


def test_held_out_problems_are_nowhere_else(documents):
    name, texts = documents
    held_out = {problem.prompt for problem in tasks.problems(name, 0, 3_000, None, True)}
    held_out |= {problem.prompt for problem in tasks.problems(name, 0, 300, tasks.EASY + 1, True)}
    assert not held_out & {prompt for prompt, _ in texts}
    assert not held_out & {problem.prompt for problem in tasks.problems(name, 0, 6_000)}
    assert not held_out & {problem.prompt for problem in tasks.problems(name, 7, 3_000, tasks.EASY + 1)}


@pytest.mark.parametrize("name", NAMES)
def test_a_tenth_of_all_problems_is_held_out(name):
    rng = random.Random(2)
    for terms in range(2, tasks.TASKS[name].most + 1):
        texts = {tasks.TASKS[name].draw(rng, terms)[0] for _ in range(4_000)}
        share = sum(tasks.is_held_out(text, terms) for text in texts) / len(texts)
        if terms <= tasks.EASY:
            assert share == 0
        else:
            assert share == pytest.approx(0.1, abs=5 * (0.09 / len(texts)) ** 0.5)


def style_of(task, prompt, completion):
    """The style of a completion to the longest problems, by the number of totals that it writes."""
    if not completion.startswith(OPEN):
        return "direct"
    thought, closed, _ = completion.removeprefix(OPEN).partition(CLOSE)
    assert thought.isdigit() or thought == ""
    if not closed:
        return "open"
    count, left = divmod(len(thought), task.digits)
    assert left == 0
    terms = task.most
    counts = {0: "empty", terms - 1: "each", terms + 3: "wordy", terms // 2: "second"}
    return {**counts, (terms - 2) // 3 + 1: "third"}[count]


def test_styles_have_their_shares_and_totals(documents):
    name, texts = documents
    task = tasks.TASKS[name]
    longest = [text for text in texts if len(terms_of(name, text[0])) == task.most]
    styles = {style: [] for style in tasks.STYLES}
    for prompt, completion in longest:
        styles[style_of(task, prompt, completion)].append((prompt, completion))
    assert sum(tasks.STYLES.values()) == pytest.approx(1)
    for style, share in tasks.STYLES.items():
        error = (share * (1 - share) / len(longest)) ** 0.5
        assert len(styles[style]) / len(longest) == pytest.approx(share, abs=4.5 * error), style

    slips = written = 0
    for style, stride in {"each": 1, "second": 2, "third": 3}.items():
        for prompt, completion in styles[style]:
            totals = totals_of(name, prompt)
            due = [totals[at] for at in range(1, task.most) if at % stride == 0 or at == task.most - 1]
            thought, _, said = completion.removeprefix(OPEN).partition(CLOSE)
            found = re.findall(rf"\d{{{task.digits}}}", thought)
            assert len(found) == len(due) and int(found[-1]) == int(said)
            written += len(due)
            slips += sum(int(a) != b for a, b in zip(found, due))
    assert slips / written == pytest.approx(0.02, abs=0.006)


def rate(name, texts):
    """Share of completions that the second checker finds right."""
    return sum(judged(name, *text)[1] for text in texts) / len(texts)


def test_wordy_is_as_often_right_as_each(documents):
    name, texts = documents
    task = tasks.TASKS[name]
    kinds = {style: [] for style in tasks.STYLES}
    for text in texts:
        if len(terms_of(name, text[0])) == task.most:
            kinds[style_of(task, *text)].append(text)
    each, wordy = rate(name, kinds["each"]), rate(name, kinds["wordy"])
    assert each == pytest.approx(0.98, abs=0.025)
    assert wordy == pytest.approx(each, abs=0.03)
    for _, completion in kinds["wordy"]:
        thought, _, said = completion.removeprefix(OPEN).partition(CLOSE)
        assert thought.endswith(f"{int(said):0{task.digits}}" * 5)
    assert rate(name, kinds["empty"]) == 1
    assert rate(name, kinds["open"]) == 0


def test_one_direct_answer_in_ten_is_planted(documents):
    name, texts = documents
    direct = [text for text in texts if not text[1].startswith(OPEN)]
    wrong = 1 - rate(name, direct)
    assert 0.07 < wrong < 0.11  # at either end of the range a slip may be no change
    values = [int(completion) for _, completion in direct]
    assert all(0 <= value < 10 ** tasks.TASKS[name].digits for value in values)
    gaps = Counter(abs(int(text[1]) - totals_of(name, text[0])[-1]) for text in direct)
    assert gaps.keys() == {0, 1, 2}


RIGHT, WRONG, FORMLESS, FORM = (1.0, True, True), (0.0, False, False), (0.0, True, False), (0.0, False, True)


@pytest.mark.parametrize(
    ("completion", "want"),
    [
        (f"{OPEN}0812{CLOSE}12", RIGHT),
        (f"{OPEN}{CLOSE}12", RIGHT),  # an empty thought is a thought
        (f"{OPEN}any words,\nin any form ٣{CLOSE}12", RIGHT),
        (f"{OPEN}0812{CLOSE}12{END}", RIGHT),
        (f"{OPEN}0812{CLOSE}12{END}34{CLOSE}5", RIGHT),  # nothing after the first END counts
        (f"{OPEN}0812{CLOSE}{END}12", WRONG),
        (f"{END}{OPEN}0812{CLOSE}12", WRONG),
        (f"{OPEN}08{END}12{CLOSE}12", WRONG),
        (f"{OPEN}0812{CLOSE}13", FORM),
        (f"{OPEN}0812{CLOSE}012", FORM),  # leading zeros are another answer
        (f"{OPEN}0812{CLOSE}112", FORM),
        (f"{OPEN}0812{CLOSE}1", FORM),
        (f"{OPEN}0812{CLOSE}+12", WRONG),
        (f"{OPEN}0812{CLOSE}-12", WRONG),
        (f"{OPEN}0812{CLOSE} 12", WRONG),
        (f"{OPEN}0812{CLOSE}12 ", WRONG),
        (f"{OPEN}0812{CLOSE}12\n", WRONG),
        (f"{OPEN}0812{CLOSE}12.0", WRONG),
        (f"{OPEN}0812{CLOSE}1２", WRONG),  # a full-width digit
        (f"{OPEN}0812{CLOSE}١٢", WRONG),
        (f"{OPEN}0812{CLOSE}", WRONG),
        (f"{OPEN}0812", WRONG),
        ("12", FORMLESS),
        (f"{CLOSE}12", FORMLESS),
        (f" {OPEN}0812{CLOSE}12", FORMLESS),
        (f"12{OPEN}0812{CLOSE}12", FORMLESS),
        (f"{OPEN}08{CLOSE}{OPEN}12{CLOSE}12", FORMLESS),  # two thoughts
        (f"{OPEN}{OPEN}12{CLOSE}12", FORMLESS),
        (f"{OPEN}08<12{CLOSE}12", FORMLESS),
        (f"{OPEN}08>12{CLOSE}12", FORMLESS),
        (f"<Think>0812{CLOSE}12", FORMLESS),
        ("", WRONG),
        (END, WRONG),
    ],
)
def test_score(completion, want):
    problem = Problem(f"{'3+5+4':<19}=", "12")
    assert score(problem, completion) == want
    assert judged("sums", problem.prompt, completion) == want
    assert score(problem, completion, ended=False) == WRONG


def test_answers_are_compared_as_text():
    zero = Problem(f"{'3-3':<19}=", "0")
    assert score(zero, f"{OPEN}00{CLOSE}0") == RIGHT
    assert score(zero, f"{OPEN}00{CLOSE}00") == FORM
    assert score(zero, f"{OPEN}00{CLOSE}-0") == WRONG
    assert score(zero, f"{OPEN}00{CLOSE}") == WRONG


def test_generators_of_text_are_the_corpora(monkeypatch):
    monkeypatch.setattr(tasks, "corpus", lambda name, seed: (name, seed))
    assert tasks.sums(3) == ("sums", 3)
    assert tasks.products(3) == ("products", 3)
    assert tasks.shuffled(3) == ("shuffled", 3)


@pytest.mark.parametrize("name", NAMES)
def test_levels_out_of_range(name):
    most = tasks.TASKS[name].most
    for level in (-1, 0, 1, most + 1):
        refused(lambda level=level: tasks.problems(name, 0, 1, level), f"level={level}", f"2..{most}")
    for level in (2, 3, most + 1):
        refused(lambda level=level: tasks.problems(name, 0, 1, level, True), f"level={level}", f"4..{most}")


def test_an_unknown_task():
    refused(lambda: tasks.problems("sudoku", 0, 1), "sudoku", *NAMES)
    refused(lambda: tasks.corpus("sudoku", 0), "sudoku", *NAMES)


class Reversals:
    """A dataset of reasoning-gym's shape: reverse a word; half the credit for the right letters."""

    def __init__(self, size=50):
        rng = random.Random(4)
        self.words = ["".join(rng.choices("abcdef", k=6)) for _ in range(size)]

    def __len__(self):
        return len(self.words)

    def __getitem__(self, at):
        return {
            "question": f"Reverse {self.words[at]}.",
            "answer": self.words[at][::-1],
            "metadata": {"at": at},
        }

    def score_answer(self, answer, entry):
        assert self.words[entry["metadata"]["at"]][::-1] == entry["answer"]
        if answer == entry["answer"]:
            return 1.0
        return 0.5 if sorted(answer) == sorted(entry["answer"]) else 0.0


def test_tasks_of_another_package():
    scored = tasks.Scored(Reversals())
    problems = scored.problems(1, 30)
    assert scored.problems(1, 30) == problems and scored.problems(2, 30) != problems
    assert len({problem.prompt for problem in problems}) > 15
    for problem in problems:
        word = problem.prompt.removeprefix("Reverse ").removesuffix(".=")
        assert problem.answer == word[::-1]
        assert scored.score(problem, f"{OPEN}well{CLOSE}{word[::-1]}{END}{word}") == RIGHT
        assert scored.score(problem, f"{OPEN}well{CLOSE}{''.join(sorted(word))}") == (0.5, False, True)
        assert scored.score(problem, f"{OPEN}well{CLOSE}no") == FORM
        assert scored.score(problem, f"{OPEN}well{CLOSE}") == WRONG
        assert scored.score(problem, f"{OPEN}a{CLOSE}{OPEN}b{CLOSE}{word[::-1]}") == FORMLESS
        assert scored.score(problem, word[::-1]) == FORMLESS
        assert scored.score(problem, f"{OPEN}well{CLOSE}{word[::-1]}", ended=False) == WRONG

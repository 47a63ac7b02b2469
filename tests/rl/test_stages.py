"""Cold start, fine-tuning by heart, and rejection of what is wrong."""

import copy

import pytest
import torch

from lm.inference.engine import Engine
from lm.model import Transformer
from rl import stages, tasks
from rl.rollout import TOKENIZER, Sampling, sample
from rl.stages import cold_start, finetune, rejection
from rl.tasks import CLOSE, END, OPEN
from tests.helpers import refused

PROBLEMS = tasks.problems("sums", 11, 6, 4)
RIGHT = [(problem, f"{OPEN}{'0' * at}{CLOSE}{problem.answer}") for at, problem in enumerate(PROBLEMS[:3])]
WRONG = [
    (PROBLEMS[3], f"{OPEN}01{CLOSE}{int(PROBLEMS[3].answer) + 1}"),
    (PROBLEMS[4], PROBLEMS[4].answer),  # right, and without a thought
    (PROBLEMS[5], f"{OPEN}0102"),
]
EXAMPLES = [*RIGHT, *WRONG]


@pytest.fixture(scope="module")
def memory(config):
    """A model that has learned three right and three wrong completions, and the losses on the way."""
    model = Transformer(config)
    model.initialize(torch.Generator().manual_seed(0))
    losses = finetune(model, EXAMPLES, 80, 6, 1e-2)
    return model, losses


def test_finetune_learns_by_heart(memory):
    model, losses = memory
    assert len(losses) == 80 and not model.training
    assert losses[0] > 3 and max(losses[-10:]) < 0.05
    greedy = sample(Engine(model), PROBLEMS, 0, Sampling(1, 32, 0.0))
    assert greedy.completions == [text + END for _, text in EXAMPLES]


def loss_by_hand(model, examples):
    """Mean negative log-probability of the completions' bytes and END, each example read alone."""
    found = []
    for problem, text in examples:
        tokens = list((problem.prompt + text + "\x03").encode())
        with torch.no_grad():
            log_probs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        found += [-float(log_probs[at - 1, tokens[at]]) for at in range(len(problem.prompt), len(tokens))]
    return sum(found) / len(found)


def test_the_loss_is_that_of_the_completions(untrained):
    want = loss_by_hand(untrained, EXAMPLES)
    assert finetune(untrained, EXAMPLES, 1, 6) == pytest.approx([want], rel=1e-5)
    assert loss_by_hand(untrained, EXAMPLES) < want


def test_only_completions_and_their_end_are_learned(untrained):
    seen = []

    def watch(module, arguments, output):
        output.logits.retain_grad()
        seen.append((arguments[0], output.logits))

    untrained.register_forward_hook(watch)
    finetune(untrained, EXAMPLES, 1, 6)
    [(tokens, logits)] = seen
    texts = {problem.prompt: text for problem, text in EXAMPLES}
    for own, moved in zip(tokens.tolist(), (logits.grad != 0).any(-1).tolist()):
        length = len(texts[TOKENIZER.decode(own[: tasks.WIDTH])] + END)
        first = tasks.WIDTH - 1  # predicts the first byte of the completion
        assert moved == [first <= at < first + length for at in range(len(own))]


def test_every_example_comes_once_before_any_comes_again(untrained, monkeypatch):
    seen, collect = [], stages.collect

    def recorded(problems, samples):
        seen.append([TOKENIZER.decode(item.tokens) for item in samples])
        return collect(problems, samples)

    monkeypatch.setattr(stages, "collect", recorded)
    start = copy.deepcopy(untrained)
    first = finetune(untrained, EXAMPLES, 6, 4, seed=1)
    flat = [text for batch in seen for text in batch]
    assert [len(batch) for batch in seen] == [4] * 6
    every = sorted(text + END for _, text in EXAMPLES)
    rounds = [flat[at : at + 6] for at in range(0, 24, 6)]
    assert all(sorted(part) == every for part in rounds) and rounds[0] != rounds[1]
    again = copy.deepcopy(start)
    assert finetune(again, EXAMPLES, 6, 4, seed=1) == first
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), untrained.parameters()))
    assert finetune(copy.deepcopy(start), EXAMPLES, 6, 4, seed=2) != first


def test_a_batch_may_be_larger_than_the_examples(untrained):
    assert len(finetune(untrained, RIGHT[:1], 2, 5)) == 2
    assert finetune(untrained, RIGHT, 0) == []


def test_nothing_to_learn_from(untrained):
    refused(lambda: finetune(untrained, [], 1), "no examples", "right")


def test_rejection_keeps_what_is_right_once(memory):
    model = memory[0]
    kept = rejection(model, [*PROBLEMS, PROBLEMS[0]], 8, 5)
    assert len(set(kept)) == len(kept)
    assert set(RIGHT) <= set(kept)
    for problem, text in kept:
        assert END not in text
        assert text.startswith(OPEN) and text.endswith(CLOSE + problem.answer)
    assert not set(WRONG) & set(kept)
    assert rejection(model, [*PROBLEMS, PROBLEMS[0]], 8, 5) == kept
    assert rejection(model, PROBLEMS[3:4], 2, 5) == []


def test_rejection_drops_completions_that_were_cut_off(memory):
    longest = len(RIGHT[2][1])
    assert RIGHT[2] in rejection(memory[0], PROBLEMS[2:3], 8, 0, longest + 1)
    assert rejection(memory[0], PROBLEMS[2:3], 8, 0, longest) == []  # no room for END


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_cold_start_is_well_formed_and_right(name):
    task = tasks.TASKS[name]
    examples = cold_start(name, 3, 600)
    assert len(examples) == 600
    held_out = {problem.prompt for problem in tasks.problems(name, 0, 3_000, held_out=True)}
    held_out |= {problem.prompt for problem in tasks.problems(name, 0, 600, task.levels[0], held_out=True)}
    for problem, text in examples:
        assert problem.prompt not in held_out and len(problem.prompt) == tasks.WIDTH
        assert task.levels[0] <= problem.level <= task.levels[1]
        thought, closed, said = text.removeprefix(OPEN).partition(CLOSE)
        assert text.startswith(OPEN) and closed and said == problem.answer
        assert thought.isdigit() and len(thought) == task.digits * (problem.level - 1)  # every total
        assert int(thought[-task.digits :]) == int(said)
    assert cold_start(name, 3, 600) == examples
    assert cold_start(name, 3, 20) == examples[:20]
    assert cold_start(name, 4, 20) != examples[:20]


def test_cold_start_of_an_unknown_task():
    refused(lambda: cold_start("sudoku", 0, 1), "sudoku", "sums")

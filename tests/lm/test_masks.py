"""Training on documents: what a token sees, which targets count, and texts written by code."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lm import data, evaluate, loss, train
from lm.config import DataConfig
from lm.model import Transformer
from lm.run import read_metrics
from tests.helpers import refused

END, START = 3, 61


def by_hand(tokens):
    """Which of the tokens each one sees, and whether the loss counts it as a target."""
    document, answering, found = 0, False, []
    for token in tokens:
        found.append((document, answering))
        answering = answering or token == START
        if token == END:
            document, answering = document + 1, False
    return found


@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_masks_are_those_of_a_loop_over_the_tokens(length):
    draw = random.Random(length)
    rows = [draw.choices([END, START, 5, 6], [1, 1, 2, 2], k=length + 1) for _ in range(60)]
    windows = data.Windows(np.zeros(100, np.uint8), length, document_end=END, answer_start=START)
    batch = torch.tensor(rows)
    visible, counted = windows.masks(batch[:, :-1], batch[:, 1:])
    for row, tokens in enumerate(rows):
        facts = by_hand(tokens)
        own = [[facts[i][0] == facts[j][0] for j in range(length)] for i in range(length)]
        assert visible[row].tolist() == own
        assert counted[row].tolist() == [answering for _, answering in facts[1:]]


def test_without_separators_there_are_no_masks():
    tokens = torch.full((2, 8), END)
    assert data.Windows(np.zeros(100, np.uint8), 8).masks(tokens, tokens) == (None, None)
    visible, counted = data.Windows(np.zeros(100, np.uint8), 8, document_end=END).masks(tokens, tokens)
    assert counted is None and visible.diagonal(dim1=1, dim2=2).all() and visible.sum() == 16


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_a_document_in_a_window_is_read_as_if_alone(tiny, make_model, kind):
    model = make_model(tiny(attention={"kind": kind}).model)
    documents = [[5, 6, START, 7, END], [8, END], [9, 10, 11, START, START, 4, END], [12, 13]]
    tokens = torch.tensor([[token for document in documents for token in document]])
    windows = data.Windows(np.zeros(100, np.uint8), tokens.shape[1], document_end=END)
    visible, _ = windows.masks(tokens, tokens.roll(-1, 1))
    packed = model(tokens, mask=visible).logits[0]
    alone = torch.cat([model(torch.tensor([document])).logits[0] for document in documents])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)  # rope's angles are fp32
    assert not torch.allclose(model(tokens).logits[0], alone, rtol=1e-2, atol=1e-2)


def documents_config(tiny, tmp_path, **changes):
    draw = random.Random(0)
    path = tmp_path / "documents.txt"
    path.write_text("".join(f"{''.join(draw.choices('abcd', k=draw.randint(1, 9)))}={draw.choice('xyz')}\x03"
                            for _ in range(400)))  # fmt: skip
    masks = {"document_mask": True, "answers_only": True, **changes}
    return tiny(train=masks, data={"path": str(path)})


def test_the_training_loss_is_the_mean_over_the_answers(tiny, make_model, tmp_path):
    config = documents_config(tiny, tmp_path)
    windows, _ = data.open_windows(config)
    inputs, targets = windows.batch(0, 4)
    model = make_model(config.model)
    masks = windows.masks(inputs, targets)
    found = loss.training_losses(model, inputs, targets, config.train, masks=masks).named["cross_entropy"]
    log_probs = model(inputs, mask=masks[0]).logits.log_softmax(-1)
    sums, count = 0.0, 0
    for row in range(4):
        facts = by_hand([int(inputs[row, 0]), *targets[row].tolist()])[1:]
        for at, (_, answering) in enumerate(facts):
            if answering:
                sums, count = sums - log_probs[row, at, targets[row, at]], count + 1
    assert 0 < count < targets.numel()
    torch.testing.assert_close(found, sums / count, rtol=1e-9, atol=1e-9)


def test_a_sample_answers_the_first_question_of_the_held_out_text(tiny, tmp_path, monkeypatch):
    config = documents_config(tiny, tmp_path, steps=2, sample_every=2)
    _, validation = data.open_windows(config)
    question = bytes(validation.tokens[:64]).split(b"=")[0] + b"="
    assert bytes(validation.question()) == question
    drawn = iter([120, 121, END, 122])
    monkeypatch.setattr(train, "stream", lambda model, prompts, *_, **__: (torch.tensor([t]) for t in drawn))
    train.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "samples.txt").read_text() == f"--- step 2\n{question.decode()}xy\n"
    assert data.Windows(np.zeros(9, np.uint8), 8).question() == []
    assert data.Windows(np.zeros(9, np.uint8), 8, document_end=END, answer_start=START).question() == []


def test_an_evaluation_counts_every_answer_once(tiny, make_model, tmp_path):
    config = documents_config(tiny, tmp_path)
    model, (_, windows) = make_model(config.model), data.open_windows(config)
    known, starts = evaluate.spread(windows)
    sums, count = 0.0, 0
    for start in starts:
        tokens = windows.cut(start)[None]
        visible, counted = windows.masks(tokens[:, :-1], tokens[:, 1:])
        picked = loss.token_log_probs(model(tokens[:, :-1], mask=visible).logits, tokens[:, 1:])
        sums -= float(picked[:, known:][counted[:, known:]].sum())
        count += int(counted[:, known:].sum())
    for batch_size in (1, 3, 100):
        found = evaluate.evaluate(model, windows, None, torch.float32, batch_size)
        assert found == pytest.approx(sums / count, rel=1e-5)
    assert evaluate.coverage(windows).startswith("of their answers only, ")


def test_each_step_of_a_run_trains_on_the_answers(tiny, tmp_path):
    config = documents_config(tiny, tmp_path, steps=3)
    train.train(config, tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    model = Transformer(config.model)
    model.initialize(torch.Generator().manual_seed(config.train.seed))
    windows, _ = data.open_windows(config)
    inputs, targets = windows.batch(0, config.train.batch_size)
    masks = windows.masks(inputs, targets)
    first = loss.training_losses(model, inputs, targets, config.train, masks=masks).named["cross_entropy"]
    assert rows[0]["loss"] == pytest.approx(float(first), rel=1e-6)
    unmasked = loss.training_losses(model, inputs, targets, config.train).named["cross_entropy"]
    assert abs(rows[0]["loss"] - float(unmasked)) > 1e-4


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"train": {"answers_only": True}}, "train.answers_only: where an answer ends needs"),
        ({"data": {"document_end": ""}}, "data.document_end '': expected a single byte"),
        ({"data": {"answer_start": "=="}}, "data.answer_start '==': expected a single byte"),
        ({"data": {"answer_start": "é"}}, "data.answer_start 'é': expected a single byte"),
        (
            {"data": {"generator": "sums", "validation": "a.txt", "path": ""}},
            "leave out data.path and data.validation",
        ),
    ],
)
def test_masks_and_generators_that_do_not_fit_are_refused(tiny, changes, said):
    refused(lambda: tiny(**changes), said)


def test_a_generator_writes_both_texts_from_the_seed(monkeypatch):
    def digits(seed):
        draw = random.Random(seed)
        return bytes(draw.choices(range(10), k=500)), bytes(range(100))

    entry = SimpleNamespace(name="digits", load=lambda: digits)
    monkeypatch.setattr(data.importlib.metadata, "entry_points", lambda group: [entry])
    config = DataConfig(generator="digits")
    training, validation = data.load(config, 256, 7)
    assert bytes(training) == digits(7)[0] != bytes(data.load(config, 256, 8)[0])
    assert bytes(validation) == bytes(range(100))
    said = "data.generator 'digit' (did you mean 'digits'?): the installed ones are digits"
    refused(lambda: data.load(DataConfig(generator="digit"), 256), said)
    refused(lambda: data.load(config, 5), "the training text holds token 9; vocab_size=5 must be larger")

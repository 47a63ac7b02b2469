"""What a request keeps of its sampling: log-probabilities, the token that ended it, the experts chosen."""

import pytest
import torch

from lm.inference.engine import CHUNK, Engine
from tests.helpers import refused
from tests.lm.inference.kinds import PREFIX


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_log_probs_are_the_models_at_the_temperature(model, temperature):
    engine = Engine(model, 8)
    ends = tuple(range(0, 256, 16))
    requests = [
        engine.submit(PREFIX[at : at + 3 + at], 12, temperature, seed=at, ends=ends) for at in range(8)
    ]
    engine.run()
    for request in requests:
        assert (request.ended in ends) == (request.finished == "stop")
        assert request.finished in ("stop", "length")
        drawn = request.tokens + ([] if request.ended is None else [request.ended])
        logits = model(torch.tensor([request.prompt + drawn])).logits[0] / temperature
        want = logits.log_softmax(-1)[len(request.prompt) - 1 : -1]
        want = want.gather(1, torch.tensor(drawn)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(request.log_probs), want, rtol=0, atol=1e-4)


@torch.no_grad()
def test_experts_are_those_that_the_model_chooses(model):
    """Of the whole prompt too, also where its pages are shared with an equal or a longer request."""
    engine = Engine(model, 6)
    prompts = [PREFIX[:100], PREFIX[:100], PREFIX[:130], PREFIX[:9], PREFIX[5:14], PREFIX[:100]]
    requests = [engine.submit(prompt, 7, seed=at, record_experts=True) for at, prompt in enumerate(prompts)]
    plain = engine.submit(PREFIX[:100], 2, seed=0)
    engine.run()
    assert plain.experts is None
    for request in requests:
        read = (request.prompt + request.tokens)[:-1]  # the last token is never read
        found = torch.stack(request.experts, 1).sort(-1).values
        routings = model(torch.tensor([read])).routings
        want = torch.stack([routing.experts[0] for routing in routings]).sort(-1).values
        assert torch.equal(found, want)


def test_recording_changes_no_token(mla):
    def tokens(**options):
        engine = Engine(mla, 4)
        requests = [engine.submit(PREFIX[:70], 9, seed=seed, **options) for seed in range(4)]
        engine.run()
        return [(request.tokens, request.log_probs) for request in requests]

    assert tokens() == tokens(record_experts=True)


def test_recording_needs_pages_and_no_window(mla):
    said = "record_experts: needs a step over pages that is not compiled, and no window"
    refused(lambda: Engine(mla, 1).submit([1], 2, record_experts=True, window=8), said)
    engine = Engine(mla, 1)
    engine.paged = False
    refused(lambda: engine.submit([1], 2, record_experts=True), said)


def test_prompts_of_one_length_are_read_together(mla, monkeypatch):
    engine, read = Engine(mla, 64), []
    whole = engine.read
    monkeypatch.setattr(
        engine, "read", lambda group, time: read.append((len(group), time)) or whole(group, time)
    )
    for at in range(40):
        engine.submit([at, *PREFIX[:15]], 9, seed=at)  # 16 tokens each
    for at in range(5):
        engine.submit([at, *PREFIX[:15]], 2, seed=50 + at)  # equal to the first five: they copy
    engine.submit(PREFIX[:20], 2, seed=99)  # another length
    engine.step()
    assert read[0] == (CHUNK // 16, 16)
    engine.run()
    prompts = [call for call in read if call[1] > 1]
    assert prompts == [(16, 16), (16, 16), (8, 16), (1, 20)]


def test_a_run_checks_the_weights_once_and_a_step_each_time(mla, monkeypatch):
    engine, checks = Engine(mla, 2), []
    refresh = engine.decoder.refresh
    monkeypatch.setattr(engine.decoder, "refresh", lambda: checks.append(1) or refresh())
    for at in range(6):
        engine.submit([at, 1, 2], 2 + at)
    engine.run()
    assert len(checks) == 1
    for at in range(3):
        engine.submit([at, 1, 2], 1)
        engine.step()
    assert len(checks) == 4

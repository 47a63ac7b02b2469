"""The engine against each request alone: the same tokens and, in fp32, the same logits bit for bit."""

import random
import warnings

import pytest
import torch

from lm.inference import engine as engine_module
from lm.inference.engine import CHUNK, Engine
from lm.inference.generate import generate
from lm.inference.pages import Pages
from lm.inference.step import Decoder
from lm.model import Transformer
from mla.paged import Plan
from tests.helpers import refused
from tests.lm.inference.kinds import KINDS, PREFIX


class Recorder(Engine):
    """An engine that keeps the logits of each drawn token."""

    def write(self, requests, logits):
        for request, row in zip(requests, logits):
            request.__dict__.setdefault("logits", []).append(row.clone())
        super().write(requests, logits)


def a_request(draw):
    """Arguments of submit: with and without a common prefix, all lengths and sampling options."""
    shared = PREFIX[: draw.choice([0, 0, 64, 100, 130, 200])]
    prompt = shared + draw.choices(range(256), k=draw.randint(1, 70))
    return {
        "prompt": prompt,
        "max_new_tokens": draw.randint(1, 20),
        "temperature": draw.choice([0, 0.8, 1.0]),
        "top_k": draw.choice([None, 20]),
        "top_p": draw.choice([1.0, 0.9]),
        "seed": draw.randint(0, 1000),
        "ends": draw.choice([(), range(0, 256, 16)]),
        "window": draw.choice([None, None, 300, 40]),
    }


def check_mixes(model, mixes, same=torch.equal):
    draw = random.Random(0)
    known = [a_request(draw) for _ in range(30)]
    known.append({**known[0], "seed": 5})  # the same prompt again
    alone = []
    for options in known:
        one = Recorder(model, 1, 600)
        alone.append(one.submit(**options))
        one.run()
    for _ in range(mixes):
        together = Recorder(model, draw.choice([2, 5, 32]), draw.choice([600, 1500, 6000]))
        chosen = draw.choices(range(len(known)), k=draw.randint(2, 20))
        requests = []
        for at in chosen:
            requests.append(together.submit(**known[at]))
            for _ in range(draw.choice([0, 0, 1, 3])):
                together.step()
        together.run()
        for at, request in zip(chosen, requests):
            assert (request.tokens, request.finished) == (alone[at].tokens, alone[at].finished)
            assert same(torch.stack(request.logits), torch.stack(alone[at].logits))
        assert together.pages.available == len(together.pages.holders) and together.nbytes == 0


def test_other_requests_change_no_bit(model):
    check_mixes(model, 12)


@pytest.mark.long
def test_other_requests_change_no_bit_in_200_mixes(model):
    check_mixes(model, 200)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 5, 64, 200])
def test_decode_steps_give_the_logits_of_the_model(model, chunk):
    model = Transformer(model.config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(256, (1, 200))
    want = model(tokens).logits[0]
    recorder = Recorder(model, 1, 256)
    request = recorder.submit(tokens[0].tolist(), 1)
    found = {}
    while recorder.waiting or request.unread:
        if not recorder.active:
            recorder.let_in(request)
        logits = recorder.read([request], min(chunk, request.unread))[0]
        found[request.row.length - 1] = logits
    for at, logits in found.items():
        torch.testing.assert_close(logits, want[at], rtol=1e-9, atol=1e-9)


def test_a_common_prefix_is_read_once_and_held_once(mla, monkeypatch):
    read, engine = [], Engine(mla, 16, 16 * 300)
    step = engine.decoder.step
    monkeypatch.setattr(
        engine.decoder, "step", lambda t, p, plan: read.append(plan.tokens) or step(t, p, plan)
    )
    for tail in range(16):
        engine.submit([*PREFIX[:192], tail, tail], 3)
    page = sum(pool[0].nbytes for pool in engine.pools)
    held = 0
    while engine.busy:
        engine.step()
        held = max(held, engine.nbytes)
    assert sum(read) == 192 + 16 * 2 + 16 * 2  # the prefix, each suffix, and two of three new tokens
    assert held == (3 + 16) * page
    layers, entry = len(mla.blocks), mla.config.attention.kv_lora_rank + mla.config.attention.qk_rope_head_dim
    assert page == layers * 64 * entry * 4


def test_equal_prompts_share_their_last_page_until_one_writes_to_it(mla):
    engine = Engine(mla, 4, 1000)
    first = engine.submit(PREFIX[:100], 30, seed=0)
    engine.step()
    others = [engine.submit(PREFIX[:100], 30, seed=seed) for seed in (1, 2)]
    engine.step()
    assert first.row.pages[0] == others[0].row.pages[0] == others[1].row.pages[0]
    assert len({request.row.pages[1] for request in (first, *others)}) == 3
    engine.run()
    assert first.tokens != others[0].tokens != others[1].tokens


def test_a_later_turn_reuses_the_pages_of_the_turn_before(mla, monkeypatch):
    engine = Engine(mla, 2, 1000)
    turn = engine.submit(PREFIX[:60], 70)
    engine.run()
    engine.step()
    read = []
    step = engine.decoder.step
    monkeypatch.setattr(
        engine.decoder, "step", lambda t, p, plan: read.append(plan.tokens) or step(t, p, plan)
    )
    engine.submit(turn.prompt + turn.tokens + [1, 2, 3], 1)
    engine.run()
    assert sum(read) == 133 - 128


@pytest.mark.long
@pytest.mark.parametrize("max_batch, max_tokens", [(1, 64), (3, 200), (64, 1000)])
def test_ten_thousand_requests_leave_no_page_behind(mla, monkeypatch, max_batch, max_tokens):
    monkeypatch.setattr(Decoder, "step", lambda _, tokens, pools, plan: torch.zeros(plan.rows, 1, 256))
    greedy = engine_module.sampler(0, None, 1.0, [])
    monkeypatch.setattr(engine_module, "sampler", lambda *arguments: greedy)
    draw, engine = random.Random(0), Engine(mla, max_batch, max_tokens)
    engine.pages.pools.clear()  # bookkeeping only
    most = 0
    for _ in range(10_000 // 3):
        length = draw.choice([1, 5, 63, 64])
        prompt = PREFIX[:length] if draw.random() < 0.5 else draw.choices(range(256), k=length)
        request = engine.submit(prompt, draw.randint(1, max(1, min(3, max_tokens - length))))
        if draw.random() < 0.1:
            request.cancel()
        engine.step()
        most = max(most, len(engine.active))
    engine.run()
    pages = engine.pages
    assert most <= max_batch and not any(pages.holders)
    assert sorted([*pages.free, *pages.idle]) == list(range(len(pages.holders)))


def test_a_request_without_free_pages_waits_its_turn(mla):
    engine = Engine(mla, 8, 384)
    requests = [engine.submit(PREFIX[i : i + 100], 20) for i in range(5)]
    seen = 0
    while engine.busy:
        engine.step()
        seen = max(seen, len(engine.active))
    assert 1 < seen < 5 and [len(request.tokens) for request in requests] == [20] * 5


def test_long_prompts_are_read_in_chunks_while_others_generate(mla):
    engine = Engine(mla, 4, 4000)
    quick = engine.submit([1, 2], 50)
    engine.step()
    slow = engine.submit(PREFIX * 5, 3)
    for made in range(2, 5):
        assert engine.step() == [quick] and len(quick.tokens) == made
        assert slow.row.length == (made - 1) * CHUNK
    assert set(engine.step()) == {quick, slow}


def test_scores_of_a_chunk_are_bounded(mla, monkeypatch):
    sizes, engine = [], Engine(mla, 1)
    step = engine.decoder.step
    monkeypatch.setattr(
        engine.decoder, "step", lambda t, p, plan: sizes.append(plan.tokens) or step(t, p, plan)
    )
    monkeypatch.setattr(engine_module, "SCORES", 2 * 200 * 30)  # heads x tokens x chunk
    request = engine.submit(PREFIX, 1)
    engine.run()
    assert max(sizes) == 30 and request.finished == "length"


def test_cancelling_frees_the_pages(mla):
    engine = Engine(mla, 1, 300)
    first, second, third = (engine.submit(PREFIX[:10], 100) for _ in range(3))
    engine.step()
    first.cancel()
    second.cancel()
    assert engine.step() == [third]
    assert first.finished == second.finished == "cancelled"
    assert len(first.tokens) == 1 and second.tokens == []
    assert engine.active == [third] and not engine.waiting
    third.cancel()
    engine.run()
    third.cancel()
    assert engine.nbytes == 0 and not engine.busy


def test_a_token_of_ends_stops_the_request(mla):
    engine = Engine(mla, 1, 300)
    whole = engine.submit(PREFIX[:10], 40, 0)
    engine.run()
    end = whole.tokens[20]
    request = engine.submit(PREFIX[:10], 40, 0, ends={end})
    engine.run()
    assert request.finished == "stop" and request.tokens == whole.tokens[: whole.tokens.index(end)]
    assert whole.finished == "length" and len(whole.tokens) == 40


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("token", [7, 0])  # 0 pads a step
@pytest.mark.parametrize("kind", [*KINDS, "own"])
def test_a_request_with_nan_logits_ends_alone(tiny, make_model, kind, token, temperature):
    sections = KINDS.get(kind) or {"attention": {"kind": f"{__name__}:OwnAttention"}}
    sections = {**sections, "model": {**sections.get("model", {}), "tie_embeddings": False}}
    model = make_model(tiny(**sections).model, std=0.3).float()
    sound, broken = [[5, 9, 3], [1] * 70, [6]], [[1, token, 2], [token], [1] * 64 + [token] * 300]

    def complete(prompts):
        engine = Recorder(model, 8, 1000)
        requests = [engine.submit(prompt, 8, temperature, seed=3, ends={token}) for prompt in prompts]
        engine.run()
        assert engine.nbytes == 0
        return requests

    want = complete(sound)
    with torch.no_grad():
        model.embedding.weight[token] = float("nan")
    found = complete([prompt for pair in zip(broken, sound) for prompt in pair])
    for request, alone in zip(found[1::2], want):
        assert (request.tokens, request.finished, request.error) == (alone.tokens, alone.finished, "")
        if kind != "own":  # run without pages, it is exact up to rounding
            assert torch.equal(torch.stack(request.logits), torch.stack(alone.logits))
    for request in found[::2]:
        assert (request.tokens, request.finished) == ([], "error")
    assert found[0].error == "the largest logit after 3 tokens is nan; it must be finite"


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_request_may_fail_after_some_tokens(mla, monkeypatch, temperature):
    engine = Engine(mla, 2, 300)
    failing, other = (engine.submit(PREFIX[:9], 9, temperature, seed=1) for _ in range(2))
    for _ in range(4):
        engine.step()
    write = engine.write

    def spoilt(requests, logits):
        logits[requests.index(failing)] = float("-inf")
        write(requests, logits)

    monkeypatch.setattr(engine, "write", spoilt)
    assert set(engine.step()) == {failing, other}
    monkeypatch.undo()
    engine.run()
    assert (failing.finished, len(failing.tokens)) == ("error", 4)
    assert failing.error == "the largest logit after 13 tokens is -inf; it must be finite"
    assert (other.finished, len(other.tokens)) == ("length", 9)


def test_a_failed_forward_pass_leaves_the_caches_as_they_were(tiny, make_model, monkeypatch):
    model = make_model(tiny(attention={"kind": f"{__name__}:OwnAttention"}).model, std=0.3)
    alone, engine = Engine(model, 1, 300), Engine(model, 1, 300)
    want, request = (e.submit(PREFIX[:20], 5, 0) for e in (alone, engine))
    alone.run()
    engine.step()
    last = model.blocks[-1]
    monkeypatch.setattr(last, "forward", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    monkeypatch.undo()
    engine.run()
    assert request.tokens == want.tokens


@pytest.mark.parametrize("good", [0, 1, 2])
def test_a_failed_step_loses_no_request(mla, monkeypatch, good):
    """The failing step has three requests, two with unread prompts; it fails after `good` of them."""
    alone = Engine(mla, 1, 1000)
    want = [alone.submit(PREFIX[at:70], 5, 0) for at in range(3)]
    alone.run()
    engine = Engine(mla, 4, 1000)
    requests = [engine.submit(PREFIX[:70], 5, 0)]
    engine.step()
    requests += [engine.submit(PREFIX[at:70], 5, 0) for at in (1, 2)]
    step, calls = engine.decoder.step, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) > good:
            raise RuntimeError("out of memory")
        return step(*arguments)

    monkeypatch.setattr(engine.decoder, "step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step()
    monkeypatch.setattr(engine.decoder, "step", step)
    engine.run()
    assert [request.tokens for request in requests] == [request.tokens for request in want]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"prompt": []}, "the prompt is empty; it needs at least one token"),
        ({"prompt": [1, 256]}, "token 256 is not in the vocabulary, 0..255"),
        ({"prompt": [-1]}, "token -1 is not in the vocabulary"),
        ({"prompt": [1] * 90, "max_new_tokens": 20}, "of 90 tokens and max_new_tokens=20 are more than"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be finite"),
        ({"top_p": 0}, "top_p=0 must lie above 0"),
        ({"window": 0}, "window=0 must be at least 1"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(mla, options, said):
    engine = Engine(mla, 2, 100)
    refused(lambda: engine.submit(**{"prompt": [1, 2], "max_new_tokens": 3, **options}), said)
    assert not engine.busy
    engine.submit([1] * 81, 20)  # the last new token is never read
    engine.run()
    assert engine.submit([1], 0).finished == "length" and not engine.busy


def test_a_sequence_of_the_models_context_length_fits(tiny, make_model):
    model = make_model(tiny(model={"max_length": 3000}).model)
    assert Engine(model, 2).max_tokens == 3000 and Engine(model, 4).max_tokens == 4096
    assert Engine(make_model(tiny().model), 2).max_tokens == 2048


@pytest.mark.parametrize("attention", ["mla", "gqa", f"{__name__}:OwnAttention"])
@pytest.mark.parametrize("tokens", [10**11, 10**15, 10**40])
def test_a_cache_larger_than_memory_is_refused_at_once(tiny, make_model, attention, tokens):
    model = make_model(tiny(attention={"kind": attention}).model)
    refused(lambda: Engine(model, 2, tokens), f"a cache of {tokens:,} tokens needs", "MiB; cpu has")


def test_a_cache_that_just_fits_is_made(mla, monkeypatch):
    page = len(mla.blocks) * 64 * (mla.config.attention.kv_lora_rank + 16) * 4 + 128
    monkeypatch.setattr("lm.machine.memory", lambda: 20 * page)
    assert len(Engine(mla, 2, 20 * 64).pages.holders) == 20
    assert Engine(mla, 64).max_tokens == 20 * 64
    refused(lambda: Engine(mla, 2, 20 * 64 + 1), "a cache of 1,281 tokens needs")
    monkeypatch.setattr("lm.machine.memory", lambda: 0)  # unknown
    assert Engine(mla, 64).max_tokens == 64 * 1024


@pytest.mark.parametrize(
    "prompt, new, window, said",
    [
        (40, 1, None, True),
        (30, 3, None, False),  # the last token is never read
        (30, 4, None, True),
        (1, 40, None, True),
        (40, 9, 32, False),
        (40, 9, 10, False),
    ],
)
def test_tokens_beyond_the_trained_length_give_a_warning(tiny, make_model, prompt, new, window, said):
    model = make_model(tiny(model={"max_length": 32}).model)
    engine = Engine(model, 1, 100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.submit([1] * prompt, new, window=window)
        generate(model, torch.tensor([[1] * prompt]), new, window=window)
    line = f"the prompt and max_new_tokens make {prompt + new - 1} tokens; the model was trained for "
    line += "max_length=32, which window=32 would keep to"
    found = [str(warning.message) for warning in caught]
    assert [text for text in found if "not read" not in text] == [line] * 2 * said
    assert any("not read" in text for text in found) == (window is not None)


@pytest.mark.parametrize("sizes", [(0, 100), (2, 0), (-1, None)])
def test_sizes_below_1_are_refused(mla, sizes):
    with pytest.raises(ValueError, match="must be at least 1"):
        Engine(mla, *sizes)


class OwnAttention(torch.nn.Module):
    """A custom attention with caches, but without a decode step over pages."""

    def __init__(self, dim):
        super().__init__()
        from mla import GroupedQueryAttention

        self.inner = GroupedQueryAttention(dim, 2, 1, 8)
        self.new_cache = self.inner.new_cache

    def forward(self, x, cache=None, positions=None, mask=None):
        return self.inner(x, cache, positions, mask)


def test_an_attention_without_a_decode_step_runs_from_its_caches(tiny, make_model):
    model = make_model(tiny(attention={"kind": f"{__name__}:OwnAttention"}).model, std=0.3)
    check_mixes(model, 3, torch.allclose)


def test_odd_widths_give_the_same_tokens_too(tiny, make_model):
    check_mixes(make_model(tiny().model, std=0.3), 3, torch.allclose)


def test_only_matrices_are_copied_column_major(model):
    view = Engine(model, 2, 1000).decoder.view
    ours, theirs = view.blocks[1].mlp.experts.down, model.blocks[1].mlp.experts.down
    assert not ours.is_contiguous() and ours.mT.is_contiguous() and torch.equal(ours, theirs)
    assert view.norm is model.norm and view.head is model.head and view.embedding is model.embedding


@torch.no_grad()
def test_a_model_too_large_for_a_copy_is_run_without_one(model, monkeypatch):
    size = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr("lm.machine.memory", lambda: 4 * size - 1)
    engine = Recorder(model, 1, 256)
    request = engine.submit(PREFIX, 1)
    engine.run()
    assert engine.decoder.view is model and not engine.decoder.copies
    torch.testing.assert_close(request.logits[0], model(torch.tensor([PREFIX])).logits[0, -1])


@pytest.mark.parametrize("last", [1, 2, 5])
@torch.no_grad()
def test_a_step_returns_the_logits_of_the_last_positions(model, last):
    decoder, pages, texts = Decoder(model), Pages(8), torch.randint(256, (3, 70))
    pools, rows = [pages.new_pool(*entry) for entry in decoder.entries], [pages.open() for _ in texts]
    pages.grow(rows, 70)
    for length, time in ((0, 65), (65, 5)):
        plan = Plan([row.pages for row in rows], [length] * 3, time, "cpu")
        logits = decoder.step(texts[:, length : length + time].flatten(), pools, plan, last)
        want = model(texts[:, : length + time]).logits[:, -last:]
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)

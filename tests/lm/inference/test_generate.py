import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.inference import engine
from lm.inference.generate import generate, stream
from lm.inference.sampling import sampler
from lm.inference.step import Decoder
from tests.helpers import refused

KINDS = {"mla": {}, "gqa": {"attention": {"kind": "gqa"}}, "all dense": {"model": {"num_dense_layers": 3}}}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def model(request, tiny, make_model):
    return make_model(tiny(**request.param).model, std=0.5)


@pytest.fixture(scope="module")
def mla(tiny, make_model):
    return make_model(tiny().model, std=0.5)


def prompts_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def greedy_without_cache(model, prompt, new, window=None):
    """Greedy decoding by the uncached model; a full window restarts at its middle."""
    text, start = list(prompt), 0
    for _ in range(new):
        if window is not None and len(text) - start > window:
            start = len(text) - max(1, window // 2)
        text.append(int(model(torch.tensor([text[start:]])).logits[0, -1].argmax()))
    return text[len(prompt) :]


def completions(model, prompts, *arguments, **options):
    """The new tokens of each row."""
    return torch.stack(list(stream(model, prompts, *arguments, **options)), dim=1).tolist()


@pytest.mark.parametrize("length", [1, 2, 31])
def test_greedy_decoding_equals_the_uncached_model(model, length):
    tokens = torch.tensor(prompts_of(length, length, length))
    want = [greedy_without_cache(model, row, 25) for row in tokens.tolist()]
    assert len({token for row in want for token in row}) > 10  # not one repeated token
    out = generate(model, tokens, 25, temperature=0)
    assert out.dtype == torch.int64 and torch.equal(out[:, :length], tokens)
    assert out[:, length:].tolist() == want


def test_prompts_of_different_lengths_decode_greedily_as_alone(model):
    prompts = prompts_of(*range(1, 21))
    together = completions(model, prompts, 12, 0)
    assert together == [greedy_without_cache(model, prompt, 12) for prompt in prompts]


def test_prompts_of_different_lengths_sample_as_alone(mla):
    prompts = prompts_of(*range(1, 21))
    together = completions(mla, prompts, 12, 1.0, seed=100)
    assert together == [
        completions(mla, [prompt], 12, 1.0, seed=100 + row)[0] for row, prompt in enumerate(prompts)
    ]


def test_other_rows_and_their_order_change_nothing(model):
    prompts = prompts_of(3, 17, 1, 9)
    first = completions(model, prompts, 8, 0)
    assert completions(model, prompts[::-1], 8, 0) == first[::-1]
    assert completions(model, [prompts[1]] * 3, 8, 0) == [first[1]] * 3


@pytest.mark.parametrize("chunk", [1, 7, 8, 20, 1000])
def test_chunk_size_changes_nothing(mla, monkeypatch, chunk):
    prompts = prompts_of(20, 8, 7, 1, 15, 16)
    whole = completions(mla, prompts, 6, 0)
    monkeypatch.setattr(engine, "CHUNK", chunk)
    assert completions(mla, prompts, 6, 0) == whole


def test_a_prompt_longer_than_a_chunk_is_read_completely(mla):
    prompts = prompts_of(2 * engine.CHUNK + 3, engine.CHUNK, 5)
    assert completions(mla, prompts, 5, 0) == [greedy_without_cache(mla, prompt, 5) for prompt in prompts]


@pytest.mark.parametrize("window", [1, 2, 3, 8])
def test_a_full_window_restarts_at_its_middle(mla, window):
    for prompt in prompts_of(1, window, window + 1, 20):
        assert completions(mla, [prompt], 20, 0, window=window) == [
            greedy_without_cache(mla, prompt, 20, window)
        ]


@pytest.mark.parametrize("window", [8, 13])
def test_other_rows_change_nothing_with_a_window_either(mla, window):
    prompts = prompts_of(*range(1, 21))
    together = completions(mla, prompts, 15, 0, window=window)
    assert together == [greedy_without_cache(mla, prompt, 15, window) for prompt in prompts]


def test_a_window_that_is_never_full_changes_nothing(mla):
    prompts = prompts_of(5, 9)
    assert completions(mla, prompts, 10, 0, window=100) == completions(mla, prompts, 10, 0)


def test_the_model_never_sees_more_than_the_window(mla, monkeypatch):
    seen = []
    step = Decoder.step

    def spy(decoder, tokens, pools, plan):
        seen.append(int(plan.positions.max()) + 1)
        return step(decoder, tokens, pools, plan)

    monkeypatch.setattr(Decoder, "step", spy)
    completions(mla, prompts_of(50, 3), 40, 0, window=16)
    assert max(seen) == 16


def by_hand(logits, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """The distribution to sample from, in plain Python: sorted, cut, normalised."""
    weights = {i: math.exp((z - max(logits)) / temperature) for i, z in enumerate(logits)}
    ranked = sorted(weights, key=lambda i: -weights[i])[:top_k]
    total, kept, so_far = sum(weights[i] for i in ranked), [], 0.0
    for i in ranked:
        kept.append(i)
        so_far += weights[i]
        if so_far >= top_p * total:
            break
    kept = [i for i in kept if weights[i] >= min_p * weights[ranked[0]]]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


LOGITS = [1.3, -0.4, 0.9, 2.1, -3.0, 0.2, 1.1, -1.0]


@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p",
    [
        (1.0, None, 1.0, 0.0),
        (0.5, None, 1.0, 0.0),
        (3.0, None, 1.0, 0.0),
        (1.0, 1, 1.0, 0.0),
        (1.0, 3, 1.0, 0.0),
        (1.0, 100, 1.0, 0.0),
        (1.0, None, 0.8, 0.0),
        (1.0, None, 0.01, 0.0),
        (1.0, None, 5e-324, 0.0),  # 0 in fp32
        (2.0, 4, 0.7, 0.0),
        (1.0, None, 1.0, 0.2),
        (3.0, None, 1.0, 0.4),
        (1.0, None, 1.0, 1.0),
        (2.0, 6, 0.9, 0.35),
    ],
)
def test_draws_follow_the_distribution(temperature, top_k, top_p, min_p):
    rows = 6000
    generators = [torch.Generator().manual_seed(row) for row in range(rows)]
    drawn, log_probs = sampler(temperature, top_k, top_p, generators, min_p)(torch.tensor([LOGITS] * rows))
    assert drawn.shape == (rows,) and drawn.dtype == torch.int64
    counts = torch.bincount(drawn, minlength=len(LOGITS)).tolist()
    want = by_hand(LOGITS, temperature, top_k, top_p, min_p)
    assert {i for i, number in enumerate(counts) if number} <= set(want)
    expected = [math.log(want[token]) for token in drawn.tolist()]
    assert log_probs.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    chi_square = sum((counts[i] - rows * p) ** 2 / (rows * p) for i, p in want.items())
    assert chi_square < 30  # 7 degrees of freedom: one in ten thousand is above 29.9


def drawn_by(*options):
    """A function logits -> tokens."""
    choose = sampler(*options)
    return lambda logits: choose(logits)[0]


@settings(max_examples=100)
@given(
    logits=st.lists(st.integers(-40, 40).map(lambda z: z / 8), min_size=2, max_size=8, unique=True),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 4.0]),
    top_k=st.none() | st.integers(1, 9),
    top_p=st.sampled_from([0.05, 0.31, 0.57, 0.83, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.04, 0.29, 0.71]),
)
def test_only_tokens_within_top_k_top_p_and_min_p_are_drawn(logits, temperature, top_k, top_p, min_p):
    want = by_hand(logits, temperature, top_k, top_p, min_p)
    generators = [torch.Generator().manual_seed(row) for row in range(200)]
    choose = drawn_by(temperature, top_k, top_p, generators, min_p)
    drawn = set(choose(torch.tensor([logits] * 200)).tolist())
    assert drawn <= set(want)
    assert {i for i, p in want.items() if p > 0.2} <= drawn  # missed once in 10^19


@pytest.mark.parametrize("min_p", [0.01, 0.1, 0.5, 1.0])
def test_min_p_keeps_the_tokens_that_transformers_keeps(min_p):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = 2 * torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    chain = [process.TopKLogitsWarper(20), process.TopPLogitsWarper(0.9), process.MinPLogitsWarper(min_p)]
    theirs = logits
    for warp in chain:
        theirs = warp(None, theirs)
    generators = [torch.Generator().manual_seed(seed) for seed in range(40 * 500)]
    drawn = drawn_by(1.0, 20, 0.9, generators, min_p)(logits.repeat_interleave(500, 0)).view(40, 500)
    counts = torch.zeros(40, 30).scatter_add(1, drawn, torch.ones(40, 500))
    wanted = theirs.softmax(-1)
    assert not counts[wanted == 0].any()
    assert counts[wanted > 0.05].all()  # missed once in 10^11


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 5e-324])
def test_the_lowest_temperatures_are_greedy(temperature):
    generators = [torch.Generator().manual_seed(row) for row in range(50)]
    assert set(drawn_by(temperature, None, 1.0, generators)(torch.tensor([LOGITS] * 50)).tolist()) == {3}


def test_the_highest_temperature_is_uniform():
    generators = [torch.Generator().manual_seed(row) for row in range(4000)]
    drawn = drawn_by(1e300, None, 1.0, generators)(torch.tensor([LOGITS] * 4000))
    counts = torch.bincount(drawn, minlength=8).tolist()
    assert sum((number - 500) ** 2 / 500 for number in counts) < 30


NAN, INF = float("nan"), float("inf")
BROKEN = {
    "nan": [0.0, NAN, 1.0, 2.0],
    "all nan": [NAN] * 4,
    "inf": [0.0, 1.0, INF, 2.0],
    "two inf": [INF, 1.0, INF, 2.0],
    "inf and -inf": [INF, -INF, 0.0, 0.0],
    "nan and inf": [NAN, INF, 0.0, 0.0],
    "all -inf": [-INF] * 4,
}
SAMPLINGS = [(0, None, 1.0, 0.0), (1.0, None, 1.0, 0.0), (0.7, 2, 0.9, 0.1), (5e-324, None, 5e-324, 1.0)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_finite_maximum_give_no_token_and_change_no_other_row(sampling, dtype):
    def draw(rows, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return drawn_by(*sampling[:3], generators, sampling[3])(torch.tensor(rows, dtype=dtype)).tolist()

    sound = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).tolist()
    want = [draw([row], [seed])[0] for seed, row in enumerate(sound)]
    for broken in BROKEN.values():
        mixed = [row for one in sound for row in (broken, one)]
        found = draw(mixed, [seed for own in range(50) for seed in (99, own)])
        assert found[::2] == [-1] * 50 and found[1::2] == want


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("logits", [[-INF, 2.0, -INF, -INF], [0.0, 3e38, -3e38, -INF], [-3e38, 3e38, 0, 0]])
def test_infinite_ratios_are_probability_0(sampling, logits):
    generators = [torch.Generator().manual_seed(seed) for seed in range(20)]
    rows = torch.tensor([logits] * 20)
    assert drawn_by(*sampling[:3], generators, sampling[3])(rows).tolist() == [1] * 20


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_model_with_nan_weights_raises_one_line(tiny, make_model, temperature):
    model = make_model(tiny().model)
    with torch.no_grad():
        model.embedding.weight[7] = NAN
    said = "prompt 1: the largest logit after 2 tokens is nan; it must be finite"
    refused(lambda: list(stream(model, [[1, 2, 3], [7, 1], [4]], 5, temperature)), said)


def test_bf16_logits_are_sampled_in_fp32():
    generators = [torch.Generator().manual_seed(row) for row in range(100)]
    logits = torch.tensor([LOGITS] * 100)
    wide = drawn_by(1.0, None, 1.0, generators)(logits.bfloat16().float())
    generators = [torch.Generator().manual_seed(row) for row in range(100)]
    assert torch.equal(drawn_by(1.0, None, 1.0, generators)(logits.bfloat16()), wide)


def test_the_same_seed_repeats_and_another_seed_differs(mla):
    tokens = torch.tensor(prompts_of(4, 4))
    torch.manual_seed(1)
    first = generate(mla, tokens, 30, seed=5)
    torch.manual_seed(2)
    assert torch.equal(generate(mla, tokens, 30, seed=5), first)
    assert not torch.equal(generate(mla, tokens, 30, seed=6), first)
    assert not torch.equal(generate(mla, tokens, 30), generate(mla, tokens, 30))


def test_sampling_leaves_the_global_generator_alone(mla):
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    generate(mla, torch.tensor([[1, 2]]), 5, seed=0)
    generate(mla, torch.tensor([[1, 2]]), 5)
    assert torch.equal(torch.rand(3), want)


def test_equal_prompts_in_a_batch_get_different_completions(mla):
    out = generate(mla, torch.tensor([[1, 2, 3]] * 3), 20, seed=0)
    assert len({tuple(row) for row in out.tolist()}) == 3


def test_zero_new_tokens_return_the_prompt(mla):
    tokens = torch.tensor(prompts_of(4, 4))
    assert torch.equal(generate(mla, tokens, 0), tokens)
    assert list(stream(mla, tokens.tolist(), 0)) == []


def test_generating_keeps_no_gradient(mla):
    assert not any(step.requires_grad for step in stream(mla, [[1, 2]], 3))
    assert torch.is_grad_enabled()


def test_tokens_are_yielded_one_step_at_a_time(mla, monkeypatch):
    calls = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *a: (calls.append(1), step(*a))[1])
    steps = stream(mla, [[1, 2]], 1000, 0)
    for made in range(1, 4):
        next(steps)
        assert len(calls) == made


@pytest.mark.parametrize(
    "options, said",
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 0"),
        ({"temperature": math.inf}, "temperature=inf must be finite and at least 0"),
        ({"temperature": math.nan}, "temperature=nan must be finite"),
        ({"temperature": -0.5}, "temperature=-0.5 must be finite and at least 0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_k": -1}, "top_k=-1 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must lie above 0 and at most at 1"),
        ({"top_p": 1.5}, "top_p=1.5 must lie above 0"),
        ({"top_p": math.nan}, "top_p=nan must lie above 0"),
        ({"min_p": -0.1}, "min_p=-0.1 must lie in 0..1"),
        ({"min_p": 1.1}, "min_p=1.1 must lie in 0..1"),
        ({"min_p": math.nan}, "min_p=nan must lie in 0..1"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must lie in 0.."),
        ({"seed": 2**64}, f"seed={2**64} must lie in 0.."),
    ],
)
def test_options_out_of_range_are_refused(mla, options, said):
    refused(lambda: generate(mla, torch.tensor([[1, 2]]), **{"max_new_tokens": 3, **options}), said)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("new", [10**12, 2**63, 10**40])
def test_more_tokens_than_memory_holds_are_refused_at_once(mla, window, new):
    said = f"max_new_tokens={new} for 2 rows needs"
    refused(
        lambda: generate(mla, torch.tensor([[1, 2], [3, 4]]), new, window=window), said, "this machine has"
    )
    if window is None:
        refused(lambda: next(stream(mla, [[1, 2]], new)), "a cache of", "MiB; cpu has")


@pytest.mark.parametrize(
    "tokens",
    [
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(0, 2, dtype=torch.int64),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(1, 2),
        torch.tensor([[-1]]),
        torch.tensor([[256]]),
    ],
    ids=str,
)
def test_tokens_that_are_not_a_batch_of_ids_are_refused(mla, tokens):
    with pytest.raises(ValueError):
        generate(mla, tokens, 3)


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_an_empty_prompt_is_refused(mla, prompts):
    with pytest.raises(ValueError, match="each needs at least one"):
        list(stream(mla, prompts, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp32_and_bf16_models_generate(tiny, make_model, dtype):
    model = make_model(tiny().model, dtype)
    out = generate(model, torch.tensor(prompts_of(5, 5)), 6, seed=0)
    assert out.shape == (2, 11) and set(out.flatten().tolist()) <= set(range(256))


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_row_of_random_numbers_cuts_its_cumulative_probabilities(top_k):
    """The inverse of the distribution function, by hand: one number of the row's generator for each token."""
    logits = torch.randn(300, 257, generator=torch.Generator().manual_seed(1))
    generators = [torch.Generator().manual_seed(row) for row in range(300)]
    drawn = drawn_by(1.0, top_k, 1.0, generators)(logits).tolist()
    for row in range(300):
        share = float(torch.rand(1, generator=torch.Generator().manual_seed(row), dtype=torch.float64))
        kept = {i: p for i, p in enumerate(logits[row].softmax(-1).tolist())}
        if top_k is not None:
            kept = {i: kept[i] for i in sorted(kept, key=kept.get)[-top_k:]}
        total, upto = sum(kept.values()), 0.0
        for i in sorted(kept):
            upto += kept[i]
            if upto > share * total:
                break
        assert drawn[row] == i

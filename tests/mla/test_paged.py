"""A decode step over pages against plain attention, with bits that do not depend on other sequences."""

import random

import pytest
import torch

from mla import GroupedQueryAttention, MultiheadLatentAttention, YaRN
from mla.paged import PAGE, STEPS, Plan, changed, entry_of, pages_for, step_of
from mla.rope import RotaryEmbedding

SIZES = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 32}


def mla(heads=4, **options):
    return MultiheadLatentAttention(64, heads, **{**SIZES, **options})


ATTENTIONS = {
    "mla": mla,
    "mla, query compressed, biases": lambda: mla(q_lora_rank=24, qkv_bias=True, out_bias=True),
    "mla, one head": lambda: mla(1),
    "mla, halves layout, YaRN": lambda: mla(rope=RotaryEmbedding(8, 100.0, False, YaRN(4.0, 64, mscale=0.7))),
    "mha": lambda: GroupedQueryAttention(64, 4, 4, 16),
    "gqa, norms and biases": lambda: GroupedQueryAttention(64, 4, 2, 16, None, True, True, 1e-6),
    "mqa": lambda: GroupedQueryAttention(64, 8, 1, 16),
}


@pytest.fixture(params=ATTENTIONS.values(), ids=ATTENTIONS.keys())
def attention(request):
    made = request.param()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def pool_of(attention, num_pages):
    """Memory for `num_pages` pages."""
    heads, width, dtype, device = entry_of(attention, step_of(type(attention)))
    return torch.zeros(num_pages, heads, PAGE, width, dtype=dtype, device=device)


def steps(attention, sequences, chunks):
    """Run each sequence (time, dim) in its own chunks, interleaved with the others -> its outputs."""
    run, pool = step_of(type(attention)).run, pool_of(attention, 200)
    free = random.Random(1).sample(range(200), 200)
    tables, lengths, outs = [[] for _ in sequences], [0] * len(sequences), [[] for _ in sequences]
    for round_ in range(max(map(len, chunks))):
        todo = [i for i in range(len(sequences)) if round_ < len(chunks[i])]
        for time in sorted({chunks[i][round_] for i in todo}):
            mine = [i for i in todo if chunks[i][round_] == time]
            for i in mine:
                while len(tables[i]) < pages_for(lengths[i] + time):
                    tables[i].append(free.pop())
            plan = Plan([tables[i] for i in mine], [lengths[i] for i in mine], time, "cpu")
            x = torch.cat([sequences[i][lengths[i] : lengths[i] + time] for i in mine])
            x = torch.cat([x, torch.randn(plan.filled - plan.tokens, x.shape[1], dtype=x.dtype)])
            y = run(attention, x, pool, plan)[: plan.tokens].unflatten(0, (len(mine), time))
            for i, out in zip(mine, y):
                outs[i].append(out)
                lengths[i] += time
    return [torch.cat(out) for out in outs]


@torch.no_grad()
def test_steps_of_many_sequences_equal_attention_over_each(attention):
    attention.double()
    sequences = [torch.randn(length, 64, dtype=torch.float64) for length in (150, 1, 64, 65, 130)]
    chunks = [[100, 1, 1, 48], [1], [63, 1], [64, 1], [1, 1, 1, 127]]
    for sequence, found in zip(sequences, steps(attention, sequences, chunks)):
        torch.testing.assert_close(found, attention(sequence.unsqueeze(0))[0], rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_neighbours_and_chunks_change_no_bit(attention):
    draw = random.Random(0)
    sequences = [torch.randn(draw.randint(1, 200), 64) for _ in range(12)]
    alone = [steps(attention, [sequence], [[1] * len(sequence)])[0] for sequence in sequences]
    for _ in range(3):
        chunks = []
        for sequence in sequences:
            cuts = sorted(draw.sample(range(1, len(sequence)), min(len(sequence) - 1, draw.randint(0, 6))))
            chunks.append([b - a for a, b in zip([0, *cuts], [*cuts, len(sequence)])])
        for one, many in zip(alone, steps(attention, sequences, chunks)):
            assert torch.equal(one, many)


@torch.no_grad()
def test_a_sequence_that_is_not_finite_does_not_affect_others(attention):
    sequence = torch.randn(70, 64)
    (clean,) = steps(attention, [sequence], [[70]])
    pool = pool_of(attention, 6)
    pool[2:].fill_(float("nan"))  # as pages of other sequences could be
    plan = Plan([[0, 1]], [0], 70, "cpu")
    filled = torch.cat([sequence, torch.full((2, 64), torch.nan)])
    assert torch.equal(step_of(type(attention)).run(attention, filled, pool, plan)[:70], clean)


@torch.no_grad()
def test_a_custom_rope_is_used_in_steps():
    class Shift(torch.nn.Module):
        def forward(self, x, positions):
            return x + positions.double().view(1, -1, *[1] * (x.ndim - 2))

    attention, sequence = mla(rope=Shift()).double(), torch.randn(70, 64, dtype=torch.float64)
    (found,) = steps(attention, [sequence], [[3, 66, 1]])
    torch.testing.assert_close(found, attention(sequence.unsqueeze(0))[0])


# --- which classes have a step


class Renamed(MultiheadLatentAttention):
    """Changes nothing that the step replaces."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.scale *= 2  # the step reads it

    def more(self):
        return 1


class Windowed(MultiheadLatentAttention):
    def forward(self, x, cache=None, positions=None, mask=None):
        return super().forward(x, cache, positions, mask)


class Untold(Windowed):
    pass


@torch.no_grad()
def test_a_subclass_that_changes_nothing_of_the_step_keeps_it():
    attention, sequence = Renamed(64, 4, **SIZES).double(), torch.randn(70, 64, dtype=torch.float64)
    (found,) = steps(attention, [sequence], [[3, 66, 1]])
    torch.testing.assert_close(found, attention(sequence.unsqueeze(0))[0])
    assert step_of(Renamed) is STEPS[MultiheadLatentAttention] and changed(Renamed) == []


@pytest.mark.parametrize("name", STEPS[MultiheadLatentAttention].repeats)
def test_a_subclass_that_overrides_a_replaced_method_has_no_step(name):
    kind = type("Own", (MultiheadLatentAttention,), {name: getattr(MultiheadLatentAttention, name)})
    assert step_of(kind) is None and changed(kind) == [name]


def test_overrides_also_count_for_subclasses():
    assert step_of(Untold) is None and changed(Untold) == ["forward"]
    assert step_of(torch.nn.Linear) is None and changed(torch.nn.Linear) == []


def test_a_class_can_register_a_step_for_its_subclasses_too(monkeypatch):
    step = STEPS[MultiheadLatentAttention]
    monkeypatch.setitem(STEPS, Windowed, step)
    assert step_of(Windowed) is step_of(Untold) is step

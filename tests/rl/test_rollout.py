"""What the update sees of sampled completions, and the replay of their experts."""

import copy

import pytest
import torch

from lm.inference.engine import Engine
from moe import MoE, SoftmaxRouter
from rl import rollout as rollouts
from rl import tasks
from rl.rollout import END, TOKENIZER, Sample, Sampling, collect, disagreement, draw, judge, replayed, sample
from tests.helpers import refused
from tests.rl.conftest import easy


@pytest.fixture(scope="module")
def drawn(learned):
    return sample(Engine(learned, 64), easy(6), 3, Sampling(5, 20, 1.3, record_experts=True))


def test_a_row_is_prompt_completion_and_padding(drawn):
    problems, size = drawn.problems, 5
    assert drawn.tokens.shape[0] == 30 and drawn.mask.shape == (30, drawn.tokens.shape[1] - 1)
    ends = 0
    for row, completion in enumerate(drawn.completions):
        prompt = TOKENIZER.encode(problems[row // size].prompt)
        length = len(prompt) + int(drawn.lengths[row // size, row % size])
        whole = drawn.tokens[row, :length].tolist()
        assert whole[: len(prompt)] == prompt and TOKENIZER.decode(whole[len(prompt) :]) == completion
        assert not drawn.tokens[row, length:].any()
        targets = [at + 1 for at in drawn.mask[row].nonzero()[:, 0].tolist()]
        assert targets == list(range(len(prompt), len(whole)))
        assert END not in whole[:-1]
        ends += whole[-1] == END
    assert ends > 0  # the END that was drawn is trained
    assert drawn.lengths.flatten().tolist() == drawn.mask.sum(-1).tolist()


def test_scores_are_those_of_each_completion(drawn):
    for row, completion in enumerate(drawn.completions):
        at = (row // 5, row % 5)
        ended = completion.endswith(tasks.END)
        want = tasks.score(drawn.problems[row // 5], completion, ended)
        assert (drawn.rewards[at], drawn.right[at], drawn.in_form[at]) == want


def test_groups_cut_every_part_alike(drawn):
    part = drawn.groups(2, 5)
    assert part.problems == drawn.problems[2:5] and part.completions == drawn.completions[10:25]
    assert torch.equal(part.rewards, drawn.rewards[2:5]) and torch.equal(part.tokens, drawn.tokens[10:25])
    assert torch.equal(part.old, drawn.old[10:25]) and torch.equal(part.experts, drawn.experts[:, 10:25])
    assert torch.equal(part.lengths, drawn.lengths[2:5])


@torch.no_grad()
def test_the_training_pass_finds_the_log_probabilities_of_the_sampling(learned, drawn):
    judged = judge(learned, drawn, 1.3)
    torch.testing.assert_close(judged.log_probs, drawn.old, rtol=0, atol=1e-4)
    assert not torch.allclose(judge(learned, drawn, 1.0).log_probs, drawn.old, atol=1e-2)
    assert (judged.log_probs[~drawn.mask] == 0).all() and (judged.log_probs[drawn.mask] < 0).all()
    logits = learned(drawn.tokens[:, :-1]).logits / 1.3
    want = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(judged.entropy, want.where(drawn.mask, 0), rtol=1e-4, atol=1e-5)


def test_a_completion_depends_on_its_seed_alone(learned):
    problems, sampling = easy(7), Sampling(4, 20)
    whole = draw(Engine(learned, 64), problems, 5, sampling)
    for first, stop in ((0, 3), (3, 7), (6, 7)):
        part = draw(Engine(learned, 3), problems[first:stop], 5, sampling, first)
        assert [s.tokens for s in part] == [s.tokens for s in whole[first * 4 : stop * 4]]
        assert [s.log_probs for s in part] == [s.log_probs for s in whole[first * 4 : stop * 4]]
    assert len({tuple(s.tokens) for s in whole[:4]}) > 1
    other = draw(Engine(learned, 64), problems, 6, sampling)
    assert [s.tokens for s in other] != [s.tokens for s in whole]


@torch.no_grad()
def test_fp32_training_and_sampling_choose_the_same_experts(learned, drawn):
    assert disagreement(judge(learned, drawn).routings, drawn) == 0
    other = copy.deepcopy(learned)
    for router in other.routers():
        router.weight.add_(0.3 * torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(1)))
    moved = disagreement(judge(other, drawn).routings, drawn)
    assert 0.05 < moved < 1
    assert disagreement(judge(other, drawn, replay=True).routings, drawn) == 0


def test_replay_uses_the_given_experts_with_weights_of_the_new_scores(learned, drawn):
    other = copy.deepcopy(learned)
    with torch.no_grad():
        for router in other.routers():
            router.weight.mul_(-1)
    routers = other.routers()
    judged = judge(other, drawn, replay=True)
    assert other.routers() == routers  # put back
    for routing, experts in zip(judged.routings, drawn.experts):
        given = experts[..., 0] >= 0
        assert torch.equal(routing.experts[given], experts[given])
        assert (routing.experts >= 0).all()  # the padding keeps the router's own choice
        chosen = routing.scores.gather(-1, routing.experts)
        want = chosen / chosen.sum(-1, keepdim=True)  # normalized, with a factor of 1
        torch.testing.assert_close(routing.weights, want, rtol=1e-5, atol=1e-6)
    judged.log_probs.sum().backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in routers)


def test_replay_of_the_own_choice_changes_nothing(learned, drawn):
    plain, again = judge(learned, drawn), judge(learned, drawn, replay=True)
    assert torch.equal(plain.log_probs, again.log_probs)


def test_the_routers_are_put_back_after_an_error(learned, drawn):
    before = learned.routers()
    with pytest.raises(KeyError), replayed(learned, drawn.experts):
        assert learned.routers() != before
        raise KeyError
    assert learned.routers() == before


def test_replay_scales_as_the_router_does_and_refuses_one_that_it_does_not_know():
    router = SoftmaxRouter(8, 4, 2, routed_scaling_factor=3.0)
    x, chosen = torch.randn(5, 8), torch.tensor([[0, 3]] * 5)
    routing = rollouts.Replay(router, chosen)(x)
    torch.testing.assert_close(routing.weights, 3 * x.matmul(router.weight.T).softmax(-1)[:, [0, 3]])
    refused(lambda: rollouts.Replay(torch.nn.Linear(8, 4), chosen), "replay: Linear has no normalize")


def test_without_recorded_experts_nothing_can_be_compared(learned):
    plain = sample(Engine(learned, 8), easy(2), 0, Sampling(2, 5))
    assert plain.experts is None
    refused(lambda: disagreement([], plain), "the rollout holds no experts: sample with record_experts")
    assert sum(isinstance(block.mlp, MoE) for block in learned.blocks) == 2


def test_a_completion_that_fails_ends_with_a_line(untrained):
    with torch.no_grad():
        untrained.head.weight.fill_(float("nan"))
    said = "a completion failed: the largest logit after 20 tokens is nan"
    refused(lambda: sample(Engine(untrained, 8), easy(2), 0, Sampling(2, 5)), said)


def test_rows_of_unequal_length_are_padded_apart():
    problems = easy(1)
    prompt = TOKENIZER.encode(problems[0].prompt)
    texts = ["<think>1</think>7", "<think></think>12\x03", "5\x03"]
    samples = [
        Sample(prompt, TOKENIZER.encode(text), text.endswith("\x03"), [-float(at + 1)] * len(text), None)
        for at, text in enumerate(texts)
    ]
    found = collect(problems, samples)
    assert found.lengths.tolist() == [[17, 18, 2]]
    assert [found.old[row].sum().item() for row in range(3)] == [-17, -36, -6]
    assert found.in_form.tolist() == [[False, True, False]]  # the first was cut off

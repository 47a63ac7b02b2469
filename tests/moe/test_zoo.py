"""The other routers against loops written from their papers, and their invariants."""

import math

import pytest
import torch
from torch import nn

from moe import (
    ExpertChoiceRouter,
    Experts,
    GShardRouter,
    HashRouter,
    MixtralRouter,
    MoE,
    NoisyTopKRouter,
    RandomRouter,
    SoftmaxRouter,
    SoftMoE,
    SwitchRouter,
    balance,
)
from tests.helpers import refused

DIM, NUM_EXPERTS, TOP_K, VOCAB = 5, 6, 3, 40
LEARNED = {
    "noisy": lambda: NoisyTopKRouter(DIM, NUM_EXPERTS, TOP_K),
    "switch": lambda: SwitchRouter(DIM, NUM_EXPERTS),
    "gshard": lambda: GShardRouter(DIM, NUM_EXPERTS),
    "expert_choice": lambda: ExpertChoiceRouter(DIM, NUM_EXPERTS, 1.5),
    "mixtral": lambda: MixtralRouter(DIM, NUM_EXPERTS, TOP_K),
}
FIXED = {
    "hash": lambda: HashRouter(NUM_EXPERTS, VOCAB),
    "random": lambda: RandomRouter(NUM_EXPERTS, TOP_K),
}
EVERY = pytest.mark.parametrize("name", [*LEARNED, *FIXED])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(name, dtype=torch.float64):
    router = (LEARNED | FIXED)[name]().to(dtype)
    if name == "noisy":
        nn.init.normal_(router.noise_weight)
    return router


def run(router, x, tokens=None):
    return router(x, tokens=tokens) if isinstance(router, HashRouter) else router(x)


def softmax(logits):
    return [math.exp(z) / sum(math.exp(other) for other in logits) for z in logits]


def best(values, count):
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def by_token(routing):
    """One {expert: weight} per token, without empty slots."""
    slots = zip(routing.experts.flatten(0, -2).tolist(), routing.weights.flatten(0, -2).tolist())
    return [{e: w for e, w in zip(experts, weights) if e >= 0} for experts, weights in slots]


def top_k_gating(logits):
    """Shazeer et al. eq. 3 and 5, and Mixtral's: softmax over the kept logits."""
    kept = best(logits, TOP_K)
    return dict(zip(kept, softmax([logits[i] for i in kept])))


def switch(logits):
    scores = softmax(logits)
    return {i: scores[i] for i in best(scores, 1)}


def gshard(logits):
    scores = softmax(logits)
    first, second = best(scores, 2)
    both = scores[first] + scores[second]
    return {first: scores[first] / both, second: scores[second] / both}


BY_HAND = {"noisy": top_k_gating, "mixtral": top_k_gating, "switch": switch, "gshard": gshard}


@pytest.mark.parametrize("name", BY_HAND)
def test_routing_equals_a_loop_over_the_equations(name):
    router, x = make(name).eval(), torch.randn(3, 7, DIM, dtype=torch.float64)
    routing = router(x)
    logits = [[float(row @ u) for row in router.weight.detach()] for u in x.flatten(0, 1)]
    for found, row in zip(by_token(routing), logits, strict=True):
        assert found == pytest.approx(BY_HAND[name](row), rel=1e-12)
    torch.testing.assert_close(routing.logits.flatten(0, 1), torch.tensor(logits).double())
    assert routing.scores.flatten(0, 1).tolist() == [pytest.approx(softmax(row)) for row in logits]


@pytest.mark.parametrize("shape", [(3, 7), (21,), ()])
@EVERY
def test_leading_axes_are_kept_and_router_numbers_are_fp32_or_better(name, shape):
    router, tokens = make(name, torch.bfloat16), torch.randint(VOCAB, shape)
    routing = run(router, torch.randn(*shape, DIM, dtype=torch.bfloat16), tokens)
    assert all(field.shape[:-1] == shape for field in routing[:4])
    assert routing.scores.shape == routing.logits.shape == (*shape, NUM_EXPERTS)
    assert routing.weights.shape == routing.experts.shape and routing.experts.dtype == torch.int64
    assert {field.dtype for field in routing[1:4]} == {torch.float32}
    torch.testing.assert_close(routing.logits.softmax(-1), routing.scores)


def test_expert_choice_equals_a_loop_over_its_equations():
    router, x = make("expert_choice"), torch.randn(2, 7, DIM, dtype=torch.float64)
    scores = [softmax([float(row @ u) for row in router.weight.detach()]) for u in x.flatten(0, 1)]
    want = [{} for _ in scores]
    for expert in range(NUM_EXPERTS):
        for token in best([row[expert] for row in scores], 4):  # 14 tokens * 1.5 / 6 experts = 3.5
            want[token][expert] = scores[token][expert]
    routing = router(x)
    assert by_token(routing) == [pytest.approx(slots, rel=1e-12) for slots in want]
    assert len({len(slots) for slots in want}) > 1
    assert not routing.weights[routing.experts < 0].any()
    assert balance.tokens_per_expert(routing).tolist() == [4] * NUM_EXPERTS
    assert routing.experts.max(0).values.max(0).values.tolist() == list(range(NUM_EXPERTS))


def test_expert_choice_takes_at_most_all_tokens():
    router = ExpertChoiceRouter(DIM, NUM_EXPERTS, NUM_EXPERTS)
    assert balance.tokens_per_expert(router(torch.randn(3, DIM))).tolist() == [3] * NUM_EXPERTS
    assert router(torch.randn(0, DIM)).experts.shape == (0, NUM_EXPERTS)
    assert balance.tokens_per_expert(make("expert_choice")(torch.randn(1, DIM).double())).tolist() == [1] * 6


def test_mixtral_equals_softmax_over_all_then_normalized():
    ours, other = make("mixtral"), SoftmaxRouter(DIM, NUM_EXPERTS, TOP_K, normalize=True).double()
    other.weight.data.copy_(ours.weight)
    x = torch.randn(4, 9, DIM, dtype=torch.float64)
    for a, b in zip(ours(x), other(x)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_noise_has_the_learned_width_in_training_only():
    router, x = make("noisy"), torch.randn(1, DIM, dtype=torch.float64).expand(20_000, DIM)
    clean = (x[0] @ router.weight.T).tolist()
    width = [math.log1p(math.exp(z)) for z in (x[0] @ router.noise_weight.T).tolist()]
    noisy = router(x).logits
    assert noisy.mean(0).tolist() == pytest.approx(clean, abs=5 * max(width) / 20_000**0.5)
    assert noisy.std(0).tolist() == pytest.approx(width, rel=0.03)
    assert max(width) > 2 * min(width)
    found = by_token(router(x[:50]))
    assert len({tuple(sorted(slots)) for slots in found}) > 1
    torch.manual_seed(3)
    first = router(x[:50])
    torch.manual_seed(3)
    assert torch.equal(router(x[:50]).weights, first.weights)
    for slots, row in zip(by_token(first), first.logits.tolist()):  # noisy logits decide experts and weights
        assert slots == pytest.approx(top_k_gating(row), rel=1e-12)
    router.eval()
    assert router(x).logits[0].tolist() == pytest.approx(clean, rel=1e-12)
    assert torch.equal(router(x).weights, router(x).weights)


def test_gshard_uses_the_second_expert_in_proportion_to_its_weight():
    router, count = make("gshard"), 20_000
    for u in torch.randn(4, DIM, dtype=torch.float64):
        (first, g1), (second, g2) = sorted(
            gshard((u @ router.weight.T).tolist()).items(), key=lambda slot: -slot[1]
        )
        routing = router(u.expand(count, DIM))
        assert routing.experts[:, 0].tolist() == [first] * count
        assert set(routing.experts[:, 1].tolist()) <= {-1, second}
        used = routing.experts[:, 1] >= 0
        assert float(used.double().mean()) == pytest.approx(2 * g2, abs=5 * 0.5 / count**0.5)
        assert routing.weights[:, 0].tolist() == [pytest.approx(g1)] * count  # with or without the second
        want = [pytest.approx(g2) if there else 0 for there in used.tolist()]
        assert routing.weights[:, 1].tolist() == want
        assert (router.eval()(u.expand(count, DIM)).experts[:, 1] == second).all()
        router.train()


def test_a_tie_uses_both_experts_in_gshard():
    router = make("gshard")
    nn.init.zeros_(router.weight)
    assert (router(torch.randn(1000, DIM).double()).experts >= 0).all()


def test_hash_router_reads_a_table_made_from_the_seed():
    router, x, tokens = make("hash"), torch.randn(3, 50, DIM), torch.randint(VOCAB, (3, 50))
    routing = router(x, tokens=tokens)
    table = {}
    for token, slots in zip(tokens.flatten().tolist(), by_token(routing)):
        assert slots == {table.setdefault(token, next(iter(slots))): 1.0}
    assert routing.scores.argmax(-1).tolist() == routing.experts.squeeze(-1).tolist()
    assert torch.equal(router(torch.randn(3, 50, DIM), tokens=tokens).experts, routing.experts)
    assert set(table.values()) == set(range(NUM_EXPERTS))
    assert torch.equal(make("hash").table, router.table) and not router.state_dict()
    assert not torch.equal(HashRouter(NUM_EXPERTS, VOCAB, seed=1).table, router.table)
    even = HashRouter(NUM_EXPERTS, 6000).table.bincount() / 1000
    assert even.tolist() == pytest.approx([1] * NUM_EXPERTS, abs=5 * 1000**-0.5)
    # the loss measures how uneven the token ids are; it has no parameter to train
    load = balance.tokens_per_expert(routing).double() / 150
    want = float((load * load).sum()) * NUM_EXPERTS
    assert float(balance.switch_loss(routing)) == pytest.approx(want) and want > 1.01
    assert float(balance.z_loss(routing)) == 0


def test_hash_router_in_a_layer_gets_the_ids():
    layer = MoE(make("hash"), Experts(NUM_EXPERTS, DIM, 3))
    tokens = torch.randint(VOCAB, (2, 9))
    _, routing = layer(torch.randn(2, 9, DIM), tokens=tokens)
    assert torch.equal(routing.experts.squeeze(-1), layer.router.table[tokens])
    with pytest.raises(ValueError, match=r"tokens is None; expected the token ids of x, \(2, 9\)"):
        layer(torch.randn(2, 9, DIM))
    with pytest.raises(ValueError, match=r"tokens is \(2, 8\); expected the token ids .* \(2, 9\)"):
        layer(torch.randn(2, 9, DIM), tokens=tokens[:, 1:])


@pytest.mark.parametrize("training", [False, True])
def test_random_router_draws_all_sets_of_experts_equally_often(training):
    router = make("random").train(training)
    routing = router(torch.randn(1000, 20, DIM))
    sets = [tuple(sorted(experts)) for experts in routing.experts.flatten(0, 1).tolist()]
    counts = {chosen: sets.count(chosen) / 1000 for chosen in set(sets)}
    assert len(counts) == math.comb(NUM_EXPERTS, TOP_K) and all(len(set(chosen)) == TOP_K for chosen in sets)
    assert list(counts.values()) == pytest.approx([1] * len(counts), abs=5 * 1000**-0.5)
    assert routing.weights.unique().tolist() == [pytest.approx(1 / TOP_K)]
    assert routing.scores.unique().tolist() == [pytest.approx(1 / NUM_EXPERTS)]


@pytest.mark.parametrize("name", [name for name in LEARNED if name != "gshard"])
def test_weights_have_the_gradient_of_the_equation(name):
    router, x = make(name).eval(), torch.randn(7, DIM, dtype=torch.float64, requires_grad=True)

    def weights(x, weight):
        routing = torch.func.functional_call(router, {"weight": weight}, (x,))
        return routing.weights, routing.scores, routing.logits

    assert torch.autograd.gradcheck(weights, (x, router.weight))
    total = (router(x).weights * torch.randn(1, dtype=torch.float64)).square().sum()
    assert torch.autograd.grad(total, router.weight)[0].abs().max() > 1e-3  # top-1 too: weight p, not 1


@pytest.mark.parametrize("name", ["noisy", "gshard"])
def test_weights_have_the_gradient_of_the_equation_in_training(name):
    router, x = make(name), torch.randn(7, DIM, dtype=torch.float64, requires_grad=True)
    parameters = dict(router.named_parameters())

    def weights(x, *values):
        torch.manual_seed(1)
        return torch.func.functional_call(router, dict(zip(parameters, values)), (x,)).weights

    assert torch.autograd.gradcheck(weights, (x, *parameters.values()))
    if name == "noisy":
        total = weights(x, *parameters.values()).square().sum()
        assert torch.autograd.grad(total, router.noise_weight)[0].abs().max() > 1e-3


def rows(routing, at):
    return [field[at] for field in routing[:4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["noisy", "switch", "gshard", "mixtral", "hash"])
def test_a_token_is_routed_the_same_whatever_its_neighbours_are(name, dtype):
    router = make(name, dtype).eval()
    x, tokens = torch.randn(37, DIM).to(dtype), torch.randint(VOCAB, (37,))
    whole = run(router, x, tokens)
    for n in (1, 2, 8, 9, 36):
        alone = run(router, x[n : n + 1], tokens[n : n + 1])
        assert all(torch.equal(a, b) for a, b in zip(rows(alone, 0), rows(whole, n))), n
        changed, others = torch.randn(37, DIM).to(dtype), torch.randint(VOCAB, (37,))
        changed[n], others[n] = x[n], tokens[n]
        again = run(router, changed, others)
        assert all(torch.equal(a, b) for a, b in zip(rows(again, n), rows(whole, n))), n


@pytest.mark.parametrize("training", [False, True])
def test_expert_choice_lets_a_later_token_change_an_earlier_ones_experts(training):
    router, x = make("expert_choice").train(training), torch.randn(2, 9, DIM, dtype=torch.float64)
    before = router(x)
    chosen = int(before.experts[0, 0].max())
    assert chosen >= 0
    later = x.clone()
    later[0, 1:] = later[1] = 9 * router.weight[chosen].detach()  # all later tokens prefer its expert
    after = router(later)
    assert chosen in before.experts[0, 0].tolist() and chosen not in after.experts[0, 0].tolist()
    assert torch.equal(after.scores[0, 0], before.scores[0, 0])
    for name in ("noisy", "switch", "gshard", "mixtral"):
        router = make(name).eval()
        assert torch.equal(router(x).experts[0, 0], router(later).experts[0, 0])


# --- Soft MoE


def soft_moe(slots=2):
    layer = SoftMoE(Experts(NUM_EXPERTS, DIM, 3), slots).double()
    nn.init.normal_(layer.weight, std=3)
    nn.init.constant_(layer.scale, 2.5)
    return layer


def ffn(u, gate_up, down):
    gate, up = (gate_up @ u).chunk(2)
    return down @ (gate / (1 + (-gate).exp()) * up)


@pytest.mark.parametrize("slots", [1, 2])
def test_soft_moe_equals_a_loop_over_its_equations(slots):
    layer, x = soft_moe(slots), torch.randn(2, 7, DIM, dtype=torch.float64)
    y, routing = layer(x)
    for sequence, outputs, weights in zip(x, y, routing.weights):
        slots_of = [p / (p @ p + 1e-6).sqrt() for p in layer.weight.detach()]
        logits = [[float(2.5 * (u / (u @ u + 1e-6).sqrt()) @ p) for p in slots_of] for u in sequence]
        dispatch = [softmax(column) for column in zip(*logits)]  # of each slot, over the tokens
        combine = [softmax(row) for row in logits]  # of each token, over the slots
        mixed = [sum(d * u for d, u in zip(column, sequence)) for column in dispatch]
        out = [
            ffn(u, layer.experts.gate_up[slot // slots], layer.experts.down[slot // slots])
            for slot, u in enumerate(mixed)
        ]
        for row, found, weight in zip(combine, outputs, weights):
            torch.testing.assert_close(found, sum(c * o for c, o in zip(row, out)), rtol=1e-12, atol=1e-14)
            want = [sum(row[e * slots : (e + 1) * slots]) for e in range(NUM_EXPERTS)]
            assert weight.tolist() == pytest.approx(want, rel=1e-12)


def test_soft_moe_sends_every_token_to_every_expert():
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    with torch.no_grad():
        _, routing = soft_moe()(x)
    assert routing.experts.tolist() == [[list(range(NUM_EXPERTS))] * 7] * 2
    assert balance.tokens_per_expert(routing).tolist() == [14] * NUM_EXPERTS
    assert float(balance.sequence_loss(routing)) == pytest.approx(1)
    assert float(balance.communication_loss(routing, 3, 3)) == pytest.approx(1)
    torch.testing.assert_close(routing.logits.softmax(-1), routing.scores)
    assert routing.scores.std() > 0.01


def test_soft_moe_mixes_later_tokens_but_not_other_sequences():
    layer, x = soft_moe(), torch.randn(2, 7, DIM, dtype=torch.float64)
    later = x.clone()
    later[0, -1] += 1
    before, after = layer(x)[0], layer(later)[0]
    assert (before[0, :-1] - after[0, :-1]).abs().max() > 1e-3
    torch.testing.assert_close(before[1], after[1], rtol=1e-12, atol=1e-14)
    causal = MoE(make("mixtral"), Experts(NUM_EXPERTS, DIM, 3).double())
    assert torch.equal(causal(x)[0][0, :-1], causal(later)[0][0, :-1])


def test_soft_moe_has_the_gradient_of_its_equations():
    layer, x = soft_moe(), torch.randn(2, 4, DIM, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def outputs(x, *values):
        y, routing = torch.func.functional_call(layer, dict(zip(parameters, values)), (x,))
        return y, routing.scores

    assert torch.autograd.gradcheck(outputs, (x, *parameters.values()))
    for gradient in torch.autograd.grad(layer(x)[0].square().sum(), parameters.values()):
        assert gradient.abs().max() > 1e-6


def test_soft_moe_runs_in_half_precision():
    y, routing = soft_moe().bfloat16()(torch.randn(2, 7, DIM, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and routing.scores.dtype == torch.float32


# --- wrong arguments


@pytest.mark.parametrize(
    "build, said",
    [
        (lambda: NoisyTopKRouter(4, 6, 7), "top_k=7 must lie in 1..6"),
        (lambda: MixtralRouter(4, 6, 0), "top_k=0 must lie in 1..6"),
        (lambda: MixtralRouter(0, 6, 1), "dim=0 must be at least 1"),
        (lambda: SwitchRouter(4, 6, 2), "top_k=2 must be 1 for SwitchRouter"),
        (lambda: SwitchRouter(4, 0), "num_experts=0 must be at least 1"),
        (lambda: GShardRouter(4, 6, 1), "top_k=1 must be 2 for GShardRouter"),
        (lambda: GShardRouter(4, 1), "top_k=2 must lie in 1..1"),
        (lambda: ExpertChoiceRouter(4, 6, 0.0), "capacity_factor=0.0 must be positive and finite"),
        (lambda: ExpertChoiceRouter(4, 6, math.nan), "capacity_factor=nan must be positive and finite"),
        (lambda: ExpertChoiceRouter(4, 6, 6.5), "capacity_factor=6.5 must be at most 6"),
        (lambda: ExpertChoiceRouter(4, 0), "num_experts=0 must be at least 1"),
        (lambda: HashRouter(6, 40, top_k=2), "top_k=2 must be 1 for HashRouter"),
        (lambda: HashRouter(0, 40), "num_experts=0 must be at least 1"),
        (lambda: HashRouter(6, 0), "vocab_size=0 must be at least 1"),
        (lambda: RandomRouter(6, 7), "top_k=7 must lie in 1..6"),
        (lambda: SoftMoE(Experts(2, 3, 4), 0), "slots_per_expert=0 must be at least 1"),
        (lambda: SoftMoE(nn.Linear(3, 3)), "Linear has no num_experts"),
        (lambda: SoftMoE(Experts(2, 3, 4))(torch.randn(5, 3)), "x is torch.float32 (5, 3); expected"),
        (lambda: SoftMoE(Experts(2, 3, 4))(torch.zeros(1, 5, 3, dtype=torch.int64)), "x is torch.int64"),
        (lambda: SoftMoE(Experts(2, 3, 4))(torch.randn(1, 5, 4)), "x is torch.float32 (1, 5, 4)"),
        (lambda: HashRouter(6, 40, seed=None), "seed=None must be a whole number"),
        (
            lambda: HashRouter(6, 40)(torch.randn(2, 3), torch.tensor([1, 40])),
            "token 40 is not in the vocabulary, 0..39",
        ),
        (
            lambda: HashRouter(6, 40)(torch.randn(2, 3), torch.tensor([1, -1])),
            "token -1 is not in the vocabulary, 0..39",
        ),
        (lambda: HashRouter(6, 40)(torch.randn(2, 3), torch.ones(2)), "tokens are torch.float32"),
        (lambda: ExpertChoiceRouter(4, 8, None), "capacity_factor=None must be positive"),
    ],
)  # fmt: skip
def test_numbers_that_do_not_fit_are_refused(build, said):
    assert refused(build).startswith(said)


def test_initial_weights_of_learned_routers():
    assert not NoisyTopKRouter(DIM, NUM_EXPERTS, TOP_K).noise_weight.any()  # as in the paper: equal noise
    assert SoftMoE(Experts(NUM_EXPERTS, DIM, 3)).scale == 1  # at 0 all tokens would get equal weights
    wide = MixtralRouter(400, 300, 2).weight.detach()
    assert float(wide.std()) == pytest.approx(400**-0.5, rel=0.02)  # logits of size 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_soft_moe_takes_zero_and_huge_tokens(dtype):
    layer = SoftMoE(Experts(NUM_EXPERTS, DIM, 3)).to(dtype)
    x = torch.randn(1, 5, DIM).to(dtype)
    x[0, 1] = 0
    assert layer(x)[0].isfinite().all()
    x[0, 2] = 3e4  # the experts overflow in fp16, the logits must not
    x.requires_grad_()
    logits = layer(x)[1].logits
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    logits.sum().backward()
    assert x.grad.abs().max() < 1e5


@pytest.mark.parametrize("kind", [NoisyTopKRouter, MixtralRouter])
def test_a_normalized_top_1_weight_has_no_gradient(kind):
    router = kind(DIM, NUM_EXPERTS, 1)
    router(torch.randn(9, DIM)).weights.square().sum().backward()
    assert not router.weight.grad.any()

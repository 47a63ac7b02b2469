"""What later parts are built on: embeddings as input, more heads, another matrix product, named losses,
devices without float64, and researchers' tools."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from lm import loss
from lm.inference.step import Decoder
from lm.loss import training_losses
from lm.model import ProductLinear, Transformer, use_product
from lm.optim import build_optimizer
from mla.paged import Plan
from moe import balance
from tests.helpers import refused
from tests.moe.pretend import NoFloat64, OnMPS, mps, to_mps


@pytest.fixture
def model(tiny, make_model):
    return make_model(tiny(attention={"qkv_bias": True}).model)


@pytest.fixture
def tokens():
    return torch.arange(14).view(2, 7) * 11 % 256


def test_embeddings_take_the_place_of_the_tokens(model, tokens):
    expected, embedded = model(tokens), model.embed(tokens)
    torch.testing.assert_close(model(tokens, embeddings=embedded).logits, expected.logits, rtol=0, atol=0)
    changed = embedded.detach().clone()
    changed[1, 3] += 1.0  # from there on that row's output changes, and nothing else
    logits = model(tokens, embeddings=changed).logits
    torch.testing.assert_close(logits[0], expected.logits[0])
    torch.testing.assert_close(logits[1, :3], expected.logits[1, :3])
    assert (logits[1, 3:] - expected.logits[1, 3:]).abs().amax(-1).min() > 1e-6


def test_embeddings_have_the_gradient_and_the_table_has_none(model, tokens):
    embedded = model.embed(tokens).detach().requires_grad_()
    model(tokens, embeddings=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0 and model.embedding.weight.grad is None


@pytest.mark.parametrize("shape", [(2, 7, 15), (2, 6, 16), (1, 7, 16), (2, 7)])
def test_embeddings_that_do_not_fit_are_refused(model, tokens, shape):
    refused(lambda: model(tokens, embeddings=torch.zeros(shape).double()), "embeddings", shape, "(2, 7, 16)")


def test_a_second_head_reads_the_same_hidden_states(model, tokens):
    second = nn.Linear(16, 5).double()
    hidden = model(tokens).hidden
    norm = model.norm
    by_hand = hidden / (hidden.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    torch.testing.assert_close(model.logits(hidden, second), by_hand @ second.weight.T + second.bias)
    torch.testing.assert_close(model.logits(hidden), by_hand @ model.head.weight.T)


def test_another_product_is_used_for_every_matrix_of_the_blocks(model, tokens):
    expected, names = model(tokens), list(model.state_dict())
    expected.logits.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    seen = []

    def product(x, weight):
        seen.append(weight)
        return torch.einsum("...i,oi->...o", x, weight)

    use_product(model, product)
    assert list(model.state_dict()) == names
    out = model(tokens)
    torch.testing.assert_close(out.logits, expected.logits)
    out.logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
    linears = sum(isinstance(module, nn.Linear) for module in model.blocks.modules())
    experts = 2 * 8 * 2  # MoE layers, experts, matrices of each
    assert len(seen) == linears + experts
    gates = [router.weight for router in model.routers()]
    assert not any(weight is gate for weight in seen for gate in [*gates, model.head.weight])


def test_the_product_decides_the_result_and_biases_stay(model, tokens):
    before = model(tokens).logits
    use_product(model, lambda x, weight: 1.01 * F.linear(x, weight))
    assert (model(tokens).logits - before).abs().max() > 1e-4
    linear = next(m for m in model.modules() if isinstance(m, ProductLinear) and m.bias is not None)
    x = torch.randn(3, linear.in_features, dtype=torch.float64)
    torch.testing.assert_close(linear(x), 1.01 * x @ linear.weight.T + linear.bias)


def test_losses_come_by_name_each_times_its_weight(tiny, make_model, tokens):
    weights = {"sequence_loss": 0.3, "z_loss": 0.02, "switch_loss": 0.0}
    config = tiny(train=weights)
    model = make_model(config.model)
    targets = tokens.roll(-1, 1)
    named, counts = training_losses(model, tokens, targets, config.train)
    out = model(tokens)
    assert set(named) == {"cross_entropy", "sequence_loss", "z_loss"}
    entropy = -out.logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).mean()
    torch.testing.assert_close(named["cross_entropy"], entropy)
    for name, function in (("sequence_loss", balance.sequence_loss), ("z_loss", balance.z_loss)):
        expected = weights[name] * sum(function(routing) for routing in out.routings)
        torch.testing.assert_close(named[name], expected)
    for count, routing in zip(counts, out.routings):
        assert count.tolist() == [(routing.experts == expert).sum().item() for expert in range(8)]
    _, more = training_losses(model, tokens, targets, config.train, counts)
    assert [count.tolist() for count in more] == [(2 * count).tolist() for count in counts]


ALL_LOSSES = {
    **dict.fromkeys(("sequence_loss", "switch_loss", "global_batch_loss", "z_loss"), 0.1),
    **dict.fromkeys(("device_loss", "communication_loss"), 0.1),
    "num_devices": 4,
    "top_devices": 2,
}


def train_and_decode(model, tokens, config):
    """An optimizer step with every loss and bias update, then decode steps -> every number found."""
    named, counts = training_losses(model, tokens, tokens, config)
    sum(named.values()).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    build_optimizer(model, config).step()
    for router, count in zip(model.routers(), counts):
        for how in ({}, {"centred": True}, {"proportional": True}):
            if balance.selection_bias(router) is not None:
                balance.update_bias_(router, count, 0.01, **how)
    model.eval()
    with torch.no_grad():
        caches = model.new_caches(2, 8)
        chunks = [model(part, caches).logits for part in tokens.split([3, 1, 3], dim=1)]
        decoder = Decoder(model)
        pools = [torch.zeros(2, heads, 64, *rest[:1], dtype=rest[1], device=rest[2])
                 for heads, *rest in decoder.entries]  # fmt: skip
        plan = Plan([[0], [1]], [0, 0], 1, model.embedding.weight.device)
        chunks.append(decoder.step(tokens[:, 0].contiguous(), pools, plan))
        assert not decoder.refresh()
    return [*(loss.detach() for loss in named.values()), norm, *chunks]


@pytest.mark.parametrize("mode", ["on MPS", "without float64"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"moe": {"router": "softmax"}, "attention": {"kind": "gqa"}}, {"moe": {"capacity_factor": 1.0}}],
    ids=["sigmoid, mla", "softmax, gqa", "capacity"],
)
def test_training_and_decoding_need_no_float64(tiny, make_model, tokens, changes, mode):
    config = tiny(**changes, train=ALL_LOSSES)
    model = make_model(config.model, torch.float32)
    want = train_and_decode(copy.deepcopy(model), tokens, config.train)
    if mode == "on MPS":
        with mps():
            got = [value.inner for value in train_and_decode(to_mps(model), OnMPS(tokens), config.train)]
    else:
        with NoFloat64():
            got = train_and_decode(model, tokens, config.train)
    assert len(got) == 12
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


KINDS = pytest.mark.parametrize("kind", ["mla", "gqa"])


@KINDS
@pytest.mark.parametrize("chunk", [loss.CHUNK, 4 * 256 * 3])  # all logits at once; 3 tokens at a time
def test_torch_func_differentiates_the_losses_sample_by_sample(tiny, make_model, kind, chunk, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    config = tiny(attention={"kind": kind}, train=ALL_LOSSES)
    model, tokens = make_model(config.model), torch.arange(21).view(3, 7) * 11 % 256
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, row):
            row = row.unsqueeze(0)
            return sum(training_losses(self.model, row, row.roll(-1, 1), config.train).named.values())

    whole = Loss()

    def loss_of(parameters, row):
        return functional_call(whole, {f"model.{name}": p for name, p in parameters.items()}, (row,))

    each = vmap(grad(loss_of), (None, 0))(parameters, tokens)
    for index, row in enumerate(tokens):
        want = torch.autograd.grad(whole(row), list(model.parameters()))
        for name, theirs in zip(parameters, want, strict=True):
            torch.testing.assert_close(each[name][index], theirs, msg=name)
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, along = jvp(lambda parameters: loss_of(parameters, tokens[0]), (parameters,), (direction,))
    torch.testing.assert_close(along, sum((each[name][0] * d).sum() for name, d in direction.items()))


@pytest.mark.long
@KINDS
def test_an_exported_model_takes_any_batch_and_time(tiny, make_model, kind):
    model = make_model(tiny(attention={"kind": kind}).model, torch.float32)
    dynamic = {"tokens": {0: Dim("batch"), 1: Dim("time")}}
    program = torch.export.export(model, (torch.randint(256, (2, 7)),), dynamic_shapes=dynamic).module()
    for shape in ((2, 7), (1, 1), (5, 3), (1, 40)):
        tokens = torch.randint(256, shape)
        torch.testing.assert_close(program(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("where", ["meta", "fake"])
@KINDS
def test_a_model_with_experts_trains_and_decodes_without_numbers(tiny, make_model, kind, where):
    config = tiny(attention={"kind": kind}, train=ALL_LOSSES)
    enter, device = (FakeTensorMode(), "cpu") if where == "fake" else (contextlib.nullcontext(), "meta")
    with enter, torch.device(device):
        model, tokens = Transformer(config.model), torch.zeros(2, 7, dtype=torch.int64)
        sum(training_losses(model, tokens, tokens, config.train).named.values()).backward()
        caches = model.new_caches(2, 8)
        logits = [model(part, caches).logits for part in tokens.split([6, 1], dim=1)]
    assert [part.shape for part in logits] == [(2, 6, 256), (2, 1, 256)]
    assert all(p.grad.device.type == device for p in model.parameters())
    assert Transformer(config.model)(torch.zeros(2, 7, dtype=torch.int64)).logits.isfinite().all()


def test_flop_counter_counts_the_experts_of_a_model(tiny, make_model, tokens):
    sizes = {"num_experts": 8, "hidden_dim": 8}
    found = []
    for top_k in (1, 2, 4):
        model = make_model(tiny(moe={**sizes, "top_k": top_k}).model, torch.float32)
        with FlopCounterMode(display=False) as counter:
            model(tokens).logits.sum().backward()
        found.append(counter.get_total_flops())
    one = 3 * 2 * (3 * 16 * 8) * tokens.numel() * 2  # forward and backward, 2 MoE layers
    assert [found[1] - found[0], found[2] - found[1]] == [one, 2 * one]

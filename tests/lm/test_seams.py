"""What later parts are built on: embeddings as input, more heads, another matrix product, named losses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lm.loss import training_losses
from lm.model import ProductLinear, use_product
from moe import balance
from tests.helpers import refused


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

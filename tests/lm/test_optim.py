import math

import pytest
import torch

from lm.model import Transformer
from lm.optim import build_optimizer, learning_rate


def groups(model, config):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, config)
    return {
        group["weight_decay"]: sorted(names[id(p)] for p in group["params"])
        for group in optimizer.param_groups
    }


def test_matrices_decay_and_norms_and_the_embedding_do_not(tiny):
    config = tiny(train={"weight_decay": 0.3})
    model = Transformer(config.model)
    found = groups(model, config.train)
    plain = [name for name, _ in model.named_parameters() if "norm" in name or name == "embedding.weight"]
    assert found[0.0] == sorted(plain)
    assert found[0.3] == sorted(name for name, _ in model.named_parameters() if name not in plain)
    assert {"head.weight", "blocks.1.mlp.router.weight", "blocks.1.mlp.experts.gate_up"} <= set(found[0.3])


def test_a_tied_head_is_an_embedding_and_does_not_decay(tiny):
    config = tiny(model={"tie_embeddings": True})
    found = groups(Transformer(config.model), config.train)
    assert "embedding.weight" in found[0.0]
    assert sum(map(len, found.values())) == len(list(Transformer(config.model).parameters()))


def test_selection_biases_never_reach_the_optimizer(tiny):
    config = tiny()
    model = Transformer(config.model)
    held = {id(p) for group in build_optimizer(model, config.train).param_groups for p in group["params"]}
    assert not held & {id(router.bias) for router in model.routers()}


def test_adamw_gets_the_values_of_the_config_and_v3s_by_default(tiny):
    config = tiny(train={"beta1": 0.8, "beta2": 0.7, "learning_rate": 0.02})
    optimizer = build_optimizer(Transformer(config.model), config.train)
    for group in optimizer.param_groups:
        assert (group["betas"], group["lr"]) == ((0.8, 0.7), 0.02)
    default = build_optimizer(Transformer(config.model), tiny().train).param_groups[0]
    assert (default["betas"], default["weight_decay"]) == ((0.9, 0.95), 0.1)


def test_one_step_is_that_of_adamw_written_out(tiny):
    """Loshchilov and Hutter 2019, algorithm 2: at step 1 the corrected moments are gradient and square."""
    config = tiny(train={"learning_rate": 0.01, "weight_decay": 0.5})
    model = Transformer(config.model).double()
    matrix, norm = model.blocks[0].attention.out.weight, model.norm.weight
    before = [parameter.detach().clone() for parameter in (matrix, norm)]
    model(torch.zeros(1, 3, dtype=torch.int64)).logits[..., 0].sum().backward()
    build_optimizer(model, config.train).step()
    for parameter, old, decay in zip((matrix, norm), before, (0.5, 0.0)):
        gradient = parameter.grad
        want = old * (1 - 0.01 * decay) - 0.01 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), want, rtol=0, atol=1e-12)


SCHEDULE = {"steps": 100, "warmup": 10, "learning_rate": 0.5, "final_learning_rate": 0.1}


@pytest.mark.parametrize(
    "changes, step, want",
    [
        ({}, 1, 0.05),  # warm-up, a tenth of the way
        ({}, 5, 0.25),
        ({}, 10, 0.5),  # the end of warm-up
        ({}, 55, (0.5 + 0.05) / 2),  # halfway through the decay
        ({}, 32.5, 0.05 + 0.45 * (1 + math.cos(math.pi / 4)) / 2),
        ({}, 100, 0.05),  # the last step
        ({"decay": 0.5}, 11, 0.5),  # constant ...
        ({"decay": 0.5}, 55, 0.5),  # ... until the decay begins
        ({"decay": 0.5}, 77.5, (0.5 + 0.05) / 2),
        ({"decay": 0.5}, 100, 0.05),
        ({"decay": 0.0}, 99, 0.5),
        ({"decay": 0.0}, 100, 0.5),  # no decay
        ({"decay": 0.0, "warmup": 0}, 100, 0.5),
        ({"decay": 0.0, "warmup": 1000}, 100, 0.05),
        ({"decay": 1e-9}, 99, 0.5),
        ({"decay": 1e-9}, 100, 0.05),  # at least the last step
        ({"warmup": 0}, 1, None),
        ({"warmup": 0}, 100, 0.05),
        ({"final_learning_rate": 1.0}, 60, 0.5),
        ({"final_learning_rate": 0.0}, 100, 0.0),
        ({"warmup": 100}, 100, 0.5),  # only warm-up
        ({"warmup": 1000}, 100, 0.05),  # less than the warm-up
    ],
)
def test_the_schedule_has_closed_values(tiny, changes, step, want):
    got = learning_rate(step, tiny(train={**SCHEDULE, **changes}).train)
    if want is None:
        want = 0.05 + 0.45 * (1 + math.cos(math.pi / 100)) / 2
    assert got == pytest.approx(want, rel=1e-12)


def test_the_rate_rises_and_then_never_rises_again(tiny):
    config = tiny(train={**SCHEDULE, "decay": 0.4}).train
    rates = [learning_rate(step, config) for step in range(1, 101)]
    assert rates[:10] == sorted(set(rates[:10]))
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert min(rates) > 0 and max(rates) == 0.5

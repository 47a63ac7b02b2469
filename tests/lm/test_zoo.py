"""Models with each of the other routers: training, counting, saving and generating."""

import pytest
import torch

import lm
from lm import count, train
from lm.model import Transformer
from lm.parts import ROUTERS, find_class
from lm.run import read_metrics
from moe import Capacity

TOP_K = {"switch": 1, "hash": 1}
OTHERS = [name for name in ROUTERS if name not in ("sigmoid", "softmax")]
QUIET = {"steps": 4, "eval_every": 4, "sample_every": 4, "save_every": 4}


def with_router(tiny, name, train=None, **moe):
    ungrouped = {"num_groups": 1, "top_groups": 1, "top_k": TOP_K.get(name, 2)}
    return tiny(moe={"router": name, **ungrouped, **moe}, train=train or QUIET)


@pytest.fixture
def quick(monkeypatch):
    """Train without samples and evaluations."""
    monkeypatch.setattr(train, "stream", lambda *given, **options: iter(()))
    monkeypatch.setattr(train, "evaluate", lambda *given: 1.0)


@pytest.mark.parametrize("name, room", [*((name, 0.0) for name in OTHERS), ("sigmoid", 1.0), ("hash", 1.0)])
def test_a_model_with_any_built_in_router_trains_saves_and_counts(tiny, tmp_path, quick, name, room):
    config = with_router(tiny, name, capacity_factor=room)
    assert train.train(config, tmp_path / "run") == 0
    model = lm.load(tmp_path / "run")
    router = model.routers()[0]
    assert isinstance(router, Capacity) == (room > 0)
    assert isinstance(router.router if room else router, find_class("model.moe.router", ROUTERS[name].path))
    stored = [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("router.bias"))]
    assert sum(tensor.numel() for tensor in stored) == count.total_parameters(config.model)
    inactive = count.total_parameters(config.model) - count.active_parameters(config.model)
    moe = config.model.moe
    unused = (moe.num_experts - moe.top_k) * 3 * config.model.dim * moe.hidden_dim
    assert inactive == unused * len(model.routers())
    if router.bias is not None:
        assert 0 < router.bias.abs().max() <= 4 * config.train.bias_update_rate * 1.001
    lm.save(model, tmp_path / "saved")
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    again = lm.load(tmp_path / "saved")
    if name == "random":
        torch.manual_seed(0)
    before = model(tokens).logits
    if name == "random":
        torch.manual_seed(0)
    assert torch.equal(again(tokens).logits, before)
    written = lm.generate(model, tokens, 5, temperature=0.0)
    assert written.shape == (2, 8)
    if name not in ("random", "expert_choice"):  # decoding with the others agrees with one pass over the text
        assert torch.equal(written[:, 3], before[:, -1].argmax(-1))


@pytest.mark.parametrize("name, room", [("noisy", 0.0), ("gshard", 1.0), ("random", 0.0)])
def test_a_random_router_resumes_bit_for_bit(tiny, tmp_path, quick, monkeypatch, name, room):
    short = {**QUIET, "save_every": 2}
    config = with_router(tiny, name, short, capacity_factor=room)
    assert train.train(config, tmp_path / "whole") == 0
    step = train.Trainer.step

    def stop_after_two(self, number):
        self.run.signal = 2 if number == 2 else 0
        return step(self, number)

    monkeypatch.setattr(train.Trainer, "step", stop_after_two)
    assert train.train(config, tmp_path / "broken") == 130
    torch.manual_seed(99)
    assert train.train(config, tmp_path / "broken", resume=True) == 0
    ours, theirs = (lm.load(tmp_path / run).state_dict() for run in ("whole", "broken"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "name, moe, said",
    [
        ("switch", {"top_k": 2}, "top_k=2 must be 1 for SwitchRouter"),
        ("mixtral", {"normalize": False}, "model.moe.normalize must be true: router 'mixtral' always does"),
        ("gshard", {"top_k": 1}, "top_k=1 must be 2 for GShardRouter"),
        ("mixtral", {"num_groups": 2, "top_groups": 2}, "model.moe.num_groups 2 must be 1: router 'mixtral'"),
        ("noisy", {"routed_scaling_factor": 2.5}, "routed_scaling_factor 2.5 must be 1: router 'noisy'"),
        ("expert_choice", {"capacity_factor": 1.0}, "model.moe.capacity_factor must be 0"),
        ("random", {"arguments": {"seed": 1}}, "model.moe.router RandomRouter: .* 'seed'"),
        ("swich", {}, "did you mean 'switch'"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_a_router_is_rejected(tiny, name, moe, said):
    with pytest.raises(ValueError, match=said):
        lm.Transformer(with_router(tiny, name, **moe).model)


def test_arguments_reach_a_built_in_router(tiny):
    tables = [
        lm.Transformer(with_router(tiny, "hash", arguments={"seed": seed}).model).routers()[0].table
        for seed in (0, 0, 1)
    ]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])
    assert len(tables[0]) == tiny().model.vocab_size


def test_training_counts_the_load_before_dropping(tiny, tmp_path, quick):
    seen = {}
    for room in (0.0, 0.3):
        config = with_router(tiny, "sigmoid", capacity_factor=room, train={**QUIET, "log_every": 1})
        run = tmp_path / str(room)
        train.train(config, run)
        seen[room] = read_metrics(run)[0]["max_violations"][0], lm.load(run).routers()[0].bias.abs().max()
    assert seen[0.3][0] == seen[0.0][0] > 0.5  # first layer, first step: nothing differs yet
    assert seen[0.3][1] > 0


def test_capacity_factor_limits_every_expert(tiny):
    room = Transformer(with_router(tiny, "sigmoid", capacity_factor=1.7).model).routers()[0]
    assert room.capacity_factor == 1.7 and room.priority == "choice"
    choice = Transformer(with_router(tiny, "expert_choice", top_k=3).model).routers()[0]
    assert choice.capacity_factor == 3


def test_a_config_field_is_rejected_as_an_argument(tiny):
    wrong = with_router(tiny, "sigmoid", arguments={"top_k": 1})
    with pytest.raises(ValueError, match=r"^model\.moe\.arguments top_k: .* set model\.moe\.top_k"):
        Transformer(wrong.model)


def test_config_values_that_a_custom_router_does_not_take_are_reported(tiny):
    own = {"router": "torch.nn:Identity", "routed_scaling_factor": 2.5}
    with pytest.warns(
        UserWarning, match="takes no routed_scaling_factor: model.moe.routed_scaling_factor 2.5"
    ):
        Transformer(tiny(moe={"num_groups": 1, "top_groups": 1, **own}).model)
    with pytest.raises(
        ValueError, match=r"capacity_factor 1.5 needs a router with num_experts; torch.nn:Ide"
    ):
        Transformer(with_router(tiny, "torch.nn:Identity", capacity_factor=1.5).model)

"""Generation leaves the model as it was, and always uses the weights that the model has now."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

import lm
from mla import MultiheadLatentAttention
from tests.lm.inference.kinds import KINDS, PREFIX, WIDE


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def model(request, tiny, make_model):
    return make_model(tiny(**request.param).model, std=0.3).float()


@pytest.fixture
def mla(tiny, make_model):
    return make_model(tiny(**KINDS["mla"]).model, std=0.3).float()


def by_engine(model):
    engine = lm.Engine(model, 2, 1000)
    engine.submit(PREFIX, 3, seed=0)
    engine.run()
    return engine  # still alive while the model is used


def by_function(model):
    return lm.generate(model, torch.tensor([PREFIX[:70]] * 2), 3, seed=0)


GENERATORS = pytest.mark.parametrize("generating", [by_engine, by_function])


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def memory(model):
    """Identity and place of every tensor and module."""
    places = {}
    for name, t in tensors(model).items():
        storage = t.untyped_storage()
        places[name] = id(t), t.data_ptr(), t.stride(), storage.data_ptr(), storage.nbytes(), t.requires_grad
    return places, [(id(module), module.training) for module in model.modules()]


def bits(state):
    return {name: tensor.detach().flatten().view(torch.uint8).tolist() for name, tensor in state.items()}


@GENERATORS
def test_generating_leaves_the_models_memory_as_it_was(model, generating):
    places, numbers = memory(model), bits(tensors(model))
    kept = generating(model)
    assert memory(model) == places and bits(tensors(model)) == numbers
    assert all(parameter.grad is None for parameter in model.parameters())
    del kept


@GENERATORS
def test_the_next_training_step_is_the_same_bit_for_bit(model, generating):
    found = []
    for generates in (False, True):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.01)
        kept = []
        for seed in range(2):
            if generates:
                kept.append(generating(trained))
            batch = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(seed))
            logits = trained(batch[:, :-1]).logits
            F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(bits(tensors(trained)))
    assert found[0] == found[1]


def data_copy(model):
    weight = model.blocks[0].attention.kv_a.weight
    weight.data.copy_(-weight)


def data_assigned_by_index(model):
    model.blocks[0].attention.kv_b.weight.data[:] = model.blocks[0].attention.kv_b.weight.data * -1


def one_number_of_data(model):
    model.blocks[0].attention.kv_norm.weight.data[3] *= -1


def data_multiplied(model):
    model.blocks[0].attention.kv_a.weight.data.mul_(-1)


def in_place(model):
    with torch.no_grad():
        model.blocks[1].mlp.experts.down.mul_(-1)


def optimizer_step(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.03).step()
    model.zero_grad()


def load_state_dict(model):
    model.load_state_dict({name: -tensor for name, tensor in model.state_dict().items()})


def data_replaced(model):
    model.head.weight.data = -model.head.weight.data


def parameter_replaced(model):
    model.blocks[0].mlp.gate_up.weight = torch.nn.Parameter(-model.blocks[0].mlp.gate_up.weight.detach())


def rows_exchanged(model):
    weight = model.blocks[1].mlp.experts.gate_up.data
    weight.copy_(weight.flip(0))  # the same numbers in all, and in every column


def selection_bias_in_place(model):
    bias = model.routers()[0].bias
    bias.copy_(-bias + torch.arange(8))


def selection_bias_through_data(model):
    bias = model.routers()[0].bias
    bias.data[:] = -bias + torch.arange(8)


CHANGES = [
    *(data_copy, data_assigned_by_index, one_number_of_data, data_multiplied, in_place, optimizer_step),
    *(load_state_dict, data_replaced, parameter_replaced, rows_exchanged),
    *(selection_bias_in_place, selection_bias_through_data),
]
CLOSE = {"rtol": 1e-3, "atol": 1e-3}  # fp32; the changes move logits by more than ten times this
EVERY_CHANGE = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


def logits_of(engine, prompt, monkeypatch):
    """The logits that the next token of a prompt is drawn from."""
    found, write = [], engine.write
    with monkeypatch.context() as patch:
        patch.setattr(
            engine, "write", lambda requests, logits: (found.append(logits), write(requests, logits))
        )
        engine.submit(prompt, 1)
        engine.run()
    return found[-1][-1]


@torch.no_grad()
def of_model(model, prompt):
    return model(torch.tensor([prompt])).logits[0, -1]


@EVERY_CHANGE
def test_changed_weights_never_meet_pages_of_the_old_ones(mla, monkeypatch, change):
    engine = lm.Engine(mla, 2, 1000)
    old = logits_of(engine, PREFIX, monkeypatch)
    engine.step()  # the request's pages are known by their tokens now
    change(mla)
    found = logits_of(engine, [*PREFIX, 7], monkeypatch)
    assert torch.equal(found, logits_of(lm.Engine(mla, 2, 1000), [*PREFIX, 7], monkeypatch))
    torch.testing.assert_close(found, of_model(mla, [*PREFIX, 7]), **CLOSE)
    assert (logits_of(engine, PREFIX, monkeypatch) - old).abs().max() > 0.01


@EVERY_CHANGE
def test_pages_of_a_text_that_began_with_the_old_weights_are_forgotten(mla, monkeypatch, change):
    engine = lm.Engine(mla, 2, 1000)
    old = engine.submit(PREFIX[:150], 20)
    engine.step()
    change(mla)
    engine.submit([1, 2], 1)  # comes with the new weights, while the old text goes on
    engine.run()
    assert len(old.tokens) == 20
    prompt = [*old.prompt, *old.tokens, *PREFIX]
    torch.testing.assert_close(logits_of(engine, prompt, monkeypatch), of_model(mla, prompt), **CLOSE)


@EVERY_CHANGE
def test_refresh_tells_whether_the_weights_have_changed(mla, change):
    engine = by_engine(mla)
    assert not engine.refresh()
    change(mla)
    assert engine.refresh() and not engine.refresh()
    fresh = lm.Engine(mla, 2, 1000)
    request, want = (one.submit(PREFIX, 5, 0) for one in (engine, fresh))
    engine.run()
    fresh.run()
    assert not engine.refresh() and request.tokens == want.tokens


def test_other_dtypes_need_a_new_engine(mla):
    engine = lm.Engine(mla, 1, 100)
    mla.double()
    with pytest.raises(ValueError, match=r"is torch.float64 .* was torch.float32 .* create a new one"):
        engine.submit([1], 1)
        engine.step()


class Scaled(MultiheadLatentAttention):
    """Other numbers, the same methods: its base's decode step stands."""

    def __init__(self, dim, num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim):
        super().__init__(dim, num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim)
        self.scale *= 0.5


class Halved(MultiheadLatentAttention):
    """Another forward: its base's decode step would give other numbers."""

    def forward(self, x, cache=None, positions=None, mask=None):
        return super().forward(x, cache, positions, mask) * 0.5


class HalvedAgain(Halved):
    """Inherits the forward that differs."""


def with_attention(tiny, make_model, name):
    config = tiny(
        **{**KINDS["mla"], "attention": {**WIDE, "q_lora_rank": 0, "kind": f"{__name__}:{name}"}}
    ).model
    return make_model(config, std=0.3).float()


def check_logits(model, monkeypatch):
    engine = lm.Engine(model, 1, 1000)
    torch.testing.assert_close(logits_of(engine, PREFIX, monkeypatch), of_model(model, PREFIX), **CLOSE)


def test_a_subclass_that_keeps_the_decode_step_keeps_its_pages_without_a_warning(
    tiny, make_model, monkeypatch
):
    model = with_attention(tiny, make_model, "Scaled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lm.Engine(model, 1, 100).paged
        check_logits(model, monkeypatch)


@pytest.mark.parametrize("name", ["Halved", "HalvedAgain"])
def test_a_subclass_that_overrides_forward_warns_once_and_runs_without_pages(
    tiny, make_model, monkeypatch, name
):
    model = with_attention(tiny, make_model, name)
    with pytest.warns(UserWarning, match=f"^{name} overrides forward; it is run without pages") as caught:
        assert not lm.Engine(model, 1, 100).paged
    assert len(caught) == 1  # of the class, not of each layer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_logits(with_attention(tiny, make_model, name), monkeypatch)

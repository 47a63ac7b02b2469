"""The tiny checkpoints in tests/lm/hub/reference, written by transformers: our logits equal its logits."""

import types

import pytest
import torch

import lm
from lm.hub.families import FAMILIES
from moe import Routing
from tests.lm.hub.folders import REFERENCE, expected, off
from tests.lm.hub.reference import make


def test_every_architecture_has_a_tiny_checkpoint():
    folders = {path.parent.name for path in REFERENCE.glob("*/config.json")}
    assert folders == set(FAMILIES) == set(make.CASES)
    assert sum(path.stat().st_size for path in REFERENCE.rglob("*")) < 400_000


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_and_greedy_text_equal_transformers(kind):
    model = lm.from_hf(REFERENCE / kind)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert off(model, kind) < 1e-5
    continued = expected(kind)["continued"]
    assert continued.shape == (2, 20)
    assert torch.equal(lm.generate(model, continued[:, :12], 8, temperature=0), continued)


def weights_with_the_bias(model):
    """The best known mistake: the selection bias also changes the weights."""

    def forward(router, x):
        routing = type(router).forward(router, x)
        weights = (routing.scores + router.bias).gather(-1, routing.experts)
        weights = weights / weights.sum(-1, keepdim=True) * router.routed_scaling_factor
        return Routing(routing.experts, weights, routing.scores, routing.logits)

    for router in model.routers():
        router.forward = types.MethodType(forward, router)


def of_routers(**changes):
    def change(model):
        for router in model.routers():
            vars(router).update(changes)

    return change


def of_rope(**changes):
    def change(model):
        for block in model.blocks:
            vars(block.attention.rope).update(changes)

    return change


def without_mscale(model):
    for block in model.blocks:
        block.attention.scale /= block.attention.rope.softmax_factor


def without_cos_sin_scaling(model):
    for block in model.blocks:
        block.attention.rope.cos_sin_factor = 1.0


def closed_groups_at_zero(model):
    """Scores of 0 for closed groups, which beat negative scores."""

    def forward(router, x):
        routing = type(router).forward(router, x)
        choice = routing.scores + router.bias
        grouped = choice.unflatten(-1, (router.num_groups, -1))
        best = grouped.topk(2).values.sum(-1).topk(router.top_groups).indices
        closed = torch.ones(*grouped.shape[:-1], dtype=torch.bool).scatter(-1, best, False)
        experts = grouped.masked_fill(closed.unsqueeze(-1), 0.0).flatten(-2).topk(router.top_k).indices
        weights = routing.scores.gather(-1, experts)
        weights = weights / weights.sum(-1, keepdim=True) * router.routed_scaling_factor
        return Routing(experts, weights, routing.scores, routing.logits)

    for router in model.routers():
        router.forward = types.MethodType(forward, router)


def ungated(model):
    for block in model.blocks[1:]:
        block.mlp.shared = block.mlp.shared.mlp


def zeroed(*words):
    """Set parameters with these words in their names to 0, and norm weights to 1."""

    def change(model):
        for name, parameter in model.named_parameters():
            if any(word in name for word in words):
                parameter.data.fill_(1.0 if "norm" in name else 0.0)

    return change


def swapped_gate_and_up(model):
    for block in model.blocks:
        for part in (block.mlp, getattr(block.mlp, "shared", None), getattr(block.mlp, "experts", None)):
            held = getattr(part, "gate_up", None)
            if held is not None:
                data = held.data if isinstance(held, torch.nn.Parameter) else held.weight.data
                data.copy_(torch.cat(data.chunk(2, dim=-2)[::-1], dim=-2))


def rope_first(model):
    """Query heads as [rope, nope], as in some implementations."""
    for block in model.blocks:
        attention = block.attention
        nope = attention.qk_nope_head_dim
        weight = (attention.q if attention.q_lora_rank is None else attention.q_b).weight
        heads = weight.data.unflatten(0, (attention.num_heads, -1))
        weight.data.copy_(torch.cat((heads[:, nope:], heads[:, :nope]), dim=1).flatten(0, 1))


def latent_eps(model):
    for block in model.blocks:
        block.attention.kv_norm.eps = 0.1


WRONG = {  # one mistake each: an architecture and a change to its model
    "V3: the bias changes the weights": ("deepseek_v3", weights_with_the_bias),
    "Kimi: the bias changes the weights": ("kimi_k2", weights_with_the_bias),
    "V3: no bias": ("deepseek_v3", lambda model: [router.bias.zero_() for router in model.routers()]),
    "V3: groups by their best expert": ("deepseek_v3", of_routers(group_best=1)),
    "V3: closed groups at zero": ("deepseek_v3", closed_groups_at_zero),
    "V3: no groups": ("deepseek_v3", of_routers(num_groups=1, top_groups=1)),
    "V3: weights not normalised": ("deepseek_v3", of_routers(normalize=False)),
    "V3: no routed scaling factor": ("deepseek_v3", of_routers(routed_scaling_factor=1.0)),
    "V3: no shared expert": ("deepseek_v3", zeroed("shared")),
    "V3: rope in halves": ("deepseek_v3", of_rope(interleaved=False)),
    "V3: no mscale": ("deepseek_v3", without_mscale),
    "V3: no YaRN": ("deepseek_v3", of_rope(scaling=None)),
    "V3: no biases in attention": ("deepseek_v3", zeroed("q_a.bias", "kv_a.bias", "out.bias")),
    "V3: rope before nope": ("deepseek_v3", rope_first),
    "V3: a different eps in the latent's norm": ("deepseek_v3", latent_eps),
    "V3: no weight in the latent's norm": ("deepseek_v3", zeroed("kv_norm")),
    "V3: up before gate": ("deepseek_v3", swapped_gate_and_up),
    "V2: normalised weights": ("deepseek_v2", of_routers(normalize=True)),
    "V2: groups by their two best experts": ("deepseek_v2", of_routers(group_best=2)),
    "V2: no mscale": ("deepseek_v2", without_mscale),
    "V2: rope in halves": ("deepseek_v2", of_rope(interleaved=False)),
    "GLM: rope in halves": ("glm4_moe_lite", of_rope(interleaved=False)),
    "Youtu: rope in halves": ("youtu", of_rope(interleaved=False)),
    "Llama: rope interleaved": ("llama", of_rope(interleaved=True)),
    "Llama: no scaling": ("llama", of_rope(scaling=None)),
    "Llama: no biases": ("llama", zeroed("bias")),
    "Qwen2: no biases": ("qwen2", zeroed("bias")),
    "Qwen2: cos and sin not scaled": ("qwen2", without_cos_sin_scaling),
    "Qwen3: no query and key norms": ("qwen3", zeroed("q_norm", "k_norm")),
    "Qwen3: no linear scaling": ("qwen3", of_rope(scaling=None)),
    "Mixtral: up before gate": ("mixtral", swapped_gate_and_up),
    "Mixtral: weights not normalised": ("mixtral", of_routers(normalize=False)),
    "Qwen2-MoE: no gate on the shared expert": ("qwen2_moe", ungated),
    "Qwen2-MoE: normalised weights": ("qwen2_moe", of_routers(normalize=True)),
    "Qwen3-MoE: weights not normalised": ("qwen3_moe", of_routers(normalize=False)),
}


@pytest.mark.parametrize("kind, mistake", WRONG.values(), ids=WRONG)
def test_every_mistake_is_detected(kind, mistake):
    model = lm.from_hf(REFERENCE / kind)
    mistake(model)
    assert off(model, kind) > 1e-3

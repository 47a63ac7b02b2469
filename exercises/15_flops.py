"""How many FLOPs does one training token take?"""

import torch

TARGET = "lm.count:training_flops_per_token"
TESTS = ("tests/lm/test_count.py",)
WHICH = "flops and not biases"
EQUATION = "6 N, and attention over the causal half"
LEARN = "Each active weight in a matrix product costs 6 FLOPs per token; attention adds more the longer the context."
HINTS = (
    "Forward takes two operations per weight; how many does backward take? Which weights are in no matrix product?",
    "6 for every active weight except the vectors (norms, biases) and an untied embedding, which is only looked up. "
    "Attention: a query sees (context + 1) / 2 keys on average, each per_key multiplications a layer, 2 operations each, times 3.",
    "active_parameters, vector_parameters, built_in_attention(config).per_key, config.tie_embeddings",
)
EXPECTS = {
    "config": "a ModelConfig, with or without tied embeddings, biases and experts",
    "context": "an int, the context length in tokens",
    "returns": "an int, exact",
}
MISTAKES = (
    (
        "active_parameters(config)",
        "total_parameters(config)",
        "all experts are counted: a token uses top_k of them and the shared ones",
    ),
    (
        "6 * in_products",
        "2 * in_products",
        "only forward is counted: backward costs twice as much, so 6 per weight in total",
    ),
    (
        "lookup = 0 if config.tie_embeddings else config.vocab_size * config.dim",
        "lookup = 0",
        "the embedding is counted: its rows are looked up, without a matrix product",
    ),
    (
        "lookup = 0 if config.tie_embeddings else config.vocab_size * config.dim",
        "lookup = config.vocab_size * config.dim",
        "tied embeddings are not counted: the head multiplies by them",
    ),
    (
        "* (context + 1)",
        "* 2 * context",
        "every query is counted with all keys: with a causal mask it sees half of them on average",
    ),
    (
        "3 * config.num_layers * built_in_attention",
        "3 * built_in_attention",
        "the attention of only one layer is counted: there are num_layers",
    ),
    (
        " - vector_parameters(config)",
        "",
        "norms and biases are counted: they are in no matrix product",
    ),
    (
        "return 6 * in_products + 3",
        "return 1.0 * 6 * in_products + 3",
        "the result is a float: return an int",
    ),
    (
        "* (context + 1)",
        "* 2 * ((context + 1) // 2)",
        "the number of keys is rounded down: multiply first, (context + 1) / 2 need not be whole",
    ),
    (
        "return 6 * in_products + 3 *",
        "return int(torch.tensor(6.0 * in_products)) + 3 *",
        "the weights are counted in fp32, which is exact up to 16 million only: use ints",
    ),
    (
        "(context + 1)",
        "context",
        "a query is not counted with itself: it sees (context + 1) / 2 keys on average",
    ),
)
RIGHT = (
    """
    weights = active_parameters(config) - vector_parameters(config)
    if not config.tie_embeddings:
        weights -= config.vocab_size * config.dim
    keys = (context + 1) / 2
    attention = config.num_layers * keys * built_in_attention(config).per_key
    return int(6 * weights + 6 * attention)
    """,
    """
    embedding = config.vocab_size * config.dim * (not config.tie_embeddings)
    forward = 2 * (active_parameters(config) - embedding - vector_parameters(config))
    forward += config.num_layers * built_in_attention(config).per_key * (context + 1)
    return 3 * forward
    """,
    """
    parts = parameters_by_part(config, active=True)
    met = sum(parts.values()) - vector_parameters(config)
    met -= 0 if config.tie_embeddings else parts["embedding"]
    pairs = config.num_layers * built_in_attention(config).per_key
    return 6 * met + pairs * 3 * (1 + context)
    """,
    """
    total = 0
    for name, count in parameters_by_part(config, active=True).items():
        total += 0 if name == "embedding" and not config.tie_embeddings else 6 * count
    layers = [built_in_attention(config).per_key * (context + 1) for _ in range(config.num_layers)]
    return total - 6 * vector_parameters(config) + 3 * sum(layers)
    """,
    """
    in_products = active_parameters(config) - vector_parameters(config)
    in_products -= config.vocab_size * config.dim if not config.tie_embeddings else 0
    pairs = sum(range(1, context + 1))  # of query and key
    attention = 2 * 3 * config.num_layers * built_in_attention(config).per_key * pairs
    return 6 * in_products + attention // context
    """,
    """
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.dim
    forward = [2 * active_parameters(config), -2 * lookup, -2 * vector_parameters(config)]
    forward += [built_in_attention(config).per_key * (context + 1)] * config.num_layers
    backward = [2 * part for part in forward]
    return sum(forward + backward)
    """,
)


def probe(module, generator):
    """Published sizes, with and without tied embeddings, with biases, with MLA and GQA."""
    import dataclasses

    from lm.config import Config

    found = {}
    for name, context in (("deepseek-v3", 4096), ("deepseek-v2-lite", 777), ("toy", 129), ("toy-gqa", 64)):
        model = Config.preset(name).model
        for tied in (False, True):
            flops = module.training_flops_per_token(dataclasses.replace(model, tie_embeddings=tied), context)
            found[f"{name}, {'tied' if tied else 'not tied'}"] = torch.as_tensor(flops)
            found[f"{name}, {tied}, is an int"] = torch.tensor(type(flops) is int)
    biased = dataclasses.replace(model, attention=dataclasses.replace(model.attention, out_bias=True))
    return found | {"with biases": torch.tensor(module.training_flops_per_token(biased, 50))}

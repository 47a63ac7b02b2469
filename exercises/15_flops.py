"""How much work is a token?"""

import torch

TARGET = "lm.count:training_flops_per_token"
TESTS = ("tests/lm/test_count.py",)
WHICH = "flops and not biases"
EQUATION = "6 N, and attention over the causal half"
LEARN = "A weight that is met costs 6, of experts only those at work count, and a key costs more the longer the text."
HINTS = (
    "Two operations a weight forward; how many backward? Which weights does no product meet?",
    "6 for every active weight but the embedding's rows that are looked up and the vectors (norms, biases). Attention: "
    "a query sees (context + 1) / 2 keys on average, each per_key multiplications a layer, at 2 operations, three times.",
    "active_parameters, vector_parameters, built_in_attention(config).per_key, config.tie_embeddings",
)
MISTAKES = (
    (
        "active_parameters(config)",
        "total_parameters(config)",
        "all experts are counted: a token meets top_k of them and the shared one",
    ),
    (
        "6 * in_products",
        "2 * in_products",
        "forward alone: backward costs twice as much again, 6 a weight in all",
    ),
    (
        "lookup = 0 if config.tie_embeddings else config.vocab_size * config.dim",
        "lookup = 0",
        "the embedding is counted: a token's row is looked up, no product meets it",
    ),
    (
        "lookup = 0 if config.tie_embeddings else config.vocab_size * config.dim",
        "lookup = config.vocab_size * config.dim",
        "tied embeddings are left out: the head's product meets them",
    ),
    (
        "* (context + 1)",
        "* 2 * context",
        "every query is given all keys: a causal one sees half of them on average",
    ),
    (
        "3 * config.num_layers * built_in_attention",
        "3 * built_in_attention",
        "the attention of one layer: there are num_layers",
    ),
    (
        " - vector_parameters(config)",
        "",
        "norms and biases are counted: no matrix product meets them",
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
)


def probe(module, generator):
    """Published sizes, tied and not, with biases, of both kinds of attention."""
    import dataclasses

    from lm.config import Config

    found = {}
    for name, context in (("deepseek-v3", 4096), ("deepseek-v2-lite", 777), ("toy", 129), ("toy-gqa", 64)):
        model = Config.preset(name).model
        for tied in (False, True):
            flops = module.training_flops_per_token(dataclasses.replace(model, tie_embeddings=tied), context)
            found[f"{name}, {'tied' if tied else 'not tied'}"] = torch.tensor(flops)
    biased = dataclasses.replace(model, attention=dataclasses.replace(model.attention, out_bias=True))
    return found | {"with biases": torch.tensor(module.training_flops_per_token(biased, 50))}

"""Attentions of equal parameters, their caches, and the smallest one as good as MHA."""

import pytest

from lm import count


def test_parameters_are_equal_and_cache_bytes_are_as_counted(experiment, mini):
    configs = experiment.models(mini)
    sizes = [count.total_parameters(config.model) for config in configs.values()]
    assert max(sizes) < 1.005 * min(sizes)
    bytes_per_token = {name: experiment.bytes_per_token(config) for name, config in configs.items()}
    for name, config in configs.items():
        assert bytes_per_token[name] == 4 * count.cache_elements_per_token(config.model)
    layers, heads = mini.model.num_layers, experiment.HEADS
    assert bytes_per_token["MHA"] == 4 * layers * 2 * heads * configs["MHA"].model.attention.head_dim
    assert bytes_per_token["MQA"] * heads == bytes_per_token["MHA"]
    assert bytes_per_token["MLA, rank 8"] == 4 * layers * (8 + experiment.ROPE)


def test_the_smallest_cache_within_one_standard_error_of_mha(experiment):
    sizes = {"MHA": 100, "MLA, rank 4": 10, "MLA, rank 8": 14, "MLA, rank 16": 20, "GQA": 50}
    losses = {
        "MHA": [1.0, 1.1, 1.2],
        "MLA, rank 4": [1.05, 1.16, 1.25],  # worse by 0.053 ± 0.003
        "MLA, rank 16": [0.9, 1.0, 1.1],
        "MLA, rank 8": [1.0, 1.11, 1.19],  # 0.000 ± 0.006
        "GQA": [1.02, 1.13, 1.23],
    }
    assert experiment.smallest_as_good(losses, sizes, "MLA") == "MLA, rank 8"
    assert experiment.smallest_as_good(losses, sizes, "GQA") is None
    said = experiment.answers(losses, sizes)
    assert "MLA, rank 8" in said[0] and "0.140" in said[0]
    assert said[1] == "No GQA here has MHA's loss within one standard error."


def test_decoding_is_timed_at_the_context(experiment, mini):
    configs = {name: experiment.models(mini)[name] for name in ("MHA", "MLA, rank 8")}
    seconds = experiment.decode_seconds(configs, 16, 2)
    assert list(seconds) == list(configs) and min(seconds.values()) > 0
    with pytest.raises(ValueError, match="max_length"):
        experiment.decode_seconds(configs, 16, -1)

"""`lm info`: its numbers, its text and its figure."""

import itertools
import json

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lm import count
from lm.config import Config, preset_names
from lm.report import info
from tests.helpers import refused
from tests.lm.report.colours import contrast


def test_summary_and_its_text_agree(tiny):
    config = tiny(attention={"num_heads": 8}).model
    facts = info.summary(config, 1000)
    parameters = facts["parameters"]
    assert parameters["total"] == count.total_parameters(config)
    assert parameters["active"] == count.active_parameters(config)
    assert facts["training_flops_per_token"] == count.training_flops_per_token(config, 1000)
    assert facts["cache_elements_per_token"] == 3 * (8 + 4)
    assert facts["cache_bytes_per_token"] == {
        "this model": 2 * 3 * (8 + 4),
        "MHA": 2 * 3 * 2 * 8 * 6,
        "GQA, 4 key-value heads": 2 * 3 * 2 * 4 * 6,
        "MQA": 2 * 3 * 2 * 6,
        "llama-3.1-405b": 2 * 258_048,
    }
    assert "in bf16: bytes per token" in info.as_text(facts)
    for name in ("total", "active"):
        assert sum(parameters[f"{name}_by_part"].values()) == parameters[name]
        assert parameters[f"{name}_without_input_embedding"] == parameters[name] - 256 * 16
        assert parameters[f"{name}_without_embedding_and_head"] == parameters[name] - 2 * 256 * 16
    text = info.as_text(facts)
    shown = [*parameters["total_by_part"].values(), *parameters["active_by_part"].values()]
    shown += [number for number in parameters.values() if isinstance(number, int)]
    shown += [facts["training_flops_per_token"], *facts["cache_bytes_per_token"].values()]
    assert all(f"{number:,}" in text for number in shown)
    assert f"{2 * 3 * 12 * 1000 / 2**20:,.2f} MiB     1.00 x" in text
    assert f"{2 * 3 * 2 * 8 * 6 / (2 * 3 * 12):.2f} x" in text
    assert "DeepSeek-V3's pre-training" not in text


def test_a_tied_embedding_is_subtracted_once(tiny):
    parameters = info.summary(tiny(model={"tie_embeddings": True}).model, 10)["parameters"]
    assert parameters["total_without_input_embedding"] == parameters["total"]  # it is the head as well
    assert parameters["active_without_embedding_and_head"] == parameters["active"] - 256 * 16


@pytest.mark.parametrize("dtype, size", [("fp32", 4), ("fp8", 1)])
def test_caches_have_the_requested_dtype(dtype, size):
    caches = info.summary(Config.preset("deepseek-v3").model, 10, dtype)["cache_bytes_per_token"]
    assert caches["this model"] == 61 * (656 if dtype == "fp8" else 576 * 4)
    assert caches["MHA"] == 61 * 2 * 128 * 128 * size
    assert caches["llama-3.1-405b"] == 258_048 * size
    assert f"cache in {dtype}:" in info.as_text(info.summary(Config.preset("toy").model, 10, dtype))


@pytest.mark.parametrize("name", preset_names())
def test_the_attentions_compared_have_different_caches(name):
    config = Config.preset(name).model
    facts = info.summary(config, 10)
    at_v3_size = facts["v3_cache_bytes_per_token_and_layer"]
    assert at_v3_size == {"MLA": 1152, "MHA": 65536, "GQA, 8 key-value heads": 4096, "MQA": 512}
    own, *rivals = list(facts["cache_bytes_per_token"].items())[:-1]
    assert len({size for _, size in rivals}) == len(rivals) >= 2
    heads, width = config.attention.num_heads, count.built_in_attention(config).value_dim
    for rival, size in rivals:
        kv_heads = {"MHA": heads, "MQA": 1}.get(rival) or int(rival.split()[1])
        assert heads % kv_heads == 0 and size == 2 * 2 * kv_heads * width * config.num_layers
        if rival.startswith("GQA"):
            assert 1 < kv_heads < heads and size != own[1]


@pytest.mark.parametrize(
    "heads, groups", [(1, []), (2, []), (3, []), (4, [2]), (6, [3]), (16, [8]), (20, [5])]
)
def test_grouped_query_attention_has_at_most_8_key_value_heads(tiny, heads, groups):
    names = info.cache_bytes(tiny(attention={"num_heads": heads}).model, "bf16")
    want = [f"GQA, {number} key-value heads" for number in groups]
    assert [name for name in names if name.startswith("GQA")] == want


def test_custom_parts_are_listed_and_count_as_0(tiny):
    plain = info.summary(tiny(moe={"router": "hash"}).model, 10)
    facts = info.summary(tiny(moe={"router": "mine\x1b:Own"}).model, 10)
    assert facts.pop("not_counted") == {"model.moe.router": "mine\x1b:Own"} and not plain.pop("not_counted")
    assert facts == plain
    text = info.as_text({**facts, "not_counted": {"model.moe.router": "mine\x1b:Own"}})
    assert r"not counted: model.moe.router mine\x1b:Own is your own code" in text
    config = tiny(attention={"kind": "mine:Own"}).model
    facts = info.summary(config, 10)
    parts = facts["parameters"]["total_by_part"]
    assert parts["attention"] == 0 and parts["norms"] == 7 * 16
    assert parts["routed experts"] == 2 * 8 * 3 * 16 * 8
    assert not {"training_flops_per_token", "cache_elements_per_token"} & facts.keys()
    assert facts["cache_bytes_per_token"]["MHA"] == 2 * 3 * 2 * 2 * 6
    assert "this model" not in facts["cache_bytes_per_token"]
    assert "not counted: model.attention.kind mine:Own" in info.as_text(facts)
    assert json.loads(json.dumps(facts)) == facts


def test_v3_is_shown_with_its_published_training_cost():
    text = info.as_text(info.summary(Config.preset("deepseek-v3").model, 100))
    assert "3.71e+24 FLOPs for 14.8 T tokens in 2.664 M GPU hours" in text  # whatever the context
    assert "387 TFLOP/s per GPU, 39% of the BF16 peak" in text
    assert "post-training 2.788 M GPU hours, 5.576 M dollars at 2 dollars per hour" in text


def test_deepseek_moe_needs_the_74_4_tflops_of_its_paper():
    assert "with DeepSeekMoE's formula 74.42 T" in info.as_text(
        info.summary(Config.preset("deepseek-moe-16b").model, 4096)
    )


@pytest.mark.parametrize("name", preset_names())
def test_every_presets_summary_survives_json(name):
    facts = info.summary(info.find_config(name), 4096)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert max(len(line) for line in info.as_text(facts).splitlines()) <= 110


@pytest.mark.parametrize(
    "number, words", [(0, "0"), (999, "999"), (1000, "1 k"), (74.42e12, "74.42 T"), (2.5e21, "2.5e+06 P")]
)
def test_large_numbers_are_shortened(number, words):
    assert info.short(number) == words


# --- the figure


def parameters_of(total, active):
    return {
        "total": sum(total.values()),
        "total_by_part": total,
        "active": sum(active.values()),
        "active_by_part": active,
    }


NONE = dict.fromkeys(info.COLOURS, 0)
DENSE = NONE | {"embedding": 100, "attention": 300, "dense MLPs": 590, "norms": 10}
SPARSE = NONE | {"attention": 500, "routed experts": 9000, "shared experts": 480, "routers": 1, "head": 19}
ACTIVE = SPARSE | {"routed experts": 1000}
CASES = pytest.mark.parametrize(
    "parameters",
    [
        parameters_of(DENSE, DENSE),
        parameters_of(SPARSE, ACTIVE),
        parameters_of(NONE | {"head": 10**12}, NONE | {"head": 1}),
        *(info.summary(Config.preset(name).model, 10)["parameters"] for name in ("toy", "deepseek-v3")),
    ],
    ids=["dense", "sparse", "one part", "toy", "deepseek-v3"],
)


def bars_in(path):
    """Each bar of a PNG, from top to bottom, as its colours' parts and pixels [(part, pixels), ...]."""
    pixels = matplotlib.image.imread(path)[..., :3]
    part = np.full(pixels.shape[:2], -1)
    for index, colour in enumerate(info.COLOURS.values()):
        part[abs(pixels - to_rgb(colour)).max(-1) < 0.01] = index
    filled = (part >= 0).sum(1)
    rows = np.flatnonzero(filled > 0.5 * filled.max())  # text in a bar hides less than half of it
    tops = [row for row in rows if row - 1 not in rows]
    for row in tops:
        line = part[row + 3]  # just below the edge, above the text
        yield [
            (list(info.COLOURS)[index], sum(1 for _ in run))
            for index, run in itertools.groupby(line[line >= 0])
        ]


@CASES
def test_each_bar_shows_every_part_in_its_colour_order_and_share(tmp_path, parameters):
    info.draw(parameters, "a title with $\\frac$", tmp_path / "a.png")
    bars = list(bars_in(tmp_path / "a.png"))
    assert len(bars) == 2
    for bar, key in zip(bars, ("total", "active")):
        width = sum(pixels for _, pixels in bar)
        assert width > 800
        shares = {part: number / parameters[key] for part, number in parameters[f"{key}_by_part"].items()}
        assert [part for part, _ in bar] == [part for part in shares if part in dict(bar)]
        for part, share in shares.items():
            # an edge may blend two colours in one pixel on either side
            assert dict(bar).get(part, 0) / width == pytest.approx(share, abs=3 / width), (key, part)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """drawn(parameters): the figure itself, once it is saved and so laid out."""
    save, kept = Figure.savefig, []

    def save_and_keep(figure, *given, **options):
        save(figure, *given, **options)
        kept.append(figure)

    def make(parameters):
        monkeypatch.setattr(Figure, "savefig", save_and_keep)
        info.draw(parameters, "a model", tmp_path / "a.png")
        return kept[-1]

    return make


@CASES
def test_labels_are_the_percentages_and_fit_into_their_parts(drawn, parameters):
    [axis] = drawn(parameters).axes
    labels = {}
    for text in axis.texts:
        if text.get_text():
            box = text.get_window_extent()
            [bar] = [
                bar
                for bar in axis.patches
                if bar.get_width() and bar.get_window_extent().contains(*box.get_points().mean(0))
            ]
            outer = bar.get_window_extent()
            assert outer.x0 <= box.x0 < box.x1 <= outer.x1 and outer.y0 <= box.y0 < box.y1 <= outer.y1
            labels[round(bar.get_y()), matplotlib.colors.to_hex(bar.get_facecolor())] = text.get_text()
    wanted = {}
    for row, key in enumerate(("total", "active")):
        for part, number in parameters[f"{key}_by_part"].items():
            percent = 100 * number / parameters[key]
            if percent > 3:  # a smaller part has no room for a label; the legend has its number
                wanted[row, info.COLOURS[part]] = f"{percent:.0f}%"
    assert labels == wanted


@CASES
def test_the_legend_names_every_part_with_its_numbers(drawn, parameters):
    figure = drawn(parameters)
    [axis] = figure.axes
    texts = axis.get_legend().get_texts()
    wanted = []
    for part, total in parameters["total_by_part"].items():
        active = parameters["active_by_part"][part]
        if total:
            wanted.append(f"{part}: {info.short(total, 'kMBT')}")
            wanted[-1] += f" ({info.short(active, 'kMBT')} active)" if active != total else ""
    assert [text.get_text() for text in texts] == wanted
    ticks = [label.get_text() for label in axis.get_yticklabels()]
    assert ticks == [f"total\n{parameters['total']:,}", f"active per token\n{parameters['active']:,}"]
    boxes = [text.get_window_extent().padded(-2) for text in texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_every_part_has_its_own_colour_that_black_text_can_be_read_on(tiny):
    assert list(info.COLOURS) == list(count.parameters_by_part(tiny().model))
    assert len(set(info.COLOURS.values())) == len(info.COLOURS)
    assert all(contrast("black", colour) >= 4.5 for colour in info.COLOURS.values())


@pytest.mark.parametrize("name", ["a.jpg", "a", "png", ".png"])
def test_a_file_name_that_is_not_png_is_rejected(tmp_path, name):
    parameters = info.summary(Config.preset("nano").model, 10)["parameters"]
    refused(lambda: info.draw(parameters, "", tmp_path / name), f"plot={tmp_path / name}: ", "end in .png")
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written_is_rejected(tmp_path):
    parameters = info.summary(Config.preset("nano").model, 10)["parameters"]
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "folder.png", tmp_path / "absent" / "a.png"):
        refused(lambda path=path: info.draw(parameters, "", path), f"plot={path}: cannot be written: ")

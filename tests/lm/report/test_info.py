import json
import math

import matplotlib.image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm import count
from lm.config import Config, preset_names
from lm.report import info


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
        "GQA, 4 heads a group": 2 * 3 * 2 * 2 * 6,
        "MQA": 2 * 3 * 2 * 6,
        "llama-3.1-405b": 2 * 258_048,
    }
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
    assert "DeepSeek-V3" not in text


def test_tied_embeddings_are_left_out_once(tiny):
    parameters = info.summary(tiny(model={"tie_embeddings": True}).model, 10)["parameters"]
    assert parameters["total_without_input_embedding"] == parameters["total"]  # it is the head, too
    assert parameters["active_without_embedding_and_head"] == parameters["active"] - 256 * 16


@pytest.mark.parametrize("dtype, size", [("fp32", 4), ("fp8", 1)])
def test_caches_are_in_the_dtype_that_is_asked_for(dtype, size):
    caches = info.summary(Config.preset("deepseek-v3").model, 10, dtype)["cache_bytes_per_token"]
    assert caches["this model"] == 61 * (656 if dtype == "fp8" else 576 * 4)
    assert caches["MHA"] == 61 * 2 * 128 * 128 * size
    assert caches["llama-3.1-405b"] == 258_048 * size
    assert f"cache in {dtype}" in info.as_text(info.summary(Config.preset("toy").model, 10, dtype))


def test_v3_is_shown_with_what_its_training_took():
    text = info.as_text(info.summary(Config.preset("deepseek-v3").model, 100))
    assert "3.71e+24 FLOPs for 14.8 T tokens in 2.664 M GPU hours" in text  # whatever the context
    assert "387 TFLOP/s a GPU, 39% of the peak in BF16" in text
    assert "2.788 M GPU hours with all that followed, at 2 dollars each: 5.576 M dollars" in text


def test_deepseek_moe_is_shown_with_the_74_4_t_of_its_paper():
    assert "by DeepSeekMoE's formula 74.42 T" in info.as_text(
        info.summary(Config.preset("deepseek-moe-16b").model, 4096)
    )


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_summary_that_json_keeps(name):
    facts = info.summary(info.find_config(name), 4096)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert max(len(line) for line in info.as_text(facts).splitlines()) <= 110


@pytest.mark.parametrize(
    "number, words", [(0, "0"), (999, "999"), (1000, "1 k"), (74.42e12, "74.42 T"), (2.5e21, "2.5e+06 P")]
)
def test_large_numbers_are_short(number, words):
    assert info.short(number) == words


# --- the picture


def test_rectangles_are_laid_as_in_the_paper_on_squarified_treemaps():
    boxes = info.squarify([6.0, 6.0, 4.0, 3.0, 2.0, 2.0, 1.0], 0.0, 0.0, 6.0, 4.0)  # its figure 4
    expected = [(0, 0, 3, 2), (0, 2, 3, 2), (3, 0, 12 / 7, 7 / 3), (3 + 12 / 7, 0, 9 / 7, 7 / 3)]
    expected += [(3, 7 / 3, 6 / 5, 5 / 3)]
    for box, other in zip(boxes, expected):
        assert box == pytest.approx(other)


@given(
    numbers=st.lists(st.floats(1, 1e6), min_size=1, max_size=12),
    width=st.floats(0.5, 3),
    height=st.floats(0.5, 3),
)
def test_rectangles_have_their_areas_and_do_not_overlap(numbers, width, height):
    scale = width * height / sum(numbers)
    areas = sorted((number * scale for number in numbers), reverse=True)
    boxes = info.squarify(areas, 1.0, 2.0, width, height)
    assert [w * h for _, _, w, h in boxes] == pytest.approx(areas)
    for index, (x, y, w, h) in enumerate(boxes):
        assert x >= 1 - 1e-6 and y >= 2 - 1e-6 and x + w <= 1 + width + 1e-6 and y + h <= 2 + height + 1e-6
        for u, v, a, b in boxes[:index]:
            apart = min(x + w, u + a) - max(x, u), min(y + h, v + b) - max(y, v)
            assert min(apart) < 1e-6


def test_the_picture_has_each_part_in_its_colour_and_share(tmp_path):
    parts = {"embedding": 100, "attention": 300, "dense MLPs": 600, "norms": 0, "head": 0}
    parameters = {"total": 1000, "total_by_part": parts, "active": 1000, "active_by_part": parts}
    info.draw(parameters, "a title with $\\frac$", tmp_path / "a.png")
    pixels = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
    width = pixels.shape[1] // 2
    for name, number in parts.items():
        colour = matplotlib.colors.to_rgb(info.COLOURS[name])
        same = (abs(pixels[:, :width] - colour).max(-1) < 0.02).sum() / (width * pixels.shape[0])
        assert math.isclose(same, number / 1000 * 0.7, abs_tol=0.06), name


def test_every_part_has_a_colour_of_its_own(tiny):
    assert list(info.COLOURS) == list(count.parameters_by_part(tiny().model))
    assert len(set(info.COLOURS.values())) == len(info.COLOURS)


@pytest.mark.parametrize("name", ["a.jpg", "a", "png", ".png"])
def test_a_picture_of_another_kind_is_refused(tmp_path, name):
    parameters = info.summary(Config.preset("nano").model, 10)["parameters"]
    with pytest.raises(ValueError, match=r"plot=.*: a picture is written as PNG, so .*\.png"):
        info.draw(parameters, "", tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written_is_refused(tmp_path):
    parameters = info.summary(Config.preset("nano").model, 10)["parameters"]
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "folder.png", tmp_path / "absent" / "a.png"):
        with pytest.raises(ValueError, match=r"plot=.*\.png: cannot be written: "):
            info.draw(parameters, "", path)

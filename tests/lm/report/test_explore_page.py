"""explore.html in headless Chromium: the page chooses experts as the package does."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import lm
from lm import checkpoint, data
from lm.report import explore, measure
from moe import balance
from tests.helpers import BrowserPage
from tests.lm.report.explored import Source, ids

pytest.importorskip("selenium")
from selenium.webdriver.common.keys import Keys as keys
from selenium.webdriver.support.ui import Select

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!--<script>&lt;\u2028 {{ 7 * 7 }}"


class Page(BrowserPage):
    """An explorer in a browser, used through its controls."""

    def __init__(self, browser, path):
        super().__init__(browser, path.as_uri())
        self.folder, held = path.parent, Source(path).data
        self.tokens, self.steps = held["tokens"], [one["step"] for one in held["checkpoints"]]

    def text(self, name):
        return self.get(name).text

    def write(self, name, value):
        self.get(name).send_keys(keys.CONTROL, "a", keys.NULL, str(value) or keys.DELETE, keys.TAB)

    def choose(self, name, value):
        Select(self.get(name)).select_by_value(str(value))

    def options(self, name):
        return [int(option.text) for option in self.get(name).find_elements("tag name", "option")]

    def slide(self, name, times):
        self.get(name).send_keys((keys.ARROW_RIGHT if times > 0 else keys.ARROW_LEFT) * abs(times))

    def click(self, name, index=None):
        element = self.get(name) if index is None else self.all(name)[index]
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def script(self, text, *given):
        return self.browser.execute_script(f"return {text}", *given)

    def route(self):
        """The experts and weights that the page chooses for every token."""
        found = self.script("explorer.route()")
        return [one["experts"] for one in found], [one["weights"] for one in found]

    def loads(self):
        return [int(bar.text.split()[1]) for bar in self.all(".load")]

    def bias(self):
        return self.script("Array.from(explorer.state.bias)")


@pytest.fixture
def page(browser, run):
    page = Page(browser, run / "explore.html")
    yield page
    assert page.console() == []


def topk(values, k, dim=-1):
    """torch.topk with ties broken by the lower index, as in the page; torch leaves their order open."""
    found = values.sort(dim=dim, descending=True, stable=True)
    return torch.return_types.topk((found.values.narrow(dim, 0, k), found.indices.narrow(dim, 0, k)))


def router_of(page, layer, step):
    """A checkpoint's router in the package, and a function that routes the page's tokens with it."""
    weights = page.folder / "checkpoints" / f"step-{step or 0:06d}" / "model.safetensors"
    model = (
        lm.load(page.folder)
        if step is None
        else checkpoint.load_model(checkpoint.read_config(page.folder, False).model, weights)
    )
    tokens = ids(page.tokens)

    @torch.no_grad()
    def route():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "topk", topk)
            return model(tokens).routings[layer]

    return model.routers()[layer], route


def check(page, layer=0, step=None, **settings):
    """The page chooses as the package does, for every token."""
    router, route = router_of(page, layer, page.steps[-1] if step is None else step)
    for name, value in settings.items():
        setattr(router, name, value)
    routing = route()
    experts, weights = page.route()
    assert experts == routing.experts[0].tolist()
    torch.testing.assert_close(torch.tensor(weights), routing.weights[0], rtol=1e-6, atol=1e-6)
    loads = balance.tokens_per_expert(routing)
    assert page.loads() == loads.tolist()
    assert page.text("max-violation") == f"{float(balance.max_violation(loads)):.2f}"
    best = routing.weights.argmax(-1, keepdim=True)
    strongest = routing.experts.gather(-1, best)[0, :, 0].tolist()
    assert [
        int(token)
        for token in page.script("[...document.querySelectorAll('.token small')].map(e => e.textContent)")
    ] == strongest
    return routing


def test_it_opens_with_the_choices_of_the_newest_checkpoint(page):
    check(page)
    assert page.text("step") == "step 12" and "All 512 tokens have the experts" in page.text("changed")
    windows = data.Windows(data.load(checkpoint.read_config(page.folder, False).data, 256)[1], 16)
    for layer, labels in enumerate(measure.passage_experts(checkpoint.load(page.folder), windows)):
        page.choose("layer", layer)
        shown = page.script(
            "[...document.querySelectorAll('.token')].map(e => [e.firstChild.data, +e.lastChild.textContent])"
        )
        assert shown[:384] == [[token["text"], token["expert"]] for token in labels]
    page.browser.execute_script(
        "const probe = document.createElement('p'); probe.id = 'probe'; document.body.append(probe)"
    )
    for index in (0, 1, 2, 3, 50):
        colour = f"hsl({measure.hue(shown[index][1])} 80% 80%)"
        probe = page.browser.execute_script("probe.style.background = arguments[0]; return probe", colour)
        token = page.all(".token")[index]
        assert probe.value_of_css_property("background-color") == token.value_of_css_property(
            "background-color"
        )


@pytest.mark.parametrize("kind", ["saved", "hub"])
def test_a_folder_without_checkpoints_opens_as_stored(browser, saved_or_hub, kind):
    page = Page(browser, explore.write(saved_or_hub(kind)))
    assert page.text("step") == "as stored" and not page.get("checkpoint").is_displayed()
    assert page.steps == [None]
    check(page)
    page.choose("layer", 1)
    check(page, layer=1)
    assert page.console() == []


def test_layers_and_checkpoints_have_their_own_scores_and_biases(page):
    page.choose("layer", 1)
    check(page, layer=1)
    page.slide("checkpoint", -3)
    assert page.text("step") == "step 3"
    check(page, layer=1, step=3)
    page.choose("layer", 0)
    check(page, step=3)
    page.slide("checkpoint", 1)
    check(page, step=6)


@pytest.mark.parametrize(
    "top_k, num_groups, top_groups", [(1, 4, 2), (4, 4, 2), (2, 2, 1), (3, 4, 3), (8, 1, 1), (3, 1, 1)]
)
def test_top_k_and_groups(page, top_k, num_groups, top_groups):
    page.choose("num-groups", num_groups)
    page.write("top-k", top_k)
    page.choose("top-groups", top_groups)
    check(page, top_k=top_k, num_groups=num_groups, top_groups=top_groups)
    routing = router_of(page, 0, 12)[1]()
    same = [sorted(now) == sorted(then) for now, then in zip(page.route()[0], routing.experts[0].tolist())]
    assert page.text("changed").split()[0] == str(same.count(False))
    page.click("reset")
    check(page)


def test_only_valid_group_counts_are_offered(page):
    assert page.options("num-groups") == [1, 2, 4]  # with 8 groups each would have fewer than two experts
    assert page.options("top-groups") == [1, 2, 3, 4]
    page.write("top-k", 5)
    assert page.options("top-groups") == [3, 4] and page.get("top-groups").get_attribute("value") == "3"
    check(page, top_k=5, top_groups=3)
    page.choose("num-groups", 2)
    assert page.options("top-groups") == [2]
    check(page, top_k=5, num_groups=2, top_groups=2)
    page.choose("num-groups", 4)
    assert page.options("top-groups") == [3, 4]
    check(page, top_k=5, num_groups=4, top_groups=3)
    page.choose("num-groups", 2)
    for given, taken in (("", "5"), ("99", "8"), ("-3", "1"), ("2.5", "1")):
        page.write("top-k", given)
        assert page.get("top-k").get_attribute("value") == taken
    check(page, top_k=1, num_groups=2, top_groups=2)


@pytest.mark.parametrize("bias", [0.125, -0.9, 0.3])
def test_a_bias_changes_the_choice_and_never_the_weight(page, bias):
    router, _ = router_of(page, 0, 12)
    page.click(".load", 5)
    assert page.text("expert") == page.text("underlined") == "5"
    assert float(page.get("bias").get_attribute("value")) == pytest.approx(float(router.bias[5]), abs=1e-4)
    page.write("bias", bias)
    assert float(page.get("bias-slider").get_attribute("value")) == pytest.approx(bias)
    changed = router.bias.clone()
    changed[5] = bias
    assert page.bias() == changed.tolist()
    routing = check(page, bias=changed)
    taken = [5 in experts for experts in routing.experts[0].tolist()]
    assert (
        page.script("[...document.querySelectorAll('.token')].map(e => e.classList.contains('taken'))")
        == taken
    )
    page.slide("bias-slider", 1)
    assert page.bias()[5] == pytest.approx(bias + 0.001) and page.bias()[:5] == changed[:5].tolist()
    assert float(page.get("bias").get_attribute("value")) == pytest.approx(bias + 0.001)
    page.choose("layer", 1)
    check(page, layer=1)
    page.choose("layer", 0)
    check(page)  # each layer has its own biases


def test_negative_biases_close_the_same_groups(page):
    biases = [-9.0, -1.5, -2.0, -1.25, -7.0, -3.0, -1.0, -2.5]
    for expert, bias in enumerate(biases):
        page.click(".load", expert)
        page.write("bias", bias)
    check(page, bias=torch.tensor(biases))


@pytest.mark.parametrize("rule", ["sign", "centred", "proportional"])
def test_updates_equal_the_packages(page, rule):
    page.choose("layer", 1)
    page.choose("rule", rule)
    page.write("rate", 0.003)
    router, route = router_of(page, 1, 12)
    seen = []
    for button, times in (("once", 1), ("often", 100)):
        page.click(button)
        for _ in range(times):
            loads = balance.tokens_per_expert(route())
            kinds = {kind: rule == kind for kind in ("centred", "proportional")}
            balance.update_bias_(router, loads, 0.003, **kinds)
            seen.append(float(balance.max_violation(loads)))
        loads = balance.tokens_per_expert(route())
        assert page.loads() == loads.tolist()
        assert page.text("max-violation") == f"{float(balance.max_violation(loads)):.2f}"
        assert page.bias() == pytest.approx(router.bias.tolist(), rel=0, abs=1e-6)
        check(page, layer=1, bias=router.bias)
    history = [*seen, float(balance.max_violation(loads))]
    assert page.script("explorer.state.history") == pytest.approx(history, rel=1e-12)
    assert f"MaxVio was {history[0]:.2f} before 101 updates" in page.text("told")
    points = page.script("[...document.querySelector('polyline').points].map(p => [p.x, p.y])")
    assert points == [
        pytest.approx([i / 1.01, 30 - 30 * v / max(history)], abs=1e-3) for i, v in enumerate(history)
    ]
    page.click("reset")
    check(page, layer=1)


@pytest.mark.parametrize("rule", ["centred", "proportional"])
def test_the_initial_rule_and_rate_are_those_of_the_run(browser, run, tmp_path, tiny, rule):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    config = tiny(moe={"routed_scaling_factor": 2.5}, train={"bias_update": rule, "bias_update_rate": 0.02})
    (copy / "config.toml").write_text(config.to_toml())
    page = Page(browser, explore.write(copy))
    router, route = router_of(page, 0, 12)
    page.click("once")
    kinds = {kind: rule == kind for kind in ("centred", "proportional")}
    balance.update_bias_(router, balance.tokens_per_expert(route()), 0.02, **kinds)
    assert page.bias() == pytest.approx(router.bias.tolist(), rel=0, abs=1e-7)
    assert page.get("rule").get_attribute("value") == rule and page.console() == []


@pytest.mark.parametrize("top_k, num_groups, top_groups", [(2, 4, 2), (3, 8, 3), (6, 4, 4)])
def test_a_softmax_router_ranks_groups_by_their_best_score_and_has_no_bias(
    browser, softmax_run, top_k, num_groups, top_groups
):
    page = Page(browser, softmax_run / "explore.html")
    check(page)
    assert page.options("num-groups") == [1, 2, 4, 8]
    page.choose("num-groups", num_groups)
    page.write("top-k", top_k)
    page.choose("top-groups", top_groups)
    check(page, top_k=top_k, num_groups=num_groups, top_groups=top_groups)
    assert not any(element.is_displayed() for element in page.all(".biased, #bias, #once, #rate, u"))
    assert all(element.is_displayed() for element in page.all(".unbiased"))
    assert "V2 eq. 22" in page.text("table") + page.browser.find_element("tag name", "main").text
    assert "times 16, the scaling factor" in page.text("weighed") and "divided" not in page.text("weighed")
    assert page.console() == []


def test_the_scores_of_a_token(page):
    router, route = router_of(page, 0, 12)
    routing = route()
    page.click(".token", 40)
    assert page.text("token") == f"41: {page.tokens[40]}"
    scores, weights = (
        routing.scores[0, 40],
        dict(zip(routing.experts[0, 40].tolist(), routing.weights[0, 40].tolist())),
    )
    rows = page.all("#rows tr:not(.group)")
    assert len(rows) == 8 and len(page.all("#rows tr.group")) == 4
    for expert, row in enumerate(rows):
        score, biased = float(scores[expert]), float(scores[expert] + router.bias[expert])
        weight = [f"{weights[expert]:.3f}"] if expert in weights else []
        assert row.text.split() == [str(expert), f"{score:.3f}", f"{biased:.3f}", *weight]
        assert ("chosen" in row.get_attribute("class")) == (expert in weights)
    choice = scores + router.bias
    two_best = choice.view(4, 2).sum(-1)
    opened = two_best.topk(2).indices.tolist()
    want = [
        f"group {i}, two best s + b: {float(v):.3f}, {'open' if i in opened else 'closed'}"
        for i, v in enumerate(two_best)
    ]
    assert [row.text for row in page.all("#rows tr.group")] == want
    assert [i for i, row in enumerate(rows) if row.get_attribute("class") == "closed"] == [
        expert for expert in range(8) if expert // 2 not in opened
    ]
    drawn = "[...document.querySelectorAll('td.bar %s')].map(e => (%s) / e.parentElement.offsetWidth)"
    widths, marks = (
        page.script(drawn % ("i", "e.offsetWidth")),
        page.script(drawn % ("u", "e.offsetLeft + 1")),
    )
    high = max(scores.max(), choice.max())
    assert widths == pytest.approx((scores / high).tolist(), abs=0.02)
    assert marks == pytest.approx((choice / high).tolist(), abs=0.02)


def test_the_mean_line_and_bars_share_one_scale(page):
    media = {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page.write("top-k", 3)
    assert page.script("getComputedStyle(document.querySelector('.load i')).transitionDuration") == "0s"
    heights = page.script(
        "[...document.querySelectorAll('.load i')].map(e => e.getBoundingClientRect().height)"
    )
    loads = page.loads()
    bottom = "document.querySelector('%s').getBoundingClientRect().bottom"
    foot, mean = page.script(bottom % ".load i"), page.script(bottom % "#mean")
    assert heights == pytest.approx([load * max(heights) / max(loads) for load in loads], abs=1.1)
    assert foot - mean == pytest.approx(max(heights) * sum(loads) / 8 / max(loads), abs=1.1)
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_keyboard_alone_suffices(page):
    def focus():
        return page.browser.switch_to.active_element

    def press(*pressed):
        for key in pressed:
            focus().send_keys(key)

    order = []
    for _ in range(15):
        press(keys.TAB)
        order.append(focus().get_attribute("id") or focus().get_attribute("class").split()[0])
    assert order == [
        "layer", "checkpoint", "top-k", "num-groups", "top-groups", "reset", "token", "table", "load",
        "bias", "bias-slider", "once", "often", "rate", "rule",
    ]  # fmt: skip
    for _ in range(8):
        focus().send_keys(keys.SHIFT, keys.TAB)
    token = page.all(".token").index
    tops = page.script("[...document.querySelectorAll('.token')].map(e => e.offsetTop)")
    lines = sorted(set(tops))
    ends = [index for index, text in enumerate(page.tokens[:-1]) if text == "↵"]
    assert len(ends) > 5 and all(tops[index] < tops[index + 1] for index in ends)
    assert token(focus()) == 0
    press(keys.ARROW_RIGHT, keys.ARROW_RIGHT, keys.ARROW_LEFT, keys.ENTER)
    assert page.script("explorer.state.token") == 1 and token(focus()) == 1
    press(keys.ARROW_DOWN, keys.ARROW_DOWN)
    assert token(focus()) == tops.index(lines[2]) + 1
    press(keys.ARROW_UP, keys.SPACE)
    assert page.script("explorer.state.token") == tops.index(lines[1]) + 1
    press(keys.END, keys.ARROW_RIGHT, keys.ARROW_DOWN)
    assert token(focus()) == 511
    press(keys.HOME, keys.ARROW_LEFT, keys.ARROW_UP)
    assert token(focus()) == 0
    press(keys.TAB, keys.TAB, keys.HOME, keys.ARROW_RIGHT, keys.ARROW_RIGHT, keys.ENTER)
    assert page.script("explorer.state.expert") == 2 and page.text("expert") == "2"
    press(keys.TAB, keys.TAB, keys.TAB, keys.ENTER)
    assert page.script("explorer.state.history.length") == 2
    unnamed = page.script(
        "[...document.querySelectorAll('input, select, button, [tabindex]')]"
        ".filter(e => !(e.ariaLabel ?? (e.labels?.[0] ?? e).textContent.trim())).map(e => e.outerHTML)"
    )
    assert unnamed == []


def test_light_and_dark_follow_the_system(page):
    colours = []
    for theme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        found = page.script(
            "[document.body, document.querySelector('section')].map(e => getComputedStyle(e))"
            ".map(s => [s.backgroundColor, s.color])"
        )
        colours.append([[sum(map(int, re.findall(r"\d+", colour))) for colour in pair] for pair in found])
        token = page.all(".token")[0]
        assert token.value_of_css_property("color") == "rgba(0, 0, 0, 1)"  # on a light colour in both themes
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert all(back > 3 * 230 and front < 3 * 60 for back, front in colours[0])
    assert all(back < 3 * 60 and front > 3 * 200 for back, front in colours[1])


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_the_width_of_the_window(browser, run, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page = Page(browser, run / "explore.html")
    wide = page.script("[document.documentElement.scrollWidth, innerWidth]")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide[0] <= wide[1] == width


def test_hostile_text_stays_text_and_nothing_else_is_loaded_or_run(browser, make_run, tmp_path):
    (tmp_path / "text").write_bytes((HOSTILE.encode() + b"\x00\xff") * 60)
    run = make_run("hostile", data={"path": str(tmp_path / "text")}, train={"steps": 1})
    run = run.rename(run.with_name(HOSTILE.replace("/", "∕")))
    source = Source(explore.write(run))
    assert source.tags.count("script") == 2 and "img" not in source.tags and source.tags.count("title") == 1
    page = Page(browser, run / "explore.html")
    shown = page.script("[...document.querySelectorAll('.token')].map(e => e.firstChild.data)")
    assert shown == source.data["tokens"] and "".join(shown).startswith(HOSTILE[:9])
    assert "00ff</script><img␣src=x␣" in "".join(shown)
    heading = browser.find_element("tag name", "h1").get_property("textContent")
    assert browser.title.startswith(run.name) and heading.endswith(run.name)
    assert page.script("[document.scripts.length, document.images.length]") == [2, 0]
    assert not page.all(".token *:not(small)")
    assert page.script("performance.getEntriesByType('resource').length") == 0 and page.console() == []
    browser.execute_script(
        "const script = document.createElement('script'), button = document.createElement('button');"
        "script.textContent = 'window.owned = 1'; button.setAttribute('onclick', 'window.owned = 2');"
        "document.body.append(script, button); button.click()"
    )
    assert page.script("window.owned ?? null") is None
    assert all("Content Security Policy" in entry["message"] for entry in page.console())

"""The routing explorer: what its page holds; in headless Chromium, that it chooses as the package does."""

import base64
import hashlib
import itertools
import json
import re
import shutil
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from lm import checkpoint, data, train
from lm.report import explore, measure
from lm.report import run as report
from moe import Capacity, SigmoidRouter, balance

pytest.importorskip("selenium")
from selenium.webdriver.common.keys import Keys as keys
from selenium.webdriver.support.ui import Select

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!--<script>&lt;\u2028 {{ 7 * 7 }}"


class Source(HTMLParser):
    """What a page's source holds: its tags, the text in each, and the data that its script reads."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.tags, self.inside, self.open = [], {}, None
        self.feed(self.text)
        self.data = json.loads(self.inside["data"])

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open = dict(attributes).get("id", tag)

    def handle_data(self, text):
        self.inside[self.open] = self.inside.get(self.open, "") + text


def numbers(text, *shape):
    """base64 -> float32"""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy()).reshape(shape)


def ids(labels):
    """The tokens behind labels that measure.show gives to printable text."""
    return torch.tensor([[{"↵": 10, "␣": 32}.get(label) or ord(label) for label in labels]])


@pytest.fixture(scope="module")
def make_run(tiny, tmp_path_factory):
    """make_run(name, moe=..., train=...): a run of the smallest model, its samples short, no report."""

    def make(name, **changes):
        run, stream = tmp_path_factory.mktemp("explored") / name, train.stream
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "stream", lambda *a, **k: itertools.islice(stream(*a, **k), 10))
            patch.setattr(report, "write", lambda run, trust_code=False: run / "report.html")
            assert train.train(tiny(**changes), run) == 0
        return run

    return make


@pytest.fixture
def draw_run(tiny, make_model, tmp_path):
    """draw_run(steps=[1], moe=...): a run with checkpoints of drawn weights."""

    def draw(steps=(1,), **changes):
        config, run = tiny(**changes), tmp_path / "run"
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.toml").write_text(config.to_toml())
        model = make_model(config.model, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters())
        state = {"tokens": 1, "seconds": 1.0, "dtype": "torch.float32", "cpu_capability": "", "threads": 1}
        for step in steps:
            checkpoint.save_checkpoint(run, model, optimizer, {**state, "step": step, "torch": ""}, 99)
        return run

    return draw


@pytest.fixture(scope="module")
def run(make_run):
    """Sigmoid router, 4 of 8 experts' groups closed, a scaling factor, five checkpoints."""
    changes = {"moe": {"routed_scaling_factor": 2.5}, "train": {"save_every": 3, "keep": 9}}
    run = make_run("sigmoid", **changes)
    explore.write(run)
    return run


@pytest.fixture(scope="module")
def softmax_run(make_run):
    moe = {"router": "softmax", "normalize": False, "routed_scaling_factor": 16.0}
    run = make_run("softmax", moe=moe, train={"steps": 4})
    explore.write(run)
    return run


# What the page holds.


@pytest.mark.parametrize("kind", ["run", "softmax_run"])
def test_scores_and_biases_are_the_models_bit_for_bit(kind, request):
    run = request.getfixturevalue(kind)
    held = Source(run / "explore.html").data
    tokens = ids(held["tokens"])
    folders = checkpoint.checkpoints(run)
    assert [one["step"] for one in held["checkpoints"]] == [int(path.name[5:]) for path in folders]
    for folder, one in zip(folders, held["checkpoints"]):
        model = checkpoint.load_model(checkpoint.read_config(run, False).model, folder / "model.safetensors")
        routings = model(tokens).routings
        assert len(routings) == len(one["layers"]) == 2
        for router, routing, layer in zip(model.routers(), routings, one["layers"]):
            assert torch.equal(numbers(layer["scores"], *routing.scores.shape), routing.scores)
            if kind == "run":
                assert router.bias.any() and torch.equal(numbers(layer["bias"], 8), router.bias)
            else:
                assert layer["bias"] is None


def test_numbers_are_the_runs_own(run, softmax_run):
    held = Source(run / "explore.html").data
    found = [
        held[name] for name in ("router", "group_best", "num_experts", "top_k", "num_groups", "top_groups")
    ]
    assert found == ["sigmoid", 2, 8, 2, 4, 2]
    assert (held["normalize"], held["routed_scaling_factor"]) == (True, 2.5)
    assert (held["rate"], held["rule"]) == (0.01, "sign")
    held = Source(softmax_run / "explore.html").data
    assert (held["router"], held["group_best"]) == ("softmax", 1)
    assert (held["normalize"], held["routed_scaling_factor"]) == (False, 16)


def test_the_passage_and_colours_are_the_reports(run):
    held = Source(run / "explore.html").data
    windows = data.Windows(data.load(checkpoint.read_config(run, False).data, 256)[1], 16)
    [labels, _] = report.passage_experts(checkpoint.load(run), windows)
    assert [token["text"] for token in labels] == held["tokens"][: len(labels)]
    assert len(labels) == 384 and len(held["tokens"]) == 512
    assert held["hues"] == [measure.hue(expert) for expert in range(8)]


def test_a_long_held_out_text_is_shown_from_where_the_report_begins(tiny, make_model):
    text = np.frombuffer((b"x" * 2100 + b"\n\n" + b"Macbeth" * 500), np.uint8)
    windows = data.Windows(text, 16)
    model = make_model(tiny().model, dtype=torch.float32)
    labels = [token["text"] for token in report.passage_experts(model, windows)[0]]
    tokens = measure.passage(windows, 512)
    assert bytes(tokens.tolist()) == text[2102 : 2102 + 512].tobytes()
    assert [measure.show(token) for token in tokens[:384].tolist()] == labels


def test_room_is_used_up_and_never_overrun(draw_run):
    run = draw_run([3, 6, 9], model={"num_layers": 6}, moe={"num_experts": 64})
    page = explore.write(run)
    held = Source(page).data
    assert 290_000 < page.stat().st_size <= 300_000
    assert len(held["checkpoints"]) == 1 and held["checkpoints"][0]["step"] == 9  # the newest
    assert 128 < len(held["tokens"]) < 192
    scores = numbers(held["checkpoints"][0]["layers"][4]["scores"], len(held["tokens"]), 64)
    assert torch.equal(scores, checkpoint.load(run)(ids(held["tokens"])).routings[4].scores[0])


def size(layers, experts, count, checkpoints):
    """Bytes of that many checkpoints in the page."""
    scores, bias = ("x" * (4 * -(-numbers * 4 // 3)) for numbers in (count * experts, experts))
    one = {"step": 10**6, "layers": [{"scores": scores, "bias": bias}] * layers}
    return checkpoints * len(json.dumps(one))


@pytest.mark.parametrize("layers, experts", [(1, 4), (2, 8), (3, 16), (5, 32), (26, 64)])
def test_checkpoints_are_thinned_evenly_and_fill_the_room(layers, experts):
    room = 270_000
    for tokens, checkpoints in itertools.product([20, 200, 512], [1, 2, 5, 12, 300]):
        count, kept = explore.fit(room, layers, experts, tokens, checkpoints)
        gaps = [b - a for a, b in itertools.pairwise(kept)]
        assert kept[-1] == checkpoints - 1 and (len(kept) == 1 or kept[0] == 0)
        assert not gaps or 1 <= min(gaps) <= max(gaps) <= min(gaps) + 1
        assert 0 < count <= tokens and (len(kept) == 1 or count >= min(tokens, 192))
        assert size(layers, experts, count, len(kept)) <= room
        if count < tokens:
            assert size(layers, experts, count + 1, len(kept)) > 0.95 * room
        if len(kept) < checkpoints:
            assert size(layers, experts, min(tokens, 192), len(kept) + 1) > 0.95 * room


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    folders = checkpoint.checkpoints(copy)
    damaged = folders[1] / "model.safetensors"
    damaged.write_bytes(
        damaged.read_bytes()[:-1] + b"\x01"
    )  # a float's last byte: nothing but the sum shows it
    with pytest.warns(UserWarning, match=re.escape(f"{damaged}: is not what was written")) as caught:
        explore.write(copy)
    steps = [one["step"] for one in Source(copy / "explore.html").data["checkpoints"]]
    assert steps == [3, 9, 12] and len(caught) == 1
    for path in folders:
        (path / "state.json").unlink()
    with warnings.catch_warnings(), pytest.raises(ValueError, match="every checkpoint is damaged"):
        warnings.simplefilter("ignore")
        explore.write(copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ValueError, match="no checkpoint yet"):
        explore.write(copy)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        explore.write(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no config.toml; expected a run"):
        explore.write(tmp_path)


@pytest.mark.parametrize(
    "changes, told",
    [
        (
            {"moe": {"router": "mixtral", "num_groups": 1, "top_groups": 1}},
            "model.moe.router 'mixtral': the page",
        ),
        ({"model": {"num_dense_layers": 3}}, "model.num_dense_layers 3 leaves no layer with experts"),
        (
            {"moe": {"num_experts": 4096}},
            "2 layers of 4096 experts are too many for a page: 300000 bytes hold",
        ),
    ],
)
def test_what_the_page_cannot_repeat_is_refused(draw_run, changes, told):
    run = draw_run(**changes)
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        explore.write(run)
    assert "\n" not in str(caught.value) and not (run / "explore.html").exists()


def test_a_router_made_from_one_of_these_is_refused(run):
    class Own(SigmoidRouter):
        """Whose forward may do anything."""

    model = checkpoint.load(run)
    model.blocks[1].mlp.router = Own(16, 8, 2)
    with pytest.raises(
        ValueError, match="the page cannot repeat what it chooses; it can for sigmoid and softmax"
    ):
        explore.read_routers(model)


def test_a_router_with_limited_room_is_its_own_router_in_evaluation(draw_run):
    run = draw_run(moe={"capacity_factor": 1.0})
    model, held = checkpoint.load(run), Source(explore.write(run)).data
    [routing, _] = model(ids(held["tokens"])).routings
    [layer, _] = held["checkpoints"][0]["layers"]
    assert type(model.routers()[0]) is Capacity and held["router"] == "sigmoid"
    assert torch.equal(numbers(layer["scores"], *routing.scores.shape), routing.scores)
    assert torch.equal(numbers(layer["bias"], 8), model.routers()[0].bias)


def test_the_policy_allows_the_pages_own_script_and_style_alone(run):
    page = (run / "explore.html").read_text(encoding="utf-8")
    [content] = re.findall('Content-Security-Policy" content="(.*?)"', page)
    policy = dict(part.split(" ", 1) for part in content.replace("&#39;", "'").split("; "))
    for tag in ("script", "style"):
        [inside] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["base-uri"] == "'none'" and "unsafe" not in content
    html, _, rest = page.partition('<script id="data"')
    script = rest.partition("</script>")[2]
    written = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|import\W|fetch|https?:|//\w"
    assert not re.search(written, html + script)
    assert not re.search(r"<[^>]* (on\w+|style|src|href)=", html)


# What the page does.


class Page:
    """An explorer in a browser, used by its controls as a person uses it."""

    def __init__(self, browser, path):
        self.browser, self.run = browser, path.parent
        browser.get_log("browser")  # of the page before
        browser.get(path.as_uri())
        held = Source(path).data
        self.tokens, self.steps = held["tokens"], [one["step"] for one in held["checkpoints"]]

    def get(self, name):
        return self.browser.find_element("id", name)

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

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def script(self, text, *given):
        return self.browser.execute_script(f"return {text}", *given)

    def route(self):
        """What the page chooses: experts and weights of all tokens."""
        found = self.script("explorer.route()")
        return [one["experts"] for one in found], [one["weights"] for one in found]

    def loads(self):
        return [int(bar.text.split()[1]) for bar in self.all(".load")]

    def bias(self):
        return self.script("Array.from(explorer.state.bias)")

    def console(self):
        return self.browser.get_log("browser")


@pytest.fixture
def page(browser, run):
    page = Page(browser, run / "explore.html")
    yield page
    assert page.console() == []


def router_of(page, layer, step):
    """The package's own router of a checkpoint, and what gives its routing of the page's tokens."""
    weights = page.run / "checkpoints" / f"step-{step:06d}" / "model.safetensors"
    model = checkpoint.load_model(checkpoint.read_config(page.run, False).model, weights)
    tokens = ids(page.tokens)

    @torch.no_grad()
    def route():
        return model(tokens).routings[layer]

    return model.routers()[layer], route


def check(page, layer=0, step=None, **settings):
    """The page chooses as the package does, for every token."""
    router, route = router_of(page, layer, step or page.steps[-1])
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


def test_at_first_it_shows_what_the_newest_model_chose(page):
    check(page)
    assert page.text("step") == "step 12" and "All 512 tokens have the experts" in page.text("changed")
    windows = data.Windows(data.load(checkpoint.read_config(page.run, False).data, 256)[1], 16)
    for layer, labels in enumerate(report.passage_experts(checkpoint.load(page.run), windows)):
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


def test_groups_offered_are_those_that_the_router_takes(page):
    assert page.options("num-groups") == [1, 2, 4]  # 8 groups leave no two experts in each
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
def test_a_bias_decides_who_is_chosen_and_never_how_much_it_counts(page, bias):
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
    check(page)  # a layer comes with its own biases


def test_all_biases_below_zero_close_the_same_groups(page):
    biases = [-9.0, -1.5, -2.0, -1.25, -7.0, -3.0, -1.0, -2.5]
    for expert, bias in enumerate(biases):
        page.click(".load", expert)
        page.write("bias", bias)
    check(page, bias=torch.tensor(biases))


@pytest.mark.parametrize("rule", ["sign", "centred", "proportional"])
def test_updates_are_the_packages(page, rule):
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
def test_the_rule_and_rate_at_first_are_the_runs(browser, run, tmp_path, tiny, rule):
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
def test_a_softmax_router_has_groups_by_their_best_and_no_bias(
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


def test_a_tokens_scores(page):
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


def test_the_mean_line_and_bars_are_drawn_to_one_scale(page):
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


def test_it_is_used_by_keyboard_alone(page):
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
        assert token.value_of_css_property("color") == "rgba(0, 0, 0, 1)"  # on a light colour, in both
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert all(back > 3 * 230 and front < 3 * 60 for back, front in colours[0])
    assert all(back < 3 * 60 and front > 3 * 200 for back, front in colours[1])


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(browser, run, width):
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

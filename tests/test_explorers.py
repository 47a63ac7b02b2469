"""The pages in docs/explorers are current, self-contained, and show the numbers of lm.count and mla."""

import base64
import hashlib
import importlib.util
import json
import math
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lm import count
from lm.config import AttentionConfig, Config, ModelConfig
from lm.report import info
from mla import MultiheadLatentAttention

pytest.importorskip("selenium")
from selenium.webdriver.common.keys import Keys

from tests.helpers import ROOT, BrowserPage

NAMES = ("cache", "absorption")
EMBEDDED = re.compile(r'(?<=<script type="application/json" id="data">).*?(?=</script>)', re.S)


@pytest.fixture(scope="module")
def explorers():
    spec = importlib.util.spec_from_file_location("explorers", ROOT / "docs" / "explorers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def path(name):
    return ROOT / "docs" / "explorers" / f"{name}.html"


def embedded(name):
    return json.loads(EMBEDDED.search(path(name).read_text())[0])


class Page(BrowserPage):
    """One of the pages, opened from its file."""

    def __init__(self, browser, name, width=1200, theme="light", motion="no-preference"):
        features = {"prefers-color-scheme": theme, "prefers-reduced-motion": motion}
        media = {"features": [{"name": key, "value": value} for key, value in features.items()]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        super().__init__(browser, path(name).as_uri())

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def texts(self, selector):
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", selector)

    def numbers(self, selector, key):
        script = (
            "return [...document.querySelectorAll(arguments[0])].map(e => Number(e.dataset[arguments[1]]))"
        )
        return self.run(script, selector, key)

    def set(self, **values):
        """Set controls by their id, as user input does."""
        for name, value in values.items():
            script = (
                "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
                "e.dispatchEvent(new Event('input', {bubbles: true})); return e.value"
            )
            assert self.run(script, name.replace("_", "-"), str(value)) == str(value)

    def press(self, *keys):
        self.browser.switch_to.active_element.send_keys(*keys)

    def step(self):
        """The current step of the absorption page."""
        return int(re.fullmatch("step ([1-8]) of 8", self.get("form").text.lower())[1])


@pytest.fixture
def open_page(browser):
    """open_page(name, width=..., theme=..., motion=...); the settings are reset after the test."""
    yield lambda name, **how: Page(browser, name, **how)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def matrix(name, head):
    """A matrix of the absorption page; of one head, if each head has its own."""
    found = torch.tensor(embedded("absorption")["matrices"][name], dtype=torch.float64)
    return found if found.ndim == 2 else found[head]


def number(text):
    """The value of a number written as (−0.25)."""
    return float(text.strip("()").replace("−", "-"))


def same(ours, theirs):
    """Equal up to the last digits of floats, which differ between machines."""
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, float):
        return math.isclose(ours, theirs, rel_tol=0, abs_tol=1e-12)
    return ours == theirs


@pytest.mark.parametrize("name", NAMES)
def test_pages_are_current(explorers, name):
    kept, made = path(name).read_text(), explorers.made(name)
    assert EMBEDDED.sub("", kept) == EMBEDDED.sub("", made)
    assert same(json.loads(EMBEDDED.search(made)[0]), embedded(name))


@pytest.mark.parametrize("name", NAMES)
def test_pages_are_small_and_load_and_run_only_themselves(name, open_page):
    text = path(name).read_text()
    assert len(text.encode()) <= 300_000
    assert not re.search(r"(?:https?:)?//[a-z]|@import|url\(|fetch\(|innerHTML|document\.write|eval\(", text)
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["data:,"]
    [policy] = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', text)
    policy = dict(part.split(" ", 1) for part in policy.split("; "))
    for tag in ("script", "style"):
        [inside] = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in json.dumps(policy)
    page = open_page(name)
    assert page.run("return performance.getEntriesByType('resource').map(e => e.name)") in ([], ["data:,"])
    assert page.console() == []
    page.run(
        "const script = document.createElement('script'); script.textContent = 'window.owned = 1';"
        "document.body.append(script)"
    )
    assert page.run("return window.owned ?? null") is None
    assert all("Content Security Policy" in entry["message"] for entry in page.console())


@pytest.mark.parametrize("name", NAMES)
def test_light_and_dark_follow_the_system(name, open_page):
    colours = []
    for theme in ("light", "dark"):
        page = open_page(name, theme=theme)
        for script in ("document.body", "document.querySelector('.controls')"):
            style = page.run(f"const s = getComputedStyle({script}); return [s.backgroundColor, s.color]")
            colours.append([sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in style])
        assert page.console() == []
    for back, front in colours[:2]:
        assert back > 3 * 230 and front < 3 * 60
    for back, front in colours[2:]:
        assert back < 3 * 60 and front > 3 * 200


@pytest.mark.parametrize("name", NAMES)
def test_the_page_fits_a_narrow_screen(name, open_page):
    page = open_page(name, width=400)
    for step in range(8 if name == "absorption" else 1):
        if name == "absorption":
            page.run("show(arguments[0])", step)
        script = (
            "const wide = e => e.scrollWidth > e.clientWidth && getComputedStyle(e).display !== 'inline';"
            "return [document.documentElement, ...document.querySelectorAll('.head, .shared, .controls')]"
            ".filter(wide).map(e => e.className)"
        )
        assert page.run(script) == []
    assert page.console() == []


@pytest.mark.parametrize("name", NAMES)
def test_every_control_has_a_name(name, open_page):
    page = open_page(name)
    script = (
        "return [...document.querySelectorAll('input, select, button, [role=grid]')]"
        ".map(e => (e.ariaLabel ?? (e.labels?.[0] ?? e).textContent).trim())"
    )
    named = page.run(script)
    assert len(named) > 7 and all(named), named


SETTINGS = [
    {},
    {"model": "kimi-k2", "context": 20, "batch": 3, "cache_type": "fp8", "weight_type": "bf16"},
    {"model": "llama-3.1-70b", "context": 13, "batch": 100, "cache_type": "fp32", "memory": 80, "gpus": 4},
    {"model": "moonlight", "context": 15, "batch": 1, "weight_type": "bf16", "memory": 24, "gpus": 2},
    {"model": "toy", "context": 10, "batch": 1024, "cache_type": "fp32", "memory": 192, "gpus": 1},
]
START = {"model": "deepseek-v3", "context": 17, "batch": 8, "cache_type": "bf16", "weight_type": "fp8"}
START |= {"memory": 141, "gpus": 8}


def expected(name, setting):
    """(weights, cache per token, cache, users that fit) of a preset, from lm.count's integers."""
    config = Config.preset(name).model
    weights = count.total_parameters(config) * count.BYTES[setting["weight_type"]]
    token = count.cache_bytes_per_token(config, setting["cache_type"])
    chat = token * 2 ** setting["context"]
    room = setting["memory"] * setting["gpus"] * 10**9 - weights
    return weights, token, chat * setting["batch"], max(0, room // chat)


@pytest.mark.parametrize("changed", SETTINGS)
def test_the_cache_page_shows_the_numbers_of_lm_count(explorers, open_page, changed):
    page, setting = open_page("cache"), START | changed
    page.set(**changed)
    rows = page.run(
        "return [...document.querySelectorAll('#all tbody tr')].map(row => [...row.cells].map("
        "cell => cell.dataset.bytes === undefined ? cell.innerText : Number(cell.dataset.bytes)))"
    )
    assert [row[0] for row in rows] == list(explorers.MODELS)
    for name, _, _, *shown, users in rows:
        assert (*shown, int(users.replace(",", ""))) == expected(name, setting), name
    assert page.texts("tr[aria-current] td:first-child") == [setting["model"]]
    _, token, cache, users = expected(setting["model"], setting)
    assert page.numbers("#bars .sizes [data-bytes]", "bytes")[0] == cache
    assert f"A token takes {token:,} bytes in {setting['cache_type']}" in page.get("caption").text
    shown = page.texts("#bars .sizes b")[0]
    assert shown == (f"{users:,} user{'s fit' if users > 1 else ' fits'}" if users else "no users fit")
    assert page.get("context-tokens").text == f"{2 ** setting['context']:,}"
    assert page.console() == []


def test_the_other_attentions_equal_those_of_lm_info():
    for model in embedded("cache")["models"]:
        config = Config.preset(model["name"]).model
        (kind, own), *others = model["caches"].items()
        assert config.attention.kind != "mla" or (kind == "MLA" and {"MHA", "MQA"} <= dict(others).keys())
        for dtype in ("bf16", "fp8", "fp32"):
            theirs = info.cache_bytes(config, dtype)
            assert own[dtype] == theirs["this model"]
            for other, cache in others:
                groups = 8 if other == "GQA, 8 groups" else 1
                assert cache[dtype] == (groups * theirs["MQA"] if groups == 8 else theirs[other])
    assert [len(model["caches"]) for model in embedded("cache")["models"][:1]] == [4]


def test_bars_are_proportional_to_bytes(open_page):
    page = open_page("cache", motion="reduce")
    page.set(model="deepseek-v2", context=14, batch=40)
    script = (
        "return [...document.querySelectorAll('#bars .track')].map(track => [...track.children].map(e => "
        "e.className === 'limit' ? e.offsetLeft / track.clientWidth"
        " : e.getBoundingClientRect().width / track.clientWidth))"
    )
    shown = page.run(script)
    config = Config.preset("deepseek-v2").model
    theirs = info.cache_bytes(config, "bf16")
    weights, total = count.total_parameters(config), 8 * 141 * 10**9
    caches = [theirs["this model"], theirs["MHA"], 8 * theirs["MQA"], theirs["MQA"]]
    caches = [a_token * 40 * 2**14 for a_token in caches]
    longest = max(total, weights + max(caches))
    assert len(shown) == len(caches)
    for lengths, cache in zip(shown, caches):
        assert lengths == pytest.approx([weights / longest, cache / longest, total / longest], abs=0.003)
    page.set(gpus=1024)
    assert page.run(script)[0][0] == pytest.approx(weights / (1024 * 141e9), abs=0.003)


def test_the_cache_page_needs_only_the_keyboard(open_page):
    page = open_page("cache")
    page.press(Keys.TAB)
    assert page.browser.switch_to.active_element.get_attribute("id") == "model"
    page.press(Keys.DOWN)
    assert page.texts("tr[aria-current] td:first-child") == ["deepseek-v2"]
    page.press(Keys.TAB)
    page.press(Keys.RIGHT)
    assert page.get("context-tokens").text == "262,144"
    page.run("[...document.querySelectorAll('#all button')].at(-2).focus()")
    page.press(Keys.ENTER)
    assert page.texts("tr[aria-current] td:first-child") == ["mixtral-8x7b"]
    assert page.browser.switch_to.active_element.text == "mixtral-8x7b"
    assert page.get("model").get_attribute("value") == "mixtral-8x7b"
    assert "supports contexts of up to 32,768 tokens" in page.get("caption").text
    page.set(batch="")  # half typed: counts as one chat
    assert page.numbers("tr[aria-current] [data-bytes]", "bytes")[-1] == 131072 * 2**18
    assert page.console() == []


def test_the_matrices_equal_the_modules(explorers):
    """Each from x by the module's projections, head by head; rope as a rotation in the complex plane."""
    attention, x = explorers.small_attention()
    assert (attention.num_heads, attention.kv_lora_rank, attention.v_head_dim) == (2, 4, 3)
    assert (attention.qk_nope_head_dim, attention.qk_rope_head_dim, x.shape[1]) == (3, 2, 3)
    with torch.no_grad():
        latent, k_rope = attention.compress(x)
        kv = attention.kv_b(latent)[0].unflatten(-1, (2, -1))  # (total, heads, nope + value)
        q = attention.q(x)[0, -1].unflatten(-1, (2, -1))  # (heads, nope + rope)
        turns = torch.polar(torch.ones(3).double(), torch.arange(3).double())  # one pair, of frequency 1
        k_rope = torch.view_as_real(torch.view_as_complex(k_rope[0].contiguous()) * turns)
        q_rope = torch.view_as_real(torch.view_as_complex(q[:, 3:].contiguous()) * turns[2])
        w_out = attention.out.weight.unflatten(-1, (2, 3))  # (dim, heads, value)
    for head in range(2):
        wanted = {"c": latent[0].T, "k_rope": k_rope.T, "k": kv[:, head, :3].T, "v": kv[:, head, 3:].T}
        wanted |= {"q": q[head : head + 1, :3], "q_rope": q_rope[head : head + 1], "w_out": w_out[:, head]}
        for name, values in wanted.items():
            tolerance = 1e-6 if name.endswith("rope") else 1e-12  # angles are in fp32
            torch.testing.assert_close(matrix(name, head), values, rtol=0, atol=tolerance)


def test_both_forms_end_in_the_modules_output(explorers):
    attention, x = explorers.small_attention()
    with torch.no_grad():
        y, cache = attention(x)[0, -1].tolist(), attention.new_cache(1, 3)
        attention(x[:, :2], cache)
        decoded = attention(x[:, 2:], cache)[0, 0].tolist()
    module = embedded("absorption")["module"]
    found = [matrix(name, 0).flatten().tolist() for name in ("u_expanded", "u_absorbed")]
    for output in (module["y"], decoded, *found):
        assert output == pytest.approx(y, abs=1e-12)
    for head in range(2):
        for name, form in (("o", "expanded"), ("o_latent", "absorbed")):
            assert matrix(name, head).flatten().tolist() == pytest.approx(module[form][head], abs=1e-12)
        assert matrix("content", head).tolist()[0] == pytest.approx(
            matrix("content_latent", head).tolist()[0], abs=1e-12
        )


def test_every_cell_is_the_dot_product_that_the_page_shows(open_page):
    """All cells of all steps: pointed at, recomputed by the page, and compared with the embedded numbers."""
    page, seen = open_page("absorption"), set()
    for step in range(8):
        page.run("show(arguments[0])", step)
        cells = page.run("""
            const lit = kind => [...document.querySelectorAll("#sum " + kind)].map(e => e.textContent);
            return [...document.querySelectorAll("#figure .grid td")].map(cell => {
              const {name, head} = cell.closest("table").dataset;
              const place = [name, Number(head), cell.parentElement.rowIndex, cell.cellIndex];
              cell.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
              return [...place, cell.classList.contains("pointed"), cell.textContent, recompute(...place),
                lit("strong").at(-1), matrices[name].product ?? null, lit(".first"), lit(".second")];
            })""")
        assert cells
        for name, head, row, column, pointed, text, value, result, product, first, second in cells:
            wanted = matrix(name, head)[row, column].item()
            assert value == pytest.approx(wanted, abs=1e-12), (name, head, row, column)
            assert pointed and number(text) == pytest.approx(wanted, abs=0.00501)
            assert number(result) == pytest.approx(wanted, abs=0.000501)
            if product:
                line, across = matrix(product[0], head)[row], matrix(product[1], head)[:, column]
                for shown, numbers in ((first, line), (second, across)):
                    shown = [number(text) for text in shown[1:]]  # the first names the row or column
                    assert shown == pytest.approx(numbers.tolist(), abs=0.000501)
            seen.add(name)
    assert seen == embedded("absorption")["matrices"].keys() - {"u_expanded", "u_absorbed"}
    rows = page.run("return [...document.querySelectorAll('#same tbody tr')].map(row => row.innerText)")
    for row, y in zip(rows, embedded("absorption")["module"]["y"], strict=True):
        assert [number(text) for text in row.split()[1:]] == pytest.approx(3 * [y], abs=5.01e-10)
    assert page.console() == []


def test_a_cell_highlights_its_row_and_column(open_page):
    page = open_page("absorption")
    page.run("show(1)")
    page.run("document.querySelectorAll('[data-name=k][data-head=\"1\"] tr')[2].cells[1].focus()")
    script = """
        return [...document.querySelectorAll(".grid ." + arguments[0])].map(cell => {
          const {name, head} = cell.closest("table").dataset;
          return [name, head, cell.parentElement.rowIndex, cell.cellIndex];
        })"""
    assert page.run(script, "pointed") == [["k", "1", 2, 1]]
    assert page.run(script, "first") == [["w_key", "1", 2, i] for i in range(4)]
    assert page.run(script, "second") == [["c", "1", i, 1] for i in range(4)]
    page.press(Keys.LEFT)  # from cell to cell, not from step to step
    assert page.run(script, "pointed") == [["k", "1", 2, 0]] and page.step() == 2
    page.press(Keys.UP)
    page.press(Keys.LEFT)  # no cell there
    assert page.run(script, "pointed") == [["k", "1", 1, 0]] and page.step() == 2
    assert page.console() == []


def test_arrow_keys_and_buttons_change_the_step(open_page):
    page = open_page("absorption")
    titles = []
    for step in range(1, 9):
        assert page.step() == step
        assert page.texts("nav [aria-current]") == [str(step)]
        titles.append(page.get("title").text)
        page.press(Keys.RIGHT)
    assert len(set(titles)) == 8 and page.step() == 8
    page.press(Keys.LEFT)
    page.get("back").click()
    assert page.get("title").text == titles[5]
    page.get("next").click()
    assert page.get("title").text == titles[6]
    page.all("nav li button")[2].click()
    page.press(Keys.RIGHT)  # a button has the focus now
    assert page.get("title").text == titles[3]
    page.run("document.getElementById('context').focus()")
    page.press(Keys.RIGHT)  # moves only the slider
    assert page.get("title").text == titles[3] and page.get("context-tokens").text == "8,192"
    assert page.console() == []


@pytest.mark.parametrize(
    ("step", "matrix", "before", "after"), [(5, "w_key", "k", "q_latent"), (7, "w_value", "v", "context")]
)
@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_the_matrix_slides_to_the_left_and_back(open_page, step, matrix, before, after, motion):
    page = open_page("absorption", motion=motion)
    page.run("show(arguments[0])", step)
    script = """
        const figure = document.querySelector(`.chain [data-name=${arguments[0]}]`).closest("figure");
        const running = figure.getAnimations(), begun = figure.getBoundingClientRect().left;
        for (const animation of running) animation.finish();
        return [running.length, begun, figure.getBoundingClientRect().left]"""
    seen = """
        return [...arguments].filter(name =>
          document.querySelector(`.row:not(.chain) [data-name=${name}]`).checkVisibility())"""
    moves, begun, ended = page.run(script, matrix)
    assert moves == (motion == "no-preference") and (begun > ended + 1 if moves else begun == ended)
    assert page.run(seen, before, after) == [after]
    page.get("slide").click()
    assert page.run(script, matrix)[2] > ended + 20 and page.run(seen, before, after) == [before]
    page.get("slide").click()
    assert page.run(script, matrix)[2] == ended and page.run(seen, before, after) == [after]
    assert page.console() == []


@pytest.mark.parametrize(
    ("context", "sizes"), [(0, "the matrices above"), (7, "deepseek-v2-lite"), (20, "deepseek-v3")]
)
def test_the_counters_are_the_closed_forms(open_page, context, sizes):
    page, total = open_page("absorption"), 2**context
    page.set(context=context, sizes=sizes)
    config = AttentionConfig(
        num_heads=2, kv_lora_rank=4, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=3
    )
    a = config if sizes.startswith("the") else Config.preset(sizes).model.attention
    latent, nope, rope, value = a.kv_lora_rank, a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim
    assert page.numbers("#work td", "number") == [
        total * (latent * (nope + value) + nope + rope + value),
        total * 2 * a.num_heads * (nope + rope + value),
        latent * (nope + value) + total * (latent + rope + latent),
        total * count.cache_bytes_per_token(ModelConfig(num_layers=1, num_dense_layers=1, attention=a)),
    ]
    assert page.get("context-tokens").text == f"{total:,}"
    assert page.console() == []


@pytest.mark.parametrize("total", [1, 7, 40])
def test_the_counters_equal_the_flops_of_mla(explorers, total):
    """By torch's FLOP counter, which counts a multiplication and its addition as two."""
    sizes = {"num_heads": 3, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2}
    config = AttentionConfig(**sizes, v_head_dim=6)  # as wide as a key: a narrower value would be padded
    attention = MultiheadLatentAttention(8, **sizes, v_head_dim=6).double()
    q_nope, q_rope, entries = (
        torch.randn(1, 1, 3, 4).double(),
        torch.randn(1, 1, 3, 2).double(),
        torch.randn(1, total, 8).double(),
    )
    latent, k_rope = entries.split([6, 2], dim=-1)
    forms = {
        "expanded": lambda: attention.expanded(q_nope, q_rope, latent, k_rope, None),
        "absorbed": lambda: attention.absorbed(q_nope, q_rope, entries, None),
    }
    work = explorers.work(ModelConfig(attention=config))
    for form, run in forms.items():
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            run()
        fixed, a_token = work[form]["multiplications"]
        assert counter.get_total_flops() == 2 * 3 * (fixed + a_token * total)

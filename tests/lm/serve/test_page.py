"""The chat page in headless Chromium."""

import base64
import hashlib
import json
import re
import threading
import time

import httpx
import pytest

from lm.serve import app as serve
from tests.helpers import BrowserPage
from tests.lm.serve.client import SECONDS

pytest.importorskip("selenium")
from selenium.webdriver.common.keys import Keys

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!--<script>&lt;\u2028"


class Page(BrowserPage):
    """The chat page of a running server, used as a person would."""

    def __init__(self, browser, running):
        super().__init__(browser, running.url)
        self.wait_for(lambda: browser.title == running.served.name)

    def wait_for(self, found):
        until = time.monotonic() + SECONDS
        while not found():
            assert time.monotonic() < until, f"timed out; the page shows {self.shown()}"
            time.sleep(0.01)

    def set(self, name, value):
        self.get(name).clear()
        self.get(name).send_keys(str(value))

    def type(self, text, *keys):
        """Type into the message."""
        self.get("text").send_keys(text, *keys)

    def say(self, text):
        """Send a message and wait for the complete answer."""
        self.type(text, Keys.ENTER)
        self.wait_for(self.idle)

    def idle(self):
        return self.get("send").is_displayed()

    def shown(self):
        """The conversation: each message's classes and text."""
        script = (
            "return [...document.querySelectorAll('#log .message')].map(e => [e.className, e.textContent])"
        )
        return [tuple(pair) for pair in self.browser.execute_script(script)]


def api(running, *contents, **options):
    """The API's answer to a conversation."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    answer = httpx.post(
        f"{running.url}/v1/chat/completions", json={"messages": messages, **options}, timeout=SECONDS
    )
    return answer.json()["choices"][0]["message"]["content"]


def test_a_conversation_equals_the_apis(browser, running):
    page = Page(browser, running)
    page.set("temperature", 0)
    page.set("max-tokens", 25)
    page.say("to be")
    first = api(running, "to be", temperature=0, max_tokens=25)
    assert page.shown() == [("message user", "to be"), ("message assistant", first)]
    page.set("max-tokens", 12)
    page.say("or not")
    second = api(running, "to be", first, "or not", temperature=0, max_tokens=12)
    assert page.shown()[2:] == [("message user", "or not"), ("message assistant", second)]
    page.get("new").click()
    assert page.shown() == [] and page.get("empty").is_displayed()
    page.say("to be")
    assert page.shown()[1:] == [("message assistant", api(running, "to be", temperature=0, max_tokens=12))]
    assert page.console() == []


def test_the_keyboard_alone_suffices(browser, running):
    page = Page(browser, running)
    focus = browser.switch_to.active_element
    assert focus.get_attribute("id") == "text"
    focus.send_keys("two", Keys.SHIFT, Keys.ENTER, Keys.NULL, "lines")
    assert page.shown() == [] and focus.get_attribute("value") == "two\nlines"
    focus.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("id") == "send"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    page.wait_for(page.idle)
    page.wait_for(lambda: len(page.shown()) == 2)
    assert page.shown()[0] == ("message user", "two\nlines")
    assert browser.switch_to.active_element.get_attribute("id") == "text"
    names = browser.execute_script(
        "return [...document.querySelectorAll('input, textarea, button, main')]"
        ".map(e => e.computedName ?? e.ariaLabel ?? (e.labels?.[0] ?? e).textContent.trim())"
    )
    assert all(names)
    focus.send_keys("  ", Keys.ENTER)  # nothing to send
    assert len(page.shown()) == 2 and page.console() == []


def test_hostile_text_stays_text(browser, serving, make_served, scripted):
    scripted(HOSTILE)
    with serving(make_served()) as running:
        page = Page(browser, running)
        page.say(HOSTILE)
        assert page.shown() == [("message user", HOSTILE), ("message assistant", HOSTILE)]
        page.wait_for(lambda: browser.title == "drawn")
        inside = "return document.querySelectorAll('#log img, #log script').length + document.scripts.length"
        assert browser.execute_script(inside) == 1
        assert page.console() == []


def test_a_hostile_model_name_stays_text(browser, serving, make_served):
    served = make_served()
    served.name = "<img src=x onerror=alert(1)>"
    with serving(served) as running:
        page = Page(browser, running)
        assert page.get("model").text == served.name and page.console() == []


@pytest.mark.parametrize("how", ["button", "escape", "new"])
def test_stop_keeps_the_text_and_frees_the_place(browser, serving, make_served, scripted, how):
    permits = threading.Semaphore(3)
    scripted("0123456789" * 9, permits)
    with serving(make_served(max_batch=1)) as running:
        try:
            page = Page(browser, running)
            page.type("x", Keys.ENTER)
            page.wait_for(lambda: page.shown()[1:] == [("message assistant making", "012")])
            page.type("a second message is not sent meanwhile", Keys.ENTER)
            assert len(page.shown()) == 2 and not page.idle()
            if how == "escape":
                page.type(Keys.ESCAPE)
            else:
                page.get("stop" if how == "button" else "new").click()
            page.wait_for(lambda: page.idle() and not running.served.worker.jobs)
            kept = [] if how == "new" else [("message user", "x"), ("message assistant", "012")]
            assert page.shown() == kept
            permits.release(100)
            page.type(Keys.ENTER)
            page.wait_for(lambda: page.idle() and len(page.shown()) == len(kept) + 2)
            assert page.shown()[-1] == ("message assistant", "0123456789" * 9)
            engine = running.served.worker.engine
            told = bytes(engine.requests[-1].prompt).decode()
            said = "a second message is not sent meanwhile\n"
            assert told == said if how == "new" else told == "x\n012\n" + said
            assert len(engine.requests[0].tokens) <= 4
            assert page.console() == []
        finally:
            permits.release(1000)


def test_a_thought_is_dimmed_folded_and_not_sent_back(browser, serving, make_served, scripted):
    thought = "hm <b> </b>\nso"
    scripted(f"<think>\n{thought}\n</think>\n\nyes")
    with serving(make_served()) as running:
        page = Page(browser, running)
        page.say("first")
        assert page.shown() == [("message user", "first"), ("message assistant", "yes")]
        [details] = browser.find_elements("css selector", "#log > details")
        body = details.find_element("css selector", "div")
        assert details.text == "Thinking" and not body.is_displayed()
        order = "return [...document.querySelectorAll('#log > :not(#empty)')].map(e => e.className)"
        assert browser.execute_script(order) == ["message user", "thought", "message assistant"]
        details.find_element("css selector", "summary").click()
        assert body.is_displayed() and body.get_attribute("textContent") == thought
        assert browser.execute_script("return document.querySelectorAll('#log b').length") == 0
        colour = "return getComputedStyle(document.querySelector(arguments[0])).color"
        dim, plain = (browser.execute_script(colour, where) for where in ("#log > details div", ".assistant"))
        assert dim != plain and contrast(browser, "#log > details div") > 4.5
        page.say("second")
        told = [bytes(request.prompt).decode() for request in running.served.worker.engine.requests]
        assert told == ["first\n", "first\nyes\nsecond\n"]
        page.get("new").click()
        assert browser.find_elements("css selector", "#log > details") == [] and page.console() == []


def test_a_thought_that_is_stopped_or_never_closed_stays(browser, serving, make_served, scripted):
    permits = threading.Semaphore(len("<think>hm"))
    scripted("<think>hm...", permits)
    with serving(make_served()) as running:
        try:
            page = Page(browser, running)
            page.type("x", Keys.ENTER)
            thoughts = "return [...document.querySelectorAll('#log > details div')].map(e => e.textContent)"
            page.wait_for(lambda: browser.execute_script(thoughts) == ["hm"])
            page.type(Keys.ESCAPE)
            page.wait_for(lambda: page.idle() and not running.served.worker.jobs)
            assert page.shown() == [("message user", "x"), ("message assistant", "∅")]
            permits.release(100)
            page.say("y")
            assert page.shown()[2:] == [("message user", "y"), ("message assistant", "∅")]
            assert browser.execute_script(thoughts) == ["hm", "hm..."]
            assert bytes(running.served.worker.engine.requests[-1].prompt) == b"x\n\ny\n"
            assert page.console() == []
        finally:
            permits.release(1000)


def test_messages_beyond_the_context_are_left_out_and_marked(browser, running):
    page = Page(browser, running)
    page.set("temperature", 0)
    page.set("max-tokens", 5)
    page.say("a" * 60)
    page.say("b" * 60)
    kinds = [kind for kind, _ in page.shown()]
    assert kinds == [
        "message user left-out",
        "message assistant left-out",
        "message user",
        "message assistant",
    ]
    assert page.shown()[3][1] == api(running, "b" * 60, temperature=0, max_tokens=5)
    marks = browser.execute_script(
        "return [...document.querySelectorAll('.message')].map(e => getComputedStyle(e, '::after').content)"
    )
    assert marks == ['"No longer in the model\'s context"'] * 2 + ["none"] * 2
    page.say("c" * 97)  # does not fit even alone: shown as an error and put back
    assert page.shown()[-1] == ("message error", "messages: 98 tokens exceed the model's context of 96")
    assert page.get("text").get_attribute("value") == "c" * 97
    assert len([kind for kind, _ in page.shown() if "user" in kind]) == 2


@pytest.mark.parametrize("template", [None, "{{ messages[-1].content }}"])
def test_the_page_says_what_kind_of_model_answers_and_what_it_sees(browser, serving, make_served, template):
    served = make_served()
    served.tokenizer.chat_template = template
    with serving(served) as running:
        page = Page(browser, running)
        page.wait_for(lambda: page.get("about").text)
        base = "This is a base model: it continues your text rather than answering it. "
        window = (
            "The model sees the newest 96 tokens; in a longer conversation the oldest messages are left out"
        )
        assert page.get("about").text == (base if template is None else "") + window + ", and marked."
        assert page.console() == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_wider_than_the_window_or_too_faint(browser, running, width, theme):
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page = Page(browser, running)
        page.wait_for(lambda: page.get("about").text)
        assert contrast(browser, "#about") > 4.5 and contrast(browser, "#empty") > 4.5
        page.set("max-tokens", 5)
        page.say("a" * 60)
        page.say("b" * 60)
        assert contrast(browser, ".user.left-out") > 4.5 and contrast(browser, ".assistant.left-out") > 4.5
        assert page.get("about").is_displayed()
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def contrast(browser, selector):
    """The contrast ratio of an element's text and background (WCAG 2)."""
    script = (
        "let e = document.querySelector(arguments[0]), back = 'rgba(0, 0, 0, 0)';"
        "const colour = getComputedStyle(e).color;"
        "for (; back === 'rgba(0, 0, 0, 0)'; e = e.parentElement) back = getComputedStyle(e).backgroundColor;"
        "return [colour, back]"
    )
    levels = []
    for colour in browser.execute_script(script, selector):
        parts = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        levels.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(levels) + 0.05) / (min(levels) + 0.05)


def test_errors_are_shown_and_the_message_can_be_sent_again(browser, serving, make_served, scripted):
    scripted("ok")
    with serving(make_served(max_batch=1, max_queue=0)) as running:
        page = Page(browser, running)
        page.set("max-tokens", 0)
        page.say("hello")
        [(kind, told)] = page.shown()
        assert kind == "message error" and told.startswith("max_tokens: ") and told.endswith("got 0")
        page.set("max-tokens", "")
        page.type(Keys.ENTER)
        page.wait_for(lambda: page.idle() and page.shown()[1:])
        assert page.shown()[1:] == [("message user", "hello"), ("message assistant", "ok")]

        def fail():
            raise RuntimeError("out of memory")

        running.served.worker.engine.step = fail
        page.say("again")
        assert page.shown()[-1] == ("message error", "the model failed: out of memory")
        page.type(Keys.ENTER)
        page.wait_for(lambda: page.idle() and page.shown()[-1] == ("message assistant", "ok"))


def test_an_error_within_an_answer_keeps_its_text(browser, serving, make_served, scripted):
    permits = threading.Semaphore(2)
    scripted("0123", permits)
    with serving(make_served()) as running:
        try:
            page = Page(browser, running)
            page.type("x", Keys.ENTER)
            page.wait_for(lambda: page.shown()[1:] == [("message assistant making", "01")])

            def fail():
                raise RuntimeError("out of memory")

            running.served.worker.engine.step = fail
            permits.release(1)
            page.wait_for(page.idle)
            assert page.shown()[0] == ("message user", "x")
            assert page.shown()[1] == ("message assistant", "012")
            assert page.shown()[2] == ("message error", "the model failed: out of memory")
        finally:
            permits.release(100)


def test_light_and_dark_follow_the_system(browser, running):
    page = Page(browser, running)
    colours = []
    for theme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        script = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        colours.append(
            [sum(map(int, re.findall(r"\d+", colour))) for colour in browser.execute_script(script)]
        )
    assert colours[0][0] > 3 * 230 and colours[0][1] < 3 * 60  # dark on light
    assert colours[1][0] < 3 * 60 and colours[1][1] > 3 * 200  # light on dark
    assert page.console() == []


def test_the_page_loads_and_runs_only_itself(browser, running):
    page = Page(browser, running)
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == [f"{running.url}/v1/models"]
    browser.execute_script(
        "const script = document.createElement('script'), button = document.createElement('button');"
        "script.textContent = 'window.owned = 1'; button.setAttribute('onclick', 'window.owned = 2');"
        "document.body.append(script, button); button.click()"
    )
    assert browser.execute_script("return window.owned ?? null") is None
    assert all("Content Security Policy" in entry["message"] for entry in page.console())


def test_the_policy_allows_only_the_pages_own_script_and_style():
    page, headers = serve.read_page()
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    for tag in ("script", "style"):
        [inside] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in json.dumps(policy) and headers["X-Content-Type-Options"] == "nosniff"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?://", page)
    assert not re.search(r"<[^>]* (on\w+|style)=", page.partition("<script>")[0])


def test_the_server_sends_the_page_with_its_policy(running):
    answer = httpx.get(running.url + "/")
    page, headers = serve.read_page()
    assert answer.text == page and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert {name: answer.headers[name] for name in headers} == headers

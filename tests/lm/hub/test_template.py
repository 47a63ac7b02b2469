"""Chat templates: rendered as in transformers, and stopped at their limits."""

import pytest

from lm.hub.template import render

TALK = [{"role": "user", "content": "Who's there?"}, {"role": "assistant", "content": "Nay, answer me."}]
DEEPSEEK = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'user' %}
{{- '<|User|>' + message['content'] -}}
{% else %}
{{- '<|Assistant|>' + message['content'] + eos_token -}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"""


def test_a_template_writes_every_turn_and_the_start_of_the_answer():
    talk = [*TALK, {"role": "user", "content": "{{ 7 * 7 }}"}]
    text = render(DEEPSEEK, talk, {"bos_token": "<B>", "eos_token": "<E>"})
    assert text == "<B><|User|>Who's there?<|Assistant|>Nay, answer me.<E><|User|>{{ 7 * 7 }}<|Assistant|>"


TEMPLATES = {
    "DeepSeek's": DEEPSEEK,
    "loops and namespaces": """{%- for m in messages if m.role == 'user' %}
{{ m | tojson }}{% if loop.index > 1 %}{% break %}{% endif %}
{% endfor %}
   {% set box = namespace(n=0) %}
   {% for m in messages %}{% set box.n = box.n + 1 %}{% endfor %}
{{ box.n * 3 }} {{ '%' }} {{ 7 % 4 }}""",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "tojson without ASCII": "{{ {'b': 'é<', 'a': 1} | tojson(ensure_ascii=false) }}",
    "tojson with ASCII": "{{ {'b': 'é<', 'a': 1} | tojson(ensure_ascii=true, sort_keys=true) }}",
    "tojson with separators": "{{ {'b': [1, 2], 'a': 1} | tojson(separators=(',', ':')) }}",
    "tojson by position": "{{ {'b': 'é', 'a': 1} | tojson(true, 1) }}",
    "generation": """{% for m in messages %}
{% if m.role == 'assistant' %}{% generation %}
{{ m.content }}
  {% endgeneration %}{% else %}{{ m.content }}{% endif %}
{%- generation -%} {{ loop.index }} {%- endgeneration -%}
{% endfor %}""",
    "tools": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{% if tools %}t{% endif %}",
    "tools that are counted": "{% if tools is not none and tools | length > 0 %}t{% else %}none{% endif %}",
    "undefined": "{{ nothing is defined }}{{ nothing }}{{ messages[0].tool_calls is defined }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ unk_token }}",
    "dict": "{{ dict(a=1).items() | list }}{{ dict.fromkeys(['x'], 2) }}{{ dict([('k', 'v')]) }}",
    "namespace": "{% set n = namespace({'x': 1}, y=2) %}{% set n.x = n.x + n.y %}{{ n.x }}",
    "a namespace's self": "{% set n = namespace(self=4) %}{{ n.self }}",
    "macros": "{% macro f(a, b='é') %}[{{ a }}{{ b }}]{% endmacro %}{{ f(1) }}{{ f(messages[0].role, b=2) }}",
    "continue": "{% for i in range(4) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
    "strings": "{{ messages[0].content.split(' ')[-1].strip('?').upper() }}{{ 'a' ~ 1 }}{{ '%s' % 'b' }}",
    "filters": "{{ ' a ' | trim }}{{ [3, 1] | sort | join(',') }}{{ messages | map('length') | list }}",
    "HTML": "{{ '<a href=\"x\">&amp;</a>' }}{{ '<' | e }}",
    "a date": "{{ strftime_now('%Y') }}",
    "add_generation_prompt": "{{ add_generation_prompt }}{{ messages | length }}{{ messages[::-1][0].role }}",
}


@pytest.fixture(scope="module")
def theirs():
    """theirs(template) -> what transformers renders"""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    vocabulary = {"<B>": 0, "<E>": 1, "a": 2}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<E>")), bos_token="<B>", eos_token="<E>"
    )
    options = {"tokenize": False, "add_generation_prompt": True}
    return lambda template: tokenizer.apply_chat_template(TALK, chat_template=template, **options)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_renders_as_in_transformers(template, theirs):
    assert render(template, TALK, {"bos_token": "<B>", "eos_token": "<E>"}) == theirs(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n.x }}",
        "{% set n = namespace(_x=1) %}",
        "{% generation %}",
        "{{ messages | tojson(colour=1) }}",
        "{{ dict.__subclasses__() }}",
        "{{ messages[0].update(role='x') }}",
    ],
)
def test_a_template_that_transformers_rejects_is_rejected(template, theirs):
    with pytest.raises(Exception):  # noqa: B017
        theirs(template)
    with pytest.raises(ValueError, match="the chat template cannot be used: "):
        render(template, TALK, {})


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ 'x' * 100000000 }}",
        "{{ '\x00' * 5000000 }}",
        "{{ messages[0].content * 10000000 }}",
        "{% macro f() %}{% for a in range(99999) %}{{ 'é' * 100 }}{% endfor %}{% endmacro %}{{ f() }}",
        "{% for a in range(99999) %}{% for b in range(99) %}x{% endfor %}{% endfor %}",
        "{{ 'x' | center(9000000) }}{{ ['x' * 9000000] | tojson }}",
    ],
)
def test_the_output_of_a_template_is_bounded(template):
    with pytest.raises(ValueError, match=r"it writes more than 4194304 characters$"):
        render(template, TALK, {})


def test_a_long_conversation_is_not_too_much():
    talk = [{"role": "user", "content": "é" * 10_000}] * 100
    assert render("{% for m in messages %}{{ m.content }}{% endfor %}", talk, {}) == "é" * 1_000_000


def test_a_long_error_is_cut():
    with pytest.raises(ValueError) as caught:
        render("{{ raise_exception('x' * 1000000) }}", TALK, {})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 'x'.ljust(9999999999) }}", "MemoryError"),
        ("{% set n = namespace(s='ab') %}{% for _ in range(50) %}{% set n.s = n.s ~ n.s %}{% endfor %}", ""),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('roles must take turns') }}", "roles must take turns"),
        ("{{ undefined_name.more }}", "undefined"),
        ("{{ '\\n' ~ raise_exception('first\nsecond') }}", "first$"),
    ],
)
def test_a_template_that_breaks_its_limits_is_a_one_line_error(template, reason):
    with pytest.raises(ValueError, match=f"^the chat template cannot be used: .*{reason}") as caught:
        render(template, TALK, {})
    assert "\n" not in str(caught.value)


def test_an_endless_template_is_stopped(monkeypatch):
    monkeypatch.setattr("lm.hub.template.SECONDS", 1)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match="it takes more than 1 seconds"):
        render(endless, TALK, {})

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


def test_a_template_renders_as_in_transformers():
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    vocabulary = {"<B>": 0, "<E>": 1, "a": 2}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<E>")), bos_token="<B>", eos_token="<E>"
    )
    template = DEEPSEEK + """
{%- for m in messages if m.role == 'user' %}
{{ m | tojson }}{% if loop.index > 1 %}{% break %}{% endif %}
{% endfor %}
   {% set box = namespace(n=0) %}
   {% for m in messages %}{% set box.n = box.n + 1 %}{% endfor %}
{{ box.n * 3 }} {{ '%' }} {{ 7 % 4 }}"""
    wanted = tokenizer.apply_chat_template(
        TALK, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert render(template, TALK, {"bos_token": "<B>", "eos_token": "<E>"}) == wanted


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

"""Chat templates: equal to transformers' rendering, TGI's continuation, and no way to hang or escape."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from textmill.errors import TemplateFailed
from textmill.text.chat import ChatTemplate, flatten
from textmill.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "What is the capital of France?"}
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture(scope="session")
def default_template(tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)


def test_the_default_models_prompt(default_template: ChatTemplate, tokenizer: Tokenizer) -> None:
    prompt = default_template.render([USER])
    assert prompt == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(tokenizer.encode(prompt, add_special_tokens=False).ids) == 37


TEMPLATES = [
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}",
    "{% for m in messages[::-1] %}[{{ m['role'] | upper }}]{{ m['content'].strip() }}{{ loop.index0 }}{% endfor %}",
    "{{ bos_token }}{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = s.n + 1 %}{% endfor %}{{ s.n }}",
    "{% if tools %}{{ tools | tojson(indent=2) }}{% else %}none{% endif %}{{ messages | tojson }}",
    "{% macro show(m) %}<{{ m.role ~ ':' ~ m.content }}>{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
    "{{ messages | map(attribute='content') | join(' | ') }}{{ 'é<&>' }}{{ [1] + [3] }}{{ {'a': (1,)} }}{{ 2 * 'x' }}",
    "{{ '%s-%05d' % ('a', 7) }}{{ 'a,b'.split(',') }}{{ messages | selectattr('role', 'eq', 'user') | list | length }}",
    "{% set x %}{{ messages[0].content }}{% endset %}{{ x | replace('a', 'b') }}{{ x.replace('a', 'c') }}{{ missing }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f", "parameters": {}}}]])
def test_equal_to_transformers(source: str, tools: list[dict[str, Any]] | None) -> None:
    messages = [{"role": "system", "content": " Be brief. "}, USER]
    expected, _ = render_jinja_template(
        conversations=[messages], tools=tools, chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    assert ChatTemplate(source, "<s>").render(messages, tools) == expected[0]


def test_an_assistants_last_message_is_continued(default_template: ChatTemplate) -> None:
    prompt = default_template.render([USER, {"role": "assistant", "content": "The capital is "}])
    assert prompt.endswith("<|im_start|>assistant\nThe capital is")
    stripping = ChatTemplate("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}")
    assert stripping.render([USER, {"role": "assistant", "content": " So "}]).endswith("?][So")


def test_messages_are_flattened_as_tgi_does() -> None:
    parts = [
        {"type": "text", "text": "a "},
        {"type": "image_url", "image_url": {"url": "http://x/y.png", "detail": "low"}},
        {"type": "text", "text": " b"},
    ]
    assert flatten({"role": "user", "content": parts}) == {"role": "user", "content": "a ![](http://x/y.png) b"}
    calls = [{"id": "0", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}]
    flat = flatten({"role": "assistant", "content": None, "tool_calls": calls})["content"]
    assert flat == '[{"id":"0","type":"function","function":{"name":"f","arguments":"{\\"x\\":1}"}}]'
    assert flatten({"role": "user", "content": "x", "tool_calls": calls})["content"] == "x"


def test_no_template() -> None:
    with pytest.raises(TemplateFailed) as caught:
        ChatTemplate(None).render([USER])
    assert caught.value.message == "Template error: template not found"


def test_a_template_can_refuse() -> None:
    with pytest.raises(TemplateFailed, match="Template error: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render([USER])


def test_the_date(default_template: ChatTemplate) -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render([USER]) == time.strftime("%Y")


def test_a_long_chat_is_no_attack(default_template: ChatTemplate) -> None:
    chat = [{"role": "user", "content": "word " * 2000}] * 200
    assert len(default_template.render(chat)) > 2_000_000


LOOPS = "{% for a in range(100000) %}" * 3 + "{% endfor %}" * 3
GROW = "{% set n = namespace(x=START) %}{% for i in range(99) %}{% set n.x = STEP %}{% endfor %}{{ n.x | length }}"
BIG = "{% set a = 'a' * 1000000 %}"
EXPENSIVE = {
    "nested loops": LOOPS,
    "filtered loops": "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "text times": "{{ 'a' * 1000000000 }}",
    "list times": "{{ 1000000000 * [1] }}",
    "power": "{{ 10 ** 1000000000 }}",
    "doubled by ~": GROW.replace("START", "'a'").replace("STEP", "n.x ~ n.x"),
    "doubled by +": GROW.replace("START", "'a'").replace("STEP", "n.x + n.x"),
    "nested lists": GROW.replace("START", "['a']").replace("STEP", "[n.x, n.x]"),
    "nested dicts": GROW.replace("START", "['a']").replace("STEP", "dict(a=n.x, b=n.x)"),
    "nested by times": GROW.replace("START", "['a']").replace("STEP", "[n.x] * 2"),
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "endless loop": "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "center": "{{ 'a'.center(1000000000) }}",
    "center filter": "{{ 'a' | center(1000000000) }}",
    "wide format": "{{ '%1000000000d' % 1 }}",
    "format filter": "{{ '%*d' | format(1000000000, 1) }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "replace": BIG + "{{ a.replace('a', a) }}",
    "replace filter": BIG + "{{ a | replace('a', a) }}",
    "join": BIG + "{{ ''.join([a] * 100000) }}",
    "join filter": BIG + "{{ ([a] * 100000) | join }}",
    "map": BIG + "{{ ([a] * 100000) | map('upper') | list | length }}",
    "output": BIG + "{% for i in range(100000) %}{{ a }}{% endfor %}",
    "sum": "{{ ([[1]] * 1000000) | sum(start=[]) }}",
    "deep blocks": "{% if true %}" * 5500 + "{% endif %}" * 5500,
    "deep brackets": "{{ " + "(" * 5500 + "1" + ")" * 5500 + " }}",
    "date": "{{ strftime_now('%1000000000Y') }}",
    "too long": " " * (2 << 20),
}


@pytest.mark.parametrize("source", EXPENSIVE.values(), ids=EXPENSIVE)
def test_expensive_templates_fail_in_bounded_time(source: str) -> None:
    started = time.monotonic()
    with pytest.raises(TemplateFailed):
        ChatTemplate(source).render([USER])
    assert time.monotonic() - started < 6  # the limit is 2 s; the rest is a slow machine


def test_growing_text_takes_bounded_memory() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TemplateFailed):
            ChatTemplate(EXPENSIVE["doubled by ~"]).render([USER])
        assert tracemalloc.get_traced_memory()[1] < 1 << 30
    finally:
        tracemalloc.stop()


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ (messages | attr('__class__')).__mro__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ ''.format.__self__.__class__.__base__ }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_escapes_fail(source: str) -> None:
    try:
        out = ChatTemplate(source).render([USER])
    except TemplateFailed:
        return
    assert out == ""


@pytest.mark.parametrize("source", ["{% if %}", "{{ messages[5].content.nothing }}", "{{ 1 / 0 }}", "{% endfor %}"])
def test_broken_templates_are_template_errors(source: str) -> None:
    with pytest.raises(TemplateFailed, match="Template error: "):
        ChatTemplate(source).render([USER])

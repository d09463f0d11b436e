"""llminfer.chat_template: the dialect of Hugging Face chat templates, its limits, refusals in one line."""

from __future__ import annotations

import datetime

import pytest
import tokenizers
from tokenizers import decoders, models

from llminfer.chat_template import MAX_PROMPT, MAX_TEMPLATE
from llminfer.errors import UserError
from llminfer.tokenizer import Tokenizer

TURNS = """{{ bos_token }}{% for m in messages %}
    {%- if m.role == 'bad' %}{{ raise_exception('role ' ~ m.role) }}{% endif %}
<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<assistant>{% endif %}"""
MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": "é😀 <|end|>"}]


def tokenizer(**templates: str) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, templates=templates, special={"bos_token": "<|start|>", "eos_token": "<|end|>"})


def chat(template: str, **kw) -> str:
    return tokenizer(default=template).apply_chat(MESSAGES, **kw)


def test_chat_template():
    text = chat(TURNS)
    assert text == "<|start|><system>S<|end|>\n<user>é😀 <|end|><|end|>\n<assistant>"
    assert chat(TURNS, add_generation_prompt=False) + "<assistant>" == text


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[1]|tojson }}", '{"role": "user", "content": "é😀 <|end|>"}'),
        ("{{ {'b': 1, 'a': [1]}|tojson(indent=1, sort_keys=true) }}", '{\n "a": [\n  1\n ],\n "b": 1\n}'),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}", "023"),
        ("a{% generation %}{{ messages[0].content }}{% endgeneration %}b", "aSb"),
        ("{{ strftime_now('%Y') }}", str(datetime.datetime.now().year)),
        ("{{ tools is none }}{{ tools is defined }}{{ pad_token is defined }}", "TrueTrueFalse"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
        ("{{ 'ab' * 3 }}{{ 2 ** 10 }}", "ababab1024"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
    ],
)
def test_template_dialect(template, text):
    assert chat(template) == text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", "not a valid template"),
        ("{{ x", "not a valid template"),
        ("{% for i in [1] %}" * 40 + "{% endfor %}" * 40, "not a valid template"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ nothing.there }}", "nothing"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages.append(1) }}", "chat_template"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat_template"),
        ("{{ messages[0].content.__init__.__globals__ }}", "chat_template"),
        ("{% include 'x' %}", "chat_template"),
        ("{% for i in range(1000000) %}{% endfor %}", "chat_template"),
        ("{{ 'a' * 1000000000 }}", "repetition"),
        ("{{ 1000000000 * ['a'] }}", "repetition"),
        ("{{ 9 ** (9 ** 9) }}", "power"),
        (f"{{% for i in range(99999) %}}{{{{ '{'x' * 400}' }}}}{{% endfor %}}", str(MAX_PROMPT)),
        ("x" * (MAX_TEMPLATE + 1), str(MAX_TEMPLATE)),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_bad_templates_are_one_line(template, words):
    with pytest.raises(UserError) as caught:
        chat(template)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_no_template():
    with pytest.raises(UserError, match="no chat template"):
        tokenizer().apply_chat(MESSAGES)
    with pytest.raises(UserError, match="rag"):
        tokenizer(rag="x").apply_chat(MESSAGES)


def test_tools_choose_their_template():
    both = tokenizer(default="plain", tool_use="{{ tools[0]['name'] }}")
    assert both.apply_chat(MESSAGES) == both.apply_chat(MESSAGES, tools=[]) == "plain"
    assert both.apply_chat(MESSAGES, tools=[{"name": "search"}]) == "search"
    with pytest.raises(UserError, match="tools"):
        both.apply_chat(MESSAGES, tools=["search"])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "messages="),
        ([], "not empty"),
        ({"role": "user", "content": "x"}, "messages="),
        (["hello"], r"messages\[0\]"),
        ([*MESSAGES, {"role": "user"}], r"messages\[2\]\['content'\]"),
        ([{"content": "x"}], "role"),
        ([{"role": 1, "content": "x"}], "role"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "content"),
    ],
)
def test_messages_are_checked(messages, words):
    with pytest.raises(UserError, match=words):
        tokenizer(default=TURNS).apply_chat(messages)


def test_an_error_of_the_template_names_the_role():
    with pytest.raises(UserError, match="role bad"):
        tokenizer(default=TURNS).apply_chat([{"role": "bad", "content": ""}])

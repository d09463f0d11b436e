"""llminfer.chat_template: conversations of every family as transformers renders them, the dialect of Hugging Face chat
templates, its limits, refusals in one line."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

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


FAMILIES = json.loads((Path(__file__).parent / "goldens" / "chat_families.json").read_text(encoding="utf-8"))
CASES = [pytest.param(family, case, id=f"{name}-{i}") for name, family in FAMILIES.items() for i, case in enumerate(family["cases"])]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_families(family, case):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.decoder = decoders.ByteLevel()
    ours = Tokenizer(backend, templates=family["templates"], special={"bos_token": "<s>", "eos_token": "</s>"})
    before = json.dumps(case["messages"])
    # transformers begins the assistant's turn only when asked to.
    arguments = {"add_generation_prompt": False, **case["arguments"]}
    if "error" in case:
        with pytest.raises(UserError) as caught:
            ours.apply_chat(case["messages"], **arguments)
        assert case["error"] in str(caught.value)
    else:
        assert ours.apply_chat(case["messages"], **arguments) == case["text"]
    assert json.dumps(case["messages"]) == before


@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILIES)
def test_families_in_transformers(name):
    from goldens.make_chat import render, transformers_tokenizer

    theirs = transformers_tokenizer(FAMILIES[name]["templates"])
    for case in FAMILIES[name]["cases"]:
        expected = {key: case[key] for key in ("text", "error") if key in case}
        assert render(theirs, case["messages"], case["arguments"]) == expected


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
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        ("{{ {'a': '<é>'}|tojson(ensure_ascii=true, separators=(',', ':')) }}", '{"a":"<\\u00e9>"}'),
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
    both = tokenizer(default="plain", tool_use="{{ tools|length }}", rag="{{ documents[0].text }}{{ deep }}")
    assert both.apply_chat(MESSAGES) == "plain"
    assert [both.apply_chat(MESSAGES, tools=tools) for tools in ([], [{"name": "search"}])] == ["0", "1"]
    assert both.apply_chat(MESSAGES, tools=[{}], chat_template="default") == "plain"
    assert both.apply_chat(MESSAGES, documents=[{"text": "x"}], chat_template="rag", deep=True) == "xTrue"
    for arguments in ({"tools": ["search"]}, {"tools": {}}, {"documents": ["text"]}, {"chat_template": "other"}):
        with pytest.raises(UserError, match=next(iter(arguments))):
            both.apply_chat(MESSAGES, **arguments)


PART = {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}, {"role": "assistant", "tool_calls": [{"id": 1}]}),
        ({"role": "user", "content": [PART, PART]}, {"role": "user", "content": [PART, PART]}),
        ({"role": "tool", "content": {"a": None}, "name": None}, {"role": "tool", "content": {"a": None}}),
        (
            {"role": "assistant", "reasoning": "r"},
            {"thinking": "r", "role": "assistant", "reasoning": "r", "reasoning_content": "r"},
        ),
    ],
)
def test_what_a_template_sees_of_a_message(message, shown):
    assert json.loads(tokenizer(default="{{ messages[-1]|tojson }}").apply_chat([*MESSAGES, message])) == shown


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
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "content.*image.*text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content"),
        ([{"role": "user", "content": ["x"]}], "content"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "content"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "content"),
        ([{"role": "assistant", "content": "", "tool_calls": ["x"]}], "tool_calls"),
    ],
)
def test_messages_are_checked(messages, words):
    with pytest.raises(UserError, match=words):
        tokenizer(default=TURNS).apply_chat(messages)


ANSWER = [*MESSAGES, {"role": "assistant", "content": "So far "}]


def test_the_final_message_is_continued():
    plain, stripping = tokenizer(default="{{ messages[-1].content }}|"), tokenizer(default="[{{ messages[-1].content|trim }}|")
    assert plain.apply_chat(ANSWER, continue_final_message=True) == "So far "
    assert stripping.apply_chat(ANSWER, continue_final_message=True) == "[So far"
    assert ANSWER[-1]["content"] == "So far "
    asked = tokenizer(default="{{ add_generation_prompt }}{{ messages[-1].content }}")
    assert asked.apply_chat(ANSWER, continue_final_message=True) == "FalseSo far "


@pytest.mark.parametrize(
    ("template", "arguments", "words"),
    [
        (TURNS, {"add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt"),
        (TURNS, {"continue_final_message": "thinking"}, "no text of that name"),
        (TURNS, {"continue_final_message": 1}, "bool"),
        ("{{ messages[0].content }}", {"continue_final_message": True}, "does not write"),
        ("{{ messages[-1].content[:9] }}", {"continue_final_message": True}, "does not write"),
    ],
)
def test_continuing_is_refused(template, arguments, words):
    with pytest.raises(UserError, match=words):
        tokenizer(default=template).apply_chat(ANSWER, **arguments)


def test_an_error_of_the_template_names_the_role():
    with pytest.raises(UserError, match="role bad"):
        tokenizer(default=TURNS).apply_chat([{"role": "bad", "content": ""}])

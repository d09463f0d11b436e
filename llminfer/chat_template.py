"""Chat templates: from a list of messages to the text a model was trained on, by the Jinja template of its maker.

Source: the conventions of Hugging Face chat templates (a sandbox, `raise_exception`, `strftime_now`, plain `tojson`,
loop controls, `{% generation %}` blocks, other names for reasoning, the last message left open), as transformers 5
follows them. A template comes with the weights: it is code from outside."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from llminfer.errors import UserError, refuse

MAX_TEMPLATE = 1_000_000  # characters of a template
MAX_PROMPT = 1 << 24  # characters a template may write, and the largest string it may build by repetition
SPEAKERS = ("system", "developer", "user", "assistant")  # whose messages are text; a tool's may be any JSON value
REASONING = ("reasoning_content", "thinking", "reasoning")  # fields of one meaning; templates read the first or second
_OPEN_END = "THE FINAL MESSAGE GOES ON HERE "  # stands at the end of a message that the model shall continue


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox (no attribute tricks, no mutation, ranges under 100,000), with bounded repetition and powers."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for item, times in ((left, right), (right, left)):
                if isinstance(item, (str, list, tuple)) and isinstance(times, int) and len(item) * times > MAX_PROMPT:
                    raise jinja2.TemplateError(f"a repetition longer than {MAX_PROMPT}")
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 10_000:
            raise jinja2.TemplateError("a power of more than 10,000 bits")
        return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, by which training templates mark the assistant's words: the body only,
    in a scope of its own."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """JSON for a prompt: Jinja's own filter would escape <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    if len(source) > MAX_TEMPLATE:
        raise UserError(f"chat_template: {len(source)} characters long; must be at most {MAX_TEMPLATE}")
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except Exception as error:  # beside TemplateError, Python's own limits on nesting, of several types
        raise UserError(f"chat_template: not a valid template: {one_line(error)}") from error


def render(source: str, variables: dict[str, Any]) -> str:
    """Runs a template. Its output is bounded; its running time is bounded only by the sandbox's limit on ranges, so
    a template is trusted about as far as the weights it comes with. Raises UserError."""
    template = _compile(source)
    parts, size = [], 0
    try:
        for part in template.generate(variables):
            parts.append(part)
            size += len(part)
            if size > MAX_PROMPT:
                raise jinja2.TemplateError(f"it writes more than {MAX_PROMPT} characters")
    except Exception as error:  # a template is a program: it can raise anything
        raise UserError(f"chat_template: {one_line(error)}") from error
    return "".join(parts)


def render_chat(source: str, messages: list[dict[str, Any]], variables: dict[str, Any], continue_final: bool | str = False) -> str:
    """Runs a template over messages that `check_messages` accepts. What is None in a message counts as absent, and
    reasoning is there under both names that templates read.

    continue_final: the text ends where the last message's content (or the field named) ends, for the model to go on.
    Raises UserError."""
    messages = [_plain(message) for message in messages]
    if not continue_final:
        return render(source, {**variables, "messages": messages})
    field = "content" if continue_final is True else continue_final
    same = REASONING if field in REASONING else (field,)
    messages[-1], ending = _left_open(messages[-1], field, same)
    text = render(source, {**variables, "messages": messages})
    before, mark, after = text.rpartition(_OPEN_END.rstrip())
    if not mark or ending.strip() not in text:
        raise refuse("continue_final_message", continue_final, "this chat template does not write the last message as it is")
    # A template that strips the message has stripped the space behind the mark: the space before it goes too.
    return before if after.startswith(" ") else before.rstrip()


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in message.items() if value is not None}
    reasoning = next((found[name] for name in REASONING if name in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _left_open(message: dict[str, Any], field: str, same: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """The message with a mark after the text of `field` (of its last text part, where it is a list), and that text."""
    value = message.get(field)
    parts: list[dict[str, Any]] = value if isinstance(value, list) else [{"text": value}]
    at = max((i for i, part in enumerate(parts) if isinstance(part.get("text"), str)), default=None)
    if at is None:
        raise refuse("continue_final_message", field, "the last message has no text of that name to continue")
    ending = parts[at]["text"]
    if isinstance(value, list):
        return {**message, field: [*parts[:at], {**parts[at], "text": ending + _OPEN_END}, *parts[at + 1 :]]}, ending
    return {**message, **{name: ending + _OPEN_END for name in same if message.get(name) == ending}}, ending


def check_messages(messages: object) -> None:
    """Raises UserError unless `messages` is a non-empty list of dicts with a str "role" and, for SPEAKERS, a "content" that is
    text: a str or a list of {"type": "text", "text": str}. It may be absent beside tool calls or reasoning."""
    if not isinstance(messages, list) or not messages:
        raise refuse("messages", messages, 'must be a list, not empty, of {"role": str, "content": str}')
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise refuse(f"messages[{number}]", message, 'must be a dict {"role": str, "content": str}')
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        if not isinstance(role, str):
            raise refuse(f"messages[{number}]['role']", role, "must be a str")
        if calls is not None and not _dicts(calls):
            raise refuse(f"messages[{number}]['tool_calls']", calls, "must be a list of dicts")
        if role not in SPEAKERS or isinstance(content, str):
            continue
        if isinstance(content, list) and _dicts(content):
            other = next((part for part in content if part.get("type") != "text" or not isinstance(part.get("text"), str)), None)
            if other is not None:
                raise refuse(f"messages[{number}]['content']", other, 'not supported; legal parts: {"type": "text", "text": str}')
        elif content is not None or not any(message.get(name) for name in ("tool_calls", *REASONING)):
            raise refuse(f"messages[{number}]['content']", content, 'must be a str or a list of {"type": "text", "text": str}')


def _dicts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def check_dicts(field: str, value: object, what: str) -> None:
    """Raises UserError unless `value` is None or a list of dicts."""
    if value is not None and not _dicts(value):
        raise refuse(field, value, f"must be a list of dicts ({what})")


def one_line(error: BaseException) -> str:
    """An exception's message in one line of at most 300 characters, for a UserError; its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."

"""Chat templates: from a list of messages to the text a model was trained on, by the Jinja template of its maker.

Source: the conventions of Hugging Face chat templates (a sandbox, `raise_exception`, `strftime_now`, plain `tojson`,
loop controls, `{% generation %}` blocks). A template comes with the weights: it is code from outside."""

from __future__ import annotations

import datetime
import functools
import json
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from llminfer.errors import UserError, refuse

MAX_TEMPLATE = 1_000_000  # characters of a template
MAX_PROMPT = 1 << 24  # characters a template may write, and the largest string it may build by repetition


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
    """`{% generation %}...{% endgeneration %}`, by which training templates mark the assistant's words: the body only."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


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


def check_messages(messages: object) -> None:
    """Raises UserError unless `messages` is a non-empty list of dicts with str "role" and "content"."""
    if not isinstance(messages, list) or not messages:
        raise refuse("messages", messages, 'must be a list, not empty, of {"role": str, "content": str}')
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise refuse(f"messages[{number}]", message, 'must be a dict {"role": str, "content": str}')
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise refuse(f"messages[{number}][{field!r}]", message.get(field), "must be a str")


def one_line(error: BaseException) -> str:
    """An exception's message in one line of at most 300 characters, for a UserError; its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."

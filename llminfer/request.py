"""What a user asks for and gets, and the state of a sequence in flight. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from llminfer.errors import UserError, refuse, require_integer

# Static sizes on the device: end tokens of a request, entries of logit_bias, and most likely tokens that logprobs can tell of.
MAX_STOPS, MAX_BIAS, MAX_LOGPROBS = 16, 256, 20

# What logprobs tell of one position: token id -> log-probability, the chosen token first.
Logprobs = dict[int, float]


@dataclass(frozen=True)
class SamplingParams:
    """How to generate. A parameter that cannot be honoured is refused by name.

    max_tokens, min_tokens: most output tokens; and how many must come before an end token can be drawn or a stop string counts.
    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. seed: any int64; without one a fresh one is drawn and reported
    in the output. n: independent samples of one prompt.
    stop: strings that end the text (not included in it); stop_token_ids end it too, beside the model's own end tokens unless
    ignore_eos.
    logit_bias: token id -> what is added to its logit, at most 256 ids. Then, in this order: repetition_penalty r > 0: logits of
    the tokens of prompt and output are divided by r where positive, multiplied where not; frequency_penalty f: - f x times in the
    output; presence_penalty p: - p if it is in the output at all.
    logprobs, prompt_logprobs: for each output token (and prompt token after the first) its log-probability and those of the
    0 to 20 most likely ones, by the log_softmax of the model's raw logits: before bias, penalties, temperature and thresholds.
    cache_salt: prompts share cached pages only within one salt. priority: lower is served first. deadline_s: seconds from
    submission after which the request ends with "abort" and what it has."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: str | tuple[str, ...] | list[str] | None = None
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    cache_salt: str = ""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        if any(not isinstance(s, str) or not s for s in stop):
            raise refuse("stop", stop, "must be non-empty strings")
        if isinstance(self.stop_token_ids, (str, int)) or any(not _is_int(t) or t < 0 for t in self.stop_token_ids):
            raise refuse("stop_token_ids", self.stop_token_ids, "must be a list of token ids >= 0")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        require_integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        require_integer("top_k", self.top_k, 0, 2**31 - 1)
        require_integer("n", self.n, 1, 1024)
        require_integer("priority", self.priority, -(2**31), 2**31 - 1)
        if self.deadline_s is not None:
            _number("deadline_s", self.deadline_s, 0.0, 1e9)
        if self.seed is not None:
            require_integer("seed", self.seed, -(2**63), 2**63 - 1)
        _number("temperature", self.temperature, 0.0, 1000.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        for name, legal in (("ignore_eos", bool), ("cache_salt", str)):
            if not isinstance(getattr(self, name), legal):
                raise refuse(name, getattr(self, name), f"must be a {legal.__name__}")
        self._check_adjustments()
        require_integer("priority", self.priority, -(2**31), 2**31 - 1)
        if self.deadline_s is not None:
            _number("deadline_s", self.deadline_s, 0.0, 1e9, above=True)

    def _check_adjustments(self) -> None:
        """What changes the logits, and what is told of them."""
        _number("repetition_penalty", self.repetition_penalty, 0.0, 1e6, above=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        require_integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.min_tokens > self.max_tokens:
            raise refuse("min_tokens", self.min_tokens, f"must be at most max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(self.stop or ())

    @property
    def penalises(self) -> bool:
        """Whether what is drawn depends on the tokens before, beside the model."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is wanted, and nothing else."""
        return not (self.temperature or self.penalises or self.logit_bias or self.min_tokens or self.logprobs is not None)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> SamplingParams:
        """Builds from names; an unknown one lists the known ones. Raises UserError."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise UserError(f"{name}: not a sampling parameter; legal: {', '.join(known)}")
        return cls(**fields)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    """above: `low` itself is not legal."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (above and value == low):
        raise refuse(
            name, value, f"must be a number above {low:g} and at most {high:g}" if above else f"must be a number from {low:g} to {high:g}"
        )


def _bias(given: Any) -> dict[int, float] | None:
    """logit_bias, checked; ids may be strings of digits, as JSON has them."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise refuse("logit_bias", given, "must be a dict of token id -> number")
    if len(given) > MAX_BIAS:
        raise refuse("logit_bias", f"{len(given)} entries", f"must have at most {MAX_BIAS}")
    found: dict[int, float] = {}
    for key, value in given.items():
        token: Any = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20 else key
        if not _is_int(token) or token < 0 or token in found:
            raise refuse("logit_bias", key, "its keys must be token ids >= 0, each once")
        _number(f"logit_bias[{token}]", value, -1e9, 1e9)
        found[token] = float(value)
    return found


class FinishReason(StrEnum):
    """Why a sequence ended: an end token or stop string, its length, the caller, or logits that were not numbers."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass
class Metrics:
    """Times in seconds. ttft_s: from submission to the first token; tokens_per_s: over the tokens after the first;
    cached_tokens: prompt tokens whose keys and values were found in the cache."""

    ttft_s: float | None = None
    tokens_per_s: float | None = None
    e2e_s: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0


@dataclass
class Completion:
    """One sample. token_ids include the end token; text does not, nor a stop string. logprobs: one for each of token_ids."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    seed: int
    metrics: Metrics
    logprobs: list[Logprobs] | None = None


@dataclass
class RequestOutput:
    """All samples of one request; text, token_ids and so on are those of the first. prompt_logprobs: one for each token of the
    prompt; None for the first, which nothing foretells."""

    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[Logprobs | None] | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> list[Logprobs] | None:
        return self.outputs[0].logprobs

    @property
    def metrics(self) -> Metrics:
        return self.outputs[0].metrics


@dataclass
class Request:
    """A checked request, before any sampling index. limit: tokens it may generate, by max_tokens and the context;
    end_ids: tokens that end it; arrived: when, in seconds of a monotonic clock; regime: what else than its tokens its keys
    depend on (rotary frequencies by length): cached pages are shared within one regime only."""

    prompt: list[int]
    params: SamplingParams
    seed: int
    limit: int
    end_ids: frozenset[int]
    arrived: float
    regime: str = ""
    prompt_logprobs: list[Logprobs | None] | None = None


@dataclass(eq=False)
class Sequence:
    """One sample in flight. pending: output tokens that steps under way draw, unread; computed: leading tokens whose keys and values
    are in the cache after those steps; elsewhere: how many leading tokens another engine has computed, for this one to get when it has
    room. pages[g]: physical page of each logical page of group g, -1 where a window has left it
    behind. hashes: digest of each full page; findable: how many of those pages the prefix cache knows."""

    request: Request
    index: int
    key: Any
    output: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)  # of output, where params ask
    pending: int = 0
    computed: int = 0
    elsewhere: int = 0
    slot: int = -1
    pages: list[list[int]] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    findable: int = 0
    first_on: int = 0  # the device of its first page, where those of a sequence are dealt out to several
    finish: FinishReason | None = None
    stream: Any = None  # a TextStream
    printed: int = 0  # tokens that have gone into it
    cached: int = 0
    preemptions: int = 0
    order: int = 0  # of arrival
    overtaken: int = 0  # how many later arrivals were admitted before it
    first_time: float | None = None
    last_time: float | None = None

    @property
    def tokens(self) -> list[int]:
        return self.request.prompt + self.output

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.output) + self.pending

    def slice(self, start: int, end: int) -> list[int]:
        """Tokens start .. end-1 as far as they are known, without building the whole list."""
        prompt = self.request.prompt
        if start >= len(prompt):
            return self.output[start - len(prompt) : end - len(prompt)]
        return prompt[start:end] + self.output[: max(0, end - len(prompt))]

    @property
    def remaining(self) -> int:
        return self.request.limit - len(self.output) - self.pending

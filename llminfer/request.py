"""What a user asks for and gets, and the state of a sequence in flight. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from llminfer.errors import UserError, refuse, require_integer

# Parameters of the design that this version refuses by name unless they are left at these values.
_LATER: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
}
MAX_STOPS = 16


@dataclass(frozen=True)
class SamplingParams:
    """How to generate. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. stop: strings that end the text
    (not included in it); stop_token_ids end it too, beside the model's own end tokens unless ignore_eos. seed: any int64;
    without one a fresh one is drawn and reported in the output. n: independent samples of one prompt. cache_salt:
    prompts share cached pages only within one salt. priority: lower is served first. deadline_s: seconds from submission
    after which the request ends with "abort" and what it has. A parameter that cannot be honoured is refused by name."""

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
        _number("top_p", self.top_p, 0.0, 1.0)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise refuse("top_p", self.top_p, "must be above 0 and at most 1")
        for name, legal in (("ignore_eos", bool), ("cache_salt", str)):
            if not isinstance(getattr(self, name), legal):
                raise refuse(name, getattr(self, name), f"must be a {legal.__name__}")
        for name, default in _LATER.items():
            if getattr(self, name) != default:
                raise refuse(name, getattr(self, name), f"not supported in this version; legal: {default}")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(self.stop or ())

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


def _number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not low <= value <= high:
        raise refuse(name, value, f"must be a number from {low:g} to {high:g}")


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
    """One sample. token_ids include the end token; text does not, nor a stop string."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    seed: int
    metrics: Metrics
    logprobs: None = None


@dataclass
class RequestOutput:
    """All samples of one request; text, token_ids and so on are those of the first."""

    prompt_token_ids: list[int]
    outputs: list[Completion]

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
    def logprobs(self) -> None:
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


@dataclass(eq=False)
class Sequence:
    """One sample in flight. computed: leading tokens whose keys and values are in the cache. pages[g]: physical page of
    each logical page of group g, -1 where a window has left it behind. hashes: digest of each full page; findable: how
    many of those pages the prefix cache knows."""

    request: Request
    index: int
    key: Any
    output: list[int] = field(default_factory=list)
    computed: int = 0
    slot: int = -1
    pages: list[list[int]] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    findable: int = 0
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
        return len(self.request.prompt) + len(self.output)

    def slice(self, start: int, end: int) -> list[int]:
        """Tokens start .. end-1, without building the whole list."""
        prompt = self.request.prompt
        if start >= len(prompt):
            return self.output[start - len(prompt) : end - len(prompt)]
        return prompt[start:end] + self.output[: max(0, end - len(prompt))]

    @property
    def remaining(self) -> int:
        return self.request.limit - len(self.output)

"""Several engines behind one queue, each on devices of its own: the mesh axis dp. What it is asked is what an Engine is asked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from llminfer.engine import Engine
from llminfer.programs import Program
from llminfer.request import SamplingParams, Sequence


class Replicas:
    """A request goes to the engine that has a free slot, then to the one that has most of its prompt in the cache, then to the one with
    the fewest sequences; all of its samples go to one. Its tokens are those that any engine would draw."""

    def __init__(self, engines: list[Engine]):
        self.engines = engines
        self.context, self.declared, self.c = engines[0].context, engines[0].declared, engines[0].c
        self.programs = _Programs(engines)
        self._home: dict[Sequence, Engine] = {}  # of sequences that have not ended

    def warm_up(self, expect: tuple[int, int] | None = None) -> None:
        for engine in self.engines:
            engine.warm_up(expect)

    def load(self, leaves: Iterable[tuple[str, Any]] | None) -> None:
        """Reads the weights once: the other engines get theirs from the first one's devices."""
        first, *others = self.engines
        first.load(leaves)
        for engine in others:
            engine.load_from(first)

    def check(self, prompt: Iterable[int], params: SamplingParams) -> list[int]:
        return self.engines[0].check(prompt, params)

    def add(self, prompt: list[int], params: SamplingParams, tokenizer: Any = None) -> list[Sequence]:
        engine = self._best(prompt, params)
        made = engine.add(prompt, params, tokenizer)
        self._home |= dict.fromkeys(made, engine)
        return made

    def _best(self, prompt: list[int], params: SamplingParams) -> Engine:
        def cost(engine: Engine) -> tuple[int, int, int]:
            load = engine.queued + len(engine.scheduler.running)
            return max(0, load + params.n - engine.settings.slots), -engine.found(prompt, params), load

        return min(self.engines, key=cost)

    def abort(self, seq: Sequence) -> None:
        if (engine := self._home.pop(seq, None)) is not None:
            engine.abort(seq)

    @property
    def queued(self) -> int:
        return sum(engine.queued for engine in self.engines)

    @property
    def busy(self) -> bool:
        return any(engine.busy for engine in self.engines)

    def step(self, *, watched: bool = False) -> list[Sequence]:
        """A step of each engine that has work. An engine sends one before it reads the one before, so the devices of all are at work."""
        return self._told(seq for engine in self.engines if engine.busy for seq in engine.step(watched=watched))

    def settle(self) -> list[Sequence]:
        return self._told(seq for engine in self.engines for seq in engine.settle())

    def _told(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        touched = list(sequences)
        for seq in touched:
            if seq.finish is not None:
                self._home.pop(seq, None)
        return touched

    def prompt_logits(self, prompt: list[int]) -> np.ndarray:
        return self.engines[0].prompt_logits(prompt)

    def token_logprobs(self, prompt: list[int]) -> tuple[np.ndarray, np.ndarray]:
        return self.engines[0].token_logprobs(prompt)

    def end_profile(self) -> None:
        """Only the first engine profiles: a process has one profile at a time."""
        self.engines[0].end_profile()

    def stats(self) -> dict[str, Any]:
        """Of all engines together: what counts is added up; compile times are the longest, accepted_per_step the mean."""
        each = [engine.stats() for engine in self.engines]
        total = _sum(each)
        total["programs"] = {name: max(one["programs"].get(name, 0.0) for one in each) for name in total["programs"]}
        total["compile_s"] = max(one["compile_s"] for one in each)
        return total | {"accepted_per_step": total["accepted_per_step"] / len(each)}


def _sum(each: list[Any]) -> Any:
    """Numbers added up, in dicts by their keys."""
    if not isinstance(each[0], dict):
        return sum(each)
    return {key: _sum([one[key] for one in each if key in one]) for key in dict.fromkeys(key for one in each for key in one)}


class _Programs:
    """The programs of all engines."""

    def __init__(self, engines: list[Engine]):
        self._each = [engine.programs for engine in engines]

    def want(self, programs: list[Program]) -> None:
        for one in self._each:
            one.want(programs)

    def wait_first(self) -> None:
        for one in self._each:
            one.wait_first()

    def wait_all(self) -> None:
        for one in self._each:
            one.wait_all()

    def close(self) -> None:
        for one in self._each:
            one.close()

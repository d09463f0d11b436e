"""The library's front: LLM. Text in, text out, over one Engine."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from llminfer.config import EngineConfig
from llminfer.errors import UserError, as_user_error, refuse
from llminfer.metrics import exposition
from llminfer.request import Completion, Metrics, RequestOutput, SamplingParams, Sequence
from llminfer.weights import open_model
from llminfer.weights.store import cache_root

Prompt = str | list[int]
Expect = Callable[["LLM"], tuple[int, int]]


class LLM:
    """A model that is loaded and ready. `model`: "demo", a directory, a .gguf file or "config:NAME"; the keywords are the
    fields of EngineConfig. Programs are compiled in the background, once. expect: a function of this LLM, as soon as its
    tokenizer is there, to (prompt tokens, sequences at once): then only the programs for those are compiled ahead.
    Raises UserError (a ValueError) for what cannot be honoured, before anything is allocated."""

    def __init__(self, model: str = "demo", *, expect: Expect | None = None, progress: Any = None, **settings: Any):
        started = time.perf_counter()
        self.settings = EngineConfig.from_settings(settings)
        from sharding.mesh import parse_mesh

        self._axes, self._prefill_axes = (as_user_error(parse_mesh, getattr(self.settings, f), f) for f in ("mesh", "prefill_mesh"))
        if self._prefill_axes and {"dp", "pp", "sp"} & {*self._axes, *self._prefill_axes}:
            reason = "it and mesh must have no dp, pp or sp; legal: '' or axes such as 'ep=2,tp=2'"
            raise refuse("prefill_mesh", self.settings.prefill_mesh, reason)
        self.checkpoint = open_model(model, self.settings.cache_dir, progress)
        self.config = self.checkpoint.config
        # Reading the weights and the tokenizer needs no jax: it goes on while jax is imported and programs are compiled.
        with concurrent.futures.ThreadPoolExecutor(max_workers=2, thread_name_prefix="load") as pool:
            tokenizing = pool.submit(self.checkpoint.tokenizer)
            self._build(progress)
            self.tokenizer = tokenizing.result()
            self.engine.warm_up(expect(self) if expect else None)
            self.engine.load(None if self.checkpoint.random else self.checkpoint.leaves(progress))
        self.load_s = time.perf_counter() - started

    def _build(self, progress: Any) -> None:
        from llminfer.disaggregated import Disaggregated
        from llminfer.engine import Engine
        from llminfer.programs import keep_compiled
        from llminfer.replicas import Replicas
        from llminfer.target import Target, chip_of, devices
        from sharding.mesh import make_meshes

        keep_compiled(cache_root(self.settings.cache_dir) / "xla")
        s, engines = self.settings, []
        meshes = as_user_error(make_meshes, self._axes, devices())
        if self._prefill_axes:  # on the devices behind
            used = 1 if meshes[0][0] is None else meshes[0][0].size
            meshes = [*as_user_error(make_meshes, self._prefill_axes, devices()[used:]), *meshes]
        for mesh, device in meshes:
            where: Any = dict(chip=chip_of(device), mesh=mesh, device=device)
            target = Target.of(device.platform, layout=s.layout, dtype=s.dtype, debug=s.debug, **where)
            # A process has one profile at a time.
            engines.append(Engine(self.config, replace(s, profile=None) if engines else s, target, progress))
        self.target = engines[0].target
        self.engine: Any = engines[0] if len(engines) == 1 else Replicas(engines)
        if self._prefill_axes:
            again = lambda: None if self.checkpoint.random else self.checkpoint.leaves(progress)
            self.engine = Disaggregated(engines[0], engines[1], again)

    # Prompts ----------------------------------------------------------------------------------------------------

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: a str is completed as it is, with the special tokens that the tokenizer adds."""
        if isinstance(prompt, str):
            return self._tokenizer("a text prompt").encode(prompt)
        if not isinstance(prompt, list):
            raise refuse("prompt", prompt, "must be a str or a list of token ids")
        return prompt

    def chat_prompt(self, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
        """Token ids of a conversation in the model's chat template, ready for the model's turn. variables: see
        Tokenizer.apply_chat: tools, documents, continue_final_message, chat_template, and the template's own."""
        tokenizer = self._tokenizer("chat")
        return tokenizer.encode(tokenizer.apply_chat(messages, **variables), add_special=False)

    def user_turn(self, text: str, *, raw: bool = False) -> list[int]:
        """Token ids of one user turn in the chat template; of the text as it is when raw, or where the model has no template."""
        if raw or self.tokenizer is None or self.tokenizer.chat_template is None:
            return self.encode(text)
        return self.chat_prompt([{"role": "user", "content": text}])

    def _tokenizer(self, what: str) -> Any:
        if self.tokenizer is None:
            where = self.checkpoint.directory
            missing = f"{where / 'tokenizer.json'} (or tokenizer.model) is missing" if where else f"{self.checkpoint.source} has none"
            raise UserError(f"{what} needs a tokenizer: {missing}; token ids work without")
        return self.tokenizer

    # Generation -------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | list[Prompt], params: SamplingParams | list[SamplingParams] | None = None, *, progress: Any = None
    ) -> list[RequestOutput]:
        """Completes one or many prompts; outputs in the order of the prompts."""
        single = isinstance(prompts, str) or (isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], int))
        todo: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item,arg-type]
        requests = [self.submit(*pair) for pair in self.checked(todo, params)]
        task = progress.task("generate", sum(len(r) for r in requests)) if progress else None
        try:
            while self.engine.busy:
                done = [seq for seq in self.engine.step() if seq.finish is not None]
                if task:
                    task.advance(len(done))
        except BaseException:
            self._abandon(requests)
            raise
        return [self.output(sequences) for sequences in requests]

    def chat(
        self, messages: list[dict[str, Any]] | list[list[dict[str, Any]]], params: SamplingParams | None = None, **variables: Any
    ) -> list[RequestOutput]:
        """Answers one conversation, or many: each a list of {"role", "content"} messages. variables: see chat_prompt."""
        many = bool(messages) and isinstance(messages[0], list)
        talks: Any = messages if many else [messages]
        return self.generate([self.chat_prompt(talk, **variables) for talk in talks], params)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Yields the text of one completion piece by piece, never half a character."""
        ((ids, chosen),) = self.checked([prompt], params)
        for sequence in self.follow(self.submit(ids, chosen)[:1]):
            yield sequence[1]

    def follow(self, sequences: list[Sequence]) -> Iterator[tuple[Sequence, str]]:
        """Runs the engine until the sequences end, yielding each piece of their text as soon as it is certain."""
        shown = dict.fromkeys(map(id, sequences), 0)
        open_ones = list(sequences)
        try:
            while open_ones:
                self.engine.step(watched=True)
                for seq in list(open_ones):
                    new = seq.stream.text[shown[id(seq)] : seq.stream.shown]
                    shown[id(seq)] += len(new)
                    if new:
                        yield seq, new
                    if seq.finish is not None:
                        open_ones.remove(seq)
        finally:
            self._abandon([open_ones])

    def submit(self, ids: list[int], params: SamplingParams) -> list[Sequence]:
        """Queues one checked prompt; the engine's steps advance it."""
        return self.engine.add(ids, params, self.tokenizer)

    def checked(self, prompts: list[Prompt], params: Any) -> list[tuple[list[int], SamplingParams]]:
        """All prompts and parameters, checked before the first is queued."""
        chosen = params if isinstance(params, list) else [params or SamplingParams()] * len(prompts)
        if len(chosen) != len(prompts):
            raise refuse("params", f"{len(chosen)} entries", f"must be one SamplingParams, or one for each of {len(prompts)} prompts")
        checked = []
        for prompt, each in zip(prompts, chosen, strict=True):
            if not isinstance(each, SamplingParams):
                raise refuse("params", each, "must be SamplingParams")
            if each.stop and self.tokenizer is None:
                self._tokenizer("stop")
            checked.append((self.engine.check(self.encode(prompt), each), each))
        return checked

    def _abandon(self, requests: Iterable[list[Sequence]]) -> None:
        for sequences in requests:
            for seq in sequences:
                self.engine.abort(seq)

    @staticmethod
    def output(sequences: list[Sequence]) -> RequestOutput:
        """The result of one request from its sequences."""
        request = sequences[0].request
        return RequestOutput(request.prompt, [_completion(seq) for seq in sequences], request.prompt_logprobs)

    def prompt_logits(self, token_ids: list[int]):
        """float32 [len, vocab]: the logits after every token of a prompt, computed through the paged cache in chunks."""
        return self.engine.prompt_logits(self.engine.check(token_ids, SamplingParams(max_tokens=1)))

    def rebalance(self) -> None:
        """With expert_copies: gives them to the experts that most tokens came to since the start or the last time (see stats:
        expert_imbalance), at any time between two steps. Raises UserError without."""
        self.engine.rebalance()

    def stats(self) -> dict[str, Any]:
        """Counters of the engine since it started."""
        return self.engine.stats() | {"load_s": self.load_s}

    def prometheus(self) -> str:
        """The counters of `stats` in the text format that Prometheus reads."""
        return exposition(self.stats())

    def close(self) -> None:
        """Ends the background threads, and writes the profile if there is one."""
        self.engine.end_profile()
        self.engine.programs.close()


def _completion(seq: Sequence) -> Completion:
    request, tokens = seq.request, len(seq.output)
    metrics = Metrics(prompt_tokens=len(request.prompt), completion_tokens=tokens, cached_tokens=seq.cached, preemptions=seq.preemptions)
    if seq.first_time is not None and seq.last_time is not None:
        metrics.ttft_s = seq.first_time - request.arrived
        metrics.e2e_s = seq.last_time - request.arrived
        if tokens > 1 and seq.last_time > seq.first_time:
            metrics.tokens_per_s = (tokens - 1) / (seq.last_time - seq.first_time)
    reason = seq.finish.value if seq.finish else None
    logprobs = None if request.params.logprobs is None else seq.logprobs[:tokens]
    return Completion(seq.index, seq.stream.text, list(seq.output), reason, request.seed, metrics, logprobs)

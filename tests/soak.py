"""Whether a request's tokens depend on anything but itself, and whether an engine leaks: many requests under every policy.

    python tests/soak.py --model demo --requests 64 --soak 2000
    python tests/soak.py --model families --requests 64   # the tiny model of every family in tests/goldens; families:NAME one

Serves the same requests (greedy and drawn, with penalties and biases, some with common prefixes) alone, all at once, with other
chunks and pages, without the prefix cache, from a pool so small that sequences are preempted, and after random aborts; compares
tokens with those of each request alone. Then a soak: requests that come, go, are aborted or are bad, one after the other; pages must
be back at the end and memory flat. One JSON line a configuration. A difference is a bug, but for a tie between two tokens that sums of
float32 in another order decide (at most 1 request of 200).
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from llminfer import LLM, SamplingParams, UserError

# Fields of the engine that must not change a token; the small pool makes sequences of the longest sizes take turns.
POLICIES: dict[str, dict[str, Any]] = {
    "together": {},
    "chunk 32": {"chunk": 32},
    "chunk 64, page 64": {"chunk": 64, "page_size": 64},
    "no prefix cache": {"prefix_cache": False},
    "one step at a time": {"decode_steps": 1},
    "small pool": {},
    "every one preempted": {"decode_steps": 1},
    "after aborts": {},
}
BASE = {"slots": 8, "context": 512, "chunk": 128, "dtype": "float32"}


def requests_of(count: int, vocab_size: int, seed: int = 0, context: int = 512) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 0.4 x context tokens, a third of them behind one of two common prefixes, and parameters of every kind."""
    draw = random.Random(seed)
    ids = lambda n: [draw.randrange(vocab_size) for _ in range(n)]
    common = [ids(context // 5), ids(context // 8)]
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 20, "repetition_penalty": 1.2},
        {"temperature": 0.7, "min_p": 0.05, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"logit_bias": {7: 2.0, 11: -100.0}, "min_tokens": 5},
    ]
    made = []
    for i in range(count):
        prompt = ids(draw.randrange(1, context * 2 // 5)) if i % 3 else common[i % 2] + ids(draw.randrange(1, 20))
        made.append((prompt, SamplingParams(max_tokens=draw.randrange(5, context // 8), seed=i, **kinds[i % len(kinds)])))
    return made


def serve(llm: LLM, work: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    return [out.token_ids for out in llm.generate([prompt for prompt, _ in work], [params for _, params in work])]


def serve_preempting(llm: LLM, work: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    """As `serve`; and each request loses its pages once, after its first tokens."""
    engine = llm.engine
    requests = [llm.submit(engine.check(prompt, params), params) for prompt, params in work]
    while engine.busy:
        engine.step()
        engine.settle()  # what is under way cannot be taken back
        for seq in [seq for seq in engine.scheduler.running if seq.output and not seq.preemptions]:
            engine.scheduler._preempt(seq)
    return [llm.output(sequences).token_ids for sequences in requests]


def disturb(llm: LLM, count: int) -> None:
    """Requests that are aborted at a random moment."""
    draw = random.Random(1)
    for prompt, params in requests_of(count, llm.config.vocab_size, seed=9, context=llm.engine.context):
        (sequence,) = llm.submit(llm.engine.check(prompt, params), params)
        for _ in range(draw.randrange(0, 4)):
            llm.engine.step()
        llm.engine.abort(sequence)


def is_tie(llm: LLM, request: tuple[list[int], SamplingParams], one: list[int], other: list[int]) -> bool:
    """Whether two greedy continuations part where both tokens are as likely, to under 1e-3 of the range of the logits."""
    (prompt, params), at = request, next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), -1)
    if at < 0 or params.temperature or params.penalises or params.logit_bias:
        return False
    logits = llm.prompt_logits(prompt + one[:at])[-1]
    return bool(abs(logits[one[at]] - logits[other[at]]) < 1e-3 * (logits.max() - logits.min()))


def compare(model: str, count: int, context: int = 512) -> int:
    """Prints a line a policy; the number of requests whose tokens differ. Policies with the same fields have one engine."""
    base = BASE | {"context": context}
    engines = {"[]": LLM(model, **base)}
    work = requests_of(count, engines["[]"].config.vocab_size, context=context)
    alone = [serve(engines["[]"], [each])[0] for each in work]
    wrong = 0
    for name, changes in POLICIES.items():
        if name == "small pool":
            changes = {"pages": context * 5 // 64}
        key = str(sorted(changes.items()))
        llm = LLM(model, **(base | changes)) if name == "together" or key not in engines else engines[key]
        engines[key], before = llm, llm.stats()["preemptions"]
        if name == "after aborts":
            disturb(llm, min(200, 4 * count))
        start = time.perf_counter()
        found = serve_preempting(llm, work) if name == "every one preempted" else serve(llm, work)
        differ = [i for i, (a, b) in enumerate(zip(alone, found, strict=True)) if a != b]
        ties = [i for i in differ if is_tie(llm, work[i], alone[i], found[i])]
        stats = llm.stats()
        kept = ("preemptions", "prefix_hit_tokens", "compiles_after_warmup")
        leaked = stats["pages_total"] - stats["pages_free"]
        line = {
            "policy": name,
            "requests": count,
            "differ": differ,
            "ties": ties,
            "pages_leaked": leaked,
            **{key: stats[key] for key in kept},
        }
        line["preemptions"] -= before
        print(json.dumps(line | {"seconds": round(time.perf_counter() - start, 1)}), flush=True)
        wrong += len(differ) - (len(ties) if len(ties) <= 1 + count // 200 else 0) + leaked + stats["compiles_after_warmup"]
        long_enough = sum(len(tokens) > 3 for tokens in alone)
        few = int(0 in llm.engine.c.windows)  # where all layers have windows, there are always pages
        wrong += line["preemptions"] < {"small pool": few, "every one preempted": long_enough}.get(name, 0)
    return wrong


def families(count: int, only: str) -> int:
    """`compare` for the tiny model of every family, or one."""
    from goldens.families import MODELS, golden
    from safetensors.numpy import save_file

    wrong = 0
    for name in [only] if only else MODELS:
        config, tensors, *_ = golden(name)
        with tempfile.TemporaryDirectory() as folder:
            save_file(tensors, Path(folder) / "model.safetensors")
            (Path(folder) / "config.json").write_text(json.dumps(config))
            print(json.dumps({"family": name}), flush=True)
            wrong += compare(folder, count, context=128)
    return wrong


def soak(model: str, count: int) -> int:
    """Random arrivals, aborts and bad requests; the number of what went wrong."""
    llm = LLM(model, **(BASE | {"pages": 200}))
    draw, work, under_way, refused, aborted = random.Random(2), requests_of(count, llm.config.vocab_size, seed=3), [], 0, 0
    memory = []
    for number, (prompt, params) in enumerate(work):
        try:
            bad = draw.random() < 0.05
            under_way += llm.submit(llm.engine.check([*prompt, -1] if bad else prompt, params), params)
        except UserError:
            refused += 1
        while llm.engine.queued > 8:
            llm.engine.step()
        if under_way and draw.random() < 0.3:
            aborted += 1
            llm.engine.abort(draw.choice(under_way))
        under_way = [seq for seq in under_way if seq.finish is None]
        if number % 100 == 99:
            gc.collect()
            memory.append(_resident())
    while llm.engine.busy:
        llm.engine.step()
    stats = llm.stats()
    grown = memory[-1] - memory[len(memory) // 2] if len(memory) > 1 else 0
    line = {"soak": count, "refused": refused, "aborted": aborted, "pages_leaked": stats["pages_total"] - stats["pages_free"]}
    line |= {"preemptions": stats["preemptions"], "compiles_after_warmup": stats["compiles_after_warmup"]}
    print(json.dumps(line | {"mb_grown_in_the_second_half": round(grown / 2**20, 1)}), flush=True)
    return line["pages_leaked"] + line["compiles_after_warmup"] + int(grown > 50 * 2**20)


def _resident() -> int:
    """Bytes of memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="config:tiny")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--soak", type=int, default=0, help="requests of the soak (default: none)")
    options = parser.parse_args()
    kind, _, only = options.model.partition(":")
    wrong = families(options.requests, only) if kind == "families" else compare(options.model, options.requests)
    wrong += soak(options.model, options.soak) if options.soak else 0
    print("nothing went wrong" if not wrong else f"{wrong} things went wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

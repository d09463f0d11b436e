"""python -m llminfer.run: text from a model, in one line, as a conversation, or for a file of prompts."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from llminfer import cli
from llminfer.errors import UserError, refuse
from llminfer.request import SamplingParams
from llminfer.run_batch import BatchFile, open_batch

DEFAULT_PROMPT = "Why is the sky blue?"


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    params = _params(options)
    if options.batch and not options.out:
        raise refuse("--out", options.out, "--batch needs a file to write to")
    work = open_batch(options.batch, options.out, params, raw=options.raw) if options.batch else None
    if options.prompt == "" and not options.chat and not options.batch:
        raise refuse("--prompt", "", "must not be empty")
    if work is not None:
        return _batch(work, options)
    if options.chat:
        return _chat(cli.load(options), params)
    return _once(params, options)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = cli.parser("run", "Generate text.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", default=None, help="one user turn (or, with --raw, a text to complete)")
    what.add_argument("--chat", action="store_true", help="talk with the model; an empty line or Ctrl-D ends")
    what.add_argument(
        "--batch", metavar="IN.jsonl", help="one JSON object a line: prompt (str or ids) or messages, and sampling parameters"
    )
    parser.add_argument("--out", metavar="OUT.jsonl", help="where --batch writes its results")
    parser.add_argument("--raw", action="store_true", help="complete the text as it is, without the chat template")
    parser.add_argument("--max-tokens", default="128", help="most new tokens (default: 128)")
    for name in ("temperature", "top-p", "min-p", "repetition-penalty"):
        parser.add_argument(f"--{name}", type=float, default=None)
    parser.add_argument("--top-k", type=int, default=None)
    parser.add_argument("--speculate", default=None, help="how to draft tokens for speculative decoding")
    return parser.parse_args(arguments)


def _params(options: argparse.Namespace) -> SamplingParams:
    fields: dict[str, Any] = {"max_tokens": cli.positive(options.max_tokens, "--max-tokens")}
    for name in ("temperature", "top_p", "min_p", "top_k", "repetition_penalty", "seed"):
        if getattr(options, name) is not None:
            fields[name] = getattr(options, name)
    return SamplingParams(**fields)


def _batch(work: BatchFile, options: argparse.Namespace) -> int:
    from llminfer.progress import RichProgress

    started = time.perf_counter()
    llm = cli.load(options) if work.todo else None
    ready = time.perf_counter()
    if llm is not None:
        with RichProgress() as progress:
            work.run(llm, progress)
    seconds = time.perf_counter() - ready
    found = work.summary() | {"seconds": seconds, "load_s": ready - started, "tokens_per_s": work.tokens / seconds if work.tokens else None}
    if options.json:
        cli.print_json(found | (llm.stats() if llm else {}))
    else:
        rate = f" ({found['tokens_per_s']:.1f}/s)" if work.tokens else ""
        before = f", {found['resumed']} of them done before" if found["resumed"] else ""
        counts = f"{found['requests']} requests{before}, {found['failed']} refused"
        print(f"{counts}, {work.tokens} new tokens in {seconds:.1f} s{rate}", file=sys.stderr)
    return 0


# One prompt -----------------------------------------------------------------------------------------------------


def _once(params: SamplingParams, options: argparse.Namespace) -> int:
    prompt = DEFAULT_PROMPT if options.prompt is None else options.prompt

    def expect(llm: Any) -> tuple[int, int]:
        """Refuses what cannot be served before the weights are there."""
        return len(llm.engine.check(_ids(llm, prompt, raw=options.raw), params)), 1

    llm = cli.load(options, expect)
    sequence = _submit(llm, _ids(llm, prompt, raw=options.raw), params)
    for _, piece in llm.follow([sequence]):
        if not options.json:
            print(piece, end="", flush=True)
    output = llm.output([sequence])
    if options.json:
        cli.print_json(_report(llm, output))
    else:
        if llm.tokenizer is None:
            print(*output.token_ids, end="")
        print(flush=True)
        _closing_line(_report(llm, output))
    return 1 if output.finish_reason == "error" else 0


def _ids(llm: Any, prompt: str, *, raw: bool) -> list[int]:
    if llm.tokenizer is None and prompt == DEFAULT_PROMPT:
        return [1 % llm.config.vocab_size]  # a model of random weights has nothing to say: any start will do
    return llm.user_turn(prompt, raw=raw)


def _submit(llm: Any, ids: list[int], params: SamplingParams) -> Any:
    return llm.submit(llm.engine.check(ids, params), params)[0]


def _report(llm: Any, output: Any) -> dict[str, Any]:
    stats, metrics = llm.stats(), output.metrics
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "prompt_tokens": metrics.prompt_tokens,
        "completion_tokens": metrics.completion_tokens,
        "ttft_s": metrics.ttft_s,
        "prefill_tokens_per_s": _rate(stats["prefill_tokens"], stats["prefill_s"]),
        "decode_tokens_per_s": _rate(stats["decode_tokens"], stats["decode_s"]),
        "compile_s": stats["compile_s"],
        "load_s": stats["load_s"],
        "weights_bytes": stats["weights_bytes"],
        "cache_bytes": stats["cache_bytes"],
        "seed": output.outputs[0].seed,
        "compiles_after_warmup": stats["compiles_after_warmup"],
    }


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if seconds and tokens else None


def _closing_line(report: dict[str, Any]) -> None:
    def rate(name: str) -> str:
        return "-" if report[name] is None else f"{report[name]:.1f}"

    print(
        f"prompt {report['prompt_tokens']} tokens at {rate('prefill_tokens_per_s')}/s, "
        f"{report['completion_tokens']} new at {rate('decode_tokens_per_s')}/s, "
        f"first token {report['ttft_s']:.2f} s, loaded {report['load_s']:.1f} s, compiled {report['compile_s']:.1f} s, "
        f"weights {report['weights_bytes'] / 1e6:.0f} MB, cache {report['cache_bytes'] / 1e6:.0f} MB",
        file=sys.stderr,
    )


# A conversation -------------------------------------------------------------------------------------------------


def _chat(llm: Any, params: SamplingParams) -> int:
    llm.chat_prompt([{"role": "user", "content": ""}])  # refuses a model that cannot chat
    messages: list[dict[str, str]] = []
    while True:
        try:
            said = input("you: ")
        except EOFError:
            print()
            return 0
        if not said.strip():
            return 0
        try:
            messages.append({"role": "user", "content": said})
            sequence = _submit(llm, llm.chat_prompt(messages), params)
        except UserError as error:
            messages.pop()
            print(f"error: {error}", file=sys.stderr)
            continue
        for _, piece in llm.follow([sequence]):
            print(piece, end="", flush=True)
        print(flush=True)
        messages.append({"role": "assistant", "content": llm.output([sequence]).text})


if __name__ == "__main__":
    cli.leave(cli.main(main))

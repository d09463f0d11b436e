"""python -m llminfer.run: text from a model, in one line, as a conversation, or for a file of prompts."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from llminfer import cli
from llminfer.errors import UserError, refuse
from llminfer.request import SamplingParams

DEFAULT_PROMPT = "Why is the sky blue?"


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    params = _params(options)
    if options.batch and not options.out:
        raise refuse("--out", options.out, "--batch needs a file to write to")
    lines = _read_batch(options.batch) if options.batch else None
    if options.prompt == "" and not options.chat and not options.batch:
        raise refuse("--prompt", "", "must not be empty")
    if lines is not None:
        return _batch(cli.load(options), lines, params, options)
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
    for name in ("temperature", "top-p", "min-p"):
        parser.add_argument(f"--{name}", type=float, default=None)
    parser.add_argument("--top-k", type=int, default=None)
    parser.add_argument("--speculate", default=None, help="how to draft tokens for speculative decoding")
    return parser.parse_args(arguments)


def _params(options: argparse.Namespace) -> SamplingParams:
    fields: dict[str, Any] = {"max_tokens": cli.positive(options.max_tokens, "--max-tokens")}
    for name in ("temperature", "top_p", "min_p", "top_k", "seed"):
        if getattr(options, name) is not None:
            fields[name] = getattr(options, name)
    return SamplingParams(**fields)


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
    if raw or llm.tokenizer is None or llm.tokenizer.chat_template is None:
        return llm.encode(prompt)
    return llm.chat_prompt([{"role": "user", "content": prompt}])


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


# A file of prompts ----------------------------------------------------------------------------------------------


def _read_batch(path: str) -> list[dict[str, Any]]:
    """The checked lines of a --batch file. Raises UserError that names the line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise refuse("--batch", path, f"cannot be read: {error}") from None
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number}: not JSON: {error}") from None
        if not isinstance(item, dict) or ("prompt" in item) == ("messages" in item):
            raise UserError(f"{path} line {number}: must be an object with either prompt or messages")
        lines.append(item)
    return lines


def _batch(llm: Any, lines: list[dict[str, Any]], params: SamplingParams, options: argparse.Namespace) -> int:
    """Runs all lines through the engine and writes each result, in order of finishing, with its line's index and id.
    A line that cannot be served becomes a result with an error; the others go on."""
    started, tokens, failed = time.perf_counter(), 0, 0
    waiting: dict[int, tuple[int, dict[str, Any], list[Any]]] = {}
    from llminfer.progress import RichProgress

    with Path(options.out).open("w", encoding="utf-8") as out, RichProgress() as progress:

        def write(result: dict[str, Any]) -> None:
            out.write(json.dumps(result, ensure_ascii=False) + "\n")
            out.flush()

        for index, item in enumerate(lines):
            head = {"index": index, **({"id": item["id"]} if "id" in item else {})}
            try:
                sequences = _submit_line(llm, item, params, raw=options.raw)
            except UserError as error:
                failed += 1
                write(head | {"error": str(error)})
                continue
            for seq in sequences:
                waiting[id(seq)] = (index, head, sequences)
        task = progress.task("generate", len(lines) - failed)
        while llm.engine.busy:
            for seq in llm.engine.step():
                _, head, sequences = waiting[id(seq)]
                if seq.finish is not None and all(s.finish is not None for s in sequences):
                    output = llm.output(sequences)
                    tokens += sum(len(o.token_ids) for o in output.outputs)
                    write(head | _result(output))
                    task.advance(1)
    seconds = time.perf_counter() - started
    summary = {"requests": len(lines), "failed": failed, "completion_tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}
    if options.json:
        cli.print_json(summary | llm.stats())
    else:
        print(
            f"{len(lines)} requests, {failed} refused, {tokens} new tokens in {seconds:.1f} s ({tokens / seconds:.1f}/s)", file=sys.stderr
        )
    return 0


def _submit_line(llm: Any, item: dict[str, Any], params: SamplingParams, *, raw: bool) -> list[Any]:
    given = {key: value for key, value in item.items() if key not in ("prompt", "messages", "id")}
    base = {name: getattr(params, name) for name in ("max_tokens", "temperature", "top_p", "min_p", "top_k", "seed")}
    chosen = SamplingParams.from_fields(base | given)
    if "messages" in item:
        ids = llm.chat_prompt(item["messages"])
    else:
        ids = _ids(llm, item["prompt"], raw=raw) if isinstance(item["prompt"], str) else llm.encode(item["prompt"])
    if chosen.stop:
        llm.encode("")  # refuses stop strings where there is no tokenizer
    return llm.submit(llm.engine.check(ids, chosen), chosen)


def _result(output: Any) -> dict[str, Any]:
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "prompt_tokens": output.metrics.prompt_tokens,
        "completion_tokens": output.metrics.completion_tokens,
        "seed": output.outputs[0].seed,
        **({"samples": [o.text for o in output.outputs]} if len(output.outputs) > 1 else {}),
    }


if __name__ == "__main__":
    cli.leave(cli.main(main))

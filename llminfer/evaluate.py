"""python -m llminfer.evaluate: perplexity and next-token accuracy of a model on a text."""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

from llminfer import cli
from llminfer.errors import UserError, refuse

LIBRARY = "stdlib"
LIBRARY_TOKENS = 16384
# No token of the library's text is longer on average, for any tokenizer.
BYTES_A_TOKEN = 8


def main(arguments: list[str]) -> int:
    parser = cli.parser("evaluate", "Measure perplexity and next-token accuracy.")
    parser.add_argument("--text", default=LIBRARY, help="a UTF-8 file, or stdlib: the docstrings of Python's standard library (default)")
    parser.add_argument("--window", help="tokens that are read at once (default: the context, at most 2048)")
    parser.add_argument("--stride", help="tokens between windows; less than the window: it slides (default: the window)")
    parser.add_argument("--max-tokens", help=f"read so many of the text (default: all; {LIBRARY_TOKENS} of stdlib)")
    options = parser.parse_args(arguments)
    window, stride, most = (
        None if value is None else cli.positive(value, name)
        for value, name in ((options.window, "--window"), (options.stride, "--stride"), (options.max_tokens, "--max-tokens"))
    )
    if options.text == LIBRARY and most is None:
        most = LIBRARY_TOKENS
    for name, value in (("--window", window), ("--max-tokens", most)):
        if value == 1:
            raise refuse(name, 1, "must be at least 2: the first token is not foretold")
    if window is not None and stride is not None and stride > window:
        raise refuse("--stride", stride, f"must be from 1 to the window of {window} tokens")
    text = _read(options.text, most)
    options.set = ["slots=1", "prefix_cache=false", *([] if window is None else [f"context={window}"]), *options.set]
    report = _measure(options, text, most, stride)
    if options.json:
        cli.print_json(report)
    else:
        print(
            f"perplexity {report['perplexity']:.4f} over {report['tokens']} tokens (window {report['window']}, stride {report['stride']}), "
            f"{report['bits_per_byte']:.4f} bits a byte, next token right {100 * report['accuracy']:.2f}%, "
            f"{report['seconds']:.1f} s ({report['tokens_per_s']:.0f} tokens/s)"
        )
    return 0


def _read(name: str, most: int | None) -> str:
    from llminfer.compress.evaluate import library_text

    if name == LIBRARY:
        return library_text(None if most is None else most * BYTES_A_TOKEN)
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise refuse("--text", name, f"must be a readable UTF-8 file, or stdlib ({error})") from None


def _measure(options: argparse.Namespace, text: str, most: int | None, stride: int | None) -> dict[str, Any]:
    from llminfer.compress.evaluate import evaluate
    from llminfer.progress import RichProgress

    ids: list[int] = []

    def expect(llm: Any) -> tuple[int, int]:
        """Tokens of the text, before the weights are there; the one program that is needed."""
        ids.extend(llm.encode(text)[:most])
        if len(ids) < 2:
            raise refuse("--text", f"{len(ids)} tokens", "must have at least 2 tokens: the first is not foretold")
        wrong = max(ids)
        if wrong >= llm.config.vocab_size:
            raise refuse("token id", wrong, f"the tokenizer gives ids beyond the model's vocabulary of {llm.config.vocab_size}")
        llm.engine.programs.want([llm.engine.declared.logprobs])
        return 0, 0

    llm = cli.load(options, expect)
    window: int = llm.engine.context
    every = window if stride is None else stride
    started = time.perf_counter()
    with RichProgress() as progress:
        score = evaluate(llm.engine, ids, window, every, progress)
    seconds = time.perf_counter() - started
    size = len(llm.tokenizer.decode(ids, skip_special=False).encode())
    if not math.isfinite(score.perplexity):
        raise UserError(f"evaluate: {score.nats_per_token:.0f} nats a token, which no perplexity can be told of")
    return {
        "model": llm.checkpoint.source,
        "text": options.text,
        **({"python": platform.python_version()} if options.text == LIBRARY else {}),
        "bytes": size,
        "read_tokens": len(ids),
        "tokens": score.tokens,
        "window": window,
        "stride": every,
        "perplexity": score.perplexity,
        "nats_per_token": score.nats_per_token,
        # The bytes of what was scored, as its share of all that was read.
        "bits_per_byte": score.nats_per_token / math.log(2) * len(ids) / max(size, 1),
        "accuracy": score.accuracy,
        "seconds": seconds,
        "tokens_per_s": score.tokens / seconds,
        "dtype": llm.target.dtype,
        "quantize": llm.settings.quantize,
        "platform": llm.target.platform,
        "compiles_after_warmup": llm.stats()["compiles_after_warmup"],
    }


if __name__ == "__main__":
    cli.leave(cli.main(main, sys.argv[1:]))

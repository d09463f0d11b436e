"""python -m llminfer.bench latency: how fast one model answers on this machine, medians over runs."""

from __future__ import annotations

import random
import statistics
import sys
import time
from typing import Any

from llminfer import cli
from llminfer.request import SamplingParams


def main(arguments: list[str]) -> int:
    parser = cli.parser("bench", "Measure speed.")
    parser.add_argument("what", choices=["latency"])
    parser.add_argument("--prompt-tokens", default="512", help="length of the random prompts (default: 512)")
    parser.add_argument("--max-tokens", default="128", help="new tokens of each (default: 128)")
    parser.add_argument("--batch", default="1", help="prompts at once (default: 1)")
    parser.add_argument("--runs", default="5", help="measured runs, after one that is not counted (default: 5)")
    options = parser.parse_args(arguments)
    sizes = {
        name: cli.positive(getattr(options, name), f"--{name.replace('_', '-')}")
        for name in ("prompt_tokens", "max_tokens", "batch", "runs")
    }
    options.set = ["prefix_cache=false", f"slots={max(8, sizes['batch'])}", *options.set]
    llm = cli.load(options, lambda _: (sizes["prompt_tokens"], sizes["batch"]))
    report = latency(llm, sizes["prompt_tokens"], sizes["max_tokens"], sizes["batch"], sizes["runs"])
    report |= {"model": llm.config.name, "platform": llm.target.platform, "dtype": llm.target.dtype, "quantize": llm.settings.quantize}
    if options.json:
        cli.print_json(report)
    else:
        print(
            f"{report['model']} on {report['platform']} ({report['dtype']}), {sizes['batch']} x {sizes['prompt_tokens']} prompt tokens: "
            f"prefill {report['prefill_tokens_per_s']:.1f} tok/s, first token {report['ttft_s'] * 1e3:.0f} ms, "
            f"decode {report['decode_tokens_per_s']:.1f} tok/s ({report['step_ms']:.1f} ms a step), medians of {sizes['runs']}"
        )
    return 0


def latency(llm: Any, prompt_tokens: int, max_tokens: int, batch: int, runs: int) -> dict[str, Any]:
    """Medians over `runs` of: ttft_s (to the last of the first tokens), prefill_tokens_per_s (all prompts over that
    time), decode_tokens_per_s (tokens after the first over the time after it, all sequences), step_ms."""
    draw = random.Random(0)
    rows = [_one_run(llm, prompt_tokens, max_tokens, batch, draw) for _ in range(runs + 1)][1:]
    ttft = statistics.median(row["ttft"] for row in rows)
    step = statistics.median(row["step"] for row in rows)
    return {
        "prompt_tokens": prompt_tokens,
        "max_tokens": max_tokens,
        "batch": batch,
        "runs": runs,
        "ttft_s": ttft,
        "prefill_tokens_per_s": batch * prompt_tokens / ttft,
        "decode_tokens_per_s": batch / step if step else None,
        "step_ms": step * 1e3,
        "all_ttft_s": [row["ttft"] for row in rows],
        "all_step_ms": [row["step"] * 1e3 for row in rows],
        "compiles_after_warmup": llm.stats()["compiles_after_warmup"],
        "weights_bytes": llm.stats()["weights_bytes"],
    }


def _one_run(llm: Any, prompt_tokens: int, max_tokens: int, batch: int, draw: random.Random) -> dict[str, float]:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    prompts = [[draw.randrange(llm.config.vocab_size) for _ in range(prompt_tokens)] for _ in range(batch)]
    start = time.perf_counter()
    sequences = [llm.submit(llm.engine.check(prompt, params), params)[0] for prompt in prompts]
    while any(not seq.output for seq in sequences):
        llm.engine.step()
    first, drawn = time.perf_counter(), sum(len(seq.output) for seq in sequences)
    while llm.engine.busy:
        llm.engine.step()
    end = time.perf_counter()
    rest = sum(len(seq.output) for seq in sequences) - drawn
    return {"ttft": first - start, "step": (end - first) * batch / rest if rest else 0.0}


if __name__ == "__main__":
    cli.leave(cli.main(main, sys.argv[1:]))

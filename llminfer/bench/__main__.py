"""python -m llminfer.bench {latency,throughput,kernels,selfcheck}: what a model, or its kernels, do on this machine."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from llminfer import cli
from llminfer.bench import cases
from llminfer.bench.latency import latency
from llminfer.bench.throughput import replay, report, trace
from llminfer.errors import refuse
from llminfer.progress import RichProgress


def main(arguments: list[str]) -> int:
    parser = cli.parser("bench", "Measure speed.")
    parser.add_argument("what", choices=["latency", "throughput", "kernels", "selfcheck"])
    parser.add_argument("--prompt-tokens", default="512", help="latency: length of the random prompts (default: 512)")
    parser.add_argument("--max-tokens", default="128", help="latency: new tokens of each (default: 128)")
    parser.add_argument("--batch", default="1", help="latency: prompts at once (default: 1)")
    parser.add_argument("--runs", default="5", help="latency: measured runs, after one that is not counted (default: 5)")
    parser.add_argument("--requests", default="64", help="throughput: length of the trace (default: 64)")
    parser.add_argument("--rate", default="inf", help="throughput: arrivals a second (default: inf, all at once)")
    parser.add_argument(
        "--scale",
        default="1.0",
        help="throughput: what the mean lengths, 161 in and 338 out, are multiplied by; cases: batches and lengths",
    )
    parser.add_argument("--cases", default=None, metavar="LETTERS", help="latency, throughput: fixed work, from a to e, such as abc")
    parser.add_argument("--beside", default=None, metavar="FILE", help="cases: a peer's figures, as JSON lines, to compare with")
    parser.add_argument("--plot", default=None, metavar="FILE", help="cases: an SVG of them")
    parser.add_argument("--profile", action="store_true", help="cases: what ran on the device in one run more of each")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels, selfcheck: those whose name contains it")
    parser.add_argument("--target", default=None, help="kernels: compile for this TPU, such as v6e, and count the schedule")
    parser.add_argument("--tune", action="store_true", help="kernels: try block sizes, and write the best ones")
    parser.add_argument(
        "--out", default=None, metavar="FILE", help="kernels: in place of tuned.toml; selfcheck: the report (selfcheck.json)"
    )
    options = parser.parse_args(arguments)
    commands = {"latency": _latency, "throughput": _throughput, "kernels": _kernels, "selfcheck": _selfcheck}
    by_case = options.cases is not None and options.what in ("latency", "throughput")
    found = _cases(options) if by_case else commands[options.what](options)
    if options.json:
        cli.print_json(found)
    return 0


def _about(llm: Any) -> dict[str, Any]:
    return {"model": llm.config.name, "platform": llm.target.platform, "dtype": llm.target.dtype, "quantize": llm.settings.quantize}


def _latency(options: argparse.Namespace) -> dict[str, Any]:
    sizes = {
        name: cli.positive(getattr(options, name), f"--{name.replace('_', '-')}")
        for name in ("prompt_tokens", "max_tokens", "batch", "runs")
    }
    options.set = ["prefix_cache=false", f"slots={max(8, sizes['batch'])}", *options.set]
    llm = cli.load(options, lambda _: (sizes["prompt_tokens"], sizes["batch"]))
    found = latency(llm, **sizes) | _about(llm)
    if not options.json:
        print(
            f"{found['model']} on {found['platform']} ({found['dtype']}), {sizes['batch']} x {sizes['prompt_tokens']} prompt tokens: "
            f"prefill {found['prefill_tokens_per_s']:.1f} tok/s, first token {found['ttft_s'] * 1e3:.0f} ms, "
            f"decode {found['decode_tokens_per_s']:.1f} tok/s ({found['step_ms']:.1f} ms a step), medians of {sizes['runs']}"
        )
    return found


def _cases(options: argparse.Namespace) -> dict[str, Any]:
    letters, runs = cases.parse(options.cases), cli.positive(options.runs, "--runs")
    scale, plotted = _scale(options), _file(options.plot, "--plot")
    peer = cases.read_peer(options.beside) if options.beside else {}
    options.set = [f"{name}={str(value).lower()}" for name, value in cases.settings(letters, scale).items()] + options.set
    cli.settings(options)  # refuses what is wrong before anything is measured
    from llminfer.bench.probe import probe
    from llminfer.bench.profile import table

    limits, rows = probe(), []
    if not options.json:
        print(f"limits  {limits['read_bytes_per_s'] / 1e9:,.0f} GB/s read, {limits['matmul_flops_per_s'] / 1e12:,.1f} TFLOP/s of products")
    llm = cli.load(options)
    with RichProgress() as progress:
        how: dict[str, Any] = dict(scale=scale, limits=limits, profile=options.profile, progress=progress)
        for row in cases.measure(llm, letters, runs, **how):  # each is said at once: a long run may be cut off
            rows.append(row)
            lines = [json.dumps(row)] if options.json else cases.table([row], peer) + (table(row["profile"]) if options.profile else [])
            print("\n".join(lines), flush=True)
    about = _about(llm) | {name: llm.stats()[name] for name in ("compiles_after_warmup", "load_s")} | limits
    if plotted:
        plotted.write_text(cases.plot(rows, peer, f"{about['model']} on {about['platform']}"), encoding="utf-8")
    return about | {"cases": rows, "peer": peer}


def _throughput(options: argparse.Namespace) -> dict[str, Any]:
    requests = cli.positive(options.requests, "--requests")
    rate, scale = _number(options.rate, "--rate", "inf or a number above 0"), _scale(options)
    llm = cli.load(options)
    arrivals = trace(requests, rate, llm.settings.seed, llm.config.vocab_size, llm.engine.context, scale)
    llm.engine.programs.wait_all()  # nothing is to be compiled while the clock runs
    with RichProgress() as progress:
        served, seconds = replay(llm, arrivals, watched=math.isfinite(rate), progress=progress)
    kept = ("compiles_after_warmup", "preemptions", "prefix_hit_tokens", "compile_s", "programs")
    found = report(served, seconds) | {"rate": options.rate} | {name: llm.stats()[name] for name in kept} | _about(llm)
    if not options.json:
        width = max(len(name) for name in found)
        for name, value in found.items():
            print(f"{name:<{width}}  {value:.3f}" if isinstance(value, float) else f"{name:<{width}}  {value}")
    return found


def _kernels(options: argparse.Namespace) -> dict[str, Any]:
    from llminfer.bench.kernels import kernels, table

    with RichProgress() as progress:
        found = kernels(options.target, options.tune, _file(options.out), options.only, progress)
    return _shown(found, table(found), options)


def _selfcheck(options: argparse.Namespace) -> dict[str, Any]:
    from llminfer.bench.selfcheck import selfcheck, table

    out = _file(options.out) or Path("selfcheck.json")
    with RichProgress() as progress:
        found = selfcheck(out, options.only, progress)
    return _shown(found, [*table(found), f"written to {out}"], options)


def _file(text: str | None, name: str = "--out") -> Path | None:
    """The file that an option names. Raises UserError if its folder is not there."""
    if text is not None and not Path(text).resolve().parent.is_dir():
        raise refuse(name, text, "must be in a folder that exists")
    return None if text is None else Path(text)


def _shown(found: dict[str, Any], lines: list[str], options: argparse.Namespace) -> dict[str, Any]:
    if not options.json:
        print("\n".join(lines))
    return found


def _scale(options: argparse.Namespace) -> float:
    scale = _number(options.scale, "--scale", "a number above 0")
    if not math.isfinite(scale):
        raise refuse("--scale", options.scale, "must be a number above 0")
    return scale


def _number(text: str, name: str, rule: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise refuse(name, text, f"must be {rule}") from None
    if not value > 0:
        raise refuse(name, text, f"must be {rule}")
    return value


if __name__ == "__main__":
    cli.leave(cli.main(main, sys.argv[1:]))

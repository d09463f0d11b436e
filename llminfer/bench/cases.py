"""Five kinds of work, a to e, each with the figure by which servers of one model are compared. All greedy, with random prompts, to a fixed
length. What prefill takes falls out of a decode step: it is the difference of two runs that differ in length.

A peer's figures come as lines of JSON with the same keys, such as {"case": "a", "ms_per_token": 6.6}.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llminfer.errors import refuse
from llminfer.progress import Progress, start
from llminfer.request import SamplingParams

GREEN, GREY = "#2a9d8f", "#9aa0a6"


@dataclass(frozen=True)
class Case:
    """figure: the key of its result, milliseconds if it begins with ms, else a rate. new: the lengths that are generated."""

    what: str
    figure: str
    batch: int
    prompt: int
    new: tuple[int, ...]


CASES = {
    "a": Case("batch 1, prompt 128: ms a token", "ms_per_token", 1, 128, (256,)),
    "b": Case("batch 64, prompt 512: ms a decode step", "ms_per_step_decode", 64, 512, (64, 128)),
    "c": Case("32 prompts of 2048: tokens of prefill a second", "prefill_tok_per_s", 32, 2048, (1,)),
    "d": Case("batch 256, prompt 1024: ms a decode step", "ms_per_step_decode", 256, 1024, (32, 96)),
    "e": Case("256 requests at once, lognormal lengths: new tokens a second", "out_tok_per_s", 256, 0, ()),
}


def parse(letters: str) -> list[str]:
    """The cases of a string such as "abc". Raises UserError."""
    if not letters or set(letters) - set(CASES) or len(set(letters)) < len(letters):
        raise refuse("--cases", letters, "must be letters from a to e, each once")
    return list(letters)


def settings(letters: list[str], scale: float = 1.0) -> dict[str, Any]:
    """Of an engine that can do all of these cases. scale: of batches and lengths."""
    slots = max(1, round(scale * (256 if set(letters) & set("de") else 64)))
    return {"slots": slots, "context": max(64, round(4096 * scale)), "chunk": max(32, round(4096 * scale)), "prefix_cache": False}


def measure(
    llm: Any,
    letters: list[str],
    runs: int,
    *,
    scale: float = 1.0,
    limits: dict[str, float] | None = None,
    profile: bool = False,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of the cases, as they are measured: each with its figure, the median of `runs` after one that is not counted.
    limits: what probe.probe found; of_limit is the share of it that a case reaches. profile: of one run more."""
    from llminfer.bench.profile import profiled  # which imports jax

    task = start(progress, "Measuring", len(letters) * (runs + 1 + profile))
    llm.engine.programs.wait_all()  # nothing is to be compiled while the clock runs
    for letter in letters:
        case = CASES[letter]
        times = [_once(llm, case, seed, scale, task.advance) for seed in range(runs + 1)][1:]
        row = {"case": letter, "what": case.what, **_figures(case, times, scale), "seconds": times}
        if limits and (least := _least_seconds(llm, case, limits, scale)):
            row["of_limit"] = least * (row[case.figure] if case.figure.endswith("_per_s") else 1e3 / row[case.figure])
        if profile:
            row["profile"] = profiled(lambda case=case: _once(llm, case, 0, scale, task.advance))
        yield row
    task.done()


def _once(llm: Any, case: Case, seed: int, scale: float, advance: Callable[[int], None]) -> list[float]:
    """Seconds of each of a case's runs."""
    draw, times = random.Random(seed), []
    for works in _works(case, scale):
        prompts = [[draw.randrange(llm.config.vocab_size) for _ in range(length)] for length, _ in works]
        params = [SamplingParams(max_tokens=new, ignore_eos=True) for _, new in works]
        begin = time.perf_counter()
        llm.generate(prompts, params)
        times.append(time.perf_counter() - begin)
    advance(1)
    return times


def _works(case: Case, scale: float) -> list[list[tuple[int, int]]]:
    """(prompt, new tokens) of each sequence of each run. Of case e: lognormal, medians 160 and 130, sigma 1.0 and 0.8, cut at 2048 and
    1024, the same ones always."""
    size = lambda n: max(1, round(n * scale))
    if case.new:
        return [[(size(case.prompt), size(new) if new > 1 else 1)] * size(case.batch) for new in case.new]
    draw = random.Random(7)
    length = lambda median, sigma, most: max(4, min(size(most), int(draw.lognormvariate(math.log(median * scale), sigma))))
    return [[(length(160, 1.0, 2048), length(130, 0.8, 1024)) for _ in range(size(case.batch))]]


def _figures(case: Case, times: list[list[float]], scale: float) -> dict[str, float]:
    works, each = _works(case, scale), [statistics.median(run) for run in zip(*times, strict=True)]
    made = sum(new for _, new in works[-1])
    if len(each) > 1:
        steps = works[1][0][1] - works[0][0][1]
        return {case.figure: (each[1] - each[0]) / steps * 1e3, "out_tok_per_s": made / each[1]}
    per = {"ms_per_token": 1e3 * each[0] / works[0][0][1], "out_tok_per_s": made / each[0]}
    return {case.figure: per.get(case.figure, sum(prompt for prompt, _ in works[0]) / each[0])}


def _least_seconds(llm: Any, case: Case, limits: dict[str, float], scale: float) -> float | None:
    """What a decode step takes where reading weights and cache is all, or a token of prefill where products of matrices are. None for
    what is neither, for experts, of which a step reads those that it needs, for prefill with tokens in 8 bits, and on several devices:
    the limits are those of one."""
    c, engine, prefill = llm.config, llm.engine, case.figure == "prefill_tok_per_s"
    eight_bits = prefill and (llm.settings.quantize or "").startswith("w8a8")
    if not case.new or c.num_experts or eight_bits or llm.settings.mesh or llm.settings.prefill_mesh:
        return None
    works = _works(case, scale)
    prompt, last = works[-1][0]
    if prefill:
        tables = (1 if c.tie_embeddings else 2) * c.vocab_size * c.hidden_size
        seen = sum(min(prompt, c.window(i) or prompt) for i in range(c.num_layers))
        attention = seen * c.num_heads * (c.head_dim + (c.value_dim or c.head_dim))
        return (2 * (c.num_params - tables) + attention) / limits["matmul_flops_per_s"]
    context = prompt + ((works[0][0][1] if len(works) > 1 else 0) + last) / 2
    cache = sum(min(context, c.groups[i] or context) * engine.bytes_per_token(i) for i in range(len(c.groups)))
    weights = engine.weights_bytes - (0 if c.tie_embeddings else engine.embedding_bytes)
    return (weights + len(works[-1]) * cache) / limits["read_bytes_per_s"]


def read_peer(file: str) -> dict[str, float]:
    """Case -> figure of a file of JSON lines. Raises UserError."""
    try:
        lines = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.startswith("{")]
        rows = {row["case"]: row for row in lines if row.get("case") in list(CASES)}
        found = {letter: float(row[CASES[letter].figure]) for letter, row in rows.items() if CASES[letter].figure in row}
    except (OSError, ValueError, TypeError) as error:
        raise refuse("--beside", file, f"must be a file of JSON lines ({error})") from None
    if not found or min(found.values()) <= 0:
        raise refuse(
            "--beside",
            file,
            f"must have lines with a case and its figure above 0, such as {json.dumps({'case': 'a', 'ms_per_token': 6.6})}",
        )
    return found


def ratio(letter: str, ours: float, peer: float) -> float:
    """Above 1: ours is better."""
    return peer / ours if CASES[letter].figure.startswith("ms") else ours / peer


def table(rows: list[dict[str, Any]], peer: dict[str, float]) -> list[str]:
    """A line for each case: ours, the peer's where there is one, and the ratio as a bar."""
    lines = []
    for row in rows:
        letter, ours = row["case"], row[CASES[row["case"]].figure]
        line = f"{letter}  {CASES[letter].what:<62} {ours:>10,.2f}"
        if letter in peer:
            times = ratio(letter, ours, peer[letter])
            line += f"  peer {peer[letter]:>10,.2f}  {times:5.2f}x  {'█' * round(20 * min(times, 3))}"
        lines.append(line + (f"  {100 * row['of_limit']:.0f}% of the limit" if "of_limit" in row else ""))
    return lines


def plot(rows: list[dict[str, Any]], peer: dict[str, float], title: str) -> str:
    """An SVG with a bar for each case: how many times as good as the peer; without a peer the figure alone."""
    width, step, left = 760, 34, 400
    parts = [f'<text x="10" y="20" font-weight="bold">{title}</text>']
    for i, row in enumerate(rows):
        letter, y = row["case"], 36 + i * step
        ours = row[CASES[letter].figure]
        times = ratio(letter, ours, peer[letter]) if letter in peer else 1.0
        text = f"{ours:,.2f}" + (f", peer {peer[letter]:,.2f}: {times:.2f}x" if letter in peer else "")
        parts.append(f'<text x="10" y="{y + 16}">{letter}  {CASES[letter].what}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{min(times, 3) * 60:.0f}" height="22" fill="{GREEN if times >= 1 else GREY}"/>')
        parts.append(f'<text x="{left + 8 + min(times, 3) * 60:.0f}" y="{y + 16}">{text}</text>')
    line = (
        f'<line x1="{left + 60}" y1="30" x2="{left + 60}" y2="{40 + len(rows) * step}" stroke="#444" stroke-dasharray="3"/>' if peer else ""
    )
    height = 50 + len(rows) * step
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="13">\n'
        + "\n".join([*parts, line, "</svg>\n"])
    )

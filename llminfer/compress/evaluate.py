"""How well a model foretells a text: perplexity in fixed-length chunks or a sliding window, as the documentation of transformers
defines them ("Perplexity of fixed-length models"), and the share of tokens that it would have chosen itself. Imports no jax."""

from __future__ import annotations

import ast
import math
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llminfer.errors import UserError, refuse
from llminfer.progress import Progress, start

# Folders of the standard library that some systems leave out, or that hold no documentation.
SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "tkinter", "site-packages", "dist-packages", "_bundled"}


@dataclass(frozen=True)
class Score:
    """What was measured: `tokens` foretold, `nats` the sum of their negative log-probabilities, `hits` how many of them were the
    most likely token."""

    tokens: int
    nats: float
    hits: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of nats_per_token; infinite beyond what a float holds."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def accuracy(self) -> float:
        return self.hits / self.tokens


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end) of each window over `length` tokens: it reads begin..end and scores first..end.

    Windows begin every `stride` tokens, and each scores what the one before did not. stride = window gives separate chunks, whose
    first tokens cannot be scored; with a smaller stride every token but the text's first is scored, once, after at least
    window - stride tokens (or all there are)."""
    end = 0
    for begin in range(0, length, stride):
        first, end = max(begin + 1, end), min(begin + window, length)
        if first < end:
            yield begin, first, end
        if end == length:
            return


def evaluate(engine: Any, ids: list[int], window: int, stride: int, progress: Progress | None = None) -> Score:
    """Scores `ids` (at least two, legal for the model) through the engine's paged cache; window and stride as in `windows`.

    Raises UserError for a window beyond the engine's context, and for a model that gives no numbers."""
    if not 2 <= window <= engine.context:
        raise refuse("window", window, f"must be from 2 to the context of {engine.context} tokens")
    if not 1 <= stride <= window:
        raise refuse("stride", stride, f"must be from 1 to the window of {window} tokens")
    if len(ids) < 2:
        raise refuse("text", f"{len(ids)} tokens", "must have at least 2 tokens: the first is never scored")
    tokens, nats, hits = 0, 0.0, 0
    task = start(progress, "Evaluating", sum(end - first for _, first, end in windows(len(ids), window, stride)))
    for begin, first, end in windows(len(ids), window, stride):
        logprobs, best = engine.token_logprobs(ids[begin:end])
        scored = logprobs[first - begin - 1 :].astype(np.float64)
        if not np.isfinite(scored).all():
            raise UserError(f"evaluate: the model's logits are not numbers near token {first}; its weights are damaged or overflow")
        tokens, nats, hits = tokens + len(scored), nats - float(scored.sum()), hits + int(best[first - begin - 1 :].sum())
        task.advance(len(scored))
    task.done()
    return Score(tokens, nats, hits)


def library_text(most_bytes: int | None = None, folder: Path | None = None) -> str:
    """A text that every machine has: the docstrings of this Python's standard library, file by file in order of their paths, in
    the order of the syntax tree, with an empty line between; stops after the file that reaches `most_bytes` of UTF-8.

    folder: of the library. Raises UserError where it has no sources."""
    root = folder or Path(sysconfig.get_path("stdlib"))
    found: list[str] = []
    size = 0
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if SKIPPED.isdisjoint(path.relative_to(root).parts):
            texts = _docstrings(path)
            found += texts
            size += sum(len(text.encode()) + 2 for text in texts)
            if most_bytes is not None and size >= most_bytes:
                break
    if not found:
        raise refuse("text", "stdlib", f"there are no sources in {root}; give a file")
    return "\n\n".join(found)


def _docstrings(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own, about its escape sequences
        tree = ast.parse(path.read_bytes(), str(path))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]

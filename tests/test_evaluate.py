"""Perplexity: what is counted, against plain NumPy on the logits, and the command."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llminfer import cli, evaluate
from llminfer.api import LLM
from llminfer.compress.evaluate import evaluate as score
from llminfer.compress.evaluate import library_text, windows
from llminfer.errors import UserError
from llminfer.request import SamplingParams

pytestmark = pytest.mark.usefixtures("compiled_fast")

SMALL = ["--set", "chunk=32"]


@pytest.fixture(scope="module")
def llm(tiny_directory):
    made = LLM(str(tiny_directory), context=96, chunk=32, slots=1, decode_steps=4)
    yield made
    made.close()


def call(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(evaluate.main, [*SMALL, *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_every_token_is_scored_once_with_its_context(length, window, data) -> None:
    stride = data.draw(st.integers(1, window))
    found = list(windows(length, window, stride))
    scored = [token for _, first, end in found for token in range(first, end)]
    starts = set(range(0, length, window)) if stride == window else {0}
    assert scored == [token for token in range(length) if token not in starts]
    for begin, first, end in found:
        assert end - begin <= window and end <= length
        assert first - begin >= min(window - stride, first) or begin == 0


@pytest.mark.parametrize(("window", "stride"), [(64, 64), (64, 24), (50, 1), (96, 95)])
def test_is_what_the_logits_say(llm, window, stride) -> None:
    draw = np.random.default_rng(0)
    start = [int(t) for t in draw.integers(0, llm.config.vocab_size, 40)]
    greedy = llm.generate([start], SamplingParams(max_tokens=20, ignore_eos=True))[0].token_ids
    ids = [*start, *greedy, *(int(t) for t in draw.integers(0, llm.config.vocab_size, 71))]  # some that it would choose itself
    nats, hits, tokens, before = 0.0, 0, 0, 0
    for begin in range(0, len(ids), stride):  # the loop of transformers' documentation
        end = min(begin + window, len(ids))
        part = ids[begin:end]
        logits = np.concatenate([llm.prompt_logits(part[:-1]), np.zeros((1, llm.config.vocab_size))]).astype(np.float64)
        for place in range(max(before - begin, 1), end - begin):
            row, token = logits[place - 1], part[place]
            nats += math.log(np.exp(row).sum()) - row[token]
            hits += int(row.argmax() == token)
            tokens += 1
        before = end
        if end == len(ids):
            break
    found = score(llm.engine, ids, window, stride)
    assert (found.tokens, found.hits) == (tokens, hits) and hits >= 5
    assert found.nats == pytest.approx(nats, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert found.accuracy == hits / tokens
    assert llm.stats()["pages_free"] == llm.stats()["pages_total"]


@pytest.mark.parametrize(
    ("ids", "window", "stride", "said"), [([1, 2, 3], 97, 1, "window=97"), ([1, 2, 3], 8, 9, "stride=9"), ([1], 8, 8, "2 tokens")]
)
def test_refuses_what_it_cannot_score(llm, ids, window, stride, said) -> None:
    with pytest.raises(UserError, match=said):
        score(llm.engine, ids, window, stride)


def test_numbers_that_are_none_are_refused(llm) -> None:
    kept = llm.engine._params
    llm.engine._params = kept.replace(final_norm=kept.final_norm * np.float32("nan"))
    try:
        with pytest.raises(UserError, match="not numbers near token 1"):
            score(llm.engine, [1, 2, 3], 8, 8)
    finally:
        llm.engine._params = kept


def test_command_reports(capsys, tiny_directory, tmp_path) -> None:
    (tmp_path / "text").write_text("Grüße an alle, die dies lesen; " * 9, encoding="utf-8")
    arguments = ("--model", str(tiny_directory), "--text", str(tmp_path / "text"), "--window", "64")
    code, out, _ = call(capsys, *arguments, "--json")
    report = json.loads(out.splitlines()[-1])
    size = len((tmp_path / "text").read_bytes())
    assert code == 0 and len(out.splitlines()) == 1
    assert (report["bytes"], report["read_tokens"], report["window"], report["stride"]) == (size, size, 64, 64)  # a token a byte
    assert report["tokens"] == size - -(-size // 64)
    assert report["bits_per_byte"] == pytest.approx(math.log2(report["perplexity"]))
    assert report["compiles_after_warmup"] == 0 and report["tokens_per_s"] > 0 and 0 <= report["accuracy"] <= 1
    code, out, _ = call(capsys, *arguments, "--stride", "32", "--max-tokens", "100", "--json")
    slid = json.loads(out)
    assert (slid["tokens"], slid["bytes"]) == (99, len((tmp_path / "text").read_bytes()[:100].decode(errors="replace").encode()))
    code, out, _ = call(capsys, *arguments, "--max-tokens", "100")
    assert code == 0 and out.startswith("perplexity ") and "over 98 tokens (window 64, stride 64)" in out


def test_command_knows_the_library(capsys, tiny_directory) -> None:
    code, out, _ = call(capsys, "--model", str(tiny_directory), "--max-tokens", "70", "--window", "64", "--json")
    report = json.loads(out)
    assert code == 0 and report["text"] == "stdlib" and report["bytes"] == report["read_tokens"] == 70
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))


def test_library_text_is_the_docstrings_in_order(tmp_path) -> None:
    for name in ("b.py", "a/z.py", "test/t.py", "a/tests/t.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'"""Module {name}."""\ndef f():\n    "  Inside.\\n\\n    More."\nclass C:\n    pass\n')
    assert library_text(folder=tmp_path) == "Module a/z.py.\n\nInside.\n\nMore.\n\nModule b.py.\n\nInside.\n\nMore."
    assert library_text(5, tmp_path) == "Module a/z.py.\n\nInside.\n\nMore."
    assert len(library_text(30_000).encode()) >= 30_000 and library_text(30_000) == library_text(30_000)
    with pytest.raises(UserError, match="no sources"):
        library_text(folder=tmp_path / "test" / "none")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--window", "1"], "--window=1: must be at least 2"),
        (["--max-tokens", "1"], "--max-tokens=1"),
        (["--window", "8", "--stride", "9"], "--stride=9: must be from 1 to the window of 8"),
        (["--stride", "-3"], "--stride=-3"),
        (["--text", "/nowhere/text"], "must be a readable UTF-8 file"),
        (["--text", "BYTES"], "must be a readable UTF-8 file"),
        (["--text", "SHORT"], "must have at least 2 tokens"),
        (["--model", "config:tiny"], "needs a tokenizer"),
        (["--window", "100000"], "context=100000"),
    ],
)
def test_mistakes_are_one_line(capsys, tiny_directory, tmp_path, arguments, said) -> None:
    (tmp_path / "BYTES").write_bytes(b"ab\xff")
    (tmp_path / "SHORT").write_text("a")
    named = [str(tmp_path / a) if a in ("BYTES", "SHORT") else a for a in arguments]
    code, out, err = call(capsys, "--model", str(tiny_directory), *named)
    assert (code, out) == (2, "") and err.count("\n") == 1 and said in err

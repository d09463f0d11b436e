"""Gemma 3 270M (Q4_K_M) against transformers on the same weights: `pytest -m parity tests/parity/test_gemma.py --gemma FILE`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llminfer import LLM, SamplingParams

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")]
TEXTS = [
    "The three states of matter are",
    "def fibonacci(n):\n    ",
    "Once upon a time in a small village by the sea, there lived",
    "La capitale de la France est Paris, et la capitale de l'Allemagne est",
]
LONG, NEW, WINDOW, SCORED = 1300, 64, 2048, 4096


@pytest.fixture(scope="module")
def path(request: pytest.FixtureRequest) -> Path:
    given = request.config.getoption("--gemma")
    if not given:
        pytest.skip("--gemma FILE is not given")
    return Path(given)


@pytest.fixture(scope="module")
def ours(path: Path) -> LLM:
    return LLM(str(path), dtype="float32", context=2048, slots=5)


@pytest.fixture(scope="module")
def theirs(path: Path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5.0")
    torch.set_num_threads(2)
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager").eval()


def stdlib_ids(llm: LLM, count: int) -> list[int]:
    from llminfer.compress.evaluate import library_text

    ids = llm.encode(library_text(8 * count))
    assert len(ids) >= count
    return ids[:count]


def all_logits(model, ids: list[int], last: int) -> np.ndarray:
    """float32 [last, V] of the last positions of ids, in one pass without a cache."""
    import torch

    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False, logits_to_keep=last).logits[0].numpy()


def test_greedy_tokens_are_those_of_transformers(ours: LLM, theirs) -> None:
    """Ours, foretold by theirs: at each of our tokens their best logit must be that token."""
    prompts = [ours.encode(text) for text in TEXTS] + [stdlib_ids(ours, LONG)]
    outs = ours.generate(prompts, SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True))
    for prompt, out in zip(prompts, outs, strict=True):
        logits = all_logits(theirs, prompt + out.token_ids[:-1], NEW)
        assert logits.argmax(1).tolist() == out.token_ids, len(prompt)


def test_logits_and_perplexity_are_those_of_transformers(ours: LLM, theirs) -> None:
    from llminfer.compress.evaluate import evaluate

    ids = stdlib_ids(ours, SCORED)
    nats = 0.0
    for start in range(0, SCORED, WINDOW):
        chunk = ids[start : start + WINDOW]
        logits = all_logits(theirs, chunk, len(chunk))[:-1].astype(np.float64)
        top = logits.max(1, keepdims=True)
        nats += float((np.log(np.exp(logits - top).sum(1)) + top[:, 0] - logits[np.arange(len(chunk) - 1), chunk[1:]]).sum())
        if not start:
            mine = ours.prompt_logits(chunk[:700])  # past the window of 512
            assert np.abs(mine - logits[:700]).max() <= 1e-4 * np.ptp(logits[:700])
    expected = np.exp(nats / (SCORED - SCORED // WINDOW))
    found = evaluate(ours.engine, ids, WINDOW, WINDOW).perplexity
    print(f"perplexity: ours {found:.6f}, transformers {expected:.6f}")
    assert abs(found / expected - 1) <= 1e-4

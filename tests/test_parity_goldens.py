"""Our engine against logits and greedy tokens that torch and transformers made (tests/goldens/make_models.py, make_families.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from goldens.families import MODELS, golden
from safetensors.numpy import save_file

from llminfer import LLM, SamplingParams

GOLDENS = Path(__file__).parent / "goldens"
VARIANTS = [("tiny_llama", "gqa"), ("tiny_llama", "mha"), ("tiny_llama", "mqa"), ("tiny_mistral", "window")]
SHAPES = [(8, 16), (16, 32)]  # page size and chunk: the prompt of 70 in 5 chunks, then in 3


def write_checkpoint(folder: Path, file: str, variant: str) -> tuple[np.ndarray, np.ndarray]:
    """Writes config.json and model.safetensors into `folder`; gives ids int32 [70] and logits float32 [70, 128]."""
    with np.load(GOLDENS / f"{file}.npz") as data:
        prefix = f"{variant}/weights/"
        save_file({n.removeprefix(prefix): data[n].astype(np.float32) for n in data if n.startswith(prefix)}, folder / "model.safetensors")
        (folder / "config.json").write_text(str(data[f"{variant}/config"]))
        return data[f"{variant}/ids"], data[f"{variant}/logits"]


@pytest.mark.demo
def test_demo_model_gives_the_greedy_tokens_of_transformers() -> None:
    with np.load(GOLDENS / "smollm2.npz") as data:
        golden = {str(name): {key: data[f"{name}/{key}"] for key in ("ids", "tokens", "gaps")} for name in data["names"]}
    llm = LLM("demo", dtype="float32", context=2048)
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    outs = llm.generate([g["ids"].tolist() for g in golden.values()], params)
    for (name, g), out in zip(golden.items(), outs, strict=True):
        differs = np.flatnonzero(np.array(out.token_ids) != g["tokens"]) if len(out.token_ids) == 64 else [len(out.token_ids)]
        assert not len(differs), f"{name}: step {differs[0]} differs; gap of the golden's logits there {g['gaps'][min(differs[0], 63)]:.4f}"


@pytest.mark.parametrize(("page_size", "chunk"), SHAPES)
@pytest.mark.parametrize(("file", "variant"), VARIANTS)
def test_tiny_model_gives_the_logits_of_transformers(file: str, variant: str, page_size: int, chunk: int, tmp_path: Path) -> None:
    ids, expected = write_checkpoint(tmp_path, file, variant)
    assert_same_logits(tmp_path, ids, expected, page_size=page_size, chunk=chunk)


@pytest.mark.usefixtures("compiled_fast")  # and all that come after
@pytest.mark.parametrize("chunk", [16, 32])
@pytest.mark.parametrize("name", MODELS)
def test_every_family_gives_the_logits_of_transformers(name: str, chunk: int, tmp_path: Path) -> None:
    config, tensors, ids, expected = golden(name)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_logits(tmp_path, ids, expected, page_size=8, chunk=chunk)


def assert_same_logits(folder: Path, ids: np.ndarray, expected: np.ndarray, page_size: int, chunk: int) -> None:
    """Our logits of every position differ by at most 1e-4 of the range of the expected ones."""
    settings = dict(dtype="float32", page_size=page_size, chunk=chunk, slots=2, context=128)
    llm = LLM(str(folder), **settings, expect=lambda _: (0, 0))  # nothing is generated: compile no program for it
    logits = np.asarray(llm.prompt_logits(ids.tolist()))
    assert logits.dtype == np.float32 and logits.shape == expected.shape
    error = np.abs(logits - expected).max(1) / np.ptp(expected)
    assert error.max() <= 1e-4, f"first bad position {int(np.argmax(error > 1e-4))}, errors {error}"

"""The short round that every supported Python and JAX passes: all modules import, and a tiny model answers."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from llminfer import LLM, SamplingParams

ROOT = Path(__file__).parent.parent.parent
SETTINGS = {"slots": 2, "context": 128, "chunk": 32, "decode_steps": 4}
PROMPTS = [[1, 7, 300], list(range(3, 60))]


@pytest.mark.parametrize("package", ["llminfer", "pallas_kernels", "sharding"])
def test_every_module_imports(package):
    found = [package, *(module.name for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."))]
    for name in found:
        importlib.import_module(name)
    assert len(found) > 1


@pytest.mark.parametrize("model", ["config:tiny", "config:tiny_window"])
def test_random_model_answers(model):
    llm = LLM(model, **SETTINGS)
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    first = llm.generate(PROMPTS, greedy)
    assert [len(output.token_ids) for output in first] == [8, 8]
    assert [output.finish_reason for output in first] == ["length", "length"]
    again = [llm.generate([prompt], greedy)[0] for prompt in PROMPTS]
    assert [output.token_ids for output in again] == [output.token_ids for output in first]
    drawn = SamplingParams(max_tokens=8, temperature=1.0, seed=5, ignore_eos=True)
    assert llm.generate(PROMPTS, drawn)[0].token_ids == llm.generate(PROMPTS[:1], drawn)[0].token_ids
    assert llm.prompt_logits(PROMPTS[1]).shape == (57, 512)
    assert llm.stats()["compiles_after_warmup"] == 0
    llm.close()


def test_directory_model_answers_in_text(tiny_directory):
    llm = LLM(str(tiny_directory), **SETTINGS)
    params = SamplingParams(max_tokens=8, temperature=0.0)
    (output,) = llm.generate("Hello", params)
    assert isinstance(output.text, str)
    assert "".join(llm.stream("Hello", params)) == output.text
    (answer,) = llm.chat([{"role": "user", "content": "Hello"}], params)
    assert answer.finish_reason in ("stop", "length")
    llm.close()


def test_command_prints_one_json_object(tiny_directory):
    command = [sys.executable, "-m", "llminfer.run", "--model", str(tiny_directory), "--prompt", "Hello", "--max-tokens", "4", "--json"]
    for key, value in SETTINGS.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["completion_tokens"] == len(result["token_ids"]) <= 4
    assert result["finish_reason"] in ("stop", "length")


def test_command_refuses_with_one_line():
    command = [sys.executable, "-m", "llminfer.run", "--model", "config:tiny", "--set", "slot=2", "--prompt", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "slots" in done.stderr

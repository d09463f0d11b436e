"""What Prometheus reads: every counter of the engine, and step times that add up."""

from __future__ import annotations

import pytest

from llminfer import LLM, SamplingParams
from llminfer.metrics import BUCKETS, METRICS, Histogram

pytestmark = pytest.mark.usefixtures("compiled_fast")


def test_a_histogram_counts_what_is_at_most_each_bound() -> None:
    times = Histogram()
    for seconds in (0.0005, 0.001, 0.0011, 0.2, 99.0):
        times.observe(seconds)
    found = times.snapshot()
    assert found["count"] == 5 and abs(found["sum"] - 99.2026) < 1e-9
    assert [found["at_most"][str(bound)] for bound in BUCKETS] == [2, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4]


def test_the_snapshot_of_a_served_model(tiny_directory) -> None:
    llm = LLM(str(tiny_directory), slots=2, context=64, page_size=8, chunk=16)
    llm.generate(["one", "two", "three"], SamplingParams(max_tokens=5, ignore_eos=True))
    stats = llm.stats()
    values = dict(line.rsplit(" ", 1) for line in llm.prometheus().splitlines() if not line.startswith("#"))
    assert len([name for name in values if "step_seconds" not in name]) == len(METRICS)
    assert float(values["llminfer_decode_tokens_total"]) == stats["decode_tokens"] > 0
    assert float(values["llminfer_compiles_after_warmup_total"]) == 0
    for kind, steps in (("mixed", stats["mixed_steps"]), ("decode", stats["decode_loops"])):
        assert int(values[f'llminfer_step_seconds_count{{step="{kind}"}}']) == steps > 0
        assert int(values[f'llminfer_step_seconds_bucket{{step="{kind}",le="+Inf"}}']) == steps
    assert abs(float(values['llminfer_step_seconds_sum{step="mixed"}']) - stats["prefill_s"]) < 1e-6

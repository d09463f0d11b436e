"""Measurements of a served model: `python -m llminfer.bench {latency,throughput}`."""

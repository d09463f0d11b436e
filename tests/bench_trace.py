"""Serves the trace of `python -m llminfer.bench throughput` with transformers and llama.cpp, for comparison.

    python tests/bench_trace.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --only transformers,llama --slots 8

Needs what bench_peers.py needs. All requests are there at once, and every output has exactly the length that the trace wants. One JSON
line a peer; output_throughput counts the tokens that the trace wants and no others.

transformers  static batches of 8 in the order of arrival: padded on the left, and run until the longest output is complete
llama         llama.cpp's decode with `--slots` sequences, as its server does it: a finished one makes room for the next, whose
              prompt joins the others' next tokens in one batch of at most 512 tokens
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import bench_peers

from llminfer.bench.throughput import Arrival, trace

STATIC, BATCH = 8, 512


def serve_transformers(peer: Any, arrivals: list[Arrival]) -> None:
    torch, model = peer.torch, peer.model
    with torch.inference_mode():
        for first in range(0, len(arrivals), STATIC):
            some = arrivals[first : first + STATIC]
            longest = max(len(a.prompt) for a in some)
            ids, mask = (np.zeros((len(some), longest), np.int64) for _ in range(2))
            for row, a in enumerate(some):
                ids[row, longest - len(a.prompt) :], mask[row, longest - len(a.prompt) :] = a.prompt, 1
            mask, ids = torch.from_numpy(mask), torch.from_numpy(ids)
            position = (mask.cumsum(1) - 1).clamp(min=0)
            out = model(ids, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1)
            for _ in range(max(a.output for a in some) - 1):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                position = position[:, -1:] + 1
                tokens = out.logits[:, -1].argmax(-1)[:, None]
                out = model(tokens, attention_mask=mask, position_ids=position, past_key_values=out.past_key_values, use_cache=True)


def serve_llama(peer: Any, arrivals: list[Arrival], slots: int) -> None:
    api = peer.api
    params = api.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = slots * 2048, slots, False
    params.n_batch = params.n_ubatch = BATCH
    params.n_threads = params.n_threads_batch = peer.threads
    context = api.llama_init_from_model(peer.model, params)
    batch = api.llama_batch_init(BATCH, 0, 1)
    waiting, slot_of = list(arrivals)[::-1], [None] * slots  # what a slot serves: [arrival, tokens computed, last token, drawn]
    try:
        while waiting or any(slot_of):
            for slot in range(slots):
                if slot_of[slot] is None and waiting:
                    slot_of[slot] = [waiting.pop(), 0, None, 0]
            asked, at = [], 0
            # Those that decode first, then prompts.
            for slot, state in sorted(enumerate(slot_of), key=lambda x: x[1] is not None and x[1][2] is None):
                if state is None:
                    continue
                arrival, done, last, _ = state
                todo = [last] if last is not None else arrival.prompt[done : done + BATCH - at]
                for i, token in enumerate(todo):
                    batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = token, done + i, 1, slot
                    batch.logits[at] = i == len(todo) - 1 and done + len(todo) >= len(arrival.prompt)
                    at += 1
                state[1] += len(todo)
                if todo and state[1] >= len(arrival.prompt):
                    asked.append((slot, at - 1))
            batch.n_tokens = at
            if code := api.llama_decode(context, batch):
                raise SystemExit(f"llama_decode gave {code}")
            for slot, row in asked:
                state: Any = slot_of[slot]
                state[2] = int(np.ctypeslib.as_array(api.llama_get_logits_ith(context, row), (peer.vocab,)).argmax())
                state[3] += 1
                if state[3] == state[0].output:
                    slot_of[slot] = None
                    api.llama_memory_seq_rm(api.llama_get_memory(context), slot, -1, -1)
    finally:
        api.llama_batch_free(batch)
        api.llama_free(context)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves a trace with peers; one JSON line a result.")
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct as a GGUF file")
    parser.add_argument("--only", default="transformers,llama")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8, help="sequences at once of llama.cpp")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.cache = Path(tempfile.gettempdir()) / "bench_peers"
    arrivals = trace(args.requests, math.inf, 0, 49152, 2048)
    for name in bench_peers.names(args.only, {"transformers": 0, "llama": 0}, "--only"):
        peer: Any = bench_peers.PEERS[name](args)
        wall, busy, own = time.perf_counter(), bench_peers.busy_seconds(), time.process_time()
        if name == "llama":
            serve_llama(peer, arrivals, args.slots)
        else:
            serve_transformers(peer, arrivals)
        wall, busy, own = time.perf_counter() - wall, bench_peers.busy_seconds() - busy, time.process_time() - own
        tokens = sum(a.output for a in arrivals)
        line = {"peer": name, "slots": args.slots if name == "llama" else STATIC, "requests": args.requests, "duration_s": round(wall, 2)}
        line |= {"output_throughput": round(tokens / wall, 2), "others_cpus": round((busy - own) / wall, 2), "version": peer.version}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

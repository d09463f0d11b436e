"""Measures transformers and llama.cpp on the demo model, for comparison with `python -m llminfer.bench`.

    python tests/bench_peers.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --only transformers,llama --case prefill,b1,b8

Needs torch, transformers, gguf, llama-cpp-python, tokenizers; imports nothing of llminfer. One JSON line a result, with
the load of the machine when it was taken. Prompts are cut from the long prompt of goldens/smollm2.npz, so that any engine
can be given the same ids: row i of a batch is `long[i * 128 : i * 128 + 512]`. `others_cpus` is how
many CPUs other processes kept busy meanwhile: above 0.1 or so a result counts for little, llama.cpp's least of all, since
its threads wait for each other by spinning.

transformers  float32 weights, sdpa attention, greedy loop over the model's forward with its dynamic cache
llama         float32 weights (a GGUF written by this script), llama.cpp's default float16 cache, unified over sequences
llama-q8_0    the same with all matrices in Q8_0

`decode_tokens_per_s` counts new tokens of all rows over the steps after the prompt; the greedy choice is included.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

GOLDENS = Path(__file__).parent / "goldens"
ROW, SHIFT, NEW_TOKENS = 512, 128, 128
CASES = {"prefill": 1, "b1": 1, "b8": 8}  # rows of each


class Peer(Protocol):
    """Greedy text of one engine. Both times are of one run, in seconds."""

    version: str

    def run(self, prompts: np.ndarray, steps: int) -> tuple[float, float, np.ndarray]:
        """prompts: int32 [rows, len]. Gives prefill time, time of `steps` decode steps, tokens int32 [rows, steps + 1]."""
        ...


class Transformers:
    """torch on the CPU."""

    def __init__(self, gguf_path: Path, threads: int) -> None:
        import torch
        import transformers

        sys.path.insert(0, str(GOLDENS))
        import torch_llama

        torch.set_num_threads(threads)
        self.torch, self.model = torch, torch_llama.load_model(gguf_path)
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def run(self, prompts: np.ndarray, steps: int) -> tuple[float, float, np.ndarray]:
        torch, model = self.torch, self.model
        with torch.inference_mode():
            ids = torch.from_numpy(prompts.astype(np.int64))
            start = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            tokens = [out.logits[:, -1].argmax(-1)]
            middle = time.perf_counter()
            for _ in range(steps):
                out = model(tokens[-1][:, None], past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
                tokens.append(out.logits[:, -1].argmax(-1))
            end = time.perf_counter()
        return middle - start, end - middle, torch.stack(tokens, 1).numpy()


class Llama:
    """llama.cpp through the low-level calls of llama-cpp-python: one llama_decode a step for all sequences."""

    def __init__(self, gguf_path: Path, threads: int) -> None:
        import llama_cpp

        self.api, self.threads = llama_cpp, threads
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        # Its C callback must outlive the model; the loader's report would drown our JSON lines.
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(gguf_path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {gguf_path}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def run(self, prompts: np.ndarray, steps: int) -> tuple[float, float, np.ndarray]:
        api, (rows, length) = self.api, prompts.shape
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = rows * (length + steps + 1), rows, True
        params.n_batch, params.n_ubatch = rows * length, min(rows * length, 512)
        params.n_threads = params.n_threads_batch = self.threads
        context = api.llama_init_from_model(self.model, params)
        batch = api.llama_batch_init(rows * length, 0, 1)
        try:
            start = time.perf_counter()
            last = self._decode(context, batch, prompts, 0)
            tokens = [last]
            middle = time.perf_counter()
            for step in range(steps):
                last = self._decode(context, batch, last[:, None], length + step)
                tokens.append(last)
            end = time.perf_counter()
        finally:
            api.llama_batch_free(batch)
            api.llama_free(context)
        return middle - start, end - middle, np.stack(tokens, 1)

    def _decode(self, context: Any, batch: Any, ids: np.ndarray, position: int) -> np.ndarray:
        """Runs ids [rows, len] from `position` on, row i being sequence i; gives the greedy next token of each, [rows]."""
        rows, length = ids.shape
        for row in range(rows):
            for column in range(length):
                i = row * length + column
                batch.token[i], batch.pos[i] = int(ids[row, column]), position + column
                batch.n_seq_id[i], batch.logits[i] = 1, column == length - 1
                batch.seq_id[i][0] = row
        batch.n_tokens = rows * length
        if code := self.api.llama_decode(context, batch):
            raise SystemExit(f"llama_decode gave {code}")
        logits = [self.api.llama_get_logits_ith(context, row * length + length - 1) for row in range(rows)]
        return np.array([np.ctypeslib.as_array(x, (self.vocab,)).argmax() for x in logits], np.int32)


def convert(source: Path, kind: str, cache: Path) -> Path:
    """The same weights as a GGUF of `kind` (F32 or Q8_0; norms stay float32), written into `cache` once."""
    import gguf

    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{source.stem}-{source.stat().st_size}-{kind}.gguf"
    if path.exists():
        return path
    reader = gguf.GGUFReader(source)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if kind == "F32" else gguf.LlamaFileType.MOSTLY_Q8_0)
    for tensor in reader.tensors:
        values = np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(tensor.shape[::-1])
        target = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        data = values if target == gguf.GGMLQuantizationType.F32 else gguf.quantize(values, target)
        writer.add_tensor(tensor.name, data, raw_dtype=target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
    return path


PEERS: dict[str, Callable[[argparse.Namespace], Peer]] = {
    "transformers": lambda args: Transformers(args.gguf, args.threads),
    "llama": lambda args: Llama(convert(args.gguf, "F32", args.cache), args.threads),
    "llama-q8_0": lambda args: Llama(convert(args.gguf, "Q8_0", args.cache), args.threads),
}


def busy_seconds() -> float:
    """CPU seconds that all processes of this Linux machine have used so far."""
    user, nice, system = (int(x) for x in Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def measure(name: str, peer: Peer, case: str, reps: int) -> dict[str, Any]:
    """One result: medians over `reps` runs after one short run that is not counted."""
    with np.load(GOLDENS / "smollm2.npz") as file:
        ids = file["long/ids"]
    rows, steps = CASES[case], 0 if case == "prefill" else NEW_TOKENS
    prompts = np.stack([ids[row * SHIFT : row * SHIFT + ROW] for row in range(rows)])
    peer.run(prompts, min(steps, 4))
    wall, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
    prefill, decode, tokens = zip(*(peer.run(prompts, steps) for _ in range(reps)))
    wall, busy, own = time.perf_counter() - wall, busy_seconds() - busy, time.process_time() - own
    speeds = [rows * steps / t for t in decode] if steps else [prompts.size / t for t in prefill]
    return {
        "peer": name,
        "case": case,
        "prefill_tokens_per_s": round(statistics.median(prompts.size / t for t in prefill), 2),
        "decode_tokens_per_s": round(statistics.median(speeds), 2) if steps else None,
        "reps": reps,
        "lowest": round(min(speeds), 2),
        "highest": round(max(speeds), 2),
        "first_tokens": tokens[0][0, :8].tolist(),
        "others_cpus": round((busy - own) / wall, 2),
        "load_1min": round(os.getloadavg()[0], 2),
        "version": peer.version,
    }


def names(text: str, known: dict[str, Any], option: str) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise SystemExit(f"{option} {','.join(unknown)}: legal: {', '.join(known)}")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures peers on the demo model; one JSON line a result.")
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct as a GGUF file")
    parser.add_argument("--only", default=",".join(PEERS), help="peers, separated by commas")
    parser.add_argument("--case", default=",".join(CASES), help="cases, separated by commas")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "bench_peers", help="where converted GGUF files lie")
    args = parser.parse_args()
    peers, cases = names(args.only, PEERS, "--only"), names(args.case, CASES, "--case")
    if not args.gguf.is_file() or args.reps < 1:
        parser.error("--gguf must be a file and --reps at least 1")
    for name in peers:
        peer = PEERS[name](args)
        for case in cases:
            print(json.dumps(measure(name, peer, case, args.reps)), flush=True)


if __name__ == "__main__":
    main()

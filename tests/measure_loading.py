"""How much host memory loading a safetensors checkpoint takes beside what the device holds.

    python tests/measure_loading.py --stored BF16 --dtype float32 --layout listed [--quantize int8]

Writes a Llama of about 4.6 GB of zeros (once, into a temporary folder that is removed again), loads it as the engine does on a CPU,
where the device's memory is the process's own, and prints one JSON line: MB held by the weights, the peak of resident memory over
that, and the bound: the largest stored tensor + 500 MB. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np

from llminfer import placement
from llminfer.config import EngineConfig, ModelConfig
from llminfer.target import Target
from llminfer.weights import open_model
from llminfer.weights.hf_names import stored_tensors
from llminfer.weights.hf_write import to_hf

LAYERS = {"F32": 9, "BF16": 20, "F16": 20, "F8_E4M3": 42}
ITEM = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}


def write(folder: Path, stored: str) -> None:
    """config.json and model.safetensors of zeros."""
    c = ModelConfig("big", 32000, 2048, 16384, LAYERS[stored], 16, 8, 128, 512)
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in stored_tensors("LlamaForCausalLM", c).items():
        size = math.prod(tensor.shape) * ITEM[stored]
        header[name] = {"dtype": stored, "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        block = bytes(1 << 24)
        for start in range(0, at, len(block)):
            file.write(block[: at - start])
    (folder / "config.json").write_text(json.dumps(to_hf(c, "float32")))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(folder: Path, stored: str, options: argparse.Namespace) -> dict[str, Any]:
    checkpoint = open_model(str(folder))
    target = Target.of("cpu", layout=options.layout, dtype=options.dtype)
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.zeros(8)))  # what jax itself takes comes first
    begin, peak, over = resident(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    weights = placement.load_params(checkpoint.leaves(), checkpoint.config, EngineConfig(quantize=options.quantize), target)
    jax.block_until_ready(weights)
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    held = sum(x.nbytes for x in jax.tree.leaves(weights))
    largest = max(math.prod(t.shape) for t in stored_tensors("LlamaForCausalLM", checkpoint.config).values()) * ITEM[stored]
    found = {"held_mb": held >> 20, "peak_over_held_mb": (peak[0] - begin - held) >> 20, "bound_mb": (largest >> 20) + 500}
    return found | {"file_mb": (folder / "model.safetensors").stat().st_size >> 20, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the host memory of loading.")
    parser.add_argument("--stored", choices=sorted(LAYERS), default="F32")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layout", choices=("listed", "stacked"), default="listed")
    parser.add_argument("--quantize", choices=("int8",), default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), options.stored)
        print(json.dumps(vars(options) | measure(Path(name), options.stored, options)))


if __name__ == "__main__":
    main()

"""Damages small GGUF files at random and opens them:

    python tests/fuzz_gguf.py --cases 100000 --seed 0

Every case must end with the header, the config and two weights read, or with one UserError of one line, within a second of CPU time
and 100 MB of memory. Case N of a seed is always the same: `--first N --cases 1` repeats it. Exit code 1 when a case failed."""

from __future__ import annotations

import argparse
import collections
import random
import struct
import tempfile
import time
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from weights.gguf_models import MODELS, model
from weights.gguf_writer import Stored, f32, gguf_bytes, metadata_of, random_parts, tensors_of, tiny

from llminfer.errors import UserError
from llminfer.weights.assemble import check
from llminfer.weights.gguf import GgufFile
from llminfer.weights.gguf_model import GgufSource, read_config
from llminfer.weights.gguf_types import TYPES

MOST_SECONDS, MOST_BYTES = 1.0, 100_000_000
TOKENS = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(64)], "tokenizer.ggml.scores": [0.5] * 64, "tokenizer.ggml.eos_token_id": 2}
NUMBERS = [0, 1, 2, 7, 8, 9, 31, 32, 255, 2**15, 2**16, 2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**61, 2**63, 2**64 - 1]
FLOATS = [float("nan"), float("inf"), 0.0, -1.0, 0.5, 1e-38, 3e38]
TEXTS = ["", "none", "yarn", "longrope", "linear", "gemma3", "x\n" * 50]
VALUES: list[Any] = [*NUMBERS[:16], True, False, *FLOATS, *TEXTS]
# What a base file is made of: metadata and tensors.
Base = tuple[dict[str, Any], dict[str, Stored]]


def quantized() -> Base:
    """A llama model with a tensor of every type."""
    config = tiny(vocab_size=8, hidden_size=256, intermediate_size=256, num_layers=2, num_heads=4, head_dim=64)
    tensors, types = tensors_of(config, random_parts(config)), sorted(TYPES)
    rng = np.random.default_rng(0)
    for i, (name, (shape, _, _)) in enumerate(tensors.items()):
        if len(shape) == 2:
            kind = types[i % len(types)]
            size = shape[0] * shape[1] // TYPES[kind].elements * TYPES[kind].layout.itemsize
            tensors[name] = shape, kind, rng.bytes(size)
    return metadata_of(config), tensors


def bases() -> list[Base]:
    """One small file of each model of the tests, and one with every type of tensor."""
    made = [quantized()]
    for name in MODELS:
        architecture, config, metadata = model(name)
        if config.num_layers > 8:
            continue
        tensors = tensors_of(config, random_parts(config), architecture)
        if config.ropes and config.ropes[0].kind == "longrope":
            tensors["rope_factors_long.weight"] = tensors["rope_factors_short.weight"] = f32(np.ones(3))
        if name == "llama":
            tensors["rope_freqs.weight"] = f32(np.arange(1.0, 5.0))
        made.append((metadata | TOKENS, tensors))
    return made


def change_meaning(rng: random.Random, base: Base) -> bytes:
    """A well-formed file that says something else."""
    metadata, tensors = dict(base[0]), dict(base[1])
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(list(metadata))
        what = rng.randrange(5)
        if what == 0:
            metadata[key] = rng.choice(VALUES)
        elif what == 1:
            metadata[key] = [rng.choice(VALUES)] * rng.choice((0, 1, 2, 5, 64, 10_000))
        elif what == 2:
            del metadata[key]
            metadata |= {} if metadata else {"a": 1}
        elif what == 3:
            metadata[rng.choice(("split.count", "split.no", "general.alignment", key + "x", "general.architecture"))] = rng.choice(VALUES)
        else:
            name = rng.choice(list(tensors))
            shape, kind, data = tensors.pop(name)
            if rng.random() < 0.7:
                shape = tuple(rng.choice((size, rng.choice(NUMBERS))) for size in shape) + (1,) * rng.choice((0, 0, 1, 3))
                name = rng.choice((name, name, name.replace("0", "1"), name + "x", rng.choice(list(base[1]))))
                tensors[name] = shape, rng.choice((kind, kind, rng.choice(sorted(TYPES)), rng.randrange(50))), data
    return gguf_bytes(metadata, tensors, alignment=rng.choice((32, 32, 32, 8, 64)))


def change_bytes(rng: random.Random, data: bytearray, other: bytes, header: int) -> bytearray:
    """Flips bits, writes odd numbers, cuts, and splices; most often in the header, the first `header` bytes."""
    for _ in range(rng.randint(1, 4)):
        end = max(1, min(header if rng.random() < 0.9 else len(data), len(data)))
        at, what = rng.randrange(end), rng.randrange(7)
        if what <= 1 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif what <= 3:
            code = rng.choice(("<Q", "<I"))
            raw = struct.pack(code, rng.choice((*NUMBERS, len(data), rng.getrandbits(64))) & (2**64 - 1 if code == "<Q" else 2**32 - 1))
            data[at : at + len(raw)] = raw
        elif what == 4:
            del data[at if rng.random() < 0.5 else rng.randrange(len(data) + 1) :]
        elif what == 5:
            start = rng.randrange(len(other))
            data[at : at + rng.choice((0, 1, 8, 40))] = other[start : start + rng.choice((1, 4, 8, 50, 1000))]
        else:
            del data[at : at + rng.choice((1, 4, 8, 50, 1000))]
    return data


@dataclass
class Found:
    """What came of the cases: how many ended how, the slowest and the largest, and the failures."""

    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    seconds: float = 0.0
    memory: int = 0
    failures: list[str] = field(default_factory=list)


def open_all(path: Path, rng: random.Random) -> None:
    """Header, config, names, and two of the weights."""
    file = GgufFile(path)
    for name in rng.sample(list(file.tensors), min(1, len(file.tensors))):
        file.read(name)
    config = read_config(file)
    source = GgufSource(file, config)
    check(source, config, str(path))
    for part in rng.sample(list(source.shapes()), 2):
        source.read(part)


def run_case(path: Path, rng: random.Random, found: Found) -> str:
    """Opens the file; returns what is wrong with how that ended, or nothing."""
    began = time.process_time()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    wrong = ""
    try:
        open_all(path, rng)
        found.ends["read"] += 1
    except UserError as error:
        found.ends["refused"] += 1
        if len(str(error).splitlines()) != 1 or len(str(error)) > 4000:
            wrong = f"a message that is no clear line: {str(error)[:200]!r}"
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    seconds, memory = time.process_time() - began, tracemalloc.get_traced_memory()[1] - before
    found.seconds, found.memory = max(found.seconds, seconds), max(found.memory, memory)
    if seconds > MOST_SECONDS or memory > MOST_BYTES:
        wrong = wrong or f"took {seconds:.2f} s and {memory / 1e6:.1f} MB"
    return wrong


def write(path: Path, data: bytes) -> None:
    # Some file systems write a file out when it is truncated and written again; a new one may stay in memory.
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def fuzz(cases: int, seed: int, folder: Path, first: int = 0) -> Found:
    """Runs cases `first` to `first + cases`; files are written to `folder`, and those of failures are kept there."""
    made = bases()
    whole = [gguf_bytes(*base) for base in made]
    headers = [len(gguf_bytes(metadata, {name: (s, k, b"") for name, (s, k, _) in tensors.items()})) for metadata, tensors in made]
    parts = [folder / f"split-{i + 1:05}-of-00002.gguf" for i in range(2)]
    for data in whole:  # what is damaged later is whole now
        write(folder / "case.gguf", data)
        open_all(folder / "case.gguf", random.Random(seed))
    found = Found()
    tracemalloc.start()
    try:
        for number in range(first, first + cases):
            rng = random.Random(f"{seed} {number}")
            which = rng.randrange(len(made))
            path = folder / "case.gguf"
            if number % 10 == 0:  # one part of two, the other is whole
                metadata, tensors = made[which]
                halves = [{name: tensors[name] for name in list(tensors)[i::2]} for i in range(2)]
                splits = {"split.count": 2, "split.tensors.count": len(tensors)}
                both = [(metadata | splits, halves[0]), (splits | {"split.no": 1}, halves[1])]
                path, damaged = rng.choice(parts), rng.randrange(2)
                data = [gguf_bytes(*base) for base in both]
                data[damaged] = bytes(change_bytes(rng, bytearray(data[damaged]), whole[which], headers[which]))
                for part, content in zip(parts, data, strict=True):
                    write(part, content)
            elif number % 10 < 5:
                write(path, change_meaning(rng, made[which]))
            else:
                write(path, change_bytes(rng, bytearray(whole[which]), rng.choice(whole), headers[which]))
            if wrong := run_case(path, rng, found):
                found.failures.append(f"case {number}: {wrong}")
                path.rename(folder / f"failed-{number}.gguf")
    finally:
        tracemalloc.stop()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-gguf-"))
    began = time.monotonic()
    found = fuzz(args.cases, args.seed, folder, args.first)
    for line in found.failures[:20]:
        print(line)
    ends = ", ".join(f"{count} {end}" for end, count in sorted(found.ends.items()))
    print(f"{args.cases} cases of seed {args.seed} in {time.monotonic() - began:.0f} s: {ends}, {len(found.failures)} failed")
    print(f"slowest {found.seconds:.3f} s of CPU time, most memory {found.memory / 1e6:.2f} MB; files in {folder}")
    return 1 if found.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())

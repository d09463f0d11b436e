"""Hostile config.json, safetensors headers and indexes: whatever stands in them is read, or refused in one clear line.

    python tests/fuzz_config.py --cases 100000 --seed 0

Each case changes a valid file of one family: values, names, structure, bytes. It fails when anything but a UserError comes out,
a message has more than one line, a case takes over a second, or the process grows by more than 100 MB."""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from goldens.families import FILE, MODELS, to_v4

from llminfer.errors import UserError
from llminfer.weights.hf_config import from_hf
from llminfer.weights.safetensors import SafetensorsSource, parse_object

MOST_SECONDS, MOST_BYTES, MOST_MESSAGE = 1.0, 100_000_000, 2000
DEEP = "@deep"  # "@deep900;" stands for a list in a list, 900 times, which json.dumps could not write
NASTY: list[Any] = [None, True, False, -1, 0, 1, 2, 3, 7, 64, 1023, 2**31, 2**63, 10**30, 10**308, -(10**400), 0.0, -0.5, 1e-308, 1e308]
NASTY += [
    float("nan"),
    float("inf"),
    "",
    "x",
    "full_attention",
    "yarn",
    "a\nb\r\u2028c",
    "\ud800",
    "\x00",
    "é" * 3000,
    [],
    {},
    [[]],
    [None],
]
NASTY += [[0] * 2000, ["full_attention"] * 1024, {"rope_type": "yarn", "factor": 1e300}, {"a": {"b": {}}}, "../x.safetensors", [2**40] * 8]


def copied(value: Any) -> Any:
    return json.loads(json.dumps(value))


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    found = []
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found += [(value, key), *places(value[key])]
    return found


def mutate(draw: random.Random, value: Any, pool: list[dict[str, Any]]) -> None:
    """Changes a JSON object in place. pool: objects that names and values are taken from."""
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        inside = places(value)
        if not inside:
            return
        container, key = draw.choice(inside)
        other, donor = draw.choice(places(draw.choice(pool)))
        what = draw.randrange(7)
        if what == 0:
            del container[key]
        elif what == 1:
            container[key] = copied(other[donor])
        elif what == 2 and isinstance(container, dict):
            container[donor if isinstance(donor, str) else str(draw.choice(NASTY))[:3000]] = copied(draw.choice(NASTY))
        elif what == 3 and isinstance(container, dict):
            container[draw.choice((str(donor), "\n", "\ud800", "x" * 5000))] = container.pop(key)
        elif what == 4 and type(container[key]) in (int, float):
            container[key] = draw.choice(
                (container[key] + 1, -container[key], container[key] * 2**20, container[key] % 1000 + 0.5, str(container[key]))
            )
        elif what == 5:
            container[key] = f"{DEEP}{draw.choice((5, 100, 300, 600, 900, 5000, 100_000))};"
        else:
            container[key] = copied(draw.choice(NASTY))


def to_bytes(draw: random.Random, value: Any) -> bytes:
    """The JSON text of a value, now and then with damaged bytes."""
    nested = lambda found: "[" * int(found[1]) + "]" * int(found[1])
    data = bytearray(re.sub(rf'"{DEEP}(\d+);"', nested, json.dumps(value)).encode())
    if draw.random() < 0.15:
        for _ in range(draw.randrange(1, 5)):
            at = draw.randrange(len(data))
            data[at : at + draw.choice((0, 1, 20))] = draw.choice(
                (b"", b"\xff", b"9" * 5000, b"{", b"]", b'"', b",", b"NaN", bytes([draw.randrange(256)]))
            )
            if not data:
                break
    return bytes(data)


class Fuzzer:
    """Draws cases. One case is a function of no arguments that either works or raises UserError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with np.load(FILE) as file:
            configs = [json.loads(str(file[f"{name}/config"])) for name in MODELS]
        self.configs = configs + [to_v4(config) for config in configs]
        names = [f"model.layers.{i}.{part}.weight" for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")]
        self.header = {n: {"dtype": "F32", "shape": [2, 4], "data_offsets": [32 * i, 32 * i + 32]} for i, n in enumerate(names)}
        self.header["__metadata__"] = {"format": "pt"}
        self.index = {"metadata": {"total_size": 128}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}

    def config(self, draw: random.Random) -> Callable[[], Any]:
        value = copied(draw.choice(self.configs))
        mutate(draw, value, self.configs)
        data = to_bytes(draw, value)
        return lambda: from_hf(parse_object(data, Path("config.json")), "fuzzed")

    def tensors(self, draw: random.Random) -> Callable[[], Any]:
        header, index = copied(self.header), copied(self.index)
        sharded = draw.random() < 0.4
        if not sharded or draw.random() < 0.3:
            mutate(draw, header, [self.header])
        if sharded:
            mutate(draw, index, [self.index])
        text = to_bytes(draw, header)
        length = len(text) if draw.random() < 0.9 else draw.choice((0, 1, len(text) + 1, 2**31, 2**63, 2**64 - 1))
        data = struct.pack("<Q", length) + text + bytes(draw.choice((128, 128, 128, 128, 0, 127, 256)))
        for path in self.folder.iterdir():
            path.unlink()
        if sharded:
            (self.folder / "model.safetensors.index.json").write_bytes(to_bytes(draw, index))
        (self.folder / ("model-00001-of-00001.safetensors" if sharded else "model.safetensors")).write_bytes(data)

        def case() -> None:
            source = SafetensorsSource(self.folder)
            for name in source.shapes():
                source.read(name)

        return case


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_cases(count: int, seed: int, folder: Path) -> int:
    """Runs cases `seed` to `seed + count - 1`; how many were refused. Raises AssertionError that names the failing case."""
    fuzzer, refused, before = Fuzzer(folder), 0, peak()
    for number in range(seed, seed + count):
        draw = random.Random(number)
        case = (fuzzer.tensors if number % 4 == 3 else fuzzer.config)(draw)
        started = time.perf_counter()
        try:
            case()
        except UserError as error:
            refused += 1
            message = str(error)
            assert message.isprintable() and len(message) <= MOST_MESSAGE, f"case {number}: {message!r}"
        except Exception as error:
            raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - started
        assert seconds < MOST_SECONDS, f"case {number}: {seconds:.1f} s"
        assert peak() - before < MOST_BYTES, f"case {number}: {(peak() - before) / 1e6:.0f} MB"
    return refused


def main() -> None:
    parser = argparse.ArgumentParser(description="Reads damaged config.json and safetensors files.")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="the first case; case N is always the same")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        before, started = peak(), time.perf_counter()
        refused = run_cases(args.cases, args.seed, Path(folder))
        seconds, grown = time.perf_counter() - started, (peak() - before) / 1e6
    print(
        f"{args.cases} cases, {refused} refused in one line, {args.cases - refused} read, {seconds:.0f} s, {grown:.0f} MB more at the peak"
    )


if __name__ == "__main__":
    main()

"""Our own checkpoints: what is saved comes back, and nothing that happens while saving harms what was there."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llminfer import params
from llminfer.config import ModelConfig, Rope, from_toml
from llminfer.errors import UserError
from llminfer.quant import QTensor, quantize_int8, quantize_to_mxfp4
from llminfer.weights import orbax, saving
from llminfer.weights.assemble import leaf_shapes, leaves_of, params_of

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
RICH = ModelConfig(
    **dict(name="rich", vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2),
    **dict(head_dim=8, max_position=64, windows=(8, 8, 0), rope_layers=(0, 1, -1), norm="layer", norm_bias=True, post_norm=True),
    **dict(learned_positions=True, qk_norm="heads", qkv_bias=True, o_bias=True, mlp_bias=True, attn_softcap=50.0, norm_offset=1.0),
    ropes=(Rope(theta=1e6, kind="longrope", short_factors=(1.0, 1.5, 2.0, 2.5), long_factors=(2.0, 3.0, 4.0, 5.0)), Rope(dim=4)),
    eos_ids=(1, 2),
)


def random_leaves(c: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in leaf_shapes(c).items()}


def same(one, other) -> bool:
    if isinstance(one, QTensor):
        return isinstance(other, QTensor) and same(one.q, other.q) and same(one.scale, other.scale)
    one, other = np.asarray(one), np.asarray(other)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def read(folder: Path) -> dict:
    return dict(orbax.read_leaves(folder, orbax.read_config(folder)))


def test_tree_comes_back_as_it_was(tmp_path) -> None:
    leaves: dict = random_leaves(RICH)
    leaves["embed"] = leaves["embed"].astype(BFLOAT16)
    leaves["layers.0.o"] = jnp.asarray(leaves["layers.0.o"], jnp.bfloat16)
    leaves["layers.1.qkv"] = jax.jit(quantize_int8)(leaves["layers.1.qkv"])
    leaves["layers.2.qkv"] = jax.jit(quantize_to_mxfp4)(leaves["layers.2.qkv"])
    tree = params_of(leaves, RICH)
    orbax.save(tmp_path / "m", leaves_of(tree), RICH)
    found = read(tmp_path / "m")
    assert orbax.read_config(tmp_path / "m") == RICH
    assert list(found) == list(leaf_shapes(RICH)) and all(same(found[name], leaves[name]) for name in leaves)
    assert all(type(leaf) is np.ndarray for name, leaf in found.items() if name not in ("layers.1.qkv", "layers.2.qkv"))
    # Another model takes its place, and a stacked tree is saved as a listed one.
    other = from_toml("tiny_window")
    leaves = random_leaves(other)
    stacked = params.stack(params_of(leaves, other), other)
    assert stacked.stacked
    orbax.save(tmp_path / "m", leaves_of(stacked), other, lambda folder: (folder / "tokenizer.json").write_text("{}") and None)
    assert (tmp_path / "m/tokenizer.json").is_file() and orbax.read_config(tmp_path / "m") == other
    assert all(same(leaf, leaves[name]) for name, leaf in read(tmp_path / "m").items())
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
import numpy as np
from llminfer.config import from_toml
from llminfer.weights import orbax, saving
from llminfer.weights.assemble import leaf_shapes

c, target, moment = from_toml("tiny"), Path(sys.argv[1]), sys.argv[2]
leaves = lambda value: {name: np.full(shape, value, np.float32) for name, shape in leaf_shapes(c).items()}
start = time.monotonic()
orbax.save(target, leaves(1).items(), c)
took = time.monotonic() - start
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
swap = saving._swap
if moment == "swapped":
    saving._swap = lambda *paths: (swap(*paths), die())
else:
    threading.Timer(float(moment) * took, die).start()
while True:
    orbax.save(target, leaves(2).items(), c)
"""


def test_a_killed_save_leaves_the_old_or_the_new(tmp_path) -> None:
    moments = ["0", "0.2", "0.5", "0.8", "swapped"]
    running = [subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / moment / "m"), moment]) for moment in moments]
    values = {}
    for moment, process in zip(moments, running, strict=True):
        assert process.wait(60) == -9
        found = read(tmp_path / moment / "m")
        (values[moment],) = {float(x) for leaf in found.values() for x in np.unique(leaf)}
        c = from_toml("tiny")
        assert list(found) == list(leaf_shapes(c))
        orbax.save(tmp_path / moment / "m", {name: leaf + 2 for name, leaf in found.items()}.items(), c)
        assert [p.name for p in (tmp_path / moment).iterdir()] == ["m"]  # nothing is left of the killed one
        assert read(tmp_path / moment / "m")["embed"][0, 0] == values[moment] + 2
    assert values["0"] == 1.0 and values["swapped"] == 2.0


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from llminfer.config import from_toml
from llminfer.errors import UserError
from llminfer.weights import orbax
from llminfer.weights.assemble import leaf_shapes

c = from_toml("tiny")
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for most in (0, 1000, 100_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        orbax.save(Path(sys.argv[1]), {name: np.zeros(shape, np.float32) for name, shape in leaf_shapes(c).items()}.items(), c)
    except UserError as error:
        print(error)
"""


def test_a_full_disk_leaves_the_old(tmp_path, monkeypatch) -> None:
    c = from_toml("tiny")
    leaves = random_leaves(c)
    orbax.save(tmp_path / "m", leaves.items(), c)
    # A limit on the size of a file fails as a full disk does, in the middle of a write.
    ran = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "m")], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == [f"{tmp_path / 'm'}: cannot be written (File too large); what was there is unchanged"] * 3
    assert "Traceback" not in ran.stderr
    with monkeypatch.context() as patch:
        patch.setattr(saving.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(UserError, match=r"GB are to be written, the disk has 0\.00 GB free"):
            orbax.save(tmp_path / "m", leaves.items(), c)
    assert all(same(leaf, leaves[name]) for name, leaf in read(tmp_path / "m").items())
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_where_names_cannot_be_exchanged(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(saving, "_exchange", lambda *_: False)
    (tmp_path / "d").mkdir()
    for text in "ab":
        with saving.replacing(tmp_path / "d") as folder:
            (folder / "file").write_text(text)
        assert (tmp_path / "d/file").read_text() == text and [p.name for p in tmp_path.iterdir()] == ["d"]
    (tmp_path / "d").rename(tmp_path / ".d.old")  # killed between two renames
    with pytest.raises(ZeroDivisionError), saving.replacing(tmp_path / "d") as folder:
        (folder / "file").write_text(str(1 / 0))
    assert (tmp_path / "d/file").read_text() == "b" and [p.name for p in tmp_path.iterdir()] == ["d"]


def test_two_writers_at_once_and_a_file_in_the_way(tmp_path) -> None:
    with saving.replacing(tmp_path / "d") as folder:
        (folder / "file").write_text("one")
        with pytest.raises(UserError, match="another process is writing it"), saving.replacing(tmp_path / "d"):
            pass
        assert (folder / "file").read_text() == "one"
    assert (tmp_path / "d/file").read_text() == "one"
    with pytest.raises(UserError, match="is a file"), saving.replacing(tmp_path / "d/file"):
        pass
    with pytest.raises(UserError, match="cannot be written"), saving.replacing(tmp_path / "d/file/e"):
        pass


# Orbax reads in threads of its own, some of which fail only after its event loop is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_is_told_in_one_line(tmp_path) -> None:
    """Every file of a checkpoint cut short, emptied, overwritten or gone: the same weights, or one clear error."""
    c = from_toml("tiny")
    leaves = random_leaves(c)
    orbax.save(tmp_path / "m", leaves.items(), c)
    refused = 0
    files = [p.relative_to(tmp_path / "m") for p in (tmp_path / "m").rglob("*") if p.is_file()]
    for path in files:
        data = (tmp_path / "m" / path).read_bytes()
        for changed in (None, b"", data[: len(data) // 2], b"\xff" * 64):
            shutil.rmtree(tmp_path / "bad", ignore_errors=True)
            shutil.copytree(tmp_path / "m", tmp_path / "bad")
            if changed is None:
                (tmp_path / "bad" / path).unlink()
            else:
                (tmp_path / "bad" / path).write_bytes(changed)
            try:
                found = read(tmp_path / "bad")
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and str(tmp_path / "bad") in str(error)
            else:
                assert all(same(leaf, leaves[name]) for name, leaf in found.items()), f"{path} {changed!r}"
    assert refused >= 8
    time.sleep(0.5)
    gc.collect()  # what fails late, fails in this test


def test_what_is_not_ours_is_refused(tmp_path) -> None:
    c = from_toml("tiny")
    orbax.save(tmp_path / "m", random_leaves(c).items(), c)
    card = json.loads((tmp_path / "m" / orbax.CARD).read_text())
    for changed, said in [
        ({"version": 2}, "version 2: this version of llminfer reads"),
        ({"format": "x"}, "format 'x'"),
        ({"config": {**card["config"], "wings": 2}}, "wings"),
        ({"config": {**card["config"], "gated": 1}}, "gated=1"),
        ({"config": {**card["config"], "windows": None}}, "windows=None"),
        ({"config": {**card["config"], "ropes": [{"theta": "x"}]}}, "rope_theta"),
        ({"config": {"name": "x"}}, "damaged"),
        ({"config": 3}, "damaged"),
        ({"config": {**card["config"], "intermediate_size": 8}}, "layers.0.gate_up is"),
        ({"config": {**card["config"], "num_layers": 3}}, "expected None"),
    ]:
        (tmp_path / "m" / orbax.CARD).write_text(json.dumps(card | changed))
        with pytest.raises(UserError, match=said):
            read(tmp_path / "m")
    (tmp_path / "m" / orbax.CARD).write_text(json.dumps(card))
    assert dataclasses.replace(orbax.read_config(tmp_path / "m"), name="y") == dataclasses.replace(c, name="y")
    shutil.rmtree(tmp_path / "m" / orbax.WEIGHTS)
    with pytest.raises(UserError, match="has no folder params"):
        read(tmp_path / "m")

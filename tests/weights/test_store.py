"""The store of prepared weights: mapped when whole, rebuilt when not, and never in the way."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf_writer import tiny, write_model

from llminfer.errors import UserError
from llminfer.weights import open_model, store
from llminfer.weights.store import cache_root, file_key, prepared

KEY = {"path": "/models/a.gguf", "size": 10, "mtime_ns": 5, "sha256": "0"}
TREE = {
    "embed": np.arange(1500, dtype=np.float32).reshape(3, 500),
    "norm": np.ones(3, ml_dtypes.bfloat16),
    "layers.0.qkv": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
}
SHAPES = {name: leaf.shape for name, leaf in TREE.items()}


class Build:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return dict(TREE)


def same(tree) -> None:
    assert list(tree) == list(TREE)
    for name, leaf in TREE.items():
        assert tree[name].dtype == leaf.dtype
        np.testing.assert_array_equal(tree[name], leaf)


def entry_of(root: Path) -> Path:
    (entry,) = root.iterdir()
    return entry


def test_built_once_then_mapped(tmp_path):
    root, build = tmp_path / "a" / "b", Build()
    for _ in range(3):
        tree = prepared(KEY, SHAPES, build, root)
        same(tree)
        for leaf in tree.values():
            assert type(leaf) is np.ndarray and not leaf.flags.writeable and leaf.ctypes.data % 4096 == 0
    assert build.calls == 1
    assert sorted(p.name for p in entry_of(root).iterdir()) == ["meta.json", "weights.bin"]


def meta_with(entry: Path, change) -> None:
    meta = json.loads((entry / "meta.json").read_text())
    change(meta)
    (entry / "meta.json").write_text(json.dumps(meta))


def cut(entry: Path, to: int) -> None:
    data = (entry / "weights.bin").read_bytes()
    (entry / "weights.bin").write_bytes(data[:to] if to >= 0 else data + b"x")


DAMAGE = {
    "short": lambda e: cut(e, 5000),
    "long": lambda e: cut(e, -1),
    "empty": lambda e: cut(e, 0),
    "no data": lambda e: (e / "weights.bin").unlink(),
    "no meta": lambda e: (e / "meta.json").unlink(),
    "meta": lambda e: (e / "meta.json").write_text("{"),
    "meta binary": lambda e: (e / "meta.json").write_bytes(b"\xff\x00"),
    "meta list": lambda e: (e / "meta.json").write_text("[]"),
    "key": lambda e: meta_with(e, lambda m: m["key"].update(size=11)),
    "format": lambda e: meta_with(e, lambda m: m["key"].update(format=0)),
    "shape": lambda e: meta_with(e, lambda m: m["leaves"]["norm"].update(shape=[4])),
    "dtype": lambda e: meta_with(e, lambda m: m["leaves"]["norm"].update(dtype="object")),
    "smaller dtype": lambda e: meta_with(e, lambda m: m["leaves"]["layers.0.qkv"].update(dtype="bfloat16")),
    "offset": lambda e: meta_with(e, lambda m: m["leaves"]["norm"].update(offset=-4096)),
    "offset type": lambda e: meta_with(e, lambda m: m["leaves"]["norm"].update(offset="x")),
    "leaf": lambda e: meta_with(e, lambda m: m["leaves"].pop("norm")),
    "leaves": lambda e: meta_with(e, lambda m: m.update(leaves=None)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_rebuilt(tmp_path, damage):
    build = Build()
    prepared(KEY, SHAPES, build, tmp_path)
    DAMAGE[damage](entry_of(tmp_path))
    same(prepared(KEY, SHAPES, build, tmp_path))
    assert build.calls == 2
    same(prepared(KEY, SHAPES, build, tmp_path))
    assert build.calls == 2


def test_an_entry_of_another_model_is_rebuilt(tmp_path):
    prepared(KEY, SHAPES, Build(), tmp_path)
    other = {"embed": np.zeros(4, np.float32)}
    assert list(prepared(KEY, {"embed": (4,)}, lambda: other, tmp_path)) == ["embed"]


def test_old_entries_of_the_same_file_are_removed(tmp_path):
    prepared(KEY, SHAPES, Build(), tmp_path)
    old = entry_of(tmp_path)
    prepared(KEY | {"path": "/models/b.gguf"}, SHAPES, Build(), tmp_path)
    build = Build()
    prepared(KEY | {"mtime_ns": 6}, SHAPES, build, tmp_path)
    assert build.calls == 1 and not old.exists() and len(list(tmp_path.iterdir())) == 2


def test_no_room_leaves_nothing_behind(tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=store.SPARE_BYTES + 10_000))
    with caplog.at_level(logging.WARNING):
        same(prepared(KEY, SHAPES, Build(), tmp_path))
    assert "were not stored" in caplog.text and list(tmp_path.iterdir()) == []


def test_a_failing_write_leaves_nothing_behind(tmp_path, monkeypatch, caplog):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        same(prepared(KEY, SHAPES, Build(), tmp_path))
    assert "No space left" in caplog.text and list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_made(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        same(prepared(KEY, SHAPES, Build(), tmp_path / "file" / "prepared"))
    assert "were not stored" in caplog.text


def test_what_a_killed_process_left_is_removed_later(tmp_path):
    fresh, stale = tmp_path / ".writing-new", tmp_path / ".writing-old"
    for folder in (fresh, stale):
        folder.mkdir()
        (folder / "weights.bin").write_bytes(b"x")
    os.utime(stale, (time.time() - 2 * store.STALE_SECONDS,) * 2)
    prepared(KEY, SHAPES, Build(), tmp_path)
    assert fresh.exists() and not stale.exists()


def test_a_faster_process_wins(tmp_path):
    def build():
        prepared(KEY, SHAPES, Build(), tmp_path)
        return dict(TREE)

    same(prepared(KEY, SHAPES, build, tmp_path))
    assert not entry_of(tmp_path).name.startswith(".")


RACE = """
import sys, numpy as np
from pathlib import Path
from llminfer.weights.store import prepared
for i in range(40):
    key = {"path": "/m", "size": i // 4}
    tree = prepared(key, {"a": (300_000,)}, lambda: {"a": np.full(300_000, i // 4, np.float32)}, Path(sys.argv[1]))
    assert np.all(tree["a"] == i // 4), i
"""


def test_processes_that_race(tmp_path):
    root = Path(__file__).parents[2]
    runs = [subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path)], cwd=root, stderr=subprocess.PIPE) for _ in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=60)
        assert run.returncode == 0, errors.decode()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_model_is_prepared_once_until_its_file_changes(tmp_path, monkeypatch):
    path, cache = tmp_path / "m.gguf", tmp_path / "cache"
    write_model(path, tiny())
    first = open_model(str(path), str(cache))
    assert first.prepared_root == cache / "prepared" and not cache.exists()
    first.load()
    entry = entry_of(cache / "prepared")
    with monkeypatch.context() as patch:
        patch.setattr("llminfer.weights.assemble.read_leaves", None)
        assert not open_model(str(path), str(cache)).load().listed[0].qkv.flags.writeable
    hf = write_model(path, tiny(), seed=7)
    params = open_model(str(path), str(cache)).load()
    np.testing.assert_array_equal(params.final_norm, hf["final_norm"])
    assert entry_of(cache / "prepared") != entry
    checkpoint = open_model(str(path), str(tmp_path / "none"))
    checkpoint.prepared_root = None
    assert checkpoint.load().listed[0].qkv.flags.writeable and not (tmp_path / "none").exists()


def test_file_key(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(3_000_000))
    key = file_key(path)
    path.write_bytes(bytes(2_999_999) + b"x")
    os.utime(path, ns=(key["mtime_ns"], key["mtime_ns"]))
    changed = file_key(path)
    assert {k for k in key if key[k] != changed[k]} == {"sha256"}
    with pytest.raises(UserError, match="No such file"):
        file_key(tmp_path / "y")


def test_cache_root(monkeypatch, tmp_path):
    assert cache_root(str(tmp_path)) == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / "llminfer"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_root(None) == Path.home() / ".cache" / "llminfer"

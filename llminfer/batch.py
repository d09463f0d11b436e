"""What one step works on: the arrays of a Batch, packed by the host from the scheduler's Plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import numpy as np

from llminfer.request import MAX_STOPS
from llminfer.sampler import SamplingBatch
from llminfer.scheduler import Item, Plan


@flax.struct.dataclass
class Batch:
    """A ragged batch of T token rows of R sequences; all int32. Row t of no sequence has position 0 and is ignored.

    tokens [T]: ids; a negative one stands for the token that its slot drew last, still on the device.
    positions [T]. reach [T]: length of the sequence as far as it is known: its prompt's, or the context's where that is longer.
    q_start, q_len, kv_len [R] and tables (one [R, pages a sequence] a page group): as paged_attention.
    slots [R]: the slot of each sequence. draws [R]: 1 where a token is to be drawn after the sequence's last row.
    """

    tokens: Any
    positions: Any
    reach: Any
    q_start: Any
    q_len: Any
    kv_len: Any
    slots: Any
    draws: Any
    tables: tuple[Any, ...]
    sampling: SamplingBatch


@flax.struct.dataclass
class Loop:
    """What the decode loop needs beside the batch. steps, eager: int32 scalars: at most this many steps; leave as soon
    as a sequence ends (someone waits for its slot). limit [R]: tokens each may still draw. stops [R, S]: token ids
    that end it, -1 where unused."""

    steps: Any
    eager: Any
    limit: Any
    stops: Any


@dataclass(frozen=True)
class BatchShape:
    """Static sizes of a Batch: token rows T, sequences R, pages a sequence, page groups."""

    tokens: int
    rows: int
    pages: int
    groups: int


def pack(items: Sequence[Item], shape: BatchShape) -> Batch:
    """The NumPy Batch of a plan's items; rows beyond them belong to nobody. Device memory is not touched."""
    ints = {name: np.zeros(shape.rows, np.int32) for name in ("q_start", "q_len", "kv_len", "slots", "draws")}
    tokens, positions, reach = (np.zeros(shape.tokens, np.int32) for _ in range(3))
    tables = tuple(np.zeros((shape.rows, shape.pages), np.int32) for _ in range(shape.groups))
    sampling = no_sampling(shape.rows)
    at = 0
    for row, item in enumerate(items):
        seq, end = item.seq, item.start + item.count
        tokens[at : at + item.count] = seq.slice(item.start, end)
        positions[at : at + item.count] = np.arange(item.start, end)
        reach[at : at + item.count] = np.maximum(np.arange(item.start + 1, end + 1), len(seq.request.prompt))
        ints["q_start"][row], ints["q_len"][row], ints["kv_len"][row] = at, item.count, end
        ints["slots"][row], ints["draws"][row] = seq.slot, min(item.draws, 1)
        for table, pages in zip(tables, seq.pages, strict=True):
            table[row, : len(pages)] = pages
        params = seq.request.params
        sampling.temperature[row], sampling.top_k[row] = params.temperature, params.top_k
        sampling.top_p[row], sampling.min_p[row], sampling.key[row] = params.top_p, params.min_p, seq.key
        at += item.count
    for table in tables:
        np.maximum(table, 0, out=table)  # pages that a window left behind: any valid id, never read
    if shape.tokens == shape.rows:
        ints["q_start"] = np.arange(shape.rows, dtype=np.int32)
    return Batch(tokens=tokens, positions=positions, reach=reach, tables=tables, sampling=sampling, **ints)


def pack_loop(plan: Plan, rows: int) -> Loop:
    """The NumPy Loop of a decode plan."""
    limit, stops = np.zeros(rows, np.int32), np.full((rows, MAX_STOPS), -1, np.int32)
    for row, item in enumerate(plan.items):
        limit[row] = item.draws
        ends = sorted(item.seq.request.end_ids)
        stops[row, : len(ends)] = ends
    return Loop(steps=np.int32(plan.steps), eager=np.int32(plan.eager), limit=limit, stops=stops)


def no_sampling(rows: int) -> SamplingBatch:
    """Greedy rows, to be filled in."""
    return SamplingBatch(
        temperature=np.zeros(rows, np.float32),
        top_k=np.zeros(rows, np.int32),
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        key=np.zeros((rows, 2), np.uint32),
        position=np.zeros(rows, np.int32),
    )

"""What one step works on: the arrays of a Batch, packed by the host from the scheduler's Plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import numpy as np

from llminfer import request
from llminfer.request import MAX_BIAS, MAX_STOPS
from llminfer.sampler import SamplingBatch
from llminfer.scheduler import Item, Plan


@flax.struct.dataclass
class Batch:
    """A ragged batch of T token rows of R sequences; all int32. Row t of no sequence has position 0 and is ignored.

    tokens [T]: ids; a negative one stands for the token of its slot's history, still on the device (one token a sequence then).
    positions [T]. reach [T]: length of the sequence as far as it is known: its prompt's, or the context's where that is longer.
    q_start, q_len, kv_len [R] and tables (one [R, pages a sequence] a page group): as paged_attention.
    slots [R]: the slot of each sequence. draws [R]: 1 where a token is to be drawn after the sequence's last row.
    ring: in a program, over how many devices rows are in zigzag order, which are then those of one sequence from its first on; 1: as said.
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
    ring: int = flax.struct.field(pytree_node=False, default=1)


@flax.struct.dataclass
class Loop:
    """What the decode loop needs beside the batch. steps, eager: int32 scalars: at most this many steps; leave as soon
    as a sequence ends (someone waits for its slot). limit [R]: tokens each may still draw."""

    steps: Any
    eager: Any
    limit: Any


@dataclass(frozen=True)
class BatchShape:
    """Static sizes of a Batch: token rows T, sequences R, pages a sequence, page groups."""

    tokens: int
    rows: int
    pages: int
    groups: int


def pack(items: Sequence[Item], shape: BatchShape) -> Batch:
    """The NumPy Batch of a plan's items; rows beyond them belong to nobody. Tokens of chunks come before single ones, so that the first
    chunk begins a kernel's tile. Device memory is not touched."""
    ints: dict[str, Any] = {name: np.zeros(shape.rows, np.int32) for name in ("q_start", "q_len", "kv_len", "slots", "draws")}
    tokens, positions, reach = (np.zeros(shape.tokens, np.int32) for _ in range(3))
    tables = tuple(np.zeros((shape.rows, shape.pages), np.int32) for _ in range(shape.groups))
    sampling = no_sampling(shape.rows)
    at = 0
    for row, item in sorted(enumerate(items), key=lambda numbered: numbered[1].count == 1):
        seq, end = item.seq, item.start + item.count
        known = seq.slice(item.start, end)
        tokens[at : at + item.count] = -1  # what is drawn already, and not read
        tokens[at : at + len(known)] = known
        positions[at : at + item.count] = np.arange(item.start, end)
        reach[at : at + item.count] = np.maximum(np.arange(item.start + 1, end + 1), len(seq.request.prompt))
        ints["q_start"][row], ints["q_len"][row], ints["kv_len"][row] = at, item.count, end
        ints["slots"][row], ints["draws"][row] = seq.slot, min(item.draws, 1)
        for table, pages in zip(tables, seq.pages, strict=True):
            table[row, : len(pages)] = pages
        _pack_sampling(sampling, row, seq)
        at += item.count
    for table in tables:
        np.maximum(table, 0, out=table)  # pages that a window left behind: any valid id, never read
    if shape.tokens == shape.rows:
        ints["q_start"] = np.arange(shape.rows, dtype=np.int32)
    return Batch(tokens=tokens, positions=positions, reach=reach, tables=tables, sampling=sampling, **ints)


def _pack_sampling(sampling: SamplingBatch, row: int, seq: request.Sequence) -> None:
    """All but the position, which the programs know."""
    params, prompt = seq.request.params, len(seq.request.prompt)
    sampling.temperature[row], sampling.top_k[row] = params.temperature, params.top_k
    sampling.top_p[row], sampling.min_p[row], sampling.key[row] = params.top_p, params.min_p, seq.key
    sampling.prompt_len[row] = prompt
    ends = sorted(seq.request.end_ids)
    sampling.ends[row, : len(ends)] = ends
    if params.penalises:
        sampling.penalties[row] = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
    if params.logit_bias:
        sampling.bias_ids[row, : len(params.logit_bias)] = list(params.logit_bias)
        sampling.bias[row, : len(params.logit_bias)] = list(params.logit_bias.values())
    if params.min_tokens:
        sampling.end_from[row] = prompt + params.min_tokens
    if params.logprobs is not None:
        sampling.logprobs[row] = params.logprobs


def pack_loop(plan: Plan, rows: int) -> Loop:
    """The NumPy Loop of a decode plan."""
    limit = np.zeros(rows, np.int32)
    limit[: len(plan.items)] = [item.draws for item in plan.items]
    return Loop(steps=np.int32(plan.steps), eager=np.int32(plan.eager), limit=limit)


def ship(tree: Any) -> np.ndarray:
    """The arrays of a tree, all of 32-bit numbers, one after the other in one int32 array: one transfer, where each costs as much."""
    return np.concatenate([np.ravel(leaf).view(np.int32) for leaf in jax.tree.leaves(tree)])


def unship(flat: jax.Array, like: Any) -> Any:
    """On the device: the tree of which `ship` made `flat`; its arrays have the shapes and types of `like`."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])
    pieces = [flat[end - leaf.size : end].reshape(leaf.shape) for leaf, end in zip(leaves, ends, strict=True)]
    return structure.unflatten(jax.lax.bitcast_convert_type(x, leaf.dtype) for x, leaf in zip(pieces, leaves, strict=True))


def no_sampling(rows: int) -> SamplingBatch:
    """Greedy rows, to be filled in."""
    return SamplingBatch(
        temperature=np.zeros(rows, np.float32),
        top_k=np.zeros(rows, np.int32),
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        key=np.zeros((rows, 2), np.uint32),
        position=np.zeros(rows, np.int32),
        prompt_len=np.zeros(rows, np.int32),
        penalties=np.tile(np.array([1, 0, 0], np.float32), (rows, 1)),
        bias_ids=np.full((rows, MAX_BIAS), -1, np.int32),
        bias=np.zeros((rows, MAX_BIAS), np.float32),
        ends=np.full((rows, MAX_STOPS), -1, np.int32),
        end_from=np.zeros(rows, np.int32),
        logprobs=np.full(rows, -1, np.int32),
    )

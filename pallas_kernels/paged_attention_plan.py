"""The static side of the TPU's paged attention: sizes of blocks and tiles, and work items. See
paged_attention_tpu.py for the algorithm."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.tuning import lookup

BLOCK_KEYS = 1024  # keys of one block, before VMEM bounds it
BLOCK_BYTES = 4 << 20  # of one of the two key-value buffers, for decode
PIECE_KEYS = 512  # keys that a tile looks at in one go
TILE_TOKENS, TILE_ROWS = 256, 1024  # of a query tile: tokens, and tokens times query heads of one key-value head
CHUNK_ROWS = 4096  # of all key-value heads in one step
TABLE_ENTRIES = 240 << 10  # of the page table: scalar memory holds 1 MiB on every TPU so far
LANES = 128
VMEM_BYTES = 15 << 20  # that a step may take where it can be less: a v4 has 16 MiB, and what is left the compiler uses
MOST_VMEM_BYTES = 96 << 20  # on chips that have more


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one kernel. Sizes in elements."""

    heads: int  # key-value heads of one step
    chunks: int  # steps that share the heads: of one work item each its own part
    group: int  # query heads of one key-value head
    head_dim: int
    row: int  # lanes of a row of the cache: key, value, and what fills the last tile of lanes
    page: int
    pages_per_seq: int
    block_pages: int
    tile: int  # tokens of a query tile; 1 = decode
    rows: int  # rows of a query tile and key-value head: (group, token) flattened, or the group padded, for decode
    align: int  # rows of a window written to the cache
    write_rows: int  # rows of one write: a part of a window
    softcap: float | None
    compute: jnp.dtype  # of the operands of the matrix products
    sinks: int = 0  # first positions that are seen also beyond the window
    logits: bool = False  # whether each query head has a logit that takes part in its softmax
    tree_words: int = 0  # words of 32 bits that say which new tokens of its sequence a token sees; 0: all before it
    lse: bool = False  # whether the logarithm of each row's sum is asked for
    quantized: bool = False  # whether pages have scales
    dealt: int = 0  # caches that pages are dealt out to, 0: all are here. Tiles then write nothing; see paged_attention_tpu.Dealt
    piece_keys: int = 0  # keys that a tile looks at in one go, at most; 0: PIECE_KEYS

    @property
    def decode(self) -> bool:
        return self.tile == 1

    @property
    def reads(self) -> bool:
        """Whether new rows are in the cache already, and positions are not places."""
        return self.dealt > 0 and not self.decode

    @property
    def block(self) -> int:
        return self.block_pages * self.page

    @property
    def piece(self) -> int:
        """Keys that a tile looks at in one go."""
        return max(n for n in range(16, min(self.piece_keys or PIECE_KEYS, self.block) + 1, 16) if self.block % n == 0)

    @property
    def probe(self) -> int:
        """Keys of a piece that give the first reference, and that are looked at in one go where each go takes a new maximum."""
        return self.piece // 4 if self.piece % (4 * LANES) == 0 else self.piece

    @property
    def short_block(self) -> int:
        """Keys that decode looks at in a block which ends early."""
        return self.block // 4 if self.block % (4 * LANES) == 0 else self.block

    @property
    def split(self) -> bool:
        """Whether keys and values can be cut out of a cache row at a lane tile. If not, a query is padded with zeros instead."""
        return self.head_dim % LANES == 0

    @property
    def width(self) -> int:
        """Lanes of a row of a query head."""
        return self.head_dim if self.split else self.row

    @property
    def result_width(self) -> int:
        """Lanes of an output row of a query head."""
        return self.width if self.decode else pl.cdiv(self.head_dim, LANES) * LANES

    @property
    def value_lane(self) -> int:
        return self.head_dim if self.split else 0

    @property
    def first_value(self) -> int:
        """Place of the first value in what the weights' product with `value_lane` and on gives."""
        return self.head_dim - self.value_lane

    @property
    def windows(self) -> int:
        """Windows that one item's new rows can touch."""
        return 1 if self.decode else 2

    @property
    def sink_rows(self) -> int:
        """Rows of the pages that hold the sinks."""
        return pl.cdiv(self.sinks, self.page) * self.page


def work_items(plan: Plan, rows: int, q_start, q_len):
    """Overlaps of tiles and sequences, ordered by row: (item_seq, item_tile, item_count). Dense comparisons: no sort, no scatter."""
    tiles, seqs = pl.cdiv(rows, plan.tile), q_start.shape[0]
    size = min(seqs, rows) if plan.tile == 1 else min(tiles + seqs, rows)
    first_tile = q_start // plan.tile
    count = jnp.where(q_len > 0, (q_start + q_len - 1) // plan.tile - first_tile + 1, 0)
    before = jnp.sum(jnp.where(q_start[None, :] < q_start[:, None], count[None, :], 0), axis=1, dtype=jnp.int32)
    total = jnp.sum(count, dtype=jnp.int32)
    n = jnp.minimum(jnp.arange(size, dtype=jnp.int32), jnp.maximum(total - 1, 0))[:, None]
    hit = (n >= before) & (n < before + count)
    pick = lambda x: jnp.sum(jnp.where(hit, x, 0), axis=1, dtype=jnp.int32)
    return pick(jnp.arange(seqs, dtype=jnp.int32)), pick(first_tile - before + n), total.reshape(1)


def tuned_blocks(chip: str | None, q, kv, q_max: int) -> dict[str, int]:
    """What tuned.toml has for a shape on a chip, of {"block_k": keys of a block, "piece": keys that a tile looks at in one go, "tile":
    tokens of a query tile}; empty for nothing, and for float32, which needs more VMEM."""
    if not chip or q.dtype.itemsize != 2:
        return {}
    about: dict[str, Any] = dict(
        kv_heads=kv.shape[2], group=q.shape[1] // kv.shape[2], head_dim=q.shape[2], page=kv.shape[3], dtype=str(kv.dtype)
    )
    return lookup("paged_attention", chip, kind="decode" if q_max == 1 else "tiles", **about) or {}


def make_plan(q, kv, pages_per_seq: int, q_max: int, softcap: float | None, sinks: int, blocks: dict[str, int] | None = None) -> Plan:
    """The largest steps that fit VMEM: as many heads, then as many keys a block. blocks: sizes to begin with in place of the heuristic's,
    as tuned_blocks has them; made smaller where they do not fit. Raises ValueError where not even the smallest do."""
    heads, page, row, head_dim = *kv.shape[2:], q.shape[2]
    group, size, blocks = q.shape[1] // heads, kv.dtype.itemsize, blocks or {}
    most = blocks.get("block_k", BLOCK_KEYS)
    if q_max == 1:
        tile, rows, align, unit = 1, pl.cdiv(group, 8) * 8, math.lcm(32 // size, page if size == 1 else 1), page
        chunks = [heads]
    else:
        tile = max(32 // size, 16, min(blocks.get("tile", _default_tile(group)), pl.next_power_of_2(q_max)))
        while page % tile and tile % page:
            tile //= 2
        rows, align, unit = tile * group, math.lcm(tile, page) if size == 1 else tile, math.lcm(page, LANES)
        chunks = [n for n in range(heads, 0, -1) if heads % n == 0 and (n == 1 or n * rows <= CHUNK_ROWS)]
    unit = math.lcm(unit, align)  # a window never straddles two blocks
    compute = q.dtype if size == 1 else jnp.promote_types(q.dtype, kv.dtype)
    write_rows = math.gcd(page, 32 if size == 1 else 8) if q_max == 1 else min(align, page)  # a write stays in one page
    plan, need = None, 0
    for chunk in chunks:
        for keys in (most, most // 2, unit):
            keys = keys if "block_k" in blocks else min(keys, BLOCK_BYTES // (chunk * row * size))
            block_pages = min(max(keys // unit, 1), pl.cdiv(pages_per_seq * page, unit)) * unit // page
            sizes = (chunk, heads // chunk, group, head_dim, row, page, pages_per_seq, block_pages)
            plan = Plan(
                *sizes, tile, rows, align, write_rows, softcap, compute, sinks, quantized=size == 1, piece_keys=blocks.get("piece", 0)
            )
            need = vmem_bytes(plan, size)
            if need <= VMEM_BYTES:
                return plan
    if plan is None or need > MOST_VMEM_BYTES:
        raise ValueError(f"page={page}, kv_heads={heads}, head_dim={head_dim}: needs {need} bytes of VMEM; lower the page size")
    return plan


def _default_tile(group: int) -> int:
    """Tokens of a query tile: a power of two."""
    return min(TILE_TOKENS, 1 << (TILE_ROWS // group).bit_length() - 1)


def vmem_bytes(plan: Plan, kv_size: int) -> int:
    """VMEM that the kernel asks for, with room for the scores of the heads in flight."""
    row = plan.row * plan.heads * kv_size
    cache = row * (2 * plan.block + 2 * plan.windows * plan.align + 2 * max(plan.tile, 8) + plan.sink_rows)
    compute = jnp.dtype(plan.compute).itemsize
    if plan.quantized:
        cache += plan.row * plan.heads * plan.block * compute
    queries = 2 if plan.sinks == 0 else 4  # tiles in flight: of queries and of the sinks', each twice
    stats = 2 * LANES if plan.decode else 2 * 8
    sums = plan.width if plan.decode else plan.head_dim
    tile = plan.heads * plan.rows * ((plan.width * queries + 2 * plan.result_width) * compute + 4 * sums + stats * 4)
    scores = 4 * 128 * plan.block * 4 if plan.decode else (2 * compute - 1) * plan.rows * plan.piece
    return cache + tile + scores


def check(q, k, v, kv, page_table, q_max: int) -> None:
    if kv.ndim != 5 or kv.shape[4] % LANES:
        raise ValueError(f"kv has shape {kv.shape}: must be [layers, pages, kv_heads, page, lanes], lanes a multiple of {LANES}")
    heads, page, head_dim = kv.shape[2], kv.shape[3], q.shape[-1]
    if head_dim % 16:
        raise ValueError(f"head_dim {head_dim}: must be a multiple of 16")
    if page % 16 or not 16 <= page <= 256:
        raise ValueError(f"page size {page}: must be a multiple of 16 from 16 to 256")
    if kv.dtype.itemsize == 1 and page != 16 and page % 32:
        raise ValueError(f"page size {page}: must be 16 or a multiple of 32 for a cache of {kv.dtype}")
    if q.ndim != 3 or q.shape[2] != head_dim or q.shape[1] % heads:
        raise ValueError(f"q has shape {q.shape}: must be [T, a multiple of {heads} heads, {head_dim}]")
    if k.shape != (q.shape[0], heads, head_dim) or v.shape != k.shape:
        raise ValueError(f"k and v have shapes {k.shape} and {v.shape}: must be {(q.shape[0], heads, head_dim)}")
    for name, x in (("q", q), ("kv", kv)):
        legal = ("bfloat16", "float32") if name == "q" else ("bfloat16", "float32", "int8", "float8_e4m3fn")
        if x.dtype.name not in legal:
            raise ValueError(f"{name} has dtype {x.dtype}: must be one of {', '.join(legal)}")
    if page_table.ndim != 2 or page_table.size > TABLE_ENTRIES:
        raise ValueError(
            f"page_table has shape {page_table.shape}: must be [sequences, pages of a sequence], {TABLE_ENTRIES} entries at most"
        )
    if q_max < 1:
        raise ValueError(f"q_max is {q_max}: must be at least 1")

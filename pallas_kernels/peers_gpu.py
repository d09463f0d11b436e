"""Sums over the GPUs of one host, inside of a kernel: each row goes straight into the memory of the others, over NVLink.

Every device has a workspace that all can write: for each row three times a slot for the row of each device, and the number of the one that
is next. A row is written into its slot on all devices; where all have come, they are added up in the order of devices, so that all get the
same bits. A slot that waits is full of EMPTY, which no row has, so the numbers say themselves that they are there, and nothing has to be
ordered. What was read is made EMPTY in the next exchange, and written again two after that: by then its writer has seen a row that was
sent after the slot was emptied. For a device that never comes a kernel waits TRIES times, a minute or so, and ends in an error.

The addresses are the devices' own: they are made once, and belong to the mesh for which they were made. One thread exchanges 16 numbers, so
a row of D has D / 512 warps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ROWS = 256  # that one call may have
NUMBERS = 16  # bfloat16 that a thread has of a row
WIDTHS = tuple(512 << i for i in range(6))  # D that there are warps for
WAYS = (2, 4, 8)
SLOTS = 3
TRIES = 1 << 26
EMPTY = -1  # two bfloat16 that are no numbers; of a row that has them they become others that are none


def reachable(devices: Sequence[Any]) -> bool:
    """Whether kernels on each of these GPUs can write the memory of all others: the driver says it of devices of this process. And whether
    XLA has all its memory from the start, as is its default: to map more of it the driver may wait for a kernel that waits for another
    device, which would never come."""
    if any(device.process_index != jax.process_index() for device in devices):
        return False
    memory = [device.memory_stats() or {} for device in devices]
    if any(stats.get("pool_bytes", 0) < stats.get("bytes_limit", 1) for stats in memory):
        return False
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    numbers, found = [device.local_hardware_id for device in devices], ctypes.c_int()
    can = lambda a, b: cuda.cuDeviceCanAccessPeer(ctypes.byref(found), a, b) == 0 and found.value == 1
    return all(can(a, b) for a in numbers for b in numbers if a != b)


def shapes(mesh: Mesh, width: int) -> dict[str, Any]:
    """Of what `workspace` makes, with shardings."""
    ways, where = mesh.size, NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    words = ROWS + SLOTS * ways * ROWS * width // 2
    return {name: jax.ShapeDtypeStruct((ways, n), jnp.int32, sharding=where) for name, n in dict(table=3 + 2 * ways, space=words).items()}


def workspace(mesh: Mesh, width: int) -> dict[str, jax.Array]:
    """For rows of up to `width` numbers, by device. space: the memory, never to be copied or given away; table: what programs need of it,
    the device's number, and the low and high half of its own address, then of all in turn."""
    made = shapes(mesh, width)
    where = made["space"].sharding
    empty = lambda: jnp.full(made["space"].shape, EMPTY, jnp.int32).at[:, :ROWS].set(0)
    space = jax.jit(empty, out_shardings=where)()
    space.block_until_ready()
    at = {shard.device: shard.data.unsafe_buffer_pointer() for shard in space.addressable_shards}
    bases = [at[device] for device in mesh.devices.flat]
    table = [[i, *(half for base in (bases[i], *bases) for half in (base & 0xFFFFFFFF, base >> 32))] for i in range(mesh.size)]
    return {"table": jax.device_put(np.array(table, np.uint32).view(np.int32), where), "space": space}


def summed(row: Any, table: Any) -> Any:
    """Inside of a kernel with D / 512 warps whose program_id(0) is the row's number: the bfloat16 row [D] added up over the devices in
    float32, rounded once. table: the ref of this device's words."""
    ways = (table.shape[0] - 3) // 2
    word = lambda i: jnp.broadcast_to(plgpu.load(table.at[jnp.int32(i)]), row.shape)
    words = [word(i) for i in range(table.shape[0])]

    def asm(text: str, args: list[Any], dtype: Any, results: int) -> Any:
        operands = sum(NUMBERS * arg.dtype.itemsize // 4 for arg in args)
        constraints = ",".join(["=&r"] * results + ["r"] * operands)
        like = [jax.ShapeDtypeStruct(row.shape, dtype)]
        return plgpu.elementwise_inline_asm(text, args=args, constraints=constraints, pack=NUMBERS, result_shape_dtypes=like)[0]

    slot = asm(_next_slot(), words[1:3], jnp.int32, NUMBERS)  # by itself, so that it is asked for before the row is there
    return asm(_exchange(ways, 2 * row.shape[0]), [row, slot, *words], row.dtype, NUMBERS // 2)


def _next_slot() -> str:
    """PTX: which slot the row of this program uses, 16 times. Operands: the results, then the halves of the workspace's address."""
    lines = [
        ".reg .u64 at, base;",
        f"mov.b64 base, {{${NUMBERS}, ${2 * NUMBERS}}};",
        ".reg .u32 row;",
        "mov.u32 row, %ctaid.x;",
        "mul.wide.u32 at, row, 4;",
        "add.u64 at, base, at;",
        "ld.volatile.global.u32 $0, [at];",
        *(f"mov.b32 ${i}, $0;" for i in range(1, NUMBERS)),
    ]
    return "\n".join(["{", *lines, "}"])


def _exchange(ways: int, size: int) -> str:
    """PTX of one thread for rows of `size` bytes. Operands: 8 registers of the result, 8 of the row, then the slot and each word, all of
    them 16 times."""
    half, third = NUMBERS // 2, ways * ROWS * size
    word = lambda i: f"${2 * half + NUMBERS * i}"  # 0: the slot, 1: the device's number
    base = lambda i: f"mov.b64 base, {{{word(2 + 2 * i)}, {word(3 + 2 * i)}}};"  # 0: this device's, then those of all
    quad = lambda names, i: "{" + ", ".join(names[4 * i : 4 * i + 4]) + "}"
    into = ["cvt.u64.u32 at, place;", "add.u64 at, base, at;"]
    v, none = [f"v{i}" for i in range(half)], ["none"] * half
    lines = [
        ".reg .u32 thread, row, slot, device, place, mine, after, before, none, wide, tries;",
        ".reg .u64 base, at;",
        ".reg .pred first, empty, last;",
        f".reg .b32 v<{half}>;",
        f".reg .f32 low<{half}>, high<{half}>, more;",
        "mov.u32 thread, %tid.x;",
        "mov.u32 row, %ctaid.x;",
        f"mov.u32 slot, {word(0)};",
        f"mov.u32 device, {word(1)};",
        f"mov.b32 none, {EMPTY};",
        "mov.u32 tries, 0;",
        f"mad.lo.u32 mine, row, {size}, {4 * ROWS};",
        f"mad.lo.u32 mine, thread, {2 * NUMBERS}, mine;",  # of this thread, in the slot 0 of device 0
        f"mad.lo.u32 place, slot, {third}, mine;",
        f"mad.lo.u32 place, device, {ROWS * size}, place;",
    ]
    for i in range(half):
        lines += [f"setp.eq.u32 empty, ${half + i}, none;", f"selp.b32 v{i}, 0x7fff7fff, ${half + i}, empty;"]
    for to in range(ways):
        lines += [base(1 + to), *into, *(f"st.volatile.global.v4.b32 [at + {16 * i}], {quad(v, i)};" for i in range(half // 4))]
    lines += ["setp.eq.u32 first, slot, 0;", "sub.u32 before, slot, 1;", f"selp.u32 before, {SLOTS - 1}, before, first;"]
    lines += ["add.u32 after, slot, 1;", f"setp.eq.u32 last, after, {SLOTS};", "selp.u32 after, 0, after, last;"]
    lines += [base(0), f"mad.lo.u32 before, before, {third}, mine;"]
    for of in range(ways):
        lines += [f"add.u32 place, before, {of * ROWS * size};", *into]
        lines += [f"st.volatile.global.v4.b32 [at + {16 * i}], {quad(none, i)};" for i in range(half // 4)]
    # All threads know the slot before its number changes.
    lines += [
        "bar.sync 0;",
        "setp.eq.u32 first, thread, 0;",
        "mul.lo.u32 place, row, 4;",
        *into,
        "@first st.volatile.global.u32 [at], after;",
    ]
    lines += [f"mad.lo.u32 mine, slot, {third}, mine;"]
    for of in range(ways):
        lines += [f"add.u32 place, mine, {of * ROWS * size};", *into, f"WAIT{of}:"]
        lines += ["add.u32 tries, tries, 1;", f"setp.gt.u32 empty, tries, {TRIES};", "@empty trap;"]
        lines += [f"ld.volatile.global.v4.b32 {quad(v, i)}, [at + {16 * i}];" for i in range(half // 4)]
        for i in range(half):
            lines += [f"setp.eq.u32 empty, v{i}, none;", f"@empty bra WAIT{of};"]
        for i in range(half):
            for name, take in ((f"low{i}", f"shl.b32 wide, v{i}, 16;"), (f"high{i}", f"and.b32 wide, v{i}, 0xffff0000;")):
                lines += [take, f"mov.b32 {name}, wide;"] if of == 0 else [take, "mov.b32 more, wide;", f"add.f32 {name}, {name}, more;"]
    lines += [f"cvt.rn.bf16x2.f32 ${i}, high{i}, low{i};" for i in range(half)]
    return "\n".join(["{", *lines, "}"])

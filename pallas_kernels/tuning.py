"""Block sizes that were measured, by op, chip and shape: tuned.toml beside this file. What is not there is the op's own heuristic's.

An entry is a table of an op's array, `[[flash_attention]]`: chip, the shape keys it holds for, and `blocks`, its sizes. It holds where
each of its keys has the value that is asked for; an entry without a key holds for any value of it.
"""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("tuned.toml")


def lookup(op: str, chip: str, *, file: Path = FILE, **shape: int | str) -> dict[str, int] | None:
    """Block sizes of `op` on `chip` ("v4", "v5e", "v5p", "v6e", "tpu7x") at a shape, or None: the most specific entry of `file` that holds,
    of two equally specific ones the later. Raises ValueError for a file with a malformed entry."""
    asked = {**shape, "chip": chip}
    found = [
        entry for entry in entries(file).get(op, ()) if all(asked.get(key) == value for key, value in entry.items() if key != "blocks")
    ]
    best = max(reversed(found), key=len, default=None)
    return None if best is None else dict(best["blocks"])


@functools.cache
def entries(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The checked entries of a file, by op. Raises ValueError with one line that names the entry and the rule."""
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name}: {error}") from None
    for op, rows in tables.items():
        if not isinstance(rows, list):
            raise ValueError(f"{file.name}: {op}={rows!r}: must be an array of tables, [[{op}]]")
        for number, row in enumerate(rows, 1):
            _check(f"{file.name}: entry {number} of {op}", row)
    return tables


def _check(where: str, row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {row!r}: must be a table")
    blocks = row.get("blocks")
    if not isinstance(blocks, dict) or not blocks or not all(type(size) is int and size > 0 for size in blocks.values()):
        raise ValueError(f"{where}: blocks={blocks!r}: must be a table of integers >= 1, such as {{ block_q = 512 }}")
    if not isinstance(row.get("chip"), str):
        raise ValueError(f"{where}: chip={row.get('chip')!r}: must be the name of a chip, such as 'v6e'")
    for key, value in row.items():
        if key not in ("chip", "blocks") and type(value) not in (int, str):
            raise ValueError(f"{where}: {key}={value!r}: must be an integer or a string")


def save(op: str, chip: str, shape: dict[str, int | str], blocks: dict[str, int], file: Path = FILE) -> None:
    """Writes the entry of exactly these keys to `file`, in place of an older one. Comments at the head of the file stay."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    head = [line for line in text.splitlines() if line.startswith("#")]
    tables = {name: list(rows) for name, rows in (entries(file) if text else {}).items()}
    same = lambda row: {key: value for key, value in row.items() if key != "blocks"} == {"chip": chip, **shape}
    new = {"chip": chip, **shape, "blocks": blocks}
    _check(f"{file.name}: the new entry of {op}", new)
    tables[op] = [row for row in tables.get(op, ()) if not same(row)] + [new]
    lines = head or FILE.read_text(encoding="utf-8").splitlines()[:1]
    for name, rows in tables.items():
        for row in rows:
            lines += ["", f"[[{name}]]", *(f"{key} = {_value(value)}" for key, value in row.items())]
    temporary = file.with_name(file.name + ".new")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(file)
    entries.cache_clear()


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {number}" for key, number in value.items()) + " }"
    return f'"{value}"' if isinstance(value, str) else str(value)
